"""A replacement of the memcnn package: a wrapper for modules with an `inverse`, whose activations are not stored.

Example:
    >>> from doodl_fast.compat import memcnn
    >>> s = memcnn.InvertibleModuleWrapper(SteppingLayer(...), keep_input=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .plain import Memo, Plain, as_tuple
from .reversible import Values, apply, operation_of

Shape = Sequence[int]


class InvertibleModuleWrapper(nn.Module):
    """Makes a module with an `inverse` one node of the graph, which holds its inputs or outputs and no activations.

    Inputs are never freed or changed. `.backward()` and `torch.autograd.grad` both work; a second derivative is an
    error. The backward pass runs under the autocast of the forward call. The memory of such modules: Gomez et al.,
    arXiv 1707.04585.

    Args:
        fn: An object with `forward` and `inverse`. Inputs and outputs may be tensors of any dtype or other objects, and
            the output a tuple or a single object. Inputs beyond the number of outputs, such as an index behind a pair,
            are held and handed to `inverse` again.
        keep_input: Whether a call holds its inputs for the backward pass. If not, `fn.inverse` rebuilds them from the
            outputs: memory then does not grow with the number of wrapped modules, but rounding errors add up. The
            layers of `compat.doodl` hand each other a float64 state; with fp16 or bf16 latents they hold their inputs
            in any case.
        keep_input_inverse: The same for calls of `inverse`.
        num_bwd_passes: How many backward passes may go through one call. After the last one nothing is held.
        disable: Runs `fn` with plain autograd.
        preserve_rng_state: Whether `fn`, when it runs again, draws the random numbers of its forward call.
        weight_grads: Whether gradients of fn's weights are computed. They cost memory and time, and no DOODL code uses
            them. The layers of `compat.doodl` refuse it, as they treat their weights as constants.

    Raises:
        TypeError: `fn` has no `forward` or no `inverse`.
        ValueError: `num_bwd_passes` is no positive int, or `weight_grads` is set for a layer of `compat.doodl`.
        RuntimeError: In the backward pass: rebuilt inputs do not lead to the outputs, a tensor was changed in place
            since the call, or there were more passes than `num_bwd_passes`. For a module with `num_timesteps`, whose
            inverse counts steps backwards, the index is turned around before this is decided.
    """

    def __init__(
        self,
        fn: Any,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        num_bwd_passes: int = 1,
        disable: bool = False,
        preserve_rng_state: bool = False,
        *,
        weight_grads: bool = False,
    ) -> None:
        super().__init__()
        if not (hasattr(fn, "forward") and hasattr(fn, "inverse")):
            raise TypeError(f"fn: expected a module with forward and inverse, got {type(fn).__name__}; add an inverse")
        if isinstance(num_bwd_passes, bool) or not isinstance(num_bwd_passes, int) or num_bwd_passes < 1:
            raise ValueError(f"num_bwd_passes: expected an int of at least 1, got {num_bwd_passes!r}")
        self.disable = disable
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse
        self.num_bwd_passes = num_bwd_passes
        self.preserve_rng_state = preserve_rng_state
        self.weight_grads = weight_grads
        self._fn = fn
        self._memo = Memo(turn=hasattr(fn, "num_timesteps"))

    def forward(self, *xin: Any) -> Any:
        """Calls `fn`, and returns its output; a tuple of one output is unpacked."""
        if self.disable:
            return _unpacked(self._fn(*xin) if callable(self._fn) else self._fn.forward(*xin))
        return self._run(xin, False, self.keep_input)

    def inverse(self, *yin: Any) -> Any:
        """Calls `fn.inverse`, and returns its output; it is differentiated in the same way as `forward`."""
        if self.disable:
            return _unpacked(self._fn.inverse(*yin))
        return self._run(yin, True, self.keep_input_inverse)

    def _run(self, inputs: Values, inverse: bool, keep: bool) -> Any:
        """Does one call as a node of the graph, by the operation that the module defines or by plain autograd."""
        operation = operation_of(self._fn, inputs, inverse)
        if operation is None:
            plain = Plain(self._fn, inputs, inverse, self.preserve_rng_state, self.weight_grads, self._memo)
            return _unpacked(apply(plain, inputs, keep, self.num_bwd_passes))
        if self.weight_grads:
            raise ValueError(f"weight_grads: {type(self._fn).__name__} treats weights as constants; expected False")
        return _unpacked(apply(operation, inputs, keep, self.num_bwd_passes))


def _unpacked(outputs: Any) -> Any:
    """Returns the only element of a tuple of one, and anything else as it is."""
    return outputs[0] if isinstance(outputs, tuple) and len(outputs) == 1 else outputs


def is_invertible_module(
    module_in: Any,
    test_input_shape: Shape | Sequence[Shape],
    test_input_dtype: torch.dtype = torch.float32,
    atol: float = 1e-6,
    random_seed: int = 42,
) -> bool:
    """Returns whether a module's `inverse` undoes its `forward`, and `forward` its `inverse`, on random inputs.

    The global random state is left as it was.

    Args:
        module_in: A module, or a wrapper whose module is tested.
        test_input_shape: The shape of its input, or a sequence of the shapes of its inputs.
        test_input_dtype: The dtype of the inputs.
        atol: The largest absolute difference that is allowed, besides a relative one of 1e-5.
        random_seed: The seed of the inputs.

    Raises:
        ValueError: `test_input_shape` is something else.
    """
    module = module_in._fn if isinstance(module_in, InvertibleModuleWrapper) else module_in
    if not hasattr(module, "inverse"):
        return False
    generator = torch.Generator().manual_seed(random_seed)
    inputs = tuple(torch.rand(s, generator=generator, dtype=test_input_dtype) for s in _shapes(test_input_shape))
    with torch.no_grad():
        outputs = as_tuple(module.forward(*inputs))
        again = as_tuple(module.inverse(*outputs))
        return _close(again, inputs, atol) and _close(as_tuple(module.forward(*again)), outputs, atol)


def _shapes(value: Any) -> list[tuple[int, ...]]:
    """Returns one or several shapes as a list of tuples."""
    is_shape: Callable[[Any], bool] = lambda v: isinstance(v, (tuple, list)) and all(isinstance(n, int) for n in v)  # noqa: E731
    if is_shape(value) and len(value):
        return [tuple(value)]
    if isinstance(value, (tuple, list)) and len(value) and all(map(is_shape, value)):
        return [tuple(shape) for shape in value]
    raise ValueError(f"test_input_shape: expected a shape such as (2, 4, 8, 8), or a sequence of them, got {value!r}")


def _close(got: Values, want: Values, atol: float) -> bool:
    """Returns whether there are as many values as wanted, and all tensors among them are close."""
    pairs = list(zip(got, want, strict=False))
    return len(got) == len(want) and all(torch.allclose(a, b, atol=atol) for a, b in pairs if isinstance(b, Tensor))
