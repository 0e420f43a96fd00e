"""The `Operation`s that calls of the reference's layers consist of: short runs of a chain's program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..chain.arithmetic import Eps, Floats, Group, group
from ..chain.checks import Trust
from ..chain.evaluator import Evaluator
from ..chain.factory import NO_FLOAT64
from ..chain.program import Program, invert
from ..chain.pull import NetworkPull
from ..chain.run import ProgramRun
from ..chain.walk import walk_backwards
from ..diffusion.networks import HALF_DTYPES
from .noise import LayerNoise
from .reversible import Gradients, Values
from .schedule import rounded_step


class Step:
    """One call of a `SteppingLayer`, as an `Operation` on (i, t, pair, further inputs).

    Args:
        evaluator: The function that predicts the noise.
        program: The couplings of the step, or of its inverse.
        alphas: The cumulative alphas that the step goes from and to.
        dtype: The dtype of the caller's latents.
        single: Whether the first latent stands for both.
        half_updates: Whether fp16 and bf16 latents are updated in their own dtype (`Quirks.half_updates`).
    """

    wide = True

    def __init__(
        self,
        evaluator: Evaluator,
        program: Program,
        alphas: tuple[float, float],
        dtype: torch.dtype,
        single: bool,
        half_updates: bool,
    ) -> None:
        self.evaluator, self.program, self.alphas, self.single = evaluator, program, alphas, single
        self.dtype = dtype
        self.rounded = half_updates and dtype in HALF_DTYPES
        self.rebuilds = not single and dtype not in HALF_DTYPES
        self.others = () if isinstance(evaluator, LayerNoise) else evaluator.tensors()

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        """Does the step; see `Operation.run`."""
        run = self.latest = self._new_run(inputs[2], keep)
        tensors = self.evaluator.tensors()
        pair, sources = self._through(run, inputs[2], tensors)
        outputs = (*map(clone, inputs[:2]), pair.to(self.dtype), *inputs[3:])
        return outputs, (run, sources, tensors) if keep else (*outputs[:2], pair, *outputs[3:])

    def undo(self, outputs: Values) -> Values:
        """Returns the inputs that led to these outputs."""
        program = invert(self.program)
        run = replace(self.latest, program=program, groups=group(program))
        with run.calling():
            pair, _ = self._through(run, outputs[2], self.evaluator.tensors())
        return (*outputs[:2], pair, *outputs[3:])

    def _new_run(self, pair: Tensor, keep: bool) -> ProgramRun:
        """Returns a run of the program. Its state has a wider dtype if inputs will be rebuilt from it."""
        state_dtype = torch.promote_types(torch.float32, self.dtype)
        if self.rebuilds and not keep:
            state_dtype = wide_dtype(pair)
        new: Callable[[], Floats] = functools.partial(Floats, self.dtype, state_dtype)
        if self.rounded:
            new = functools.partial(Rounded, self.dtype, state_dtype, self.alphas)
        like = pair.new_empty(0, dtype=self.dtype)
        return ProgramRun.create(self.evaluator, self.program, "checkpoint", like, state_dtype, new, keep, Trust())

    def _through(self, run: ProgramRun, pair: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns the pair after the run, in the dtype of the run's state, and the sources that the run stored."""
        x, y = pair.chunk(2)
        state = [half.to(run.state_dtype, copy=True) for half in (x, x if self.single else y)]
        with run.evaluator.running():
            sources = run.forward(run.new_arithmetic(), state, tensors).tensors
        return torch.cat([state[0], state[0]] if self.single else state), sources

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Computes gradients from the sources that `run` stored; see `Operation.pull`."""
        run, sources, tensors = kept
        if cotangents[2] is None:
            return self._gradients(None, [], cotangents, needs)
        to_pair, sums = self._back(run, list(sources), None, tensors, cotangents[2], needs)
        return self._gradients(to_pair, sums, cotangents, needs)

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """Rebuilds the inputs and computes gradients with one network evaluation for each coupling.

        The evaluation's value undoes the coupling, and its graph gives the vector-Jacobian product.
        """
        if cotangents[2] is None:
            return self.undo(outputs), self._gradients(None, [], cotangents, needs)
        run = self.latest
        state = [half.to(run.state_dtype) for half in outputs[2].chunk(2)]
        to_pair, sums = self._back(run, [], state, self.evaluator.tensors(), cotangents[2], needs)
        return (*outputs[:2], torch.cat(state), *outputs[3:]), self._gradients(to_pair, sums, cotangents, needs)

    def _back(
        self,
        run: ProgramRun,
        sources: list[Tensor],
        state: list[Tensor] | None,
        tensors: Sequence[Tensor],
        cotangent: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Pulls a cotangent of the pair back through the couplings.

        Args:
            run: The forward run.
            sources: The stored sources of the couplings, in the order of the program. Each one used is removed.
            state: If there are no sources: x and y after the run. They are replaced by those before it.
            tensors: The evaluator's tensors.
            cotangent: The cotangent of the pair after the run.
            needs: Which of the inputs and `others` need a gradient.

        Returns:
            The gradient of the pair before the run, and those of the evaluator's tensors that need one.
        """
        pulled = [half.to(run.state_dtype) for half in self._enter(cotangent)]
        work = run.new_arithmetic()
        with run.evaluator.running():
            pull = NetworkPull(run, tensors, self._wanted(needs))
            for half in pulled:
                pull.watch.note(half, None)

            def visit(passed: Group, source: Tensor | None) -> Eps | None:
                return pull(sources.pop() if source is None else source, passed, pulled, undoing=state is not None)

            for _ in walk_backwards(run.groups, work, state or [], visit):
                pass
        pull.watch.read()
        pull.watch.check()
        return self._leave(pulled), pull.sums

    # The methods below translate between the layer's inputs and x, y and the evaluator's tensors, which a run works on.

    def _enter(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cotangents of x and y after the run."""
        to_x, to_y = cotangent.chunk(2)
        return (to_x + to_y, torch.zeros_like(to_y)) if self.single else (to_x, to_y)

    def _leave(self, pulled: list[Tensor]) -> Tensor:
        """Returns the gradient of the input pair, from those of x and y before the run."""
        to_x, to_y = pulled
        return torch.cat([to_x + to_y, torch.zeros_like(to_y)] if self.single else pulled)

    def _wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Returns which of the evaluator's tensors need a gradient."""
        return [needs[place] for place in self._places(needs)]

    def _places(self, needs: Sequence[bool]) -> list[int]:
        """Returns where the evaluator's tensors stand among the inputs and `others`."""
        if isinstance(self.evaluator, LayerNoise):
            return [3 + place for place in self.evaluator.places]
        return list(range(len(needs) - len(self.others), len(needs)))

    def _gradients(
        self,
        to_pair: Tensor | None,
        sums: list[Tensor | None],
        cotangents: Sequence[Tensor | None],
        needs: Sequence[bool],
    ) -> Gradients:
        """Puts the gradients in the order of the inputs and `others`.

        Args:
            to_pair: The gradient of the pair.
            sums: The gradients of the evaluator's tensors that need one.
            cotangents: The cotangents of the outputs. An input that is also an output gets its cotangent as well.
            needs: Which of the inputs and `others` need a gradient.
        """
        gradients: Gradients = [*cotangents, *[None] * (len(needs) - len(cotangents))]
        gradients[2] = to_pair
        wanted = [place for place in self._places(needs) if needs[place]]
        for place, total in zip(wanted, sums, strict=False):
            if total is not None:
                passed = gradients[place]
                gradients[place] = total if passed is None else passed + total
        return [gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)]


@dataclass(frozen=True)
class Rounded(Floats):
    """The arithmetic of `Quirks.half_updates`: guidance and every term of a step are rounded to fp16 or bf16.

    Attributes:
        alphas: The cumulative alphas that the step goes from and to.
    """

    alphas: tuple[float, float]

    def apply(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        """Does one coupling in place of the fused operator."""
        assert eps is not None
        value, g = eps
        noise = value.to(self.latents_dtype)
        if g is not None:
            uncond, cond = noise.chunk(2)
            noise = uncond + g * (cond - uncond)
        target = state[group.target].to(self.latents_dtype)
        state[group.target] = rounded_step(target, noise, *self.alphas).to(self.state_dtype)


class Mix:
    """One call of a `MixingLayer` or of its inverse, as an `Operation`.

    The mixing is linear, so its gradient needs neither inputs nor outputs.

    Args:
        p: The mixing weight.
        dtype: The dtype of the caller's latents.
        inverse: Whether the mixing is undone.
        half_updates: Whether fp16 and bf16 latents are mixed in their own dtype (`Quirks.half_updates`).
    """

    others: tuple[Tensor, ...] = ()
    wide = True

    def __init__(self, p: float, dtype: torch.dtype, inverse: bool, half_updates: bool) -> None:
        mixing = ops.Mixing(True, p, 1 - p, p, 1 - p)
        self.mixing, self.undoing = (mixing.inverse(), mixing) if inverse else (mixing, mixing.inverse())
        self.dtype = dtype
        self.rounded = half_updates and dtype in HALF_DTYPES
        self.rebuilds = dtype not in HALF_DTYPES

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        """Mixes the pair; see `Operation.run`."""
        pair = inputs[0] if keep or not self.rebuilds else inputs[0].to(wide_dtype(inputs[0]))
        pair = self._mixed(pair, self.mixing)
        return (pair.to(self.dtype),), None if keep else (pair,)

    def undo(self, outputs: Values) -> Values:
        """Returns the pair before the mixing."""
        return (self._mixed(outputs[0], self.undoing),)

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        """Computes the gradient of the pair by the transposed mixing; see `Operation.pull`."""
        if cotangents[0] is None:
            return [None]
        to_x, to_y = cotangents[0].chunk(2)
        to_x, to_y, _ = ops.coupling_mix_vjp(to_x, to_y, self.mixing)
        return [torch.cat([to_x, to_y])]

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """Returns the pair before the mixing, and its gradient."""
        return self.undo(outputs), self.pull(None, cotangents, needs)

    def _mixed(self, pair: Tensor, mixing: ops.Mixing) -> Tensor:
        """Returns the pair after a mixing, with a rounding after every operation if `half_updates` asks for it."""
        x, y = pair.chunk(2)
        if not self.rounded:
            return torch.cat(ops.mix(x, y, mixing))
        first, second = (x, y) if mixing.target_first else (y, x)
        first = mixing.a0 * first + mixing.c0 * second
        second = mixing.a1 * second + mixing.c1 * first
        return torch.cat([first, second] if mixing.target_first else [second, first])


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype in which layers that rebuild their inputs hand each other the state, float64 if possible."""
    return torch.float32 if tensor.device.type in NO_FLOAT64 else torch.float64


def clone(value: Any) -> Any:
    """Returns a clone of a tensor, and any other object as it is."""
    return value.clone() if isinstance(value, Tensor) else value
