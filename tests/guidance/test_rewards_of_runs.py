"""`doodl-fast run` with rewards, similarity, segmentation and depth, by local folders and files alone."""

from __future__ import annotations

import json
import re
import shlex
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
    """Folders clip, words, dino, segformer, dpt; files head.pth, HPS.pt, ImageReward.pt, target.png."""
    work = tmp_path_factory.mktemp("models")
    for part in tiny_pipeline.clip(work):
        part.save_pretrained(work / "clip")
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 1)
    torch.nn.init.constant_(head.bias, 5.0)
    torch.save(head.state_dict(), work / "head.pth")
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
    "aesthetic": (
        ["--guidance-model", "{clip}", "--guidance-head", "{head.pth}"],
        lambda work: guidance.Aesthetic.from_pretrained(work / "clip", work / "head.pth"),
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


DOCS = Path(__file__).parents[2] / "docs" / "rewards.md"
STAND_INS = {
    "PICK_SCORE_FOLDER": "{clip}",
    "HPS_v2.1_compressed.pt": "{HPS.pt}",
    "DINOV2_FOLDER": "{dino}",
    "CLIP_FOLDER": "{clip}",
    "openai/clip-vit-large-patch14": "{clip}",
    "sac+logos+ava1-l14-linearMSE.pth": "{head.pth}",
    "dog.png": "{target.png}",
    "FOLDER": "shapes",
}
"""What takes the place of published models in the commands of the docs."""


def test_the_commands_of_the_docs(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = re.findall(r"^    doodl-fast (run .*(?:\n        .*)*)", DOCS.read_text(), re.MULTILINE)
    assert len(commands) == 2
    for number, command in enumerate(commands):
        words = shlex.split(command.replace("\\\n", " "))
        words[words.index("--out") + 1] = str(tmp_path / str(number))
        for name, stand_in in STAND_INS.items():
            words = [re.sub(rf"(^|=){re.escape(name)}$", rf"\1{stand_in}", word) for word in words]
        losses = losses_of(filled(words, models), monkeypatch)
        assert len(losses) == words.index("--guidance-model" if number else "--target") - words.index("--guidance") - 1


def test_guides_of_one_kind_share_a_model_and_cutouts(models: Path, tmp_path: Path, monkeypatch: Any) -> None:
    more = ["aesthetic:0.5", "clip-text", "--guidance-model", "{clip}", "--guidance-head", "{head.pth}"]
    line = [*LINE, "--out", str(tmp_path), "--guidance", *more, "--num-cutouts", "3", "--cut-power", "0.5"]
    losses = losses_of(filled(line, models), monkeypatch)
    (aesthetic, weight), (text, _) = losses["aesthetic"], losses["clip-text"]
    assert weight == 0.5 and aesthetic.num_cutouts == text.num_cutouts == 3 and aesthetic.cut_power == 0.5
    assert torch.equal(aesthetic.head.bias, torch.tensor([5.0]))


def test_a_head_of_another_model_is_named(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Linear(9, 1).state_dict(), tmp_path / "other.pth")
    more = ["aesthetic", "--guidance-model", "{clip}", "--guidance-head", str(tmp_path / "other.pth")]
    assert cli.main(filled([*LINE, "--out", str(tmp_path / "out"), "--guidance", *more], models)) == 2
    assert "head: expected one for embeddings of 16 features (the model's), got one for 9" in capsys.readouterr().err


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
        (
            ["aesthetic"],
            "--guidance-head: expected the file of a head, .* with --guidance aesthetic, got none",
        ),
        (
            ["aesthetic", "--guidance-head", "no.pth"],
            "--guidance-head: expected the file of a head, .* got no.pth",
        ),
        (["symmetry", "--guidance-head", "{head.pth}"], "--guidance-head: expected --guidance aesthetic with it, got"),
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
