"""What the tests of the operators share: operands in every dtype and layout, float64 results, and the tolerances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import BACKENDS as BACKENDS
from conftest import DEVICE, DTYPES
from torch import Tensor

from doodl_fast import ops

# How far a result may be from the float64 truth, in units in the last place *of the sum of the terms' magnitudes* (an
# ulp of the result itself would be unfair where terms cancel). Provenance: half an ulp for the one rounding to the
# output's dtype, plus 2^-24 (2^-53 for fp64) for each rounding of the arithmetic: at most 12 (coefficients 7, products
# and sums of coupling + mixing on the longest path), so 12 * 0.5 ulp where output and arithmetic share a dtype, and 12
# * 2^-24 of an fp16 (2^-10) or bf16 (2^-7) ulp elsewhere. fp16's results below 2^-14 are subnormal: 2^-25 absolute.
ULP_BOUND = {torch.float16: 0.501, torch.bfloat16: 0.501, torch.float32: 6.5, torch.float64: 6.5}
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}

STATE_EPS = [(state, eps) for state in DTYPES for eps in DTYPES]

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z.contiguous(),
    "channels_last": lambda z: z.contiguous(memory_format=torch.channels_last),
    "transposed": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda z: torch.stack([z, z], -1)[..., 1],
    "flipped batch in memory": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
}
# Odd sizes end in the middle of a vector, of a block, or of what one thread computes.
SHAPES = [(1, 1), (3, 7), (2, 3, 5, 7), (1, 4, 16, 33), (2, 4, 2, 9, 11), (1, 1031), (2, 0, 4), (0, 4)]


def require(backend: str, device_type: str = DEVICE.type) -> None:
    """Skips a test, with the reason, if a backend cannot compute on the device of the tests, or on another one."""
    reason = ops.why_not(backend, device_type)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def operands(
    shape: tuple[int, ...], state: str, eps: str, guided: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns target, source and eps, whose entries have very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    batch = (2 * shape[0] if guided else shape[0], *shape[1:])

    def draw(size: tuple[int, ...], dtype: str) -> Tensor:
        value = torch.randn(size, generator=generator, dtype=torch.float64)
        return (value * torch.randn(size, generator=generator, dtype=torch.float64).exp()).to(DEVICE, DTYPES[dtype])

    return draw(shape, state), draw(shape, state), draw(batch, eps)


def check(got: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """Compares a result with the float64 one, whose terms have this sum of magnitudes, within the table's bound."""
    assert got.shape == truth.shape
    bound = ULP_BOUND[got.dtype] * torch.finfo(got.dtype).eps * magnitude + SMALLEST[got.dtype]
    error = (got.double() - truth).abs()
    assert bool((error <= bound).all()), f"off by up to {float((error / bound).max()):.3g} of the bound"


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Returns whether two tensors have the same bits, strides and dtype. All NaNs count as equal."""
    if got.dtype != want.dtype or got.shape != want.shape or got.stride() != want.stride():
        return False
    nan = torch.isnan(want)
    zeros = torch.signbit(got[want == 0]) == torch.signbit(want[want == 0])
    return torch.equal(torch.isnan(got), nan) and torch.equal(got[~nan], want[~nan]) and bool(zeros.all())


class Linear:
    """A float64 value, and the sum of the magnitudes of its terms, which its error is compared with."""

    def __init__(self, value: Tensor, magnitude: Tensor | None = None) -> None:
        self.value = value.double()
        self.magnitude = self.value.abs() if magnitude is None else magnitude

    def __mul__(self, factor: float) -> Linear:
        return Linear(self.value * factor, self.magnitude * abs(factor))

    def __add__(self, other: Linear) -> Linear:
        return Linear(self.value + other.value, self.magnitude + other.magnitude)


def guided_eps(eps: Tensor, g: float | None) -> Linear:
    if g is None:
        return Linear(eps)
    uncond, cond = (Linear(half) for half in eps.chunk(2))
    return uncond + (cond + uncond * -1) * g


def update(x: Tensor, y: Tensor, noise=None, starts=None, seed: int = 5, **settings):
    """Does one update with gradients and momenta drawn from a seed, and returns x, y and their momenta."""
    generator = torch.Generator().manual_seed(seed)
    gx, gy, mx, my = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(4))
    options = {"rate": 0.5, "clip": 0.4, "momentum": 0.9, "nesterov": False, "tied": True, "sigma": 0.1, **settings}
    latents, momenta = ops.latent_update((x, y), (mx, my), (gx, gy), noise, starts, **options)
    return [*latents, *momenta]
