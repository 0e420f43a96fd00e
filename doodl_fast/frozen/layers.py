"""The layers that have a leaner way to run, by the full name of their class, and that way.

A row of the table makes the `forward` of a class. Every such `forward` calls the same kernels as the class's own, with
and without a graph, so values and gradients have the same bits, but for those of `group_norm.py`, `modulated_norm.py`,
`gated.py` and `quick_gelu.py`. Classes are found by name, so that neither diffusers nor transformers is imported for
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import level
from .attention import Recording
from .convolution import Geometry, convolution
from .functions import activation, recomputed
from .gated import GELU, SILU, Gate, gated, may_be_one_op
from .group_norm import activated, fused
from .level import Level
from .modulated_norm import adaptive, root_mean_square
from .quick_gelu import by_operators, quick_gelu
from .recipes import active, recipe_of, remember

Forward = Callable[..., Any]
_aten = torch.ops.aten


class Pattern(NamedTuple):
    """One way to run layers of some classes.

    Attributes:
        make: Gives the `forward` for a class.
        level: The first level at which it is used.
        refuse: Gives the reason why a layer must be left alone, or None.
        gains: Whether graphs of such layers keep less with lean="recompute" than with lean=True.
    """

    make: Callable[[type], Forward]
    level: Level = Level.ON
    refuse: Callable[[Any], str | None] = lambda layer: None
    gains: bool = False


def _is_small(layer: Any, x: Tensor, limit: int) -> bool:
    """Whether PyTorch's layer is used because a tensor has few elements. With lean="recompute" none has."""
    return x.numel() < limit and layer._doodl_fast_level is Level.ON


def _wants_gradients(layer: nn.Module) -> bool:
    """Whether one of a layer's own weights is the result of something that wants a gradient, a LoRA for instance."""
    return any(weight is not None and weight.requires_grad for weight in layer._parameters.values())


def _is_plain(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's convolution is called for an input."""
    if _is_small(layer, x, level.SMALL) or not active(x):
        return True
    return x.ndim != weight.ndim or x.dtype != weight.dtype or _wants_gradients(layer)


def _convolution(cls: Any) -> Forward:
    """A convolution of one to three dimensions that keeps its weights alone."""

    def forward(self: Any, input: Tensor) -> Tensor:
        table = self._parameters  # An attribute of a module that is a weight takes a microsecond to find.
        weight, bias = table["weight"], table["bias"]
        if _is_plain(self, input, weight):
            result: Tensor = cls.forward(self, input)
            return result
        padding, none = self.padding, (0,) * (input.ndim - 2)
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode), none
        geometry = Geometry(self.stride, padding, self.dilation, False, none, self.groups)
        return convolution(input, weight, bias, geometry)

    return forward


def _transposed_convolution(cls: Any) -> Forward:
    """A transposed convolution that keeps its weights alone."""

    def forward(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None or _is_plain(self, input, self.weight):
            result: Tensor = cls.forward(self, input, output_size)
            return result
        geometry = Geometry(self.stride, self.padding, self.dilation, True, self.output_padding, self.groups)
        return convolution(input, self.weight, self.bias, geometry)

    return forward


def _padding_by_name(layer: Any) -> str | None:
    return f"padding {layer.padding!r}" if isinstance(layer.padding, str) else None


def _group_norm(cls: Any) -> Forward:
    """A group norm whose output need not be saved by what follows."""

    def forward(self: Any, input: Tensor) -> Tensor:
        # The op may round differently. So whether it is called must not depend on the level, which may change in a run.
        both = fused(self, input) if input.numel() >= level.SMALL_NORM else None
        if both is not None:
            return both
        output: Tensor = cls.forward(self, input)
        return (
            remember(output, F.group_norm, input, self.num_groups, self.weight, self.bias, self.eps)
            if active(input) and not _is_small(self, input, level.SMALL_NORM)
            else output
        )

    return forward


def _layer_norm(cls: Any) -> Forward:
    """A layer norm whose output need not be saved by what follows."""

    def forward(self: Any, input: Tensor) -> Tensor:
        output: Tensor = cls.forward(self, input)
        if not active(input):
            return output
        return remember(output, F.layer_norm, input, self.normalized_shape, self.weight, self.bias, self.eps)

    return forward


def _linear(cls: Any) -> Forward:
    """A linear layer whose output need not be saved by what follows, if that makes something smaller of it."""

    def forward(self: Any, input: Tensor) -> Tensor:
        output: Tensor = cls.forward(self, input)
        if active(input) and (recipe_of(input) is not None or self.in_features <= self.out_features):
            remember(output, F.linear, input, self.weight, self.bias)
        return output

    return forward


def _whole(cls: Any) -> Forward:
    """A layer of one argument that keeps nothing but that, and computes everything inside again."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        # Classes name their argument differently: where it is given by its name, the layer stays as it is.
        if len(args) != 1 or kwargs or not active(args[0]) or _wants_gradients(self):
            result: Tensor = cls.forward(self, *args, **kwargs)
            return result
        weights = tuple(weight for weight in self._parameters.values() if weight is not None)
        again = functools.partial(cls.forward, self)
        return remember(recomputed(again, args[0], weights=weights), again, args[0])

    return forward


def _quick_gelu(cls: Any) -> Forward:
    """transformers' quick GELU, by the op where that is used."""
    whole, known = _whole(cls), cls.forward.__module__ == cls.__module__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = quick_gelu(args[0]) if known and len(args) == 1 and not kwargs else None
        return whole(self, *args, **kwargs) if result is None else result

    return forward


def _elementwise(function: Callable[[Any], Callable[[Tensor], Tensor]], backward: Callable[..., Any]) -> Any:
    """A row for an activation function.

    Args:
        function: Gives the function of a layer.
        backward: Gives its gradient from the layer, the cotangent and the function's argument.
    """

    def make(cls: Any) -> Forward:
        def forward(self: Any, input: Tensor) -> Tensor:
            if not active(input):
                result: Tensor = cls.forward(self, input)
                return result
            return activation(input, function(self), functools.partial(backward, self))

        return forward

    return make


def _silu_backward(layer: Any, grad: Tensor, x: Tensor) -> Any:
    return _aten.silu_backward(grad, x)


def _silu(cls: Any) -> Forward:
    """SiLU, which a norm before it may have computed already."""
    alone = _elementwise(lambda layer: F.silu, _silu_backward)(cls)

    def forward(self: Any, input: Tensor) -> Tensor:
        result: Tensor = input if activated(input) else alone(self, input)
        return result

    return forward


def _gelu_backward(layer: Any, grad: Tensor, x: Tensor) -> Any:
    return _aten.gelu_backward(grad, x, approximate=getattr(layer, "approximate", "none"))


def _gelu(layer: Any) -> Callable[[Tensor], Tensor]:
    return functools.partial(F.gelu, approximate=getattr(layer, "approximate", "none"))


def _in_place(layer: Any) -> str | None:
    return "it changes its input in place" if layer.inplace else None


def _gelu_tanh_backward(layer: Any, grad: Tensor, x: Tensor) -> Any:
    return _aten.gelu_backward(grad, x, approximate="tanh")


def _other_gelu(layer: Any) -> str | None:
    """Why one of transformers' layers is not the function that its class is named after."""
    act = getattr(layer.act, "func", layer.act)
    return None if act is F.gelu else "it has a function of its own"


_DEVICES = ("cpu", "cuda", "meta")
"""Where diffusers' projections with an activation compute what is written here."""


def _projected_quick_gelu(cls: Any) -> Forward:
    """A projection and a quick GELU: the projection's result is kept, and nothing of the activation."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or args[0].device.type not in _DEVICES:
            return cls.forward(self, *args, **kwargs)
        x = self.proj(args[0])
        result = quick_gelu(x)
        if result is not None:
            return result
        lean = active(args[0]) and not _is_small(self, args[0], level.SMALL)
        return recomputed(by_operators, x) if lean else by_operators(x)

    return forward


def _gated(gate: Gate) -> Callable[[Any], Forward]:
    """A row for a projection and a gated activation: the projection's result is kept, and nothing of the activation."""

    def make(cls: Any) -> Forward:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or args[0].device.type not in _DEVICES:
                return cls.forward(self, *args, **kwargs)
            (x,) = args
            # The op may round differently. So whether it is called must not depend on the level, which may change in a
            # run, and not on whether there is a graph.
            one_op = x.numel() >= level.SMALL and may_be_one_op(x)
            if not one_op and (_is_small(self, x, level.SMALL) or not active(x)):
                return cls.forward(self, x)
            return gated(self.proj(x), gate, one_op)

        return forward

    return make


def _other_gate(layer: Any) -> str | None:
    return None if type(layer.activation) is nn.SiLU else "it has a function of its own"


def _gelu_of_projection(cls: Any) -> Forward:
    """diffusers' projection with a GELU, of which PyTorch keeps the projection alone: here what that follows from."""

    def forward(self: Any, hidden_states: Tensor) -> Any:
        if not active(hidden_states):
            return cls.forward(self, hidden_states)
        return activation(self.proj(hidden_states), _gelu(self), functools.partial(_gelu_backward, self))

    return forward


def _recording(cls: Any) -> Forward:
    """A layer whose cheap operators pass recipes on: modulations by a time embedding, and attention."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        if not any(active(x) for x in given):
            return cls.forward(self, *args, **kwargs)
        with Recording():
            return cls.forward(self, *args, **kwargs)

    return forward


def _attention(cls: Any) -> Forward:
    """diffusers' attention. Where nothing would be saved otherwise, it runs without a mode that sees each operator."""
    recording = _recording(cls)

    def forward(self: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        cheap = type(self.to_q) is nn.Linear and getattr(self, "norm_q", None) is getattr(self, "norm_k", None) is None
        if cheap and (encoder_hidden_states is None or _is_small(self, hidden_states, level.SMALL_QUERY)):
            return cls.forward(self, hidden_states, encoder_hidden_states, *args, **kwargs)
        return recording(self, hidden_states, encoder_hidden_states, *args, **kwargs)

    return forward


def _rms_norm(cls: Any) -> Forward:
    """RMSNorm, of which the op keeps the input, or what that follows from."""
    whole = _whole(cls)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        result = root_mean_square(self, args[0]) if len(args) == 1 and not kwargs else None
        return whole(self, *args, **kwargs) if result is None else result

    return forward


def _adaptive(cls: Any) -> Forward:
    """A norm with a modulation by an embedding, by the op where that is used."""
    recording, known = _recording(cls), getattr(cls.forward, "__module__", "") == cls.__module__

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        leanest = self._doodl_fast_level is Level.RECOMPUTE
        result = adaptive(self, args, kwargs, recipe=leanest) if known else None
        if result is not None:
            return result
        return recording(self, *args, **kwargs) if leanest else cls.forward(self, *args, **kwargs)

    return forward


_CONVOLUTION = Pattern(_convolution, refuse=_padding_by_name)
_TRANSPOSED = Pattern(_transposed_convolution)
_SILU = Pattern(_silu, refuse=_in_place)
_ATTENTION = Pattern(_recording, gains=True)
_ADAPTIVE = Pattern(_adaptive)
_RMS_NORM = Pattern(_rms_norm)

PATTERNS: dict[str, Pattern] = {
    **{f"torch.nn.modules.conv.Conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"torch.nn.modules.conv.ConvTranspose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "torch.nn.modules.normalization.GroupNorm": Pattern(_group_norm),
    "torch.nn.modules.normalization.LayerNorm": Pattern(_layer_norm, Level.RECOMPUTE),
    "torch.nn.modules.normalization.RMSNorm": _RMS_NORM,
    "torch.nn.modules.linear.Linear": Pattern(_linear, Level.RECOMPUTE),
    "torch.nn.modules.activation.SiLU": _SILU,
    "torch.nn.modules.activation.GELU": Pattern(_elementwise(_gelu, _gelu_backward)),
    "diffusers.models.normalization.RMSNorm": _RMS_NORM,
    "diffusers.models.normalization.FP32LayerNorm": Pattern(_whole),
    "diffusers.models.normalization.AdaLayerNormZero": _ADAPTIVE,
    "diffusers.models.normalization.AdaLayerNormZeroSingle": _ADAPTIVE,
    "diffusers.models.normalization.AdaLayerNormContinuous": _ADAPTIVE,
    "diffusers.models.normalization.SD35AdaLayerNormZeroX": _ADAPTIVE,
    "diffusers.models.activations.GEGLU": Pattern(_gated(GELU), gains=True),
    "diffusers.models.activations.SwiGLU": Pattern(_gated(SILU), refuse=_other_gate, gains=True),
    "diffusers.models.activations.ApproximateGELU": Pattern(_projected_quick_gelu, gains=True),
    "diffusers.models.activations.GELU": Pattern(_gelu_of_projection, Level.RECOMPUTE, gains=True),
    "diffusers.models.attention_processor.Attention": Pattern(_attention, gains=True),
    **{
        f"diffusers.models.transformers.transformer_{name}Attention": _ATTENTION
        for name in ("flux.Flux", "flux2.Flux2", "longcat_image.LongCatImage", "ovis_image.OvisImage", "bria.Bria")
    },
    # Its queries, keys and values are parts of a larger projection, which is kept at every level.
    "diffusers.models.transformers.transformer_flux2.Flux2ParallelSelfAttention": Pattern(_recording),
    "diffusers.models.transformers.transformer_ltx.LTXAttention": _ATTENTION,
    "transformers.activations.QuickGELUActivation": Pattern(_quick_gelu),
    "transformers.activations.NewGELUActivation": Pattern(_whole),
    "transformers.activations.FastGELUActivation": Pattern(_whole),
    "transformers.activations.AccurateGELUActivation": Pattern(_whole),
    "transformers.activations.SiLUActivation": Pattern(_elementwise(lambda layer: F.silu, _silu_backward)),
    "transformers.activations.GELUActivation": Pattern(
        _elementwise(lambda layer: F.gelu, _gelu_backward), refuse=_other_gelu
    ),
    "transformers.models.clip.modeling_clip.CLIPAttention": Pattern(_recording, Level.RECOMPUTE, gains=True),
    "transformers.models.siglip.modeling_siglip.SiglipAttention": Pattern(_recording, Level.RECOMPUTE, gains=True),
}
"""What is replaced, by the full name of the class. Subclasses are left alone: they may do something else."""

FREE = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *("linear.Linear", "linear.Identity", "normalization.LayerNorm", "sparse.Embedding", "activation.ReLU"),
        *("dropout.Dropout", "dropout.Dropout1d", "dropout.Dropout2d", "dropout.Dropout3d"),
        *("upsampling.Upsample", "pooling.AvgPool2d", "padding.ZeroPad2d", "flatten.Flatten"),
    )
)
"""Layers of which PyTorch keeps nothing that could be left out without a matrix product."""


def name_of(named: Any) -> str:
    """The full name of a class or of a function. What has none gets one that no class has."""
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', '')}"
