"""Training is apart from use, and its command leads from drawn pictures to model folders that can be loaded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from doodl_fast import shapes
from doodl_fast.diffusion.pipeline import load_pipeline
from doodl_fast.guidance.classifier import load_classifier
from doodl_fast.guidance.clip import load_clip
from doodl_fast.shapes import train
from doodl_fast.shapes.training import data, fit


def test_use_does_not_import_training() -> None:
    code = """
import sys
from doodl_fast import shapes
from doodl_fast.shapes import captions, evaluate, measure, scenes
shapes.load_pipeline(), shapes.load_clip(), shapes.load_classifier()
assert not [name for name in sys.modules if name.startswith("doodl_fast.shapes.train")]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_commands_say_what_they_do(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"doodl_fast.shapes.{command}", "--help"], capture_output=True, text=True, check=True
    )
    assert f"doodl_fast.shapes.{command}" in done.stdout and "options:" in done.stdout


def test_training_writes_models_that_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each stage on a few pictures write models with the networks and files of the ones in the package."""
    for name, recipe in fit.RECIPES.items():
        monkeypatch.setitem(fit.RECIPES, name, dataclasses.replace(recipe, steps=2, batch=4))
    monkeypatch.setattr(data, "CHUNK", 24)
    drawn = data.pictures(tmp_path / "work", count=24, workers=1)
    monkeypatch.setattr(train, "pictures", lambda folder: drawn)
    out = tmp_path / "out"
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(
        sys, "argv", ["train", "--work", str(tmp_path / "work"), "--out", str(out), "--threads", threads]
    )
    train.main()
    assert {path.stem for path in (tmp_path / "work").glob("*.ckpt")} == set(fit.RECIPES)
    made = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    shipped = {path.relative_to(shapes.WEIGHTS) for path in shapes.WEIGHTS.rglob("*") if path.is_file()}
    assert {path for path in made if path.suffix == ".safetensors"} == {
        path for path in shipped if path.suffix == ".safetensors"
    }
    networks = [
        (load_pipeline(out / "pipeline").unet, shapes.load_pipeline().unet),
        (load_clip(out / "clip")[0], shapes.load_clip()[0]),
        (load_classifier(out / "classifier")[0], shapes.load_classifier()[0]),
    ]
    for ours, theirs in networks:
        sizes = [{name: weight.shape for name, weight in each.named_parameters()} for each in (ours, theirs)]
        assert sizes[0] == sizes[1]


def test_training_continues_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that is interrupted and called again ends with the same weights as one that is not interrupted."""
    monkeypatch.setitem(fit.RECIPES, "toy", fit.Recipe(steps=6, batch=2, learning_rate=1e-2, ema=0.5))
    monkeypatch.setattr(fit, "SECONDS_BETWEEN_CHECKPOINTS", 0)

    def trained(work: Path, stop: int | None = None) -> torch.Tensor:
        work.mkdir(exist_ok=True)
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def loss(chosen: np.ndarray, step: int) -> torch.Tensor:
            if step == stop:
                raise KeyboardInterrupt
            return module(torch.randn(2, 3) + torch.from_numpy(chosen)[:, None]).square().mean()

        return fit.fit("toy", work, module, np.arange(8), loss).weight

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=3)
    assert torch.equal(trained(tmp_path / "parts"), whole)
    assert torch.load(tmp_path / "parts" / "toy.ckpt", weights_only=True)["step"] == 6


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train", "--work", "work", "unet", "sound"])
    with pytest.raises(SystemExit):
        train.main()
    assert "expected one of text, vae, unet, clip, classifier, export, got 'sound'" in capsys.readouterr().err
