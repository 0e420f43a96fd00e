"""One call of a reversible operation as a node of the caller's graph: what it keeps, rebuilds and differentiates.

A node that keeps its inputs needs no inverse. One that does not keeps its outputs instead, and lets go of those that
another such node takes as its inputs: that node will have rebuilt them by the time they are needed, as a backward pass
visits it first (the memory of reversible networks: Gomez et al., arXiv 1707.04585; for DOODL: arXiv 2303.13703). So a
loop over any number of steps holds one state, and no tensor of the caller's is freed or changed for it.
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
    """Something reversible that is done once, to given inputs; they may be anything, as may the outputs."""

    rebuilds: bool
    """Whether inputs can be had back from outputs precisely enough for a gradient."""
    wide: bool
    """Whether it takes and returns values of higher precision than the caller's between calls that rebuild: rounding to
    the caller's dtype after each of many calls could not be undone."""
    others: tuple[Tensor, ...]
    """What it depends on besides its inputs and may have to give gradients to."""

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        """The outputs, and, if `keep`, what `pull` will need, else the outputs as precise as there are.

        Called without grad mode.
        """
        ...

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Gradients of inputs and `others`, where needed."""
        ...

    def undo(self, outputs: Values) -> Values:
        """The inputs again."""
        ...

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """The inputs again, and the gradients."""
        ...


class ReversibleLayer(nn.Module):
    """A module that says by itself how its calls are undone and differentiated.

    A subclass that overrides `forward` or `inverse` is treated as any other module; see `operation_of`.
    """

    def operation(self, inputs: Values, inverse: bool) -> Operation:
        raise NotImplementedError


def operation_of(fn: Any, inputs: Values, inverse: bool) -> Operation | None:
    """What `fn`, called with these inputs, does in its own way; None for modules that have none, and for subclasses
    that redefine a direction without redefining that."""
    if isinstance(fn, ReversibleLayer):
        for cls in type(fn).__mro__:
            if "operation" in vars(cls):
                return fn.operation(inputs, inverse)
            if "forward" in vars(cls) or "inverse" in vars(cls):
                break
    return None


def apply(operation: Operation, inputs: Values, keep: bool = True, passes: int = 1) -> Values:
    """The operation's outputs, differentiable if any of its inputs or `others` is.

    keep: whether to hold what the gradient needs, instead of rebuilding it. passes: how many backward passes may go
    through; after the last of them nothing is held any more.
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
    """Notices in-place changes of tensors that a gradient will read again, as autograd does for its own."""

    def __init__(self, values: Values) -> None:
        self._noted = [(value.detach(), version_of(value)) for value in values if isinstance(value, Tensor)]

    def check(self) -> None:
        for tensor, version in self._noted:
            if version_of(tensor) != version:
                raise RuntimeError(
                    f"a tensor of shape {tuple(tensor.shape)} that an invertible module depends on was changed in "
                    "place between its call and the backward pass; change a clone of it"
                )


class Slot:
    """An output that a call needs for its backward pass, or who will rebuild it.

    value: the output, perhaps more precise than the caller got it. given: what he got.
    """

    def __init__(self, value: Any, given: Any) -> None:
        self.value: Any = value.detach() if isinstance(value, Tensor) else value
        self.dtype = value.dtype if isinstance(value, Tensor) else None
        self.noted, self.version = version_of(value), version_of(given)
        self.supplier: Call | None = None

    def get(self) -> Any:
        if self.value is None and self.supplier is not None:
            self.supplier.supply()
        if self.supplier is None and version_of(self.value) != self.noted:
            raise RuntimeError(
                "an output of an invertible module was changed in place after the call, so its inputs cannot be "
                "rebuilt from it; change a clone, or use keep_input=True"
            )
        return self.value

    def release(self, supplier: Call) -> None:
        self.value, self.supplier = None, supplier

    def fill(self, value: Tensor) -> None:
        self.value = value.detach().to(self.dtype)

    def done(self) -> None:
        """Lets go of a rebuilt value."""
        if self.supplier is not None:
            self.value = None


class Call:
    """What one call holds for its backward passes."""

    def __init__(self, operation: Operation, keep: bool, passes: int) -> None:
        self.operation, self.keep, self.passes = operation, keep, passes
        self.kept: Any = None
        self.slots: list[Slot] = []
        # weak: a slot knows who rebuilds it, and its own call outlives this one's graph
        self.sources: list[weakref.ref[Slot] | None] = []
        self.guard = Guard(operation.others)

    def origins(self, inputs: Values) -> list[Slot | None]:
        """The slots of those inputs that are outputs of calls which rebuild, if this one does."""
        slots: list[Slot | None] = [None if self.keep else getattr(value, "_doodl_slot", None) for value in inputs]
        return [
            slot if slot is not None and slot.version == version_of(value) else None
            for slot, value in zip(slots, inputs, strict=True)
        ]

    def link(self, inputs: Values, outputs: Values) -> None:
        """Gives every output a slot, and takes over those of the inputs."""
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
        if not self.slots:
            raise RuntimeError(_EXHAUSTED)
        return tuple(slot.get() for slot in self.slots)

    def supply(self) -> None:
        """Rebuilds the inputs outside a backward pass of this call."""
        with torch.no_grad():
            self._hand_back(self.operation.undo(self.outputs()))

    def _hand_back(self, inputs: Values) -> None:
        for source, value in zip(self.sources, inputs, strict=True):
            target = source() if source is not None else None
            if target is not None:
                target.fill(value)

    def backward(self, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
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
    """A call in the caller's graph.

    It keeps to the side of autograd's own storage, which a first `.backward()` frees: `passes` of them may come.
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
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
