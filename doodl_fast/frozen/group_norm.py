"""GroupNorm and the SiLU after it as one op, where that changes no bit or makes the result more exact.

PyTorch reads and writes the tensor once for each of the two, and a lean gradient computes the norm once more. The op
`ops.group_norm_silu` does both in one pass, forward and backward. The norm's layer calls it, and marks its result, so
that the layer of SiLU, which is called with that result, returns it as it is. This is done in blocks alone whose code
is known to call the one with the result of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops.transforms import is_plain
from .functions import entered
from .recipes import load, recipe_of, save

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SILU_FOLLOWS = "_doodl_fast_silu_follows"
"""The attribute of a norm's layer whose result is always given to a layer of SiLU."""
_ACTIVATED = "_doodl_fast_activated"
"""The attribute of a tensor that a norm's layer has applied SiLU to."""


def _always(block: Any) -> bool:
    return True


def _norm_alone(block: Any) -> bool:
    """Whether SiLU comes directly after the second norm of a residual block, not after a scale and a shift."""
    return bool(block.time_embedding_norm != "scale_shift")


_DIFFUSERS_AUTOENCODER = "diffusers.models.autoencoders.vae"
_END = (("conv_norm_out", "conv_act", _always),)
PAIRS: dict[str, tuple[tuple[str, str, Callable[[Any], bool]], ...]] = {
    "diffusers.models.resnet.ResnetBlock2D": (
        ("norm1", "nonlinearity", _always),
        ("norm2", "nonlinearity", _norm_alone),
    ),
    "diffusers.models.unets.unet_2d.UNet2DModel": _END,
    "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel": _END,
    f"{_DIFFUSERS_AUTOENCODER}.Encoder": _END,
    f"{_DIFFUSERS_AUTOENCODER}.Decoder": _END,
}
"""Blocks by the full name of their class: the attributes of a norm and of the SiLU after it, and when that holds."""


def note_pairs(blocks: Iterable[tuple[str, nn.Module]], norm_class: type, silu_class: type) -> None:
    """Notes in norms that SiLU follows.

    Args:
        blocks: The copied modules of a network, and the full names of their originals' classes.
        norm_class: The class of lean norms. Others are left alone.
        silu_class: The class of lean layers of SiLU. Others are left alone.
    """
    blocks = list(blocks)
    uses = Counter(id(layer) for _, block in blocks for layer in block._modules.values())
    for name, block in blocks:
        forward = type(block).forward
        if "forward" in block.__dict__ or getattr(forward, "__module__", "") != type(block).__module__:
            continue  # Somebody has replaced it, perhaps by code that does something else between the two.
        for norm, silu, holds in PAIRS.get(name, ()):
            layer, following = block._modules.get(norm), block._modules.get(silu)
            if type(layer) is norm_class and type(following) is silu_class and uses[id(layer)] == 1 and holds(block):
                layer.__dict__[_SILU_FOLLOWS] = True


def fused(layer: Any, x: Tensor) -> Tensor | None:
    """Returns SiLU of a norm's result if SiLU follows and the op is used for such an input, else None."""
    if torch.compiler.is_compiling() or _SILU_FOLLOWS not in layer.__dict__ or not _is_used(layer, x):
        return None
    weights = layer._parameters["weight"], layer._parameters["bias"]
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _GroupNormSilu.apply(  # type: ignore[no-untyped-call]
            x, recipe_of(x) or x, *weights, layer.num_groups, layer.eps
        )
    else:
        y = ops.group_norm_silu(x, _tensor(weights[0]), _tensor(weights[1]), layer.num_groups, layer.eps)[0]
    setattr(y, _ACTIVATED, True)
    return y


def activated(x: Tensor) -> bool:
    """Whether SiLU has been applied to a tensor already. It is not any more afterwards: a second SiLU is computed."""
    return not torch.compiler.is_compiling() and bool(vars(x).pop(_ACTIVATED, False))


def _is_used(layer: Any, x: Tensor) -> bool:
    """Whether the op is called for a norm's input.

    That depends on the input's device, dtype and layout, and not on whether a graph is made or the call is recorded as
    a CUDA graph. So all calls of a run with equal inputs give the same bits.
    """
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    return (
        type(x) is Tensor
        and x.ndim == 4
        and x.numel() > 0
        and weight is not None
        and bias is not None
        and weight.dtype == bias.dtype == x.dtype
        and x.dtype in _DTYPES
        and not (weight.requires_grad or bias.requires_grad)
        and not _has_any_global_hook()  # A hook could see that the norm's result is not the norm's.
        and not torch._C._is_any_autocast_enabled()
        and is_plain()
        and _pays(x)
    )


def _pays(x: Tensor) -> bool:
    """Whether the op is faster than PyTorch's two.

    In float32 on a CPU the op must have the bits of PyTorch, which it has for contiguous tensors; PyTorch's kernels for
    contiguous half precision on a CPU are about as fast. Elsewhere the op rounds differently (docs/kernels.md).
    """
    if x.is_contiguous():
        if x.is_cpu:
            return x.dtype == torch.float32 and ops.matches_torch()
    elif not x.is_contiguous(memory_format=torch.channels_last) or (x.is_cpu and x.dtype == torch.float32):
        return False
    return (x.is_cuda or x.is_cpu) and ops.has_kernel("group_norm_silu", x)


def _tensor(weight: Tensor) -> Tensor:
    """A frozen weight as a plain tensor, which the op's kernels are called with directly."""
    return weight if type(weight) is Tensor else weight.detach()


class _GroupNormSilu(torch.autograd.Function):
    """`silu(group_norm(x))`, which keeps x, or what x follows from, and the statistics of the groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Any, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        y, mean, rstd = ops.group_norm_silu(x, _tensor(weight), _tensor(bias), num_groups, eps)
        save(ctx, kept, mean, rstd, weight, bias)
        ctx.num_groups, ctx.eps, ctx.backend = num_groups, eps, ops.choice()
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = load(ctx)
        if torch.is_grad_enabled():  # A second derivative needs the way back to x.
            y = F.silu(F.group_norm(x, ctx.num_groups, weight, bias, ctx.eps))
            return *torch.autograd.grad(y, x, grad_outputs, create_graph=True), None, None, None, None, None
        given = (grad_outputs[0], x, mean, rstd, _tensor(weight), _tensor(bias), ctx.num_groups)
        with entered(ctx.backend):
            return ops.group_norm_silu_backward(*given), None, None, None, None, None
