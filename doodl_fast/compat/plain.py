"""A call of any module that has an inverse, differentiated by running it again under plain autograd."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..diffusion.networks import HALF_DTYPES, without_weight_grad
from .reversible import Gradients, Guard, Values

T = TypeVar("T")
TOLERANCES = {True: 0.05, False: 1e-3}
"""The largest relative error (2-norm) of outputs that are computed from rebuilt inputs, for half precision (True) and
other dtypes. The rounding of one call is far below it, and the error of a wrong inverse far above."""


@dataclass
class Memo:
    """What the calls of one wrapper have found out about its module.

    Attributes:
        turn: Whether the module's inverse counts steps from the other end. This is a guess at first.
    """

    turn: bool


class Plain:
    """One call of `fn.forward` or `fn.inverse`, as an `Operation`.

    Args:
        fn: The module.
        inputs: The inputs of the call.
        inverse: Whether `fn.inverse` is called, and not `fn.forward`.
        preserve_rng_state: Whether the call, when it is repeated, draws the same random numbers.
        weight_grads: Whether gradients of the module's weights are computed.
        memo: What earlier calls of the same wrapper have found out.
    """

    rebuilds = True
    wide = False

    def __init__(
        self, fn: Any, inputs: Values, inverse: bool, preserve_rng_state: bool, weight_grads: bool, memo: Memo
    ) -> None:
        self.fn, self.memo = fn, memo
        self.forwards: Callable[..., Any] = fn.inverse if inverse else fn.forward
        self.backwards: Callable[..., Any] = fn.forward if inverse else fn.inverse
        weights = fn.parameters() if weight_grads and isinstance(fn, nn.Module) else ()
        self.others: tuple[Tensor, ...] = tuple(weight for weight in weights if weight.requires_grad)
        devices = {value.device for value in inputs if isinstance(value, Tensor)}
        self.surroundings = Surroundings(devices, preserve_rng_state)
        self.rest: Values = ()  # These are the inputs beyond the number of outputs.

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        """Calls the module; see `Operation.run`."""
        outputs = as_tuple(self.forwards(*inputs))
        self.rest = inputs[len(outputs) :]
        return outputs, (inputs, Guard(inputs)) if keep else outputs

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Computes gradients by calling the module again with the inputs that were kept; see `Operation.pull`."""
        inputs, guard = kept
        guard.check()
        return self._pull(inputs, cotangents, needs)[1]

    def undo(self, outputs: Values) -> Values:
        """Returns the inputs that led to these outputs. Raises RuntimeError if the module's inverse is wrong."""
        return self._first_right(outputs, lambda inputs: (self._again(inputs), inputs))

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """Rebuilds the inputs and computes gradients. Raises RuntimeError if the module's inverse is wrong."""

        def pull(inputs: Values) -> tuple[Values, tuple[Values, Gradients]]:
            again, gradients = self._pull(inputs, cotangents, needs)
            return again, (inputs, gradients)

        return self._first_right(outputs, pull)

    def _first_right(self, outputs: Values, use: Callable[[Values], tuple[Values, T]]) -> T:
        """Rebuilds the inputs, hands them to `use`, and returns its result once they are known to be right.

        The inverse of a layer that counts steps may expect the index of a loop in the opposite direction, as that of
        DOODL's does. Both are tried, beginning with what was right before.

        Args:
            outputs: The outputs of the call.
            use: Takes rebuilt inputs. Returns the outputs that they lead to, which are compared with those of the call,
                and its result.

        Raises:
            RuntimeError: The rebuilt inputs do not lead to the outputs.
        """
        turnable = hasattr(self.fn, "num_timesteps") and len(outputs) > 1
        for turn in (self.memo.turn, not self.memo.turn) if turnable else (False,):
            again, result = use(self._undo(outputs, turn))
            if _distance(again, outputs) <= _tolerance(outputs):
                self.memo.turn = turn
                return result
        raise RuntimeError(
            f"{type(self.fn).__name__}.inverse does not undo its forward, so a gradient from rebuilt inputs would be "
            "wrong; use keep_input=True (keep_input_inverse=True for calls of inverse), which needs no inverse"
        )

    def _undo(self, outputs: Values, turn: bool) -> Values:
        """Rebuilds the inputs by the module's own inverse.

        Args:
            outputs: The outputs of the call.
            turn: Whether the inverse is given the index, which is the first value, counted from the other end.
        """
        given = (self.fn.num_timesteps - (outputs[0] + 1), *outputs[1:]) if turn else outputs
        with self.surroundings.again():
            inputs = (*as_tuple(self.backwards(*given, *self.rest))[: len(outputs)], *self.rest)
        return (outputs[0], *inputs[1:]) if turn else inputs

    def _again(self, inputs: Values) -> Values:
        """Repeats the call, and returns its outputs."""
        with self.surroundings.again():
            return as_tuple(self.forwards(*inputs))

    def _pull(
        self, inputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """Repeats the call with a graph, and returns its outputs and the gradients."""
        leaves = list(inputs)
        for index, needed in enumerate(needs[: len(inputs)]):
            if needed:
                leaves[index] = inputs[index].detach().requires_grad_()
        frozen = [self.fn] if isinstance(self.fn, nn.Module) and not self.others else []
        with torch.enable_grad(), self.surroundings.again(), without_weight_grad(*frozen):
            outputs = as_tuple(self.forwards(*leaves))
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs, cotangents, strict=True)
            if cotangent is not None and isinstance(output, Tensor) and output.requires_grad
        ]
        wanted = [value for value, needed in zip((*leaves, *self.others), needs, strict=True) if needed]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if pairs and wanted:
            found = torch.autograd.grad([p[0] for p in pairs], wanted, [p[1] for p in pairs], allow_unused=True)
        left = iter(found)
        return outputs, [next(left) if needed else None for needed in needs]


class Surroundings:
    """The autocast of a call and, on request, its random state, which are restored when the call is repeated.

    Args:
        devices: The devices of the inputs.
        preserve_rng_state: Whether the random state is recorded.
    """

    def __init__(self, devices: set[torch.device], preserve_rng_state: bool) -> None:
        self._autocasts = []
        for kind in {"cpu", *(device.type for device in devices)}:
            if torch.amp.is_autocast_available(kind):
                enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
                self._autocasts.append((kind, dtype, enabled, torch.is_autocast_cache_enabled()))
        self._cuda = sorted(device.index for device in devices if device.type == "cuda")
        self._states: list[Tensor] | None = None
        if preserve_rng_state:
            self._states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in self._cuda)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The context in which the call is repeated."""
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled, cache in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, cache))
            if self._states is not None:
                stack.enter_context(torch.random.fork_rng(devices=self._cuda))
                torch.set_rng_state(self._states[0])
                for index, state in zip(self._cuda, self._states[1:], strict=True):
                    torch.cuda.set_rng_state(state, index)
            yield


def as_tuple(outputs: Any) -> Values:
    """Returns a tuple or list as a tuple, and any other object as a tuple of one."""
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _distance(got: Values, want: Values) -> float:
    """Returns the largest relative difference (2-norm) between the floating tensors of two results."""
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if isinstance(b, Tensor) and b.is_floating_point() and b.numel():
            wide = torch.promote_types(b.dtype, torch.float32)
            norm = b.to(wide).norm().clamp_min(torch.finfo(wide).tiny)
            worst = max(worst, float((a.detach().to(wide) - b.to(wide)).norm() / norm))
    return worst


def _tolerance(outputs: Values) -> float:
    """Returns the largest difference that is taken for rounding."""
    return TOLERANCES[any(isinstance(o, Tensor) and o.dtype in HALF_DTYPES for o in outputs)]
