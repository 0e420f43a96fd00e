"""Every mistake on a command line ends in exit code 2 and one line, before a model is loaded, and leaves nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_cli_run import refused

from doodl_fast import cli
from doodl_fast.cli import errors, options

RUN = ["run", "--model", "shapes", "--prompt", "a dog", "--guidance", "symmetry", "--out", "out"]
TEXT = ["run", "--model", "shapes", "--prompt", "a dog", "--guidance", "clip-text", "--out", "out"]
IMAGE = ["run", "--model", "shapes", "--prompt", "a dog", "--guidance", "clip-image", "--out", "out"]
CLASS = ["run", "--model", "shapes", "--prompt", "a dog", "--guidance", "classifier", "--out", "out"]
INVERT = ["invert", "a.png", "--model", "shapes", "--prompt", "a dog", "--out", "out"]
PROFILE = ["profile", "--out", "out"]
NOT_UTF8 = os.fsdecode(b"\xff")

BAD = [
    ([*RUN, "--height", "100000000"], "argument --height: expected at most 32768"),
    ([*INVERT, "--width", "100000000"], "argument --width: expected at most 32768"),
    ([*PROFILE, "--batch", "99999999999"], "argument --batch: expected at most 65536"),
    ([*RUN, "--variant", "fp16"], "--variant: expected none, as the embedded model has no variants, got 'fp16'"),
    ([*PROFILE, "--batch", "0"], "batch: expected an int of at least 1"),
    ([*PROFILE, "--estimate", "sd15", "--resolution", "99999999"], "argument --resolution: expected at most 32768"),
    ([*RUN, "--height", "33"], "height: expected a positive multiple of 4 (the VAE's scale factor), got 33"),
    ([*RUN, "--width", "-64"], "width: expected a positive multiple of 4"),
    ([*INVERT, "--height", "33"], "height: expected a positive multiple of 4"),
    ([*PROFILE, "--resolution", "33"], "resolution: expected a positive multiple of 4"),
    ([*RUN, "--model", "org/name", "--height", "0"], "height: expected a positive number of pixels, got 0"),
    ([*RUN, "--steps", "0"], "num_inference_steps: expected an int from 1 to 1000 (the training timesteps), got 0"),
    ([*RUN, "--steps", "1001"], "num_inference_steps: expected an int from 1 to 1000"),
    ([*INVERT, "--steps", "0"], "num_inference_steps: expected an int from 1 to 1000"),
    ([*RUN, "--model", "org/name", "--steps", "0"], "num_inference_steps: expected an int of at least 1, got 0"),
    ([*PROFILE, "--steps", "4", "1001"], "--steps: expected an int from 1 to 1000"),
    (["drift", "--out", "out", "--steps", "4", "1001"], "--steps: expected an int from 1 to 1000"),
    (["drift", "--out", "out", "--steps", "0"], "--steps: expected numbers of at least 1, got 0"),
    (["demo", "--out", "out", "--steps", "0"], "--steps: expected an int from 1 to 1000 (the training timesteps)"),
    (["demo", "--out", "out", "--optimization-steps", "0"], "num_optimization_steps: expected an int of at least 1"),
    ([*RUN, "--guidance-scale", "inf"], "guidance_scale: expected a finite number, got inf"),
    ([*INVERT, "--guidance-scale", "nan"], "guidance_scale: expected a finite number, got nan"),
    (["drift", "--out", "out", "--guidance-scale", "nan"], "guidance_scale: expected a finite number, got nan"),
    ([*RUN, "--mix-weight", "0"], "mix_weight: expected a number in (0, 1], got 0.0"),
    ([*PROFILE, "--mix-weight", "2"], "mix_weight: expected a number in (0, 1], got 2.0"),
    (["drift", "--out", "out", "--mix-weight", "nan"], "mix_weight: expected a number in (0, 1], got nan"),
    ([*RUN, "--memory", "none"], "memory: expected one of"),
    ([*RUN, "--seed", "99999999999999999999"], "argument --seed: expected at most"),
    ([*RUN, "--memory", "auto", "--memory-budget", "99999999999999999999"], "memory_budget: expected"),
    ([*RUN, "--memory", "auto", "--memory-budget", "٣GiB"], "memory_budget: expected"),
    ([*PROFILE, "--memory-budget", "٣GiB"], "memory_budget: expected"),
    ([*RUN, "--memory-budget", "1GiB"], "--memory-budget: expected --memory auto with it"),
    ([*RUN, "--steps", "٣"], "argument --steps: invalid int value: '٣'"),
    ([*RUN, "--learning-rate", "1e308"], "learning_rate: expected"),
    ([*RUN, "--grad-scale", "1e308"], "grad_scale, formerly learning_rate: expected"),
    ([*RUN, "--perturbation-scale", "1e308"], "perturbation_scale: expected"),
    ([*RUN, "--optimization-steps", "0"], "num_optimization_steps: expected an int of at least 1"),
    ([*RUN, "--model", "~nobody/foo"], "model: the folder '~nobody/foo' does not exist"),
    ([*INVERT, "--model", "~nobody/foo"], "model: the folder '~nobody/foo' does not exist"),
    ([*RUN, "--variant", ""], "argument --variant: expected a text, got an empty one"),
    ([*RUN, "--out", ""], "argument --out: expected a text, got an empty one"),
    ([*PROFILE, "--out", ""], "argument --out: expected a text, got an empty one"),
    (["drift", "--out", ""], "argument --out: expected a text, got an empty one"),
    (["demo", "--out", ""], "argument --out: expected a text, got an empty one"),
    ([*INVERT, "--out", ""], "argument --out: expected a text, got an empty one"),
    ([*RUN, "--out", NOT_UTF8], "expected arguments in UTF-8, got '\\udcff'"),
    ([*PROFILE, "--against", ","], "--against: expected some of naive, checkpoint, reference=DIR, got ''"),
    ([*PROFILE, "--against", "naive,naive"], "--against: expected every name once"),
    (
        [*RUN, "--label", "star"],
        "--label: expected --guidance classifier or segmentation with it, got --guidance symmetry",
    ),
    ([*RUN, "--guidance-prompt", "a cat"], "--guidance-prompt: expected --guidance clip-text or text-score or"),
    ([*RUN, "--guidance-image", "a.png"], "--guidance-image: expected --guidance clip-image with it"),
    (
        [*RUN, "--guidance-model", "x/y"],
        "--guidance-model: expected --guidance clip-text or clip-image or",
    ),
    ([*RUN, "--num-cutouts", "0"], "--num-cutouts: expected --guidance clip-text or clip-image or aesthetic with it"),
    ([*TEXT, "--direction", "vertical"], "--direction: expected --guidance symmetry with it"),
    ([*CLASS, "--cut-power", "0.3", "--label", "1"], "--cut-power: expected --guidance clip-text or clip-image"),
    ([*TEXT, "--cut-power", "inf"], "--cut-power: expected a positive finite number, got inf"),
    ([*TEXT, "--num-cutouts", "-1"], "--num-cutouts: expected at least 0, got -1"),
    ([*TEXT, "--num-cutouts", "9999999999"], "argument --num-cutouts: expected at most 100000"),
    ([*TEXT, "--guidance-prompt", " "], "prompt: expected a text"),
    ([*TEXT, "--guidance-model", "./none"], "guidance model: the folder './none' does not exist"),
    ([*TEXT, "--guidance-model", "~nobody/foo"], "guidance model: the folder '~nobody/foo' does not exist"),
    ([*IMAGE, "--guidance-image", "none.png"], "--guidance-image: the file 'none.png' does not exist"),
    ([*IMAGE, "--guidance-image", "bomb.png"], "--guidance-image: the file 'bomb.png' has too many pixels"),
    ([*IMAGE, "--guidance-image", "pipe"], "is a pipe"),
    ([*CLASS, "--label", "zebra", "--guidance-model", "classes"], "label: 'zebra' is not one of the model's 2 classes"),
    ([*CLASS, "--label", ""], "argument --label: expected a text"),
    (["invert", "bomb.png", *INVERT[2:]], "the file 'bomb.png' has too many pixels"),
    (["invert", "pipe", *INVERT[2:]], "is a pipe"),
    (["generate", ""], "argument STATE: expected a text, got an empty one"),
    ([*RUN, "--option", "x"], "argument --option: expected NAME=VALUE, got 'x'"),
    ([*RUN, "--option", "a=1", "--option", "a=2"], "--option: expected a once, got it twice"),
    ([*INVERT, "--option", "height=3"], "--option: height has an option of its own"),
    ([*RUN, "--option", "image=none.png"], "image: the file 'none.png' does not exist"),
    ([*RUN, "--num-frames", "99999999"], "argument --num-frames: expected at most 65536"),
    ([*RUN[:3], *RUN[5:]], "--prompt: expected a text, which says what the picture shows, got none"),
    ([*INVERT[:4], *INVERT[6:]], "--prompt: expected a text, which says what the picture shows, got none"),
    ([*PROFILE, "--resolution", "32", "--width", "32"], "--resolution: expected none beside --height and --width"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a picture, a picture of too many pixels, a pipe, and a classifier's config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    Image.new("RGB", (8, 8), "red").save("a.png")
    Image.new("RGB", (40, 40), "red").save("bomb.png")
    os.mkfifo("pipe")
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "config.json").write_text(json.dumps({"id2label": {"0": "star", "1": "disc"}}))
    return tmp_path


def loads(*_: Any) -> Any:
    raise AssertionError("a model was loaded before the command line was refused")


@pytest.mark.parametrize(("line", "message"), BAD, ids=[ascii(" ".join(line)) for line, _ in BAD])
def test_one_line_nothing_loaded_nothing_left(
    line: list[str], message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from doodl_fast import shapes
    from doodl_fast.diffusion import pipeline

    for module, name in ((shapes, "load_pipeline"), (pipeline, "load_pipeline"), (shapes, "load_clip")):
        monkeypatch.setattr(module, name, loads)
    before = sorted(folder.rglob("*"))
    assert message in refused(line, capsys)
    assert sorted(folder.rglob("*")) == before


DAMAGED = ["[]", "{", "1", "null", "[" * 100_000, '{"prompt": 1}']


@pytest.mark.parametrize("content", DAMAGED, ids=[content[:9] for content in DAMAGED])
def test_damaged_run_json(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text(content)
    assert "--resume: " in refused([*RUN, "--resume"], capsys)
    assert (folder / "out" / "run.json").read_text() == content


@pytest.mark.parametrize("content", [*DAMAGED, '{"settings": [], "weights": 1, "report": []}'])
def test_damaged_invert_json(content: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "invert.json").write_text(content)
    assert "is damaged" in refused(["generate", str(folder)], capsys)


# Mistakes and bugs


def failing(error: BaseException) -> Any:
    def load(args: Any) -> Any:
        raise error

    return load


@pytest.mark.parametrize("error", [TypeError("internal"), RuntimeError("internal"), ValueError("internal")])
def test_a_bug_is_a_traceback_and_exit_1(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a ValueError, if it comes from code that is not of this package."""
    monkeypatch.setattr(options, "load_pipeline", failing(error))
    assert cli.main(RUN) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "internal" in said and "this is a bug" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to allocate 9"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError("disk full"),
    ],
    ids=lambda error: type(error).__name__ + str(error)[:9],
)
def test_what_the_machine_lacks_is_one_line(
    error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "load_pipeline", failing(error))
    line = refused([*RUN, "--height", "512"], capsys)
    assert ("out of memory with --height 512" in line) != isinstance(error, OSError)


def test_a_missing_backend_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from doodl_fast import ops

    monkeypatch.setattr(options, "load_pipeline", failing(ops.BackendUnavailable("no triton here")))
    assert refused(RUN, capsys).endswith("error: no triton here")


def test_debug_shows_the_traceback_of_a_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*RUN, "--learning-rate", "nan", "--debug"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and said.splitlines()[-1].startswith("doodl-fast: error: grad_scale")


def test_only_a_raise_statement_of_ours_is_a_mistake() -> None:
    def caught(text: str, name: str) -> bool:
        try:
            exec(compile(text, name, "exec"), {"__name__": name})
        except ValueError as error:
            return errors.is_raised_here(error.__traceback__)
        raise AssertionError("nothing was raised")

    assert caught("raise ValueError('prompt: expected a text')", "doodl_fast.made_up")
    assert not caught("a, b = 1, 2, 3", "doodl_fast.made_up")
    assert not caught("int('x')", "doodl_fast.made_up")
    assert not caught("raise ValueError('theirs')", "doodl_faster")
    assert not errors.is_raised_here(None)
