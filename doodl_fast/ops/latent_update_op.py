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
from .layout import check_same, dense_format
from .transforms import is_plain, needs_formula, refuse_tangents

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
    starts = None if start_norms is None else _joined(latents[0], start_norms)
    clip = math.inf if clip is None else clip
    if not clip >= 0:
        raise ValueError(f"clip: expected None or a number that is not negative, got {clip}")
    tensors = (*latents, *momenta, *gradients, noise, starts)
    update: Callable[..., tuple[Tensor, ...]] = torch.ops.doodl_fast.latent_update
    if is_plain(*tensors):
        update = _latent_update_forward
    elif needs_formula(*tensors):
        update = _latent_update_formula
    x, y, mx, my = update(*tensors, rate, clip, momentum, nesterov, tied, sigma)
    return (x, y), (mx, my)


def _joined(x: Tensor, start_norms: Sequence[Tensor]) -> Tensor:
    """The start norms of both latents, (2, B) in float64."""
    expected = f"start_norms: expected one for each of {x.shape[0] if x.ndim else 1} samples, on the latents' device"
    if len(start_norms) != 2 or any(norm.numel() != start_norms[0].numel() for norm in start_norms):
        raise ValueError(f"{expected}, for x and for y; got shapes {[tuple(norm.shape) for norm in start_norms]}")
    for norm in start_norms:
        if norm.device != x.device:
            raise ValueError(f"{expected} {x.device}; got {norm.device}")
    return torch.cat([norm.reshape(1, -1) for norm in start_norms]).to(torch.float64)


def _latent_update_forward(*arguments: Any) -> tuple[Tensor, ...]:
    """The update of the schema below, and in its order."""
    tensors, starts, settings = arguments[:7], arguments[7], arguments[8:]
    refuse_tangents("latent_update", *arguments[:8])
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
    _check(x, y, mx, my, gx, gy, noise, starts)
    return tuple(torch.empty_like(x, memory_format=dense_format(x)) for _ in range(4))


def _check(
    x: Tensor,
    y: Tensor,
    mx: Tensor,
    my: Tensor,
    gx: Tensor,
    gy: Tensor,
    noise: Tensor | None,
    starts: Tensor | None,
) -> None:
    """Raises TypeError or ValueError for operands that do not fit together."""
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"latents: expected float32 or float64, got {x.dtype}; smaller updates would vanish in it")
    if not x.ndim:
        raise ValueError("latents: expected a leading batch dimension, got 0-dim tensors")
    check_same("x", x, y=y, mx=mx, my=my, gx=gx, gy=gy, noise=noise)
    if starts is not None and (tuple(starts.shape) != (2, x.shape[0]) or starts.device != x.device):
        raise ValueError(f"start_norms: expected one for each of {x.shape[0]} samples, on the latents' device")


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
    tensors = x, y, mx, my, gx, gy, noise
    x, y, mx, my = _stepped(*tensors, rate, clip, momentum, nesterov, tied, sigma)
    if starts is not None:
        x, y = _rescaled(x, y, starts)
    for out, value in zip((out_x, out_y, out_mx, out_my), (x, y, mx, my), strict=True):
        out.copy_(value)


def _stepped(
    x: Tensor,
    y: Tensor,
    mx: Tensor,
    my: Tensor,
    gx: Tensor,
    gy: Tensor,
    noise: Tensor | None,
    rate: float,
    clip: float,
    momentum: float,
    nesterov: bool,
    tied: bool,
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first pass: new x, y and momenta, before they are scaled to their start norms."""
    if x.dtype == torch.float32:  # clamp refuses a bound beyond the dtype's range; the kernels round it to infinity
        clip = float(torch.tensor(clip, dtype=torch.float64).float())
    gx, gy = gx * rate, gy * rate
    if tied:
        gx = gy = (gx + gy) * 0.5
    moved, momenta = [], []
    for z, m, gradient in ((x, mx, gx), (y, my, gy)):
        gradient = gradient.clamp(-clip, clip)
        m = m * momentum + gradient
        z = z - (m * momentum + gradient if nesterov else m)
        moved.append(z if noise is None else z + noise * sigma)
        momenta.append(m)
    if tied:
        moved = [(moved[0] + moved[1]) * 0.5] * 2
    return moved[0], moved[1], momenta[0], momenta[1]


def _rescaled(x: Tensor, y: Tensor, starts: Tensor) -> Pair:
    """The second pass: each sample scaled to the norm that it started with."""
    squares = torch.stack([z.double().square().reshape(len(z), -1).sum(1) for z in (x, y)])
    factors = (starts / squares.sqrt()).to(x.dtype)
    shape = (-1, *[1] * (x.ndim - 1))
    return x * factors[0].reshape(shape), y * factors[1].reshape(shape)


def _latent_update_formula(*arguments: Any) -> tuple[Tensor, ...]:
    """The update in plain torch operations, which can be transformed and differentiated in any mode."""
    starts, settings = arguments[7], arguments[8:]
    _check(*arguments[:8])
    noise = arguments[6] if settings[-1] != 0 else None
    operands: tuple[Any, ...] = (*arguments[:6], noise, *settings)
    x, y, mx, my = _stepped(*operands)
    if starts is not None and x.numel():
        x, y = _rescaled(x, y, starts)
    return x, (y.clone() if y is x else y), mx, my
