"""`doodl-fast run` with rewards, similarity, segmentation and depth, by local folders and files alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import test_dense
import test_hps
import test_image_reward
import test_similarity
import tiny_pipeline
import torch
from bert_words import bert_words
from conftest import smooth_pictures
from PIL import Image

from doodl_fast import cli, guidance
from doodl_fast.optimization import loop

PROMPT = "a red circle"
LINE = ["run", "--model", "shapes", "--prompt", PROMPT, "--steps", "2", "--optimization-steps", "1"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders clip, words, dino, segformer, dpt; files HPS.pt, ImageReward.pt, target.png."""
    work = tmp_path_factory.mktemp("models")
    for part in tiny_pipeline.clip(work):
        part.save_pretrained(work / "clip")
    torch.save(test_hps.recorded_weights(), work / "HPS.pt")
    torch.save(test_image_reward.recorded_weights(), work / "ImageReward.pt")
    bert_words().save_pretrained(work / "words")
    pairs = {
        "dino": (test_similarity.dino(), test_similarity.processor()),
        "segformer": (test_dense.segmenter(), test_dense.processor("Segformer")),
        "dpt": (test_dense.estimator(), test_dense.processor("DPT")),
    }
    for name, (model, processor) in pairs.items():
        model.save_pretrained(work / name)
        processor.save_pretrained(work / name)
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(work / "target.png")
    return work


def losses_of(line: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The losses that a command line gives to `optimize`."""
    found: dict[str, Any] = {}

    def spy(chain: Any, latents: Any, decode: Any, loss: Any, steps: int, **options: Any) -> Any:
        found["loss"] = loss
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "optimize", spy)
    assert cli.main(line) == 130
    return found["loss"]


CASES: dict[str, tuple[list[str], Any]] = {
    "pick-score": (
        ["--guidance-model", "{clip}"],
        lambda work: guidance.PickScore.from_pretrained(work / "clip", PROMPT),
    ),
    "text-score": (
        ["--guidance-model", "{clip}", "--guidance-processor", "{clip}", "--guidance-prompt", "a star"],
        lambda work: guidance.TextScore.from_pretrained(work / "clip", "a star"),
    ),
    "hpsv2": (
        ["--guidance-model", "{HPS.pt}", "--guidance-processor", "{clip}"],
        lambda work: guidance.HPSv2.from_pretrained(work / "HPS.pt", PROMPT, processor=work / "clip"),
    ),
    "image-reward": (
        ["--guidance-model", "{ImageReward.pt}", "--guidance-processor", "{words}"],
        lambda work: guidance.ImageReward.from_pretrained(work / "ImageReward.pt", PROMPT, processor=work / "words"),
    ),
    "similarity": (
        ["--guidance-model", "{dino}", "--target", "{target.png}", "--look", "patches"],
        lambda work: guidance.Similarity.from_pretrained(work / "dino", work / "target.png", look="patches"),
    ),
    "segmentation": (
        ["--guidance-model", "{segformer}", "--label", "sky"],
        lambda work: guidance.Segmentation.from_pretrained(work / "segformer", "sky"),
    ),
    "depth": (
        ["--guidance-model", "{dpt}", "--target", "{target.png}"],
        lambda work: guidance.Depth.from_pretrained(work / "dpt", work / "target.png"),
    ),
}


def filled(words: list[str], models: Path) -> list[str]:
    """A line with the names of folders and files in braces replaced by their paths."""
    return [re.sub(r"\{(.*?)\}", lambda found: str(models / found[1]), word) for word in words]


@pytest.mark.parametrize("name", CASES)
def test_each_name_stands_for_its_class(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, made = CASES[name]
    found = losses_of([*LINE, "--out", str(tmp_path), "--guidance", name, *filled(options, models)], monkeypatch)
    expected, images = made(models), smooth_pictures(1, 32, 32, 0).clamp(-0.95, 0.95)
    assert type(found) is type(expected)
    assert float(found(images)) == float(expected(images)) != 0


def test_several_with_a_model_each(models: Path, tmp_path: Path) -> None:
    """A whole run, which can be resumed."""
    given = ["--guidance", "text-score:0.1", "pick-score", "similarity", "segmentation:2", "--target", "{target.png}"]
    given += ["--guidance-model", "pick-score={clip}", "similarity={dino}", "segmentation={segformer}"]
    line = filled([*LINE, "--out", str(tmp_path / "out"), *given], models)
    assert cli.main(line) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    history = {name: values[0] for name, values in result["history"].items()}
    assert list(history) == ["text-score", "pick-score", "similarity", "segmentation"]
    expected = 0.1 * history["text-score"] + history["pick-score"] + history["similarity"]
    assert result["losses"][0] == pytest.approx(expected + 2 * history["segmentation"], rel=1e-5)
    assert cli.main([*line[:8], "2", *line[9:], "--resume"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["hpsv2"], '--guidance-model: expected the file "HPS_v2.1_compressed.pt" or a folder with --guidance hpsv2'),
        (["image-reward", "--guidance-model", "{clip}"], '--guidance-model: expected the file "ImageReward.pt" with'),
        (["similarity"], "--target: expected a picture file with --guidance similarity, got none"),
        (["depth", "--target", "{target.png}"], "--guidance-model: expected a model for depth estimation with"),
        (["segmentation", "--guidance-model", "{segformer}"], "--label: expected a class, or a picture as --target"),
        (["segmentation", "--guidance-model", "{segformer}", "--label", "car"], "label: 'car' is not one of"),
        (["similarity", "--target", "no.png"], "--target: .*no.png"),
        (
            ["pick-score", "similarity", "--target", "{target.png}", "--guidance-model", "{clip}"],
            "--guidance-model: expected it with one kind of model alone, or as GUIDE=... for each, got it with",
        ),
        (["pick-score", "--guidance-model", "depth={dpt}"], "--guidance-model: expected --guidance depth with depth="),
        (["pick-score", "--guidance-model", "{clip}", "{dpt}"], "--guidance-model: expected one for each guide, as"),
        (["symmetry", "--look", "whole"], "--look: expected --guidance similarity with it, got --guidance symmetry"),
        (["pick-score", "--guidance-model", "pick-score=./none"], "guidance model: the folder './none' does not exist"),
    ],
)
def test_what_is_refused(
    more: list[str], message: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(filled([*LINE, "--out", str(tmp_path / "out"), "--guidance", *more], models)) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()
