"""`doodl-fast run`, on tiny pipelines in real formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from PIL import Image

from doodl_fast import cli
from doodl_fast.cli import files
from doodl_fast.cli import run as run_command
from doodl_fast.optimization import loop as doodl

FILES = {"before.png", "after.png", "best.png", "losses.png", "result.json", "run.json", "state"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders: sd, clip, classifier."""
    work = tmp_path_factory.mktemp("models")
    tiny_pipeline.stable_diffusion(work / "words").save_pretrained(work / "sd")
    model, processor = tiny_pipeline.clip(work / "words")
    model.save_pretrained(work / "clip")
    processor.save_pretrained(work / "clip")
    tiny_pipeline.classifier().save_pretrained(work / "classifier")
    return work


def command(models: Path, out: Path, *more: str, guidance: str = "symmetry", steps: int = 2) -> list[str]:
    line = ["run", "--model", str(models / "sd"), "--prompt", "a dog", "--guidance", guidance, "--steps", "2"]
    line += ["--height", "32", "--width", "64", "--optimization-steps", str(steps), "--device", "cpu"]
    return [*line, "--out", str(out), *more]


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a bad command line ends in."""
    capsys.readouterr()
    assert cli.main(line) == 2
    lines = [text for text in capsys.readouterr().err.splitlines() if "doodl-fast" in text]
    assert len(lines) == 1
    assert lines[0].startswith("doodl-fast: error: ")
    return lines[0]


def test_a_run_writes_pictures_losses_and_state(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main(command(models, out, "--save-every", "2", "--learning-rate", "100", steps=3)) == 0
    assert {path.name for path in out.iterdir()} == FILES | {"step_000.png", "step_002.png"}
    result = json.loads((out / "result.json").read_text())
    assert len(result["losses"]) == 3 and result["final_loss"] < result["losses"][0]
    assert result["best_loss"] == min(*result["losses"], result["final_loss"])
    assert result["options"]["prompt"] == "a dog" and result["options"]["learning_rate"] == 100
    for name in ("before", "after", "best", "step_002"):
        assert Image.open(out / f"{name}.png").size == (64, 32)
    assert (out / "before.png").read_bytes() == (out / "step_000.png").read_bytes() != (out / "after.png").read_bytes()


def test_the_options_reach_the_loop(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(chain: Any, latents: Any, decode: Any, loss: Any, steps: int, **options: Any) -> Any:
        seen.update(options, chain=chain, latents=latents, steps=steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(doodl, "optimize", spy)
    more = ["--momentum", "0.5", "--nesterov", "--clip-grad-value", "none", "--perturbation-scale", "0", "--no-tied"]
    more += ["--no-renormalize", "--first-image-only", "--mix-weight", "0.8", "--memory", "3", "--guidance-scale", "2"]
    assert cli.main(command(models, tmp_path / "out", *more, "--seed", "7", "--dtype", "bf16", steps=9)) == 130
    expected = {
        "steps": 9,
        "grad_scale": 1.0,
        "momentum": 0.5,
        "nesterov": True,
        "clip_grad_value": None,
        "tied_latents": False,
        "renormalize_latents": False,
        "perturbation_scale": 0,
        "first_image_only": True,
        "seed": 7,
        "resume": False,
    }
    assert {key: seen[key] for key in expected} == expected
    chain = seen["chain"]
    assert (chain.mix_weight, chain.memory, chain.denoiser.guidance_scale, len(chain.schedule)) == (0.8, 3, 2, 2)
    assert chain.denoiser.unet.dtype == torch.bfloat16 and seen["latents"].dtype == torch.float32
    assert seen["latents"].shape == (1, 4, 4, 8)


def test_a_resumed_run_is_the_uninterrupted_one(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--guidance-model", str(models / "clip"), "--num-cutouts", "2", "--learning-rate", "10")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main(command(models, whole, *more, guidance="clip-text", steps=3)) == 0

    real = run_command._Writer.__call__

    def interrupted(self: Any, info: Any) -> None:
        real(self, info)
        if info.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_command._Writer, "__call__", interrupted)
    assert cli.main(command(models, broken, *more, guidance="clip-text", steps=3)) == 130
    assert "doodl-fast: interrupted; the same command with --resume continues" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (broken / "result.json").exists()
    assert cli.main(command(models, broken, *more, "--resume", guidance="clip-text", steps=3)) == 0
    results = [json.loads((out / "result.json").read_text()) for out in (whole, broken)]
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["final_loss"] == results[1]["final_loss"]
    for name in ("before.png", "after.png", "best.png", "step_001.png", "step_002.png"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()


def test_a_taken_folder_is_left_as_it_is(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(command(models, out, "--resume", steps=1)) == 0  # nothing there: begins
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "already holds a run" in refused(command(models, out, steps=1), capsys)
    other = refused(command(models, out, "--resume", "--guidance-scale", "3", steps=1), capsys)
    assert "--resume: the run in" in other and "--guidance-scale 7.5, got 3.0" in other
    (out / "run.json").unlink()
    assert "--resume: expected run.json" in refused(command(models, out, "--resume", steps=1), capsys)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == {
        path: data for path, data in before.items() if path.name != "run.json"
    }


def test_a_lost_state_is_not_begun_anew(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that was killed in its first step begins anew; one whose state was lost would be overwritten."""
    line = command(models, tmp_path / "run")
    assert cli.main(line) == 0
    shutil.rmtree(tmp_path / "run" / "state")
    before = (tmp_path / "run" / "result.json").read_bytes()
    assert "no state/state.json, without which the run cannot be continued" in refused([*line, "--resume"], capsys)
    assert (tmp_path / "run" / "result.json").read_bytes() == before
    for name in ("after.png", "best.png", "losses.png", "result.json", "step_001.png"):
        (tmp_path / "run" / name).unlink()
    assert cli.main([*line, "--resume"]) == 0


@pytest.mark.parametrize("guidance", ["clip-text", "clip-image", "classifier"])
def test_every_guide(models: Path, tmp_path: Path, guidance: str) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    more = {
        "clip-text": ["--guidance-model", str(models / "clip"), "--guidance-prompt", "a cat"],
        "clip-image": ["--guidance-model", str(models / "clip"), "--guidance-image", str(tmp_path / "red.png")],
        "classifier": ["--guidance-model", str(models / "classifier"), "--label", "blue circle"],
    }[guidance]
    assert cli.main(command(models, tmp_path / "out", *more, guidance=guidance, steps=1)) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["losses"][0] > 0 and result["options"]["guidance"] == guidance


BAD = [
    (["--steps", "0"], "num_inference_steps: expected an int from 1 to 1000"),
    (["--optimization-steps", "0"], "num_optimization_steps: expected an int of at least 1"),
    (["--height", "33"], "height: expected a positive multiple of 8"),
    (["--width", "-8"], "width: expected a positive multiple of 8"),
    (["--mix-weight", "0"], "mix_weight: expected a number in (0, 1]"),
    (["--learning-rate", "nan"], "learning_rate: expected"),
    (["--clip-grad-value", "-1"], "clip_grad_value: expected"),
    (["--clip-grad-value", "much"], "argument --clip-grad-value: invalid"),
    (["--memory", "none"], "memory: expected one of"),
    (["--guidance-scale", "inf"], "guidance_scale: expected a finite number"),
    (["--save-every", "0"], "--save-every: expected at least 1"),
    (["--model", "/nowhere/at/all"], "model: the folder '/nowhere/at/all' does not exist"),
    (["--guidance", "beauty"], "argument --guidance: invalid choice"),
    (["--guidance", "classifier"], "--label: expected a class's name or index"),
    (["--guidance", "classifier", "--label", "x"], "--guidance-model: expected an image classifier"),
    (["--guidance", "classifier", "--label", "x", "--guidance-model", "CLASSIFIER"], "label: 'x' is not one of"),
    (["--guidance", "clip-image"], "--guidance-image: expected one or more files"),
    (["--guidance", "clip-image", "--guidance-image", "none.png", "--guidance-model", "CLIP"], "does not exist"),
    (["--guidance", "clip-text", "--guidance-model", "./none"], "guidance model: the folder './none' does not exist"),
    (["--guidance", "clip-text", "--guidance-prompt", "", "--guidance-model", "CLIP"], "prompt: expected a text"),
    (["--frobnicate"], "unrecognized arguments: --frobnicate"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    places = {"CLASSIFIER": str(models / "classifier"), "CLIP": str(models / "clip")}
    more = [places.get(word, word) for word in more]
    assert message in refused(command(models, tmp_path / "out", *more), capsys)
    assert not any(tmp_path.iterdir())


def test_a_file_in_the_way_a_missing_gpu_and_no_command(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    assert "--out: expected a folder, got the file" in refused(command(models, tmp_path / "file"), capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device: expected a CUDA device" in refused(command(models, tmp_path / "o", "--device", "cuda"), capsys)
    assert "required: COMMAND" in refused([], capsys)
    assert "required: --model" in refused(["run"], capsys)


def test_help_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys; from doodl_fast import cli\ntry: cli.main(['run', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--clip-grad-value" in done.stdout


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"old": 1})

    def broken(partial: Path) -> None:
        partial.write_text('{"new"')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.replace(path, broken)
    assert json.loads(path.read_text()) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
