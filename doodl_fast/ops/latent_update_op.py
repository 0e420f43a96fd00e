"""DOODL's latent update in two passes over memory: clipped momentum SGD, tied, perturbed, renormalised.

For latents x, y with gradients gx, gy and momenta mx, my (arXiv 2303.13703, section 4; momentum and nesterov as in
torch.optim.SGD without dampening), i in {x, y}:

    g_i = rate g_i                                  rate: half the learning rate, the loss being a sum over both
    tied:  g_x = g_y = (g_x + g_y) / 2
    g_i = min(max(g_i, -clip), clip)                NaN stays NaN
    m_i = momentum m_i + g_i ;   z_i = z_i - (m_i, or with nesterov  g_i + momentum m_i)
    z_i = z_i + sigma noise
    tied:  z_x = z_y = (z_x + z_y) / 2
    second pass, where start norms are given:   z_i = z_i (start_i / |z_i|), sample by sample

Arithmetic in the latents' dtype (float32 or float64), in the order written, no multiply-add contracted. The sum of
squares behind |z_i| is accumulated in float64 in an order that depends on the backend and on the shape alone, so a
backend repeats itself bit for bit; between backends it may differ in float64's last digits, and a float32 result then
in its last bit only when it sits on a tie. The factor `start / |z|` is formed in float64 and rounded once.

Shapes: latents, gradients, momenta and noise (B, ...); start norms (B,) or (B, 1, ...), float64 or the latents' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends.registry import eager, select
from .layout import check_same, dense_format, is_plain

Pair = tuple[Tensor, Tensor]


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
    """One update: new ((x, y), (mx, my)); nothing is changed in place.

    latents, momenta, gradients: pairs of (B, ...) tensors of one shape, one dtype (float32 or float64), one device.
    noise: (B, ...) or None. start_norms: the norms that each sample is scaled back to, or None.
    Raises ValueError or TypeError, naming the argument.
    """
    starts = None
    if start_norms is not None:
        starts = torch.cat([norm.reshape(1, -1) for norm in start_norms]).to(torch.float64)
    clip = math.inf if clip is None else clip
    tensors = (*latents, *momenta, *gradients, noise, starts)
    update: Callable[..., tuple[Tensor, ...]] = torch.ops.doodl_fast.latent_update
    if is_plain(*tensors):
        update = _latent_update_forward
    x, y, mx, my = update(*tensors, rate, clip, momentum, nesterov, tied, sigma)
    return (x, y), (mx, my)


def _latent_update_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The update of the schema below, and in its order."""
    tensors, starts, settings = arguments[:7], arguments[7], arguments[8:]
    outs = _outputs(*arguments[:8])
    x, noise, sigma = tensors[0], tensors[6], settings[-1]
    if not x.numel():
        return outs
    layout = dense_format(x)
    inputs = [z.contiguous(memory_format=layout) for z in tensors[:6]]
    noise = None if noise is None or sigma == 0 else noise.contiguous(memory_format=layout)
    select("latent_update", x)(*outs, *inputs, noise, starts, *settings)
    return outs


_latent_update_op = torch.library.custom_op(
    "doodl_fast::latent_update",
    mutates_args=(),
    schema="(Tensor x, Tensor y, Tensor mx, Tensor my, Tensor gx, Tensor gy, Tensor? noise, Tensor? starts, "
    "float rate, float clip, float momentum, bool nesterov, bool tied, float sigma) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)(_latent_update_forward)


@_latent_update_op.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _outputs(*arguments[:8])


def _outputs(
    x: Tensor,
    y: Tensor,
    mx: Tensor,
    my: Tensor,
    gx: Tensor,
    gy: Tensor,
    noise: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, ...]:
    """New x, y, mx, my, not filled yet, once the operands are found to fit together."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents: expected float32 or float64, got {x.dtype}; smaller updates would vanish in it")
    if not x.ndim:
        raise ValueError("latents: expected a leading batch dimension, got 0-dim tensors")
    check_same("x", x, y=y, mx=mx, my=my, gx=gx, gy=gy, noise=noise)
    if starts is not None and (tuple(starts.shape) != (2, x.shape[0]) or starts.device != x.device):
        raise ValueError(f"start_norms: expected one for each of {x.shape[0]} samples, on the latents' device")
    return tuple(torch.empty_like(x, memory_format=dense_format(x)) for _ in range(4))


# The reference kernels


@eager
def _latent_update(
    out_x: Tensor,
    out_y: Tensor,
    out_mx: Tensor,
    out_my: Tensor,
    x: Tensor,
    y: Tensor,
    mx: Tensor,
    my: Tensor,
    gx: Tensor,
    gy: Tensor,
    noise: Tensor | None,
    starts: Tensor | None,
    rate: float,
    clip: float,
    momentum: float,
    nesterov: bool,
    tied: bool,
    sigma: float,
) -> None:
    gx, gy = gx * rate, gy * rate
    if tied:
        gx = gy = (gx + gy) * 0.5
    moved: list[Tensor] = []
    for z, m, gradient, out_m in ((x, mx, gx, out_mx), (y, my, gy, out_my)):
        gradient = gradient.clamp(-clip, clip)
        torch.add(m * momentum, gradient, out=out_m)
        z = z - (out_m * momentum + gradient if nesterov else out_m)
        moved.append(z if noise is None else z + noise * sigma)
    if tied:
        moved = [(moved[0] + moved[1]) * 0.5] * 2
    out_x.copy_(moved[0])
    out_y.copy_(moved[1])
    if starts is not None:
        squares = torch.stack([z.double().square().reshape(len(z), -1).sum(1) for z in (out_x, out_y)])
        rescale(out_x, out_y, squares, starts)


def rescale(x: Tensor, y: Tensor, squares: Tensor, starts: Tensor) -> None:
    """Scales each sample from the norm that its sum of squares gives to the one it started with, in place."""
    factors = (starts / squares.sqrt()).to(x.dtype)
    for z, factor in zip((x, y), factors, strict=True):
        z.mul_(factor.reshape(-1, *[1] * (z.ndim - 1)))
