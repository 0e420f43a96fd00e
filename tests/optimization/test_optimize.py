"""The optimisation loop: results, resuming, optimizers, memory, errors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import doodl_fast
from doodl_fast.optimization import checkpoint as runstate

CHILD = Path(__file__).parent / "optimize_child.py"


def problem(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A small chain over a smooth callable, and a loss that wants the picture's mean square at 2."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (torch.randn(4, 4, generator=generator, dtype=torch.float64) / 3).to(DEVICE, dtype)

    def network(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        return torch.tanh(torch.einsum("oc,bc...->bo...", mixing.to(x.dtype), x)) + 0.1 * x

    schedule = doodl_fast.Schedule((800, 600, 400, 200), (0.1, 0.3, 0.6, 0.9), (0.3, 0.6, 0.9, 0.99))
    chain = doodl_fast.EDICT(doodl_fast.Denoiser(network, None), schedule)
    latents = torch.randn(2, 4, 5, 5, generator=generator).to(DEVICE, dtype)
    return {"chain": chain, "latents": latents, "decode": lambda z: 2 * z, "loss": noisy_loss, "progress": False}


def noisy_loss(image: Tensor) -> Tensor:
    """Draws from the global generator, as losses with random cutouts do."""
    return (image.float().square().mean() - 2).square() + 1e-3 * (image * torch.randn_like(image)).mean().float()


def quiet_loss(image: Tensor) -> Tensor:
    return (image.float().square().mean() - 2).square()


def optimize(**changes: Any) -> doodl_fast.Result:
    torch.manual_seed(11)
    arguments = {**problem(), "num_optimization_steps": 4, "grad_scale": 5.0, "clip_grad_value": 0.05, **changes}
    return doodl_fast.optimize(**arguments)


def test_loss_falls_and_result_is_what_it_says() -> None:
    seen: list[doodl_fast.StepInfo] = []
    given = problem()
    latents, before = given["latents"], given["latents"].clone()
    result = optimize(latents=latents, loss=quiet_loss, renormalize_latents=False, callback_on_step_end=seen.append)
    assert torch.equal(latents, before)
    assert len(result.losses) == len(seen) == 4
    assert result.final_loss < result.losses[0]
    assert [info.loss for info in seen] == result.losses
    x0, y0 = given["chain"](*result.latents)
    assert torch.equal(result.images[0], 2 * x0) and torch.equal(result.images[1], 2 * y0)
    assert result.final_loss == pytest.approx(float(quiet_loss(2 * x0) + quiet_loss(2 * y0)) / 2)
    assert torch.equal(result.latents[0], result.latents[1])


def test_best_step_belongs_to_the_lowest_loss() -> None:
    result = optimize(
        loss=quiet_loss, grad_scale=200.0, clip_grad_value=1.5, renormalize_latents=False, num_optimization_steps=6
    )
    everything = [*result.losses, result.final_loss]
    assert result.best_loss == min(everything) and result.best_step == everything.index(min(everything))
    assert result.best_step < 6, "the steps are meant to overshoot here"
    value = sum(float(quiet_loss(image)) for image in result.best_images) / 2
    assert value == pytest.approx(result.best_loss)


@pytest.mark.parametrize(("tied", "renormalize"), [(True, True), (False, True), (False, False)])
def test_ties_and_norms(tied: bool, renormalize: bool) -> None:
    latents = problem()["latents"]
    pair = (latents, latents.flip(-1) * 1.5)
    x, y = optimize(latents=pair, tied_latents=tied, renormalize_latents=renormalize).latents
    assert torch.equal(x, y) is tied
    start = (pair[0] + pair[1]) / 2 if tied else pair[0]
    kept = torch.allclose(x.flatten(1).norm(dim=1), start.flatten(1).norm(dim=1), rtol=1e-5)
    assert kept is renormalize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_updates_are_not_lost_in_half_precision(dtype: torch.dtype) -> None:
    """A step of 1e-4 is below half an ulp of fp16 for latents of 1 or more; in float32 it adds up."""
    given = problem(dtype=dtype)
    seen_dtypes = set()

    def decode(z: Tensor) -> Tensor:
        seen_dtypes.add(z.dtype)
        return 2 * z

    settings = {"clip_grad_value": 1e-4, "perturbation_scale": 0.0, "renormalize_latents": False, "momentum": 0.0}
    result = optimize(**given | {"decode": decode, "loss": quiet_loss}, grad_scale=1e4, **settings)
    assert seen_dtypes == {dtype}
    assert result.latents[0].dtype == torch.promote_types(dtype, torch.float32)
    moved = (result.latents[0] - given["latents"].to(result.latents[0].dtype)).abs()
    assert float(moved.median()) == pytest.approx(4e-4, rel=0.02)


def test_any_torch_optimizer() -> None:
    result = optimize(optimizer=lambda p: torch.optim.Adam(p, lr=0.05), loss=quiet_loss, renormalize_latents=False)
    assert result.final_loss < result.losses[0]
    sgd = {"grad_scale": 3.0, "perturbation_scale": 0.0, "loss": quiet_loss}
    ours = optimize(**sgd)
    theirs = optimize(**sgd, optimizer=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9))
    assert torch.allclose(ours.latents[0], theirs.latents[0], atol=1e-6)


def test_first_image_only_decodes_one_member() -> None:
    decoded = []
    result = optimize(first_image_only=True, decode=lambda z: decoded.append(1) or 2 * z, num_optimization_steps=3)
    assert len(decoded) <= 3 + 2 and all(len(pair) == 1 for pair in result.pair_losses) and len(result.images) == 1


def test_one_decoder_graph_at_a_time() -> None:
    """When the second image is decoded, nothing of the first one's graph is left."""
    alive: list[weakref.ref[Tensor]] = []

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, z: Tensor) -> Tensor:
            kept = 2 * z.detach()
            ctx.kept = kept
            alive.append(weakref.ref(kept))
            return kept.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return 2 * gradient

    def decode(z: Tensor) -> Tensor:
        assert [ref for ref in alive if ref() is not None] == []
        return Layer.apply(z) if torch.is_grad_enabled() else 2 * z

    optimize(decode=decode, num_optimization_steps=2)
    assert len(alive) == 4


def test_callback_can_stop() -> None:
    result = optimize(callback_on_step_end=lambda info: info.step == 1)
    assert len(result.losses) == 2


@pytest.mark.parametrize("adam", [False, True])
def test_resume_is_bit_identical(tmp_path: Path, adam: bool) -> None:
    factory = (lambda p: torch.optim.Adam(p, lr=0.05)) if adam else None
    whole = optimize(num_optimization_steps=6, optimizer=factory)
    optimize(num_optimization_steps=3, optimizer=factory, folder=tmp_path)
    torch.manual_seed(999)  # a new process starts from another random state
    arguments = {**problem(), "grad_scale": 5.0, "clip_grad_value": 0.05, "optimizer": factory}
    resumed = doodl_fast.optimize(**arguments, num_optimization_steps=6, resume=tmp_path)
    assert resumed.losses == whole.losses and resumed.final_loss == whole.final_loss
    assert torch.equal(resumed.latents[0], whole.latents[0]) and torch.equal(
        resumed.best_latents[0], whole.best_latents[0]
    )


def test_killed_run_resumes_bit_identically(tmp_path: Path) -> None:
    """kill -9 in the middle of a run, at whatever point it is; then resume in a fresh process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def child(folder: Path, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CHILD), str(folder), *flags]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    victim = child(tmp_path / "killed", "--slow")
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / runstate.INDEX).exists() and time.monotonic() < deadline:
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    time.sleep(0.15)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    step = runstate.load(tmp_path / "killed")["step"]
    assert 1 <= step < 12, "the run must have been cut in the middle"
    resumed, _ = child(tmp_path / "killed", "--resume").communicate(timeout=300)
    whole, _ = child(tmp_path / "whole").communicate(timeout=300)
    assert resumed == whole and len(whole) > 100


def test_interrupted_save_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runstate.save(tmp_path, {"value": torch.ones(3)}, step=1)
    real = Path.replace

    def dies(self: Path, target: Path) -> Path:
        if Path(target).name == runstate.INDEX:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        runstate.save(tmp_path, {"value": torch.zeros(3)}, step=2)
    assert torch.equal(runstate.load(tmp_path)["value"], torch.ones(3))


def test_state_tree_round_trip(tmp_path: Path) -> None:
    tree = {"a": [1, 2.5, None, "x", True], 3: {"t": torch.arange(4, dtype=torch.uint8)}, "f": 0.1 + 0.2}
    runstate.save(tmp_path, tree, step=7)
    loaded = runstate.load(tmp_path)
    assert loaded["a"] == tree["a"] and loaded["f"] == tree["f"] and torch.equal(loaded[3]["t"], torch.arange(4))
    with pytest.raises(TypeError, match="cannot store set"):
        runstate.save(tmp_path, {"s": {1}}, step=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_optimization_steps": 0}, ValueError, "num_optimization_steps: expected an int of at least 1, got 0"),
        ({"momentum": 1.0}, ValueError, r"momentum: expected a number in \[0, 1\)"),
        ({"grad_scale": -1}, ValueError, "grad_scale, formerly learning_rate: expected"),
        ({"clip_grad_value": 0}, ValueError, "clip_grad_value: expected a positive number, or None"),
        ({"nesterov": True, "momentum": 0.0}, ValueError, "nesterov: expected momentum > 0"),
        ({"latents": torch.ones(1, 4, 2, 2, dtype=torch.int64)}, TypeError, "latents: expected a floating tensor"),
        ({"latents": torch.full((1, 4, 2, 2), float("nan"))}, ValueError, "latents: expected finite values"),
        (
            {"latents": (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 3))},
            ValueError,
            "latents: expected .* alike in shape",
        ),
        ({"latents": (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2).double())}, ValueError, "alike in shape, dtype"),
        (
            {"loss": lambda image: image.mean((1, 2, 3))},
            ValueError,
            "loss: expected a differentiable scalar tensor, got shape",
        ),
        (
            {"loss": lambda image: image.mean().item()},
            ValueError,
            "loss: expected a differentiable scalar tensor, got float",
        ),
        ({"loss": lambda image: image.detach().mean()}, ValueError, "loss: .* without a graph"),
        ({"loss": lambda image: image.mean() / 0 * 0}, FloatingPointError, "loss: expected a finite value, got nan"),
        ({"decode": lambda z: [z]}, TypeError, "decode: expected a function that returns a tensor, got list"),
        ({"optimizer": lambda p: None}, TypeError, "optimizer: expected a factory"),
        ({"resume": True}, ValueError, "resume: expected folder= beside resume=True"),
        ({"resume": "nowhere"}, ValueError, "resume: expected a folder with state.json"),
    ],
)
def test_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimize(**changes)


def test_infinite_gradient_is_named_and_the_state_survives(tmp_path: Path) -> None:
    def loss(image: Tensor) -> Tensor:
        slope = (image.flatten()[0] * 0).sqrt()  # at 0: a finite value with an infinite slope
        stored = any(tmp_path.glob("state-*"))
        return quiet_loss(image) + slope if stored else quiet_loss(image)

    with pytest.raises(FloatingPointError, match="NaN or Inf at optimisation step 1"):
        optimize(loss=loss, folder=tmp_path)
    assert runstate.load(tmp_path)["step"] == 1


def test_resume_refuses_another_run(tmp_path: Path) -> None:
    optimize(folder=tmp_path, num_optimization_steps=2)
    with pytest.raises(ValueError, match="already holds a run; pass resume=True"):
        optimize(folder=tmp_path)
    with pytest.raises(ValueError, match=r"resume: .* had grad_scale=5.0, got 2.0"):
        optimize(resume=tmp_path, grad_scale=2.0)
    with pytest.raises(ValueError, match=r"resume: .* had start="):
        optimize(resume=tmp_path, latents=problem(seed=1)["latents"])
    with pytest.raises(ValueError, match="the saved run used no optimizer"):
        optimize(resume=tmp_path, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    with pytest.raises(ValueError, match=r"resume: .* had seed=0, got 3"):
        optimize(resume=tmp_path, seed=3)
    (tmp_path / runstate.INDEX).write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        optimize(resume=tmp_path)


def test_resume_refuses_another_optimizer(tmp_path: Path) -> None:
    """Loading the stored state into it would have replaced its settings."""
    optimize(folder=tmp_path, num_optimization_steps=2, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    for name, factory in {
        "lr=0.05, got 0.1": lambda p: torch.optim.Adam(p, lr=0.1),
        r"betas=\[0.9, 0.999\], got \[0.5, 0.999\]": lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.5, 0.999)),
        "class='Adam', got 'SGD'": lambda p: torch.optim.SGD(p, lr=0.05),
    }.items():
        with pytest.raises(ValueError, match=f"resume: the saved run's optimizer had {name}"):
            optimize(resume=tmp_path, optimizer=factory)
    same = optimize(resume=tmp_path, optimizer=lambda p: torch.optim.Adam(p, lr=0.05, foreach=False))
    assert len(same.losses) == 4
