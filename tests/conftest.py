"""What the tests of the chain share: the recorded numbers, tiny networks, ways to count and compare.

`DOODL_FAST_TEST_DEVICE=cuda` puts them, and with them the tests of the ops, the chain and the optimisation, on a GPU.
Random numbers are drawn on the CPU all the same.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from safetensors.torch import load_file
from torch import Tensor, nn

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.frozen import level
from doodl_fast.solvers.edict import EDICT

GOLDEN = Path(__file__).parent / "golden"
BACKENDS = ("eager", "native", "triton")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
MEMORIES = ("checkpoint", 1, 3, "reversible")
MEMORY_MODES: dict[str, dict[str, Any]] = {
    "checkpoint": {"memory": "checkpoint"},
    "every two steps": {"memory": 2},
    "reversible": {"memory": "reversible"},
    "naive": {"memory": "naive"},
    "auto": {"memory": "auto", "memory_budget": "1GiB"},
    "exact": {"memory": "reversible", "arithmetic": "exact64"},
}
"""Every way to keep what a gradient needs, as options of a chain."""
DEVICE = torch.device(os.environ.get("DOODL_FAST_TEST_DEVICE", "cpu"))

settings.register_profile("doodl", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("doodl")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton's interpreter runs the kernels on the CPU.
if DEVICE.type == "cuda":  # The tolerances are those of fp32, and some tests compare bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
torch.set_num_threads(1)  # With models this tiny, more threads only wait for each other.


@pytest.fixture
def lean_small_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has lean layers used for tensors of any size, as those of tests are tiny."""
    for name in ("SMALL", "SMALL_NORM", "SMALL_QUERY"):
        monkeypatch.setattr(level, name, 0)


@cache
def golden(name: str) -> dict[str, Tensor]:
    """Returns the tensors of one recorded file. They are shared, so clone one before changing it."""
    return {key: value.to(DEVICE) for key, value in load_file(GOLDEN / f"{name}.safetensors").items()}


@cache
def golden_meta(stage: str) -> dict[str, Any]:
    """Returns the numbers and settings that were recorded beside the tensors of one stage."""
    meta: dict[str, Any] = json.loads((GOLDEN / "manifest.json").read_text())["stages"][stage]["meta"]
    return meta


def relative(actual: Tensor, expected: Tensor) -> float:
    """Returns |actual - expected| / |expected| in the 2-norm, computed in float64."""
    assert actual.shape == expected.shape
    expected = expected.detach().double()
    return float((actual.detach().double() - expected).norm() / expected.norm())


@cache
def golden_unet(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Returns the recorded diffusers UNet. It is shared, so its mode and its flags must not be changed."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(**json.loads((GOLDEN / "unet_config.json").read_text())).to(DEVICE)
    weights = {key[5:]: value for key, value in golden("models").items() if key.startswith("unet/")}
    unet.load_state_dict(weights)
    if DEVICE.type != "cpu":
        unet.time_proj = TimestepsOfTheCpu(unet.time_proj)
    return unet.to(dtype).eval()


class TimestepsOfTheCpu(nn.Module):
    """Embeds timesteps as a network of diffusers does on the CPU, on any device.

    diffusers computes sines and cosines in float32 whatever the network's dtype, and those of a GPU differ from the
    CPU's by 1e-7. Whole timesteps are looked up in a table, which needs no copy to the CPU.
    """

    def __init__(self, embed: nn.Module, count: int = 1000) -> None:
        super().__init__()
        self.embed = embed
        self.table = embed(torch.arange(count)).to(DEVICE)

    def forward(self, t: Tensor) -> Tensor:
        index = t.long().clamp(0, len(self.table) - 1)
        return torch.where((index == t)[:, None], self.table.to(t.device)[index], self.embed(t))


def golden_denoiser(dtype: torch.dtype, guidance_scale: float = 7.5, vjp_dtype: Any = None) -> Denoiser:
    """Returns a denoiser of the recorded UNet, with VJPs in the UNet's own dtype unless vjp_dtype says otherwise."""
    models = golden("models")
    cond, uncond = models["embedding_conditional"].to(dtype), models["embedding_unconditional"].to(dtype)
    return Denoiser(golden_unet(dtype), cond, uncond, guidance_scale, vjp_dtype=vjp_dtype)


def sd_scheduler(**changes: Any) -> Any:
    """Returns a DDIM scheduler with Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    return DDIMScheduler(**{**options, "set_alpha_to_one": False, **changes})


def recorded_schedule(scheduler: str, steps: int) -> Schedule:
    """Returns a schedule of the alphas that the reference used."""
    table = {key: golden("schedule")[f"{scheduler}/T{steps}/{key}"].tolist() for key in ("t", "alpha", "alpha_prev")}
    return Schedule(tuple(int(t) for t in table["t"]), tuple(table["alpha"]), tuple(table["alpha_prev"]))


class TinyNet(nn.Module):
    """A smooth network for latents of any rank, called as `(x, t, cond)`."""

    def __init__(self, channels: int = 3, features: int = 4, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        width = 6
        self.inside = nn.Parameter(torch.randn(width, channels, generator=generator) / channels**0.5)
        self.outside = nn.Parameter(torch.randn(channels, width, generator=generator) / width**0.5)
        self.project = nn.Parameter(torch.randn(width, features, generator=generator) / features**0.5)
        self.to(DEVICE)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        hidden = torch.einsum("hc,bc...->bh...", self.inside, x) + t.to(x.dtype) / 1000
        if cond is not None:
            added = torch.einsum("hf,blf->bh", self.project, cond) / cond.shape[1]
            hidden = hidden + added.reshape(*added.shape, *[1] * (x.ndim - 2))
        if shift is not None:
            hidden = hidden + shift.reshape(-1, *[1] * (x.ndim - 1))
        return torch.einsum("ch,bh...->bc...", self.outside, torch.tanh(hidden))


class DependsOnGradMode(TinyNet):
    """A network whose values depend on grad mode, as those of some kernels do."""

    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args) * (1.01 if torch.is_grad_enabled() else 1)


class Counting(nn.Module):
    """A network that records each call: (batch size, with a graph?)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: list[tuple[int, bool]] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((x.shape[0], torch.is_grad_enabled() and x.requires_grad))
        return self.network(x, t, cond)


def conditions(batch: int = 1, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Returns cond and uncond for TinyNet."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, batch, 5, 4, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return both[0].clone(), both[1].clone()


def latents(
    *shape: int, dtype: torch.dtype = torch.float64, seed: int = 2, grad: bool = False
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    return both[0].clone().requires_grad_(grad), both[1].clone().requires_grad_(grad)


def randn(*shape: int, seed: int = 0, **options: Any) -> Tensor:
    """Returns standard normal numbers in float64, on the CPU."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **options)


def smooth_pictures(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Returns pictures (batch, 3, height, width) in [-1, 1] that are neither noise nor constant."""
    coarse = torch.rand(batch, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return F.interpolate(coarse, (height, width), mode="bilinear")


def tiny_chain(
    steps: int = 4,
    memory: str | int = "checkpoint",
    guidance_scale: float = 3.0,
    prediction_type: str = "epsilon",
    network: Callable[..., Any] | None = None,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> EDICT:
    """Returns EDICT on a tiny network, guided unless guidance_scale is 1, with VJPs in the network's own dtype."""
    cond, uncond = conditions(dtype=dtype)
    network = TinyNet().to(dtype) if network is None else network
    denoiser = Denoiser(network, cond, uncond, guidance_scale, vjp_dtype=None)
    schedule = Schedule.from_scheduler(sd_scheduler(prediction_type=prediction_type), steps)
    return EDICT(denoiser, schedule, memory=memory, **options)


def weights_of(outputs: tuple[Tensor, ...], seed: int = 3) -> list[Tensor]:
    """Returns the weights of the loss of `pull`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device) for out in outputs]


def pull(outputs: tuple[Tensor, Tensor], inputs: list[Tensor], seed: int = 3) -> tuple[Tensor, ...]:
    """Returns the gradients of a fixed random linear loss that weighs both outputs differently."""
    weights = weights_of(outputs, seed)
    loss = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(loss, inputs, retain_graph=True)  # Conditions may have a graph of their own.


def pickled(value: Any) -> Any:
    """Returns an object after it was pickled and unpickled."""
    return pickle.loads(pickle.dumps(value))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend of the operators, which is chosen for the length of a test."""
    from ops_cases import require

    from doodl_fast import ops

    require(request.param)
    with ops.backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Stable Diffusion XL pipeline."""
    import tiny_pipeline

    return tiny_pipeline.stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny CLIP model and its processor."""
    import tiny_pipeline

    return tiny_pipeline.clip(tmp_path_factory.mktemp("clip"))
