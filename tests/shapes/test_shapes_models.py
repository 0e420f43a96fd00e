"""The embedded models that come with the package: their formats, the quality of pictures, and guidance."""

from __future__ import annotations

import json
import random

import pytest
import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.diffusion.pipeline import initial_latents
from doodl_fast.guidance import Classifier, ClipText
from doodl_fast.shapes import evaluate
from doodl_fast.shapes.scenes import pixels


@pytest.fixture(scope="module")
def pipeline():
    return shapes.load_pipeline()


def test_weights_are_small_fp16_safetensors_in_the_usual_folders() -> None:
    from safetensors import safe_open

    files = [path for path in shapes.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in shapes.WEIGHTS.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            dtypes = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
        assert "F16" in dtypes and dtypes <= {"F16", "I64"}
    index = json.loads((shapes.WEIGHTS / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert index["text_encoder"][1] == "CLIPTextModel"
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]


def test_pictures_of_one_object_are_right(pipeline) -> None:
    """A bad model fails on this sample. `python -m doodl_fast.shapes.evaluate` measures the quality."""
    wanted = random.Random(1).sample(list(shapes.prompts(1)), 20)
    assert evaluate.share_right(pipeline, wanted) >= 0.8


def test_pictures_of_two_objects_are_right(pipeline) -> None:
    """The relation must be right as well. Half of all pictures are right by chance."""
    wanted = random.Random(2).sample(list(shapes.prompts(2)), 24)
    assert evaluate.share_right(pipeline, wanted) >= 0.75


def test_training_makes_the_tokenizer_that_is_shipped(pipeline, tmp_path) -> None:
    from doodl_fast.shapes.training.tokenizer import make_tokenizer

    captions = [str(prompt) for prompt in shapes.prompts(2)]
    vocabularies = []
    for build in ("a", "b", "c"):
        tokenizer = make_tokenizer(tmp_path / build)
        vocabularies.append(tokenizer.get_vocab())
        assert tokenizer(captions).input_ids == pipeline.tokenizer(captions).input_ids
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]


def test_vae_keeps_what_is_in_a_picture(pipeline) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    scenes = [shapes.sample(rng, held_out=True) for _ in range(30)]
    images = pixels(np.stack([shapes.render(scene) for scene in scenes]))
    decoder = doodl_fast.Decoder(pipeline.vae)
    with torch.no_grad():
        rebuilt = decoder(decoder.encode(images))
    assert sum(shapes.judge(i, s.prompt).correct for i, s in zip(rebuilt, scenes, strict=True)) >= 28
    assert -10 * torch.log10(((rebuilt - images) / 2).square().mean()) > 30  # dB


def test_classifier_tells_varieties_apart() -> None:
    assert evaluate.classifier_accuracy(100) >= 0.9


def test_clip_binds_attributes_to_objects() -> None:
    """Half of the answers are right by chance."""
    preferences = evaluate.clip_preferences(60)
    assert len(preferences) == 7
    assert min(preferences.values()) >= 0.9


@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_guidance_lowers_its_loss(pipeline, kind: str) -> None:
    prompt = "a red star"
    cond, uncond, extra = doodl_fast.encode_prompt(pipeline, prompt)
    schedule = doodl_fast.Schedule.from_scheduler(pipeline.scheduler, 6)
    chain = doodl_fast.EDICT(doodl_fast.Denoiser(pipeline.unet, cond, uncond, 3.0, **extra), schedule, 0.7)
    if kind == "clip":
        loss = ClipText(*shapes.load_clip(), "a blue star")
    else:
        loss = Classifier(*shapes.load_classifier(), "4-pointed star")
    result = doodl_fast.optimize(
        chain,
        initial_latents(pipeline, seed=1),
        doodl_fast.Decoder(pipeline.vae),
        loss,
        6,
        grad_scale=10.0,
        clip_grad_value=1e-2,
        progress=False,
    )
    assert result.best_loss < 0.9 * result.losses[0]


def test_prompts_in_other_words_are_tokenized(pipeline) -> None:
    ids = pipeline.tokenizer("a zebra, 42 <unknown>!").input_ids
    assert len(ids) > 4 and all(0 <= i < len(pipeline.tokenizer) for i in ids)


def test_missing_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(shapes, "WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="embedded weights are missing; reinstall doodl-fast, or train them"):
        shapes.load_clip()
