"""One call of a reversible operation as a node of the caller's autograd graph.

A node either keeps its inputs, and then needs no inverse, or it keeps its outputs and rebuilds its inputs from them in
the backward pass. If the outputs of a node are the inputs of another node that rebuilds, the first node does not keep
them: the backward pass visits the second node first, which will have rebuilt them by then. A loop over any number of
steps therefore holds a single state. This is how reversible networks save memory (Gomez et al., arXiv 1707.04585), and
DOODL uses it for diffusion (arXiv 2303.13703). No tensor of the caller's is freed or changed for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Values = tuple[Any, ...]
Gradients = list[Tensor | None]


class Operation(Protocol):
    """One call of something reversible. Inputs and outputs may be tensors or any other objects.

    All methods are called with grad mode off.

    Attributes:
        rebuilds: Whether inputs can be rebuilt from outputs precisely enough for a gradient.
        wide: Whether calls that rebuild hand each other values in a higher precision than the caller's. Rounding them
            to the caller's dtype after each of many calls could not be undone.
        others: The tensors besides the inputs that the outputs depend on and that may need gradients.
    """

    rebuilds: bool
    wide: bool
    others: tuple[Tensor, ...]

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        """Does the call.

        Args:
            inputs: The inputs of the call.
            keep: Whether the gradient will be computed by `pull`, without rebuilding the inputs.

        Returns:
            The outputs, and then what `pull` will need if `keep` is set, or else the outputs in the highest precision
            that there is.
        """
        ...

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Computes gradients from what `run` kept.

        Args:
            kept: The second value that `run` returned.
            cotangents: One for each output, or None.
            needs: For each of the inputs, and then each of `others`, whether it needs a gradient.

        Returns:
            A gradient or None for each of the inputs, and then each of `others`.
        """
        ...

    def undo(self, outputs: Values) -> Values:
        """Returns the inputs that led to these outputs."""
        ...

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """Returns the inputs that led to these outputs, and the gradients as `pull` returns them."""
        ...


class ReversibleLayer(nn.Module):
    """A module that defines by itself how its calls are undone and differentiated.

    A subclass that overrides `forward` or `inverse` without overriding `operation` is treated like any other module.
    """

    def operation(self, inputs: Values, inverse: bool) -> Operation:
        """Returns what one call does.

        Args:
            inputs: The inputs of the call.
            inverse: Whether `inverse` is called, and not `forward`.
        """
        raise NotImplementedError


def operation_of(fn: Any, inputs: Values, inverse: bool) -> Operation | None:
    """Returns the `Operation` of a call of `fn`, or None if `fn` does not define one.

    A subclass of `ReversibleLayer` that redefines `forward` or `inverse`, and not `operation`, does not define one.
    """
    if isinstance(fn, ReversibleLayer):
        for cls in type(fn).__mro__:
            if "operation" in vars(cls):
                return fn.operation(inputs, inverse)
            if "forward" in vars(cls) or "inverse" in vars(cls):
                break
    return None


def apply(operation: Operation, inputs: Values, keep: bool = True, passes: int = 1) -> Values:
    """Does an operation, as a node of the autograd graph if any of its inputs or `others` requires grad.

    Args:
        operation: The operation.
        inputs: Its inputs.
        keep: Whether to keep what the gradient needs, instead of rebuilding it.
        passes: How many backward passes may go through the node. After the last one nothing is kept any more.

    Returns:
        The outputs.
    """
    tensors = [value for value in (*inputs, *operation.others) if isinstance(value, Tensor)]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        with torch.no_grad():
            return operation.run(inputs, keep=False)[0]
    call = Call(operation, keep or not operation.rebuilds, passes)
    run: Callable[..., Values] = Node.apply
    outputs = run(call, call.origins(inputs), *inputs, *operation.others)
    call.link(inputs, outputs)
    return outputs


class Guard:
    """Notices in-place changes of tensors that a gradient will read again, as autograd does for those it saves."""

    def __init__(self, values: Values) -> None:
        self._noted = [(value.detach(), version_of(value)) for value in values if isinstance(value, Tensor)]

    def check(self) -> None:
        """Raises RuntimeError if one of the tensors was changed in place."""
        for tensor, version in self._noted:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that an invertible module depends on was changed in "
                    "place between its call and the backward pass; change a clone of it"
                )


class Slot:
    """An output that a call needs for its backward pass, or the call that will rebuild it.

    Args:
        value: The output, which may be more precise than the one that the caller got.
        given: The output that the caller got.
    """

    def __init__(self, value: Any, given: Any) -> None:
        self.value: Any = value.detach() if isinstance(value, Tensor) else value
        self.dtype = value.dtype if isinstance(value, Tensor) else None
        self.noted, self.version = version_of(value), version_of(given)
        self.supplier: Call | None = None

    def get(self) -> Any:
        """Returns the output, which is rebuilt if it is not there. Raises RuntimeError if it was changed in place."""
        if self.value is None and self.supplier is not None:
            self.supplier.supply()
        if self.supplier is None and version_of(self.value) != self.noted:
            raise RuntimeError(
                "an output of an invertible module was changed in place after the call, so its inputs cannot be "
                "rebuilt from it; change a clone, or use keep_input=True"
            )
        return self.value

    def release(self, supplier: Call) -> None:
        """Drops the output, which `supplier` will rebuild."""
        self.value, self.supplier = None, supplier

    def fill(self, value: Tensor) -> None:
        """Stores the rebuilt output."""
        self.value = value.detach().to(self.dtype)

    def done(self) -> None:
        """Drops a rebuilt output. One that was never dropped stays."""
        if self.supplier is not None:
            self.value = None


class Call:
    """What one call holds for its backward passes.

    Args:
        operation: What the call does.
        keep: Whether it keeps what the gradient needs, instead of rebuilding it.
        passes: How many backward passes may go through.
    """

    def __init__(self, operation: Operation, keep: bool, passes: int) -> None:
        self.operation, self.keep, self.passes = operation, keep, passes
        self.kept: Any = None
        self.slots: list[Slot] = []
        # These references are weak, because a slot refers to the call that rebuilds it: this one. Strong ones would be
        # a cycle.
        self.sources: list[weakref.ref[Slot] | None] = []
        self.guard = Guard(operation.others)

    def origins(self, inputs: Values) -> list[Slot | None]:
        """Returns, for each input, its slot if it is an unchanged output of a call that rebuilds, or else None.

        If this call does not rebuild its inputs, there are no slots.
        """
        slots: list[Slot | None] = [None if self.keep else getattr(value, "_doodl_slot", None) for value in inputs]
        return [
            slot if slot is not None and slot.version == version_of(value) else None
            for slot, value in zip(slots, inputs, strict=True)
        ]

    def link(self, inputs: Values, outputs: Values) -> None:
        """Gives every output a slot, and releases the slots of the inputs, which this call will rebuild."""
        if self.keep:
            return
        self.slots = [Slot(value, output) for value, output in zip(self.kept, outputs, strict=True)]
        self.kept = None
        for output, slot in zip(outputs, self.slots, strict=True):
            if isinstance(output, Tensor) and output.requires_grad:
                output._doodl_slot = slot  # type: ignore[attr-defined]
        for origin in self.origins(inputs):
            self.sources.append(None if origin is None else weakref.ref(origin))
            if origin is not None:
                origin.release(self)

    def outputs(self) -> Values:
        """Returns the outputs of the call. Raises RuntimeError if the last backward pass is over."""
        if not self.slots:
            raise RuntimeError(_EXHAUSTED)
        return tuple(slot.get() for slot in self.slots)

    def supply(self) -> None:
        """Rebuilds the inputs for the call that they came from, outside a backward pass of this one."""
        with torch.no_grad():
            self._hand_back(self.operation.undo(self.outputs()))

    def _hand_back(self, inputs: Values) -> None:
        """Stores rebuilt inputs in the slots of the calls that they came from."""
        for source, value in zip(self.sources, inputs, strict=True):
            target = source() if source is not None else None
            if target is not None:
                target.fill(value)

    def backward(self, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Computes the gradients of inputs and `others`. Raises RuntimeError after more passes than were allowed."""
        if self.passes == 0:
            raise RuntimeError(_EXHAUSTED)
        self.guard.check()
        self.passes -= 1
        if self.keep:
            gradients = self.operation.pull(self.kept, cotangents, needs)
        else:
            inputs, gradients = self.operation.undo_and_pull(self.outputs(), cotangents, needs)
            self._hand_back(inputs)
            for slot in self.slots:
                slot.done()
        if self.passes == 0:
            self.kept, self.slots, self.guard = None, [], Guard(())
        return gradients


_EXHAUSTED = (
    "this invertible module's outputs were differentiated before, and what their gradient needs was let go of after "
    "the last pass that num_bwd_passes allows; raise num_bwd_passes"
)


class Node(torch.autograd.Function):
    """The node of a call in the caller's graph.

    What a `Call` holds is not in autograd's own storage, because the first `.backward()` frees that, and more than one
    may be allowed.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, origins: list[Slot | None], *values: Any) -> Values:
        given = (
            slot.value if slot is not None and slot.value is not None and call.operation.wide else value
            for slot, value in zip(origins, values, strict=False)
        )
        inputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in given)
        outputs, call.kept = call.operation.run(inputs, call.keep)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(
            *(o for o in outputs if isinstance(o, Tensor) and not (o.is_floating_point() or o.is_complex()))
        )
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> Values:
        with torch.no_grad():
            return None, None, *ctx.call.backward(cotangents, ctx.needs_input_grad[2:])


def version_of(value: Any) -> int:
    """Returns autograd's count of the in-place changes of a tensor; 0 for objects that have none."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
