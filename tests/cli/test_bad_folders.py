"""Folders and machines that a command cannot work with: one line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
from PIL import Image
from test_cli_run import refused

from doodl_fast import cli
from doodl_fast.cli import files

RUN = ["run", "--prompt", "a dog", "--guidance", "symmetry", "--steps", "2", "--optimization-steps", "1"]


def run(model: Path | str, out: Path, *more: str) -> list[str]:
    return [*RUN, "--model", str(model), "--device", "cpu", "--out", str(out), *more]


# Models of which a part would be ignored

CONTROL = {"_class_name": "StableDiffusionControlNetXSPipeline", "controlnet": ["diffusers", "ControlNetModel"]}
MOTION = {
    "_class_name": "AnimateDiffVideoToVideoPipeline",
    "unet": ["diffusers", "UNetMotionModel"],
    "motion_adapter": ["diffusers", "MotionAdapter"],
}
COMMANDS = {
    "run": lambda model, out: run(model, out),
    "invert": lambda model, out: [*_invert(out), "--model", str(model)],
    "profile": lambda model, out: ["profile", "--model", str(model), "--steps", "2", "--out", str(out)],
    "drift": lambda model, out: ["drift", "--model", str(model), "--steps", "2", "--out", str(out)],
}


def _invert(out: Path) -> list[str]:
    picture = out.parent / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    return ["invert", str(picture), "--prompt", "a dog", "--out", str(out)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("index", "message"),
    [(CONTROL, "has controlnet, which would be ignored"), (MOTION, "makes videos, which is not supported")],
    ids=["ControlNet", "AnimateDiff"],
)
def test_folders_whose_parts_would_be_ignored(
    index: dict[str, Any], message: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_pipeline.stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "sd")
    whole = json.loads((tmp_path / "sd" / "model_index.json").read_text())
    (tmp_path / "sd" / "model_index.json").write_text(json.dumps(whole | index))
    assert message in refused(COMMANDS[command](tmp_path / "sd", tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


# Runs whose state is damaged

DAMAGED = {
    "half of it": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another object": lambda data: b"{}",
    "no object": lambda data: b"[]",
    "nested too deeply": lambda data: b"[" * 100_000,
    "a changed digit": lambda data: data.replace(b"1", b"2", 1),
    "a path out of the folder": lambda data: data.replace(b'"tensors": "', b'"tensors": "../'),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "out"
    assert cli.main(run("shapes", out)) == 0
    return out


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_state_is_one_line_and_stays(damage: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = finished / "state" / "state.json"
    good = state.read_bytes()
    bad = DAMAGED[damage](good)
    assert bad != good
    state.write_bytes(bad)
    others = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    try:
        said = refused(run("shapes", finished, "--resume", "--optimization-steps", "2"), capsys)
        assert "resume: the state in" in said and "is damaged or foreign" in said
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == others
    finally:
        state.write_bytes(good)
    assert cli.main(run("shapes", finished, "--resume")) == 0


def test_a_state_whose_index_is_lost(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = finished / "state" / "state.json"
    good = state.read_bytes()
    state.unlink()
    try:
        assert "without the state.json that belongs to it" in refused(run("shapes", finished, "--resume"), capsys)
    finally:
        state.write_bytes(good)


# Machines with too little memory

CHILD = """
import resource, sys
import diffusers, matplotlib.figure, transformers
from doodl_fast import cli, shapes

shapes.load_pipeline()
with open("/proc/self/status") as status:
    now = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
resource.setrlimit(resource.RLIMIT_DATA, (now + 2**28,) * 2)
for line in sys.stdin.read().splitlines():
    print(cli.main(line.split()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts what is allocated on Linux alone")
def test_too_little_memory_is_one_line(tmp_path: Path) -> None:
    """The allocator fails in the noise, in the picture, in a batch and within the optimisation."""
    large, out = ["--height", "32768", "--width", "32768"], tmp_path / "out"
    lines = [
        run("shapes", out, *large),
        [*_invert(out), "--model", "shapes", *large],
        ["profile", "--batch", "65536", "--steps", "4", "8", "--out", str(out)],
        run("shapes", out, "--height", "2048", "--width", "2048"),
    ]
    commands = "\n".join(" ".join(word.replace("a dog", "dog") for word in line) for line in lines)
    done = subprocess.run([sys.executable, "-c", CHILD], input=commands, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if line.isdecimal()] == ["2"] * 4, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("doodl-fast: error: ")]
    assert len(said) == 4 and "Traceback" not in done.stderr
    for line, asked in zip(
        said,
        ("--height 32768, --width 32768", "--height 32768", "--batch 65536, --steps 4 8", "--height 2048"),
        strict=True,
    ):
        assert line.startswith(f"doodl-fast: error: out of memory with {asked}") and "; ask for less" in line
    assert not out.exists()


# Results are written as a whole


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["drift", "--steps", "2"], {"drift.json", "drift.png"}),
        (["profile", "--steps", "2", "--repeats", "1"], {"profile.json", "profile.png", "timelines.png"}),
        (["demo", "--steps", "2", "--optimization-steps", "1"], {"contact_sheet.png", "figures.json", "losses.png"}),
    ],
    ids=["drift", "profile", "demo"],
)
def test_results_are_complete_before_they_have_their_names(
    command: list[str], written: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file lies complete under a temporary name while the old one is still there, and then takes its place."""
    out, seen, replace = tmp_path / "out", [], files.os.replace
    out.mkdir()
    for name in written:
        (out / name).write_text("old")

    def watched(old: Any, new: Any) -> None:
        assert Path(new).read_text() == "old" and Path(old).stat().st_size > 100
        seen.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(files.os, "replace", watched)
    assert cli.main([*command, "--out", str(out)]) == 0
    assert sorted(seen) == sorted(written) and {path.name for path in out.iterdir()} == written
