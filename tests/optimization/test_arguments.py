"""Arguments that cannot work are refused by name, and former names go on working with a warning."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimize import optimize, problem, quiet_loss

import doodl_fast
from doodl_fast.optimization.update import LatentUpdate

ZERO = torch.cat([torch.ones(1, 4, 5, 5), torch.zeros(1, 4, 5, 5)])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"decode": 1}, TypeError, r"decode: expected a function .*, got int; pass doodl_fast.Decoder\(pipe"),
        ({"loss": 3}, TypeError, "loss: expected a function from images to a scalar tensor, or a list .*, got int"),
        ({"chain": "EDICT"}, TypeError, r"chain: expected a function \(x, y\) -> \(x0, y0\), got str"),
        ({"callback_on_step_end": 1}, TypeError, "callback_on_step_end: expected a function of one StepInfo"),
        ({"latents": None}, TypeError, "latents: expected a floating tensor or a pair of them, got NoneType"),
        ({"optimizer": "adam"}, TypeError, "optimizer: expected a factory .*, got str"),
        ({"scheduler": 3}, TypeError, "scheduler: expected a factory such as .*, got int"),
        ({"scheduler": lambda o: o}, TypeError, "scheduler: expected a factory that returns an LRScheduler"),
        ({"patience": 0}, ValueError, "patience: expected an int of at least 1, got 0"),
        ({"min_delta": -1}, ValueError, "min_delta: expected a finite number of at least 0, got -1"),
        ({"best_of": 0}, ValueError, "best_of: expected an int of at least 1, got 0"),
        (
            {"grad_scale": 1e308},
            ValueError,
            r"grad_scale, formerly .*: expected a number in \[0, 3.4e\+38\], got 1e\+3",
        ),
        ({"perturbation_scale": 1e308}, ValueError, r"perturbation_scale: expected a number in \[0, 1e\+37\], got 1e"),
        ({"tied_latents": "no"}, TypeError, "tied_latents: expected True or False, got 'no'"),
        ({"nesterov": None}, TypeError, "nesterov: expected True or False, got None"),
        ({"seed": "a"}, TypeError, "seed: expected an int, got str"),
        ({"seed": 2**64}, ValueError, "seed: expected an int of 64 bits, got 18446744073709551616"),
        ({"generator": 5}, TypeError, "generator: expected a torch.Generator or None, got int"),
        ({"latents": ZERO}, ValueError, "latents: expected a positive norm .* got 0.0 for sample 1 of the mean of x"),
        ({"latents": (ZERO + 1, ZERO), "tied_latents": False}, ValueError, "got 0.0 for sample 1 of y"),
        ({"latents": (ZERO + 1, -ZERO - 1)}, ValueError, "got 0.0 for sample 0 of the mean of x and y"),
    ],
)
def test_refused(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    """Nothing has been written when an argument is refused."""
    with pytest.raises(error, match=message):
        optimize(folder=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"folder": ""}, ValueError, "folder: expected the path of a folder, got an empty text"),
        ({"resume": ""}, ValueError, "resume: expected the path of a folder, got an empty text"),
        ({"folder": 5}, TypeError, "folder: expected the path of a folder, got int"),
    ],
)
def test_what_is_no_path_is_refused(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty text would store the run in the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        optimize(**changes)
    assert not list(tmp_path.iterdir())


def test_latents_of_norm_zero_need_no_renormalisation() -> None:
    result = optimize(latents=ZERO.to(problem()["latents"]), renormalize_latents=False, loss=quiet_loss)
    assert bool(torch.isfinite(result.latents[0]).all())


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"grad_scale": 3e38, "clip_grad_value": None}, "grad_scale"), ({"optimizer": "sgd"}, "optimizer")],
)
def test_an_update_that_overflows_blames_the_right_argument(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    if name == "optimizer":
        changes = {"optimizer": lambda p: torch.optim.SGD(p, lr=3e38), "grad_scale": 1e4, "clip_grad_value": None}
    with pytest.raises(FloatingPointError, match=f"{name}: the updated latents hold NaN or Inf"):
        optimize(folder=tmp_path / "run", loss=quiet_loss, renormalize_latents=False, **changes)
    assert not (tmp_path / "run" / "state.json").exists()


def test_noise_that_overflows_blames_the_perturbation() -> None:
    x = torch.ones(1, 2)
    settings = doodl_fast.UpdateSettings(perturbation_scale=1e37, renormalize_latents=False)
    update = LatentUpdate(x, x, settings, torch.Generator())
    object.__setattr__(settings, "perturbation_scale", 1e39)
    with pytest.raises(FloatingPointError, match="perturbation_scale: the updated latents"):
        update.step(x, x)


def test_former_names_work_with_a_warning() -> None:
    seen: list[doodl_fast.StepInfo] = []
    given = {key: value for key, value in {**problem(), "clip_grad_value": 0.05}.items() if key != "loss"}
    with pytest.warns(DeprecationWarning, match="is now called") as caught:
        former = doodl_fast.optimize(
            **given, loss=quiet_loss, num_optimization_steps=2, learning_rate=7.0, callback=seen.append
        )
    said = " ".join(str(w.message) for w in caught)
    assert "learning_rate is now called grad_scale" in said and "callback is now called callback_on_step_end" in said
    assert {Path(w.filename).name for w in caught} == {"test_arguments.py"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        now = doodl_fast.optimize(**given, loss=quiet_loss, num_optimization_steps=2, grad_scale=7.0)
    assert former.losses == now.losses and torch.equal(former.latents[0], now.latents[0]) and len(seen) == 2
    with pytest.raises(TypeError, match="learning_rate: expected only grad_scale=, its new name, got both"):
        doodl_fast.optimize(**given, loss=quiet_loss, learning_rate=1.0, grad_scale=1.0)


def test_former_name_of_the_settings() -> None:
    with pytest.warns(DeprecationWarning, match="learning_rate is now called grad_scale"):
        settings = doodl_fast.UpdateSettings(learning_rate=3.0)
    assert settings == doodl_fast.UpdateSettings(3.0) and settings.grad_scale == 3
    assert replace(settings, momentum=0.5).as_dict()["grad_scale"] == 3
    with pytest.warns(DeprecationWarning, match="now called grad_scale"):
        assert settings.learning_rate == 3
