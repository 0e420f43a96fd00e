"""DOODL's update of the latents, in two passes over memory: clipped momentum SGD, tied, perturbed, renormalised.

For latents x, y with gradients gx, gy and momenta mx, my (arXiv 2303.13703, section 4; momentum and nesterov as in
torch.optim.SGD without dampening), for each z in {x, y} with its gradient g and its momentum m:

    g = rate g                                rate: half the learning rate, as the loss is a sum over both latents
    tied:  gx = gy = (gx + gy) / 2
    g = min(max(g, -clip), clip)              NaN stays NaN
    m = momentum m + g ;   z = z - m, or with nesterov  z = z - (g + momentum m)
    z = z + sigma noise
    tied:  x = y = (x + y) / 2
    second pass, if start norms are given:    z = z (start / |z|), for each sample

Arithmetic: it is done in the latents' dtype (float32 or float64), in the order written, and no multiply-add is
contracted. The sum of squares behind |z| is accumulated in float64, in an order that depends on the backend and on the
shape alone. So a backend always gives the same bits, while two backends may differ in the last digits of that float64
sum, and in the last bit of a float32 result if the result lies between two floats. The factor `start / |z|` is
computed in float64 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .layout import check_same, dense_format
from .registration import register, registered
from .signatures import LATENT_UPDATE
from .transforms import is_plain, needs_formula

Pair = tuple[Tensor, Tensor]
LARGEST = torch.finfo(torch.float32).max
"""Numbers from half a spacing of float32 above it, 2^103, are rounded to infinity."""


def latent_update(
    latents: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    noise: Tensor | None = None,
    start_norms: Sequence[Tensor] | None = None,
    *,
    rate: float = 0.5,
    clip: float | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    tied: bool = False,
    sigma: float = 0.0,
) -> tuple[Pair, Pair]:
    """Computes one update of a pair of latents and their momenta. Nothing is changed in place.

    Args:
        latents: The pair (x, y) of tensors (B, ...) of one dtype, float32 or float64, on one device.
        momenta: The pair of their momenta, of the same shape, dtype and device.
        gradients: The pair of their gradients, of the same shape, dtype and device.
        noise: Normal noise (B, ...) of the same dtype and device, or None.
        start_norms: For x and for y the norms that each sample is scaled back to, (B,) or (B, 1, ...), in float64 or
            the latents' dtype; or None.
        rate: The factor of the gradients.
        clip: The largest magnitude of an element of a scaled gradient, or None.
        momentum: The factor of the momenta.
        nesterov: Whether Nesterov's momentum is used.
        tied: Whether x and y get the mean of both gradients, and the mean of both values.
        sigma: The factor of the noise.

    Returns:
        The new latents (x, y) and the new momenta (mx, my).

    Raises:
        ValueError: Shapes, devices or numbers do not fit.
        TypeError: A dtype does not fit.
    """
    starts = None if start_norms is None else _joined(latents[0], start_norms)
    clip = math.inf if clip is None else clip
    if not clip >= 0:
        raise ValueError(f"clip: expected None or a number that is not negative, got {clip}")
    tensors = (*latents, *momenta, *gradients, noise, starts)
    arguments = (*tensors, rate, clip, momentum, nesterov, tied, sigma)
    if is_plain(*tensors):
        x, y, mx, my = _latent_update_forward(*arguments)
    elif needs_formula(*tensors):
        x, y, mx, my = _latent_update_formula(LATENT_UPDATE.call(*arguments))
    else:
        x, y, mx, my = registered.latent_update(*arguments)
    return (x, y), (mx, my)


def _joined(x: Tensor, start_norms: Sequence[Tensor]) -> Tensor:
    """Returns the start norms of both latents as one tensor (2, B) in float64."""
    expected = f"start_norms: expected one for each of {x.shape[0] if x.ndim else 1} samples, on the latents' device"
    if len(start_norms) != 2 or any(norm.numel() != start_norms[0].numel() for norm in start_norms):
        raise ValueError(f"{expected}, for x and for y; got shapes {[tuple(norm.shape) for norm in start_norms]}")
    for norm in start_norms:
        if norm.device != x.device:
            raise ValueError(f"{expected} {x.device}; got {norm.device}")
    return torch.cat([norm.reshape(1, -1) for norm in start_norms]).to(torch.float64)


def _latent_update_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """Checks the operands, brings them to one layout and calls the kernel. arguments: those of the registered op."""
    tensors, starts, settings = arguments[:7], arguments[7], arguments[8:]
    outs = _outputs(LATENT_UPDATE.call(*arguments))
    x, noise, sigma = tensors[0], tensors[6], settings[-1]
    if not x.numel():
        return outs
    layout = dense_format(x)
    inputs = [z.contiguous(memory_format=layout) for z in tensors[:6]]
    noise = None if noise is None or sigma == 0 else noise.contiguous(memory_format=layout)
    select("latent_update", x)(*outs, *inputs, noise, starts, *settings)
    return outs


def _outputs(call: Any) -> tuple[Tensor, ...]:
    """Checks the operands and returns uninitialised tensors for x, y, mx and my."""
    _check(call)
    return tuple(torch.empty_like(call.x, memory_format=dense_format(call.x)) for _ in range(4))


def _check(call: Any) -> None:
    """Raises TypeError or ValueError if the operands do not fit together."""
    x, starts = call.x, call.starts
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents: expected float32 or float64, got {x.dtype}; smaller updates would vanish in it")
    if not x.ndim:
        raise ValueError("latents: expected a leading batch dimension, got 0-dim tensors")
    check_same("x", x, y=call.y, mx=call.mx, my=call.my, gx=call.gx, gy=call.gy, noise=call.noise)
    if starts is not None and (tuple(starts.shape) != (2, x.shape[0]) or starts.device != x.device):
        raise ValueError(f"start_norms: expected one for each of {x.shape[0]} samples, on the latents' device")


# The arithmetic in plain torch operations, which the eager kernel and the formula share


def _stepped(call: Any, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x, y and their momenta after the first pass, which does not scale samples to their start norms."""
    clip, momentum = call.clip, call.momentum
    if call.x.dtype == torch.float32:  # clamp refuses a bound outside the dtype's range, which the kernels round.
        clip = math.inf if clip >= LARGEST + 2.0**103 else min(clip, LARGEST)
    gx, gy = call.gx * call.rate, call.gy * call.rate
    if call.tied:
        gx = gy = (gx + gy) * 0.5
    moved, momenta = [], []
    for z, m, gradient in ((call.x, call.mx, gx), (call.y, call.my, gy)):
        gradient = gradient.clamp(-clip, clip)
        m = m * momentum + gradient
        z = z - (m * momentum + gradient if call.nesterov else m)
        moved.append(z if noise is None else z + noise * call.sigma)
        momenta.append(m)
    if call.tied:
        moved = [(moved[0] + moved[1]) * 0.5] * 2
    return moved[0], moved[1], momenta[0], momenta[1]


def _rescaled(x: Tensor, y: Tensor, starts: Tensor) -> Pair:
    """Returns x and y after the second pass, which scales each sample to the norm that it started with."""
    squares = torch.stack([z.double().square().reshape(len(z), -1).sum(1) for z in (x, y)])
    factors = (starts / squares.sqrt()).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 1))
    return x * factors[0].reshape(shape), y * factors[1].reshape(shape)


def _latent_update_formula(call: Any) -> tuple[Tensor, ...]:
    """Returns the update by operations that can be transformed and differentiated in any mode."""
    _check(call)
    x, y, mx, my = _stepped(call, call.noise if call.sigma != 0 else None)
    if call.starts is not None and x.numel():
        x, y = _rescaled(x, y, call.starts)
    return x, (y.clone() if y is x else y), mx, my


@eager(LATENT_UPDATE)
def _latent_update_eager(call: Any) -> None:
    """Fills the four outputs."""
    x, y, mx, my = _stepped(call, call.noise)
    if call.starts is not None:
        x, y = _rescaled(x, y, call.starts)
    for out, value in zip((call.out_x, call.out_y, call.out_mx, call.out_my), (x, y, mx, my), strict=True):
        out.copy_(value)


register(LATENT_UPDATE, _latent_update_forward, _outputs)
