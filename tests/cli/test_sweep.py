"""`doodl-fast sweep` and `summarise`: methods against other ways to the same pictures, plans, errors."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import doodl_fast
from doodl_fast import cli, shapes
from doodl_fast.cli import options, sweep_runs
from doodl_fast.cli import sweep as sweep_command
from doodl_fast.optimization import one_step, search

PROMPT = "a red star"
OPTIONS = {
    "model": "shapes",
    "guidance": ["clip-text"],
    "steps": 3,
    "guidance_scale": 4,
    "optimization_steps": 2,
    "grad_scale": 50,
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none", "solver": "ddim"},
    "best": {"kind": "best-of", "best_of": 3, "solver": "ddim"},
    "one step": {"kind": "one-step", "one_step_scale": 20, "solver": "ddim"},
    "one step edict": {"kind": "one-step", "one_step_scale": 20, "mix_weight": 0.7},
    "edict": {"mix_weight": 0.7},
    "noise": {"solver": "lcm", "variables": ["start", "noise"]},
}


def write(path: Path, **changes: Any) -> Path:
    """A configuration of one prompt and seed."""
    config = {"prompts": [PROMPT], "seeds": [5], "methods": METHODS, "measures": ["shapes"], "options": OPTIONS}
    path.write_text(json.dumps({**config, **changes}))
    return path


def run(config: Path, out: Path, *more: str) -> int:
    return cli.main(["sweep", str(config), "--out", str(out), "--device", "cpu", *more])


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert cli.main(line) == 2
    (text,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("doodl-fast: error: ")]
    return text


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of all methods, whose networks were loaded once."""
    work = tmp_path_factory.mktemp("sweep")
    loads: list[str] = []
    real_pipeline, real_guide = options.load_pipeline, sweep_runs.load_guide
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(options, "load_pipeline", lambda args: loads.append("pipeline") or real_pipeline(args))
        patch.setattr(sweep_runs, "load_guide", lambda kind, *rest: loads.append(kind) or real_guide(kind, *rest))
        assert run(write(work / "sweep.json"), work / "out") == 0
    assert sorted(loads) == ["clip-text", "pipeline"]
    return work / "out"


def place(out: Path, method: str) -> Path:
    """The folder of a method's run."""
    (found,) = [path for path in (out / "runs").iterdir() if path.name.startswith(method.replace(" ", "-") + "_")]
    return found


def result(out: Path, method: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place(out, method) / "result.json").read_text())
    return found


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def same(path: Path, image: torch.Tensor) -> bool:
    """Whether a file has exactly the pixels of a picture (1, 3, H, W)."""
    return bool((pixels(path) == np.asarray(doodl_fast.ImageTensor(image.detach()).pil()[0])).all())


def chain(solver: Any, **more: Any) -> Any:
    return solver.from_pipeline(shapes.load_pipeline(), PROMPT, num_inference_steps=3, guidance_scale=4, **more)


def guide() -> Any:
    return doodl_fast.guidance.ClipText(*shapes.load_clip(), PROMPT)


def test_an_optimisation_is_that_of_the_run_command(out: Path, tmp_path: Path) -> None:
    line = ["run", "--model", "shapes", "--prompt", PROMPT, "--guidance", "clip-text", "--steps", "3", "--seed", "5"]
    line += ["--guidance-scale", "4", "--optimization-steps", "2", "--grad-scale", "50", "--mix-weight", "0.7"]
    assert cli.main([*line, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    alone = json.loads((tmp_path / "run" / "result.json").read_text())
    ours = result(out, "edict")
    assert ours["losses"] == [*alone["losses"], alone["final_loss"]] and ours["loss_best"] == alone["best_loss"]
    for name in ("before.png", "after.png", "best.png"):
        assert (place(out, "edict") / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


def test_without_guidance_it_is_the_picture_of_diffusers(out: Path) -> None:
    pipe = shapes.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    theirs = pipe(PROMPT, num_inference_steps=3, guidance_scale=4.0, latents=noise).images[0]
    ours = pixels(place(out, "none") / "after.png")
    assert np.abs(ours - np.asarray(theirs.convert("RGB")).astype(int)).max() <= 1
    found = result(out, "none")
    assert found["distance"] == 0 and found["loss_before"] == found["loss_after"]
    verdict = shapes.judge(Image.open(place(out, "none") / "after.png").convert("RGB"), PROMPT)
    assert found["measures"] == {"right": float(verdict.correct), "score": verdict.score}


def test_the_best_of_many_is_that_of_search(out: Path) -> None:
    ddim = chain(doodl_fast.DDIM)
    found = search(ddim, ddim.noise(seed=5), ddim.decode, guide(), best_of=3, seed=5)
    ours = result(out, "best")
    assert ours["losses"] == found.losses and ours["best_step"] == found.best
    assert same(place(out, "best") / "after.png", found.images[0])
    assert (place(out, "best") / "before.png").read_bytes() == (place(out, "none") / "after.png").read_bytes()


@pytest.mark.parametrize(("method", "solver"), [("one step", "DDIM"), ("one step edict", "EDICT")])
def test_one_step_guidance_is_that_of_the_library(out: Path, method: str, solver: str) -> None:
    made = chain(getattr(doodl_fast, solver), **({"mix_weight": 0.7} if solver == "EDICT" else {}))
    ends = one_step(made, made.noise(seed=5), made.decode, guide(), 20.0)
    with torch.no_grad():
        after, before = made.decode(ends[0]), made.decode(made(made.noise(seed=5))[0])
    folder = next(p for p in (out / "runs").iterdir() if p.name.startswith(method.replace(" ", "-") + "_"))
    assert same(folder / "after.png", after) and same(folder / "before.png", before)
    assert (folder / "after.png").read_bytes() != (folder / "before.png").read_bytes()


def test_noise_of_the_steps_is_optimised(out: Path) -> None:
    lcm = chain(doodl_fast.LCM)
    generator = torch.Generator().manual_seed(5)
    start = lcm.noise(generator=generator)
    lcm.step_noise = lcm.draw_noise(start, generator=generator)
    torch.manual_seed(5)
    expected = doodl_fast.optimize(
        lcm, start, lcm.decode, guide(), 2, grad_scale=50.0, seed=5, variables=["start", "noise"], progress=False
    )
    assert result(out, "noise")["losses"] == [*expected.losses, expected.final_loss]
    assert same(place(out, "noise") / "after.png", expected.images[0])


def test_what_is_in_the_folder(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in out.iterdir()} - {"results.parquet", "summary.json"}
    assert names == {"contact_sheet.png", "gallery.html", "results.csv", "runs", "sweep.json", "timings.csv"}
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == list(METHODS) and {row["status"] for row in rows} == {"done"}
    assert {row["guide"] for row in rows} == {"clip-text"}
    assert cli.main(["summarise", str(out), "--baseline", "none", "--columns", "loss_after"]) == 0
    said = capsys.readouterr().out
    assert "6 of 6 runs are done" in said and "## loss after" in said and "less none" in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["baseline"] == "none" and len(summary["summary"]) == 6


def test_a_finished_sweep_is_not_done_again_and_grows(out: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run(out.parent / "sweep.json", out) == 0
    assert {path: path.read_bytes() for path in before} == before
    # More seeds in a copy of it: the runs that are there are kept.
    import shutil

    shutil.copytree(out, tmp_path / "copy")
    kept = place(tmp_path / "copy", "none")
    seen = (kept / "result.json").stat().st_mtime_ns
    methods = {"none": METHODS["none"]}
    more = write(tmp_path / "more.json", seeds=[5, 6], methods=methods)
    assert run(more, tmp_path / "copy", "--change-plan") == 0
    assert (kept / "result.json").stat().st_mtime_ns == seen
    with open(tmp_path / "copy" / "results.csv", newline="") as file:
        assert [(row["seed"], row["status"]) for row in csv.DictReader(file)] == [("5", "done"), ("6", "done")]


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path / "sweep.json", seeds=4)
    assert run(config, tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "24 runs, of which 0 are done" in said and "4 seeds: 0, 1, 2, 3" in said
    assert re.search(r"shapes, fp32, 3 steps: .* of weights, .* at least, .* with checkpointed steps", said)
    assert not (tmp_path / "out").exists()


def test_the_configuration_may_be_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]
    for text in ('prompts=["a red star"]', "seeds=3", 'methods=["none", "ddim"]', 'guides=["symmetry"]'):
        line += ["--set", text]
    assert cli.main([*line, "--set", "options.model=shapes", "--set", "options.steps=4"]) == 0
    assert "6 runs" in capsys.readouterr().out


def broken(image: torch.Tensor, prompt: str, given: Any) -> float:
    """A measure that fails for one prompt."""
    if prompt == PROMPT:
        raise RuntimeError("no such picture")
    return float(image.mean())


def test_a_failed_run_is_said_and_can_be_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_runs, "_shapes", broken)
    config = write(
        tmp_path / "sweep.json", prompts=[PROMPT, "a blue star"], methods={"none": {"kind": "none", "solver": "ddim"}}
    )
    assert run(config, tmp_path / "out") == sweep_command.SOME_FAILED
    said = capsys.readouterr().out
    assert "RuntimeError: no such picture" in said and "1 runs failed; --retry-failed does them again" in said
    monkeypatch.undo()
    assert run(config, tmp_path / "out") == sweep_command.SOME_FAILED
    assert run(config, tmp_path / "out", "--retry-failed") == 0


def test_own_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_measures.py").write_text(
        "def about(image, prompt, options):\n    return {'size': image.shape[-1], 'steps_asked': options['steps']}\n"
    )
    monkeypatch.chdir(tmp_path)
    config = write(tmp_path / "sweep.json", methods={"none": METHODS["none"]}, measures=["own_measures:about"])
    assert run(config, tmp_path / "out") == 0
    assert result(tmp_path / "out", "none")["measures"] == {"size": 64.0, "steps_asked": 3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["frobnicate"]}, "CONFIG: method 'frobnicate'.*invalid choice: 'frobnicate'"),
        ({"methods": {"a": {"best_of": 3}}}, "best_of: expected kind best-of with it, got optimize; omit it"),
        ({"methods": {"a": {"kind": "best-of"}}}, "best_of: expected a whole number of at least 1, got None"),
        ({"methods": {"a": {"kind": "magic"}}}, "kind: expected one of optimize, none, best-of, one-step, got 'magic'"),
        (
            {"methods": {"a": {"kind": "one-step", "solver": "lcm"}}},
            "solver: expected one whose steps are a schedule's",
        ),
        ({"methods": {"a": {"kind": "one-step", "one_step_scale": "x"}}}, "one_step_scale: expected a finite number"),
        ({"methods": {"a": {"variables": "start"}}}, "variables: expected a list of names"),
        ({"methods": {"a": {"patience": 0}}}, "patience: expected a whole number of at least 1"),
        ({"settings": {"a": {"brightness": 3}}}, "expected an option of `doodl-fast run` or one of .*'brightness'"),
        ({"settings": {"a": {"seed": 3}}}, "'seed' belongs under seeds"),
        ({"settings": {"a": {"device": "cpu"}}}, "'device' belongs on the command line, as --device"),
        ({"settings": {"a": {"tied": 3}}}, "tied: expected true or false, got 3"),
        ({"settings": {"a": {"momentum": [1, 2]}}}, "momentum: expected one value, got the list"),
        ({"settings": {"a": {"momentum": "much"}}}, "CONFIG: .*argument --momentum: invalid float value: 'much'"),
        ({"settings": {"a": {"momentum": 2}}}, "CONFIG: .*momentum: expected a number in"),
        ({"settings": {"a": {"height": 33}}}, "height: expected a positive multiple of"),
        ({"settings": {"a": {"label": "x"}}}, "--label: expected --guidance classifier or segmentation with it"),
        ({"measures": ["beauty"]}, "measures: expected 'shapes' or MODULE:FUNCTION, got 'beauty'"),
        ({"measures": ["no_such:thing"]}, "measures: cannot import 'no_such'"),
        ({"options": {**OPTIONS, "model": "/nowhere"}}, "model: the folder '/nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path / "sweep.json", **changes)
    assert re.search(
        message, refused(["sweep", str(config), "--out", str(tmp_path / "out"), "--device", "cpu"], capsys)
    )
    assert not (tmp_path / "out").exists()


def test_options_reach_a_run_as_they_are_written() -> None:
    from doodl_fast.cli.sweep_options import namespace
    from doodl_fast.sweep import expand

    given = {
        **OPTIONS,
        "clip_grad_value": None,
        "tied": False,
        "nesterov": True,
        "no_renormalize": True,
        "first_image_only": False,
        "perturbation_scale": -0.0,
        "option": ["clip_skip=1"],
        "memory": 3,
        "learning_rate": 2.5,
    }
    del given["grad_scale"]
    args = namespace(expand({"prompts": ["- a dog"], "seeds": [9], "options": given}).runs[0], "cpu")
    assert (args.prompt, args.seed, args.device) == ("- a dog", 9, "cpu")
    assert (args.clip_grad_value, args.tied, args.nesterov, args.renormalize) == (None, False, True, False)
    assert (args.first_image_only, args.option, args.memory, args.learning_rate) == (False, ["clip_skip=1"], 3, 2.5)


def test_ranks_choose_devices_and_where_to_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `accelerate launch` and torchrun set them."""
    assert sweep_command.find_device("cpu") == "cpu" and sweep_command.find_device(None) is None
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep_command.find_device(None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert sweep_command.find_device(None) == "cuda:1" and sweep_command.find_device("cuda:3") == "cuda:3"
    runs: Any = tuple(range(8))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert sweep_command._rotated(runs) == [6, 7, 0, 1, 2, 3, 4, 5]
    monkeypatch.delenv("RANK")
    assert sweep_command._rotated(runs) == list(runs)
