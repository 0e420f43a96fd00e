"""What calls of the reference's layers do, as `Operation`s: short runs of the library's engine."""

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
    """One call of a `SteppingLayer`, as an `Operation` on (i, t, pair, what came after it).

    evaluator: the noise, as the engine takes it. program: the couplings of the step, or of its inverse.
    alphas: the noise levels it goes from and to. single: whether the first latent stands for both.
    half_updates: see `Quirks`.
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
        run = self.latest = self._new_run(inputs[2], keep)
        tensors = self.evaluator.tensors()
        pair, sources = self._through(run, inputs[2], tensors)
        outputs = (*map(clone, inputs[:2]), pair.to(self.dtype), *inputs[3:])
        return outputs, (run, sources, tensors) if keep else (*outputs[:2], pair, *outputs[3:])

    def undo(self, outputs: Values) -> Values:
        program = invert(self.program)
        run = replace(self.latest, program=program, groups=group(program))
        with run.calling():
            pair, _ = self._through(run, outputs[2], self.evaluator.tensors())
        return (*outputs[:2], pair, *outputs[3:])

    def _new_run(self, pair: Tensor, keep: bool) -> ProgramRun:
        state_dtype = torch.promote_types(torch.float32, self.dtype)
        if self.rebuilds and not keep:
            state_dtype = wide_dtype(pair)
        new: Callable[[], Floats] = functools.partial(Floats, self.dtype, state_dtype)
        if self.rounded:
            new = functools.partial(Rounded, self.dtype, state_dtype, self.alphas)
        like = pair.new_empty(0, dtype=self.dtype)
        return ProgramRun.create(self.evaluator, self.program, "checkpoint", like, state_dtype, new, keep, Trust())

    def _through(self, run: ProgramRun, pair: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The pair after the run, in the dtype of its state, and the sources of its couplings if they are stored."""
        x, y = pair.chunk(2)
        state = [half.to(run.state_dtype, copy=True) for half in (x, x if self.single else y)]
        with run.evaluator.running():
            sources = run.forward(run.new_arithmetic(), state, tensors).tensors
        return torch.cat([state[0], state[0]] if self.single else state), sources

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        run, sources, tensors = kept
        if cotangents[2] is None:
            return self._gradients(None, [], cotangents, needs)
        to_pair, sums = self._back(run, list(sources), None, tensors, cotangents[2], needs)
        return self._gradients(to_pair, sums, cotangents, needs)

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        """One evaluation a coupling: its value undoes it, its graph pulls the cotangent through."""
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
        """Gradients of the pair and of the wanted tensors. Takes the couplings' sources, or undoes them in `state`."""
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

    # Between the caller's inputs and the engine's pair and tensors

    def _enter(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        to_x, to_y = cotangent.chunk(2)
        return (to_x + to_y, torch.zeros_like(to_y)) if self.single else (to_x, to_y)

    def _leave(self, pulled: list[Tensor]) -> Tensor:
        to_x, to_y = pulled
        return torch.cat([to_x + to_y, torch.zeros_like(to_y)] if self.single else pulled)

    def _wanted(self, needs: Sequence[bool]) -> list[bool]:
        """Which of the evaluator's tensors want a gradient: the tensors among the further inputs, or the others."""
        return [needs[place] for place in self._places(needs)]

    def _places(self, needs: Sequence[bool]) -> list[int]:
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
        """sums: of the wanted tensors. What was passed through gets its cotangent as well."""
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
    """fp16 or bf16 latents as the reference updates them: guidance and every term of a step are rounded to their dtype
    (`Quirks.half_updates`).

    alphas: the noise levels that the step goes from and to.
    """

    alphas: tuple[float, float]

    def apply(self, group: Group, state: list[Tensor], eps: Eps | None) -> None:
        assert eps is not None
        value, g = eps
        noise = value.to(self.latents_dtype)
        if g is not None:
            uncond, cond = noise.chunk(2)
            noise = uncond + g * (cond - uncond)
        target = state[group.target].to(self.latents_dtype)
        state[group.target] = rounded_step(target, noise, *self.alphas).to(self.state_dtype)


class Mix:
    """One call of a `MixingLayer`, or of its inverse, as an `Operation`. Linear: it keeps nothing."""

    others: tuple[Tensor, ...] = ()
    wide = True

    def __init__(self, p: float, dtype: torch.dtype, inverse: bool, half_updates: bool) -> None:
        mixing = ops.Mixing(True, p, 1 - p, p, 1 - p)
        self.mixing, self.undoing = (mixing.inverse(), mixing) if inverse else (mixing, mixing.inverse())
        self.dtype = dtype
        self.rounded = half_updates and dtype in HALF_DTYPES
        self.rebuilds = dtype not in HALF_DTYPES

    def run(self, inputs: Values, keep: bool) -> tuple[Values, Any]:
        pair = inputs[0] if keep or not self.rebuilds else inputs[0].to(wide_dtype(inputs[0]))
        pair = self._mixed(pair, self.mixing)
        return (pair.to(self.dtype),), None if keep else (pair,)

    def undo(self, outputs: Values) -> Values:
        return (self._mixed(outputs[0], self.undoing),)

    def pull(self, kept: Any, cotangents: Sequence[Tensor | None], needs: Sequence[bool]) -> Gradients:
        if cotangents[0] is None:
            return [None]
        to_x, to_y = cotangents[0].chunk(2)
        to_x, to_y, _ = ops.coupling_mix_vjp(to_x, to_y, self.mixing)
        return [torch.cat([to_x, to_y])]

    def undo_and_pull(
        self, outputs: Values, cotangents: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> tuple[Values, Gradients]:
        return self.undo(outputs), self.pull(None, cotangents, needs)

    def _mixed(self, pair: Tensor, mixing: ops.Mixing) -> Tensor:
        x, y = pair.chunk(2)
        if not self.rounded:
            return torch.cat(ops.mix(x, y, mixing))
        first, second = (x, y) if mixing.target_first else (y, x)
        first = mixing.a0 * first + mixing.c0 * second
        second = mixing.a1 * second + mixing.c1 * first
        return torch.cat([first, second] if mixing.target_first else [second, first])


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What a state is carried in between calls that rebuild."""
    return torch.float32 if tensor.device.type in NO_FLOAT64 else torch.float64


def clone(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
