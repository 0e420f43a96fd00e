"""One call of a network, with or without its vector-Jacobian product (VJP), recorded and replayed on any inputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graph_recorder import Recorder


class Shared:
    """What all recordings of one recorder have in common.

    Attributes:
        recorder: It makes the recordings.
        turn: Counts the replays. A recording's intermediate results are valid until the next replay of any recording.
        lock: Held while inputs are copied in, kernels are launched and results are copied out, so that the replays of
            several threads do not mix.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.turn, self.lock = recorder, 0, threading.RLock()


class RecordedCall:
    """A recorded function of tensors. It is called with tensors of the same shapes, and is differentiable once.

    The intermediate results of the latest replay alone are there for a gradient. If another replay came between, the
    recording is replayed for the same inputs again, so the inputs are all that an evaluation keeps.

    Args:
        shared: What it has in common with other recordings.
        function: Called with tensors like `inputs`, returns a tensor.
        inputs: Example inputs.
        wanted: Which of them want gradients. If none does, the call is recorded without a graph.

    Raises:
        RuntimeError: The function does something that cannot be recorded, such as waiting for the device.
    """

    def __init__(
        self, shared: Shared, function: Callable[..., Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
    ) -> None:
        self._shared = shared
        # They are made outside of a recording, so they are no part of the memory that recordings share.
        self._inputs = [x.detach().clone().requires_grad_(want) for x, want in zip(inputs, wanted, strict=True)]
        self._leaves = [x for x in self._inputs if x.requires_grad]
        self._latest: list[tuple[weakref.ref[Tensor], int] | None] = [None] * len(self._inputs)
        versions = [x._version for x in self._inputs]
        self._output: Tensor | None = None
        self._cotangent: Tensor | None = None

        def forward() -> Tensor:
            with torch.set_grad_enabled(bool(self._leaves)):
                self._output = function(*self._inputs)
            return self._output.detach()

        def backward() -> tuple[Tensor | None, ...]:
            assert self._output is not None
            found: tuple[Tensor | None, ...] = torch.autograd.grad(
                self._output, self._leaves, self._cotangent, allow_unused=True
            )
            return found

        def both() -> None:
            value = forward()
            if self._leaves:
                self._cotangent = torch.zeros_like(value)
                backward()

        with shared.lock:
            shared.recorder.warm_up(both)
            self._output = None
            self._replay_forward, self._value = shared.recorder.record(forward)
            if self._leaves:
                self._replay_backward, self._gradients = shared.recorder.record(backward)
            shared.turn += 1
        self._stay = [x._version == version for x, version in zip(self._inputs, versions, strict=True)]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's value, a tensor of its own."""
        if self._leaves:
            result: Tensor = _Replay.apply(self, *inputs)  # type: ignore[no-untyped-call]
            return result
        return self.forward(inputs)[0]

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
        """Replays the call. Returns the value, and the number of the replay."""
        with torch.no_grad(), self._shared.lock:
            for index, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
                latest = self._latest[index]
                # Conditions are the same tensors in all evaluations of a run, and are copied once, unless the function
                # changes what it is given.
                if latest is None or latest[0]() is not given or latest[1] != given._version:
                    own.copy_(given)
                    keeps = self._stay[index] and not given.is_inference()
                    self._latest[index] = (weakref.ref(given), given._version) if keeps else None
            self._replay_forward()
            self._shared.turn += 1
            return self._value.clone(), self._shared.turn

    def backward(self, turn: int, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
        """Replays the VJP of the call that had a number, after that call itself if its results are not there any more.

        Args:
            turn: The number of the call.
            inputs: Its inputs.
            cotangent: That of its value.
        """
        assert self._cotangent is not None
        with torch.no_grad(), self._shared.lock:
            if turn != self._shared.turn:
                self.forward(inputs)
            self._cotangent.copy_(cotangent)
            self._replay_backward()
            self._shared.turn += 1  # The VJP overwrites what it has read.
            found = iter([None if grad is None else grad.clone() for grad in self._gradients])
        return [next(found) if own.requires_grad else None for own in self._inputs]


class _Replay(torch.autograd.Function):
    """A replayed call as a node of autograd's graph, which keeps the inputs alone."""

    @staticmethod
    def forward(ctx: Any, recorded: RecordedCall, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.recorded = recorded
        value, ctx.turn = recorded.forward(inputs)
        return value

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recorded.backward(ctx.turn, ctx.saved_tensors, cotangent)
