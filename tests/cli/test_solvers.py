"""`--solver` of `run`, `invert` and `generate`: every solver, its options, and what is stored of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image
from test_cli_run import refused

import doodl_fast
from doodl_fast import cli, shapes
from doodl_fast.cli import edit, solvers
from doodl_fast.cli import run as run_command
from doodl_fast.optimization import loop

CLASSES = {
    "edict": doodl_fast.EDICT,
    "ddim": doodl_fast.DDIM,
    "bdia": doodl_fast.BDIA,
    "obelm": doodl_fast.OBELM,
    "rex": doodl_fast.Rex,
    "sampler": doodl_fast.Sampler,
    "dpm-solver": doodl_fast.DPMSolver,
    "unipc": doodl_fast.UniPC,
    "lcm": doodl_fast.LCM,
}


def run(out: Path, *more: str, model: Path | str = "shapes") -> list[str]:
    line = ["run", "--model", str(model), "--prompt", "a red circle", "--guidance", "symmetry", "--steps", "3"]
    return [*line, "--optimization-steps", "1", "--device", "cpu", "--out", str(out), *more]


def stopped_at_the_loop(line: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `run` hands to `optimize`."""
    seen: dict[str, Any] = {}

    def spy(chain: Any, latents: Any, decode: Any, loss: Any, steps: int, **options: Any) -> Any:
        seen.update(chain=chain, latents=latents, decode=decode)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "optimize", spy)
    assert cli.main(line) == 130
    return seen


# run


@pytest.mark.parametrize("name", CLASSES)
def test_every_solver_optimises(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert cli.main(run(out, "--solver", name, "--learning-rate", "100")) == 0
    stored = json.loads((out / "run.json").read_text())
    assert stored["solver"] == name
    assert stored["mix_weight"] == (0.93 if name == "edict" else None)
    assert stored["gamma"] == (1.0 if name == "bdia" else None)
    assert (stored["scheme"], stored["zeta"]) == (("midpoint", 0.999) if name == "rex" else (None, None))
    result = json.loads((out / "result.json").read_text())
    assert len(result["losses"]) == 1 and result["final_loss"] != result["losses"][0]
    assert len(result["pair_losses"][0]) == (2 if name == "edict" else 1)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("ddim", "DDIMScheduler"),
        ("dpm-solver", "DPMSolverMultistepScheduler"),
        ("unipc", "UniPCMultistepScheduler"),
        ("lcm", "LCMScheduler"),
    ],
)
def test_the_first_picture_is_the_pipelines_own(
    name: str, scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is diffusers' pipeline with the scheduler of that name."""
    import diffusers

    seen = stopped_at_the_loop(
        run(tmp_path / "out", "--solver", name, "--seed", "5", "--guidance-scale", "4"), monkeypatch
    )
    pipeline = shapes.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    assert type(seen["chain"]) is CLASSES[name]
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(seen["latents"].shape, generator=generator)  # The latents come before LCM's own noise.
    assert torch.equal(drawn, seen["latents"])
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "generator": generator}
    own = pipeline("a red circle", latents=drawn, **options).images
    with torch.no_grad():
        ours = seen["chain"](seen["latents"])[0]
    assert float((ours - own).norm() / own.norm()) < 1e-5


def noisy_model(tmp_path: Path) -> Path:
    """A tiny pipeline whose own scheduler adds noise in every step."""
    from diffusers import EulerAncestralDiscreteScheduler

    pipeline = tiny_pipeline.stable_diffusion(tmp_path / "words")
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "noisy")
    return tmp_path / "noisy"


def test_noise_of_the_steps_follows_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is diffusers' pipeline, which draws the latents and then the steps' noise from one generator."""
    model = noisy_model(tmp_path)
    line = run(tmp_path / "out", "--solver", "sampler", model=model)
    seen = [stopped_at_the_loop([*line, "--seed", seed], monkeypatch) for seed in ("5", "5", "6")]
    noises = [torch.stack([entry["latents"], *entry["chain"].step_noise]) for entry in seen]
    assert len(noises[0]) > 2 and torch.equal(noises[0], noises[1]) and not torch.equal(noises[0], noises[2])
    pairs = [(a, b) for a in range(len(noises[0])) for b in range(a)]
    assert not any(torch.equal(noises[0][a], noises[0][b]) for a, b in pairs)

    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    own = pipeline("a red circle", num_inference_steps=3, generator=generator, output_type="latent").images
    with torch.no_grad():
        (ours,) = seen[0]["chain"](seen[0]["latents"])
    assert float((ours - own).norm() / own.norm()) < 1e-4


def test_a_noisy_run_is_resumed_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy_model(tmp_path)
    more = ("--solver", "sampler", "--learning-rate", "100", "--optimization-steps", "2")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main(run(whole, *more, model=model)) == 0
    real = run_command._Writer.__call__

    def interrupted(self: Any, info: Any) -> None:
        real(self, info)
        if info.step == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_command._Writer, "__call__", interrupted)
    assert cli.main(run(broken, *more, model=model)) == 130
    monkeypatch.undo()
    assert cli.main(run(broken, *more, "--resume", model=model)) == 0
    results = [json.loads((out / "result.json").read_text()) for out in (whole, broken)]
    assert results[0]["losses"] == results[1]["losses"] and results[0]["final_loss"] == results[1]["final_loss"]


def test_another_solver_does_not_continue_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(run(out, "--solver", "bdia", "--gamma", "0.5")) == 0
    for more, message in (
        (("--solver", "edict"), "had --solver 'bdia', got 'edict'"),
        (("--solver", "bdia"), "had --gamma 0.5, got 1.0"),
    ):
        assert message in refused(run(out, "--resume", *more), capsys)
    assert cli.main(run(out, "--resume", "--solver", "bdia", "--gamma", "0.5", "--optimization-steps", "2")) == 0


def test_a_run_from_before_there_were_solvers_is_edict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(run(out)) == 0
    stored = json.loads((out / "run.json").read_text())
    del stored["solver"], stored["gamma"]
    (out / "run.json").write_text(json.dumps(stored))
    assert "had --solver 'edict', got 'ddim'" in refused(run(out, "--resume", "--solver", "ddim"), capsys)
    assert cli.main(run(out, "--resume", "--optimization-steps", "2")) == 0


BAD = [
    (["--solver", "ddim", "--mix-weight", "0.9"], "--mix-weight: expected --solver edict with it, got --solver ddim"),
    (["--gamma", "0.5"], "--gamma: expected --solver bdia with it, got --solver edict"),
    (["--solver", "bdia", "--gamma", "0"], "gamma: expected a number in (0, 1], got 0.0"),
    (["--solver", "bdia", "--gamma", "nan"], "gamma: expected a number in (0, 1], got nan"),
    (["--solver", "unipc", "--no-tied"], "--no-tied: expected --solver edict with it, got --solver unipc"),
    (["--solver", "obelm", "--first-image-only"], "--first-image-only: expected --solver edict with it"),
    (["--solver", "ddim", "--memory", "reversible"], "--memory: expected checkpoint, naive or auto with --solver ddim"),
    (["--solver", "sampler", "--memory", "3"], "--memory: expected checkpoint, naive or auto with --solver sampler"),
    (["--solver", "ddim", "--zeta", "0.9"], "--zeta: expected --solver rex with it, got --solver ddim"),
    (["--scheme", "rk4"], "--scheme: expected --solver rex with it, got --solver edict"),
    (["--solver", "rex", "--zeta", "1.5"], "zeta: expected a number in (0, 1], got 1.5"),
    (["--solver", "rex", "--scheme", "rk5"], "argument --scheme: invalid choice: 'rk5'"),
    (["--solver", "lcm", "--memory", "2"], "--memory: expected checkpoint, naive or auto with --solver lcm"),
    (["--solver", "heun"], "argument --solver: invalid choice: 'heun'"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_lines(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(run(tmp_path / "out", *more), capsys)
    assert not any(tmp_path.iterdir())


# invert and generate


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    scene = shapes.Scene(shapes.Prompt.parse("a red circle"), (shapes.Object("red", "disc", 32, 30, 13),))
    Image.fromarray(shapes.render(scene)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def invert(picture: Path, *more: str) -> list[str]:
    line = ["invert", str(picture), "--model", "shapes", "--prompt", "a red circle", "--steps", "5", "--device", "cpu"]
    return [*line, "--out", str(picture.parent / "state"), *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


@pytest.mark.parametrize(
    "more",
    [
        ("--solver", "bdia"),
        ("--solver", "bdia", "--gamma", "0.7", "--steps", "6", "--arithmetic", "exact64"),
        ("--solver", "obelm"),
        ("--solver", "obelm", "--steps", "4", "--strength", "1"),
        ("--solver", "rex"),
        ("--solver", "rex", "--scheme", "rk4", "--zeta", "0.9", "--steps", "4"),
    ],
    ids=" ".join,
)
def test_there_and_back_bit_for_bit(
    more: tuple[str, ...], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With even and odd numbers of steps, as the latent that holds the picture depends on it."""
    out = tmp_path / "state"
    assert cli.main(invert(picture, *more)) == 0
    settings = json.loads((out / "invert.json").read_text())["settings"]
    assert settings["solver"] == more[1] and settings["mix_weight"] is None
    assert np.abs(pixels(out / "encoded.png") - pixels(picture)).mean() < 10  # the VAE's error: it is the same picture
    assert ("|x - y| / |x| =" if more[1] == "rex" else "|y| / |x| =") in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--solver", more[1]]) == 0
    assert "came back bit for bit" in capsys.readouterr().out
    assert (out / "reconstruction.png").read_bytes() == (out / "encoded.png").read_bytes()
    assert cli.main(["generate", str(out), "--prompt", "a blue circle"]) == 0
    assert capsys.readouterr().out.startswith("edited: ")
    assert not np.array_equal(pixels(out / "edit.png"), pixels(out / "encoded.png"))


def test_folders_from_before_there_were_solvers_are_edicts(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "state"
    assert cli.main(invert(picture)) == 0
    index = json.loads((out / "invert.json").read_text())
    assert index["settings"]["solver"] == "edict"
    del index["settings"]["solver"], index["settings"]["gamma"]
    (out / "invert.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert cli.main(["generate", str(out)]) == 0
    assert "came back bit for bit" in capsys.readouterr().out
    said = refused(["generate", str(out), "--solver", "bdia"], capsys)
    assert "was inverted with edict, got bdia; omit it, or invert the picture again with --solver bdia" in said


def test_damaged_solver_settings(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "state"
    assert cli.main(invert(picture, "--solver", "bdia")) == 0
    index = json.loads((out / "invert.json").read_text())
    for name, value in {"solver": "ddim", "gamma": 0.0, "mix_weight": "x"}.items():
        (out / "invert.json").write_text(json.dumps(index | {"settings": index["settings"] | {name: value}}))
        assert f"{name} is {value!r}" in refused(["generate", str(out)], capsys)
    for value in (None, 0.5):
        (out / "invert.json").write_text(json.dumps(index | {"settings": index["settings"] | {"gamma": value}}))
        assert ("gamma is None" if value is None else "by a chain with another") in refused(
            ["generate", str(out)], capsys
        )


def test_what_invert_refuses(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--solver", "ddim"), "argument --solver: invalid choice: 'ddim'"),
        (("--solver", "obelm", "--gamma", "0.5"), "--gamma: expected --solver bdia with it, got --solver obelm"),
        (("--solver", "bdia", "--gamma", "0.01", "--steps", "40"), "BDIA divides a latent by gamma in every step"),
        (("--solver", "lcm"), "argument --solver: invalid choice: 'lcm'"),
    ):
        assert message in refused(invert(picture, *more), capsys)
        assert not (tmp_path / "state").exists()


def test_damaged_settings_of_rex(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "state"
    assert cli.main(invert(picture, "--solver", "rex", "--steps", "2")) == 0
    index = json.loads((out / "invert.json").read_text())
    for name, value in {"scheme": "rk5", "zeta": None}.items():
        (out / "invert.json").write_text(json.dumps(index | {"settings": index["settings"] | {name: value}}))
        assert f"{name} is {value!r}" in refused(["generate", str(out)], capsys)
    del index["settings"]["scheme"], index["settings"]["zeta"]
    (out / "invert.json").write_text(json.dumps(index))
    assert "scheme is None" in refused(["generate", str(out)], capsys)


def test_what_to_do_when_rex_overflows() -> None:
    settings = {"solver": "rex", "zeta": 0.5, "arithmetic": "exact"}
    said = edit.advice(settings, SimpleNamespace(schedule=range(10)))  # type: ignore[arg-type]
    assert "Rex divides a latent by zeta in every step, here 1e+03 times" in said
    assert said.endswith("a --zeta nearer to 1, or --arithmetic exact64")


def test_every_solver_has_its_class() -> None:
    from doodl_fast.solvers.runge_kutta import SCHEMES

    assert tuple(SCHEMES) == solvers.SCHEMES
    assert {name: solvers.solver_class(name) for name in solvers.SOLVERS} == CLASSES
