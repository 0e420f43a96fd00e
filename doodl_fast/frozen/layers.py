"""The layers that have a leaner way to run, by the full name of their class, and that way.

A row of the table makes the `forward` of a class. Every such `forward` calls the same kernels as the class's own, with
and without a graph, so values and gradients have the same bits; `group_norm.py` has the one exception. Classes are
found by name, so that neither diffusers nor transformers is imported for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Recording
from .convolution import Geometry, convolution
from .functions import activation, recomputed
from .group_norm import activated, fused
from .level import Level
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


def _wants_gradients(layer: nn.Module) -> bool:
    """Whether one of a layer's own weights is the result of something that wants a gradient, a LoRA for instance."""
    return any(weight is not None and weight.requires_grad for weight in layer._parameters.values())


def _convolution(cls: Any) -> Forward:
    """A convolution of one to three dimensions that keeps its weights alone."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if (
            not active(input)
            or input.ndim != self.weight.ndim
            or input.dtype != self.weight.dtype
            or _wants_gradients(self)
        ):
            result: Tensor = cls.forward(self, input)
            return result
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = (0,) * len(self.stride)
        none = (0,) * len(self.stride)
        geometry = Geometry(self.stride, padding, self.dilation, False, none, self.groups)
        return convolution(input, self.weight, self.bias, geometry)

    return forward


def _transposed_convolution(cls: Any) -> Forward:
    """A transposed convolution that keeps its weights alone."""

    def forward(self: Any, input: Tensor, output_size: Any = None) -> Tensor:
        plain = (
            not active(input)
            or input.ndim != self.weight.ndim
            or input.dtype != self.weight.dtype
            or _wants_gradients(self)
        )
        if plain or output_size is not None:
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
        both = fused(self, input)
        if both is not None:
            return both
        output: Tensor = cls.forward(self, input)
        return (
            remember(output, F.group_norm, input, self.num_groups, self.weight, self.bias, self.eps)
            if active(input)
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


def _projected(function: Callable[[Tensor], Tensor]) -> Callable[[Any], Forward]:
    """A row for a projection and an activation: the projection's result is kept, and nothing of the activation."""

    def make(cls: Any) -> Forward:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or not active(args[0]) or args[0].device.type not in ("cpu", "cuda", "meta"):
                return cls.forward(self, *args, **kwargs)
            return recomputed(function, self.proj(args[0]))

        return forward

    return make


def _geglu(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def _swiglu(x: Tensor) -> Tensor:
    hidden, gate = x.chunk(2, dim=-1)
    return hidden * F.silu(gate)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


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


_CONVOLUTION = Pattern(_convolution, refuse=_padding_by_name)
_TRANSPOSED = Pattern(_transposed_convolution)
_SILU = Pattern(_silu, refuse=_in_place)
_ATTENTION = Pattern(_recording, gains=True)
_MODULATION = Pattern(_recording, Level.RECOMPUTE)

PATTERNS: dict[str, Pattern] = {
    **{f"torch.nn.modules.conv.Conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"torch.nn.modules.conv.ConvTranspose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "torch.nn.modules.normalization.GroupNorm": Pattern(_group_norm),
    "torch.nn.modules.normalization.LayerNorm": Pattern(_layer_norm, Level.RECOMPUTE),
    "torch.nn.modules.normalization.RMSNorm": Pattern(_whole),
    "torch.nn.modules.linear.Linear": Pattern(_linear, Level.RECOMPUTE),
    "torch.nn.modules.activation.SiLU": _SILU,
    "torch.nn.modules.activation.GELU": Pattern(_elementwise(_gelu, _gelu_backward)),
    "diffusers.models.normalization.RMSNorm": Pattern(_whole),
    "diffusers.models.normalization.FP32LayerNorm": Pattern(_whole),
    "diffusers.models.normalization.AdaLayerNormZero": _MODULATION,
    "diffusers.models.normalization.AdaLayerNormZeroSingle": _MODULATION,
    "diffusers.models.normalization.AdaLayerNormContinuous": _MODULATION,
    "diffusers.models.normalization.SD35AdaLayerNormZeroX": _MODULATION,
    "diffusers.models.activations.GEGLU": Pattern(_projected(_geglu), gains=True),
    "diffusers.models.activations.SwiGLU": Pattern(_projected(_swiglu), gains=True),
    "diffusers.models.activations.ApproximateGELU": Pattern(_projected(_quick_gelu), gains=True),
    "diffusers.models.activations.GELU": Pattern(_gelu_of_projection, Level.RECOMPUTE, gains=True),
    "diffusers.models.attention_processor.Attention": _ATTENTION,
    "diffusers.models.transformers.transformer_flux.FluxAttention": _ATTENTION,
    "transformers.activations.QuickGELUActivation": Pattern(_whole),
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


def name_of(cls: type) -> str:
    """The full name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"
