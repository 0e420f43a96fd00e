"""From noise latents and other variables to losses, and back to the gradients of the losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..chain.host_reads import together
from ..chain.memory.planner import release
from ..diffusion.pipeline import Decoder
from . import low_memory
from .checkpoint import random_state, restore_random_state
from .cotangents import cotangent_of, wide
from .evaluation import Evaluation
from .ignored_leaves import warn_of_ignored_leaves
from .losses import NAMES, Losses
from .result import Pair, as_images
from .variables import NOISE, START
from .without_gradient import warn_of_constant_losses, warn_of_zero_gradients

Gradient = tuple[tuple[float, ...], tuple[Tensor, ...], list[Tensor]]
Scores = tuple[tuple[float, ...], tuple[Tensor, ...]]
Values = dict[str, list[Tensor]]
Decode = Callable[[Tensor], Tensor]
Loss = Callable[..., Tensor]


def undecoded(latents: Tensor) -> Tensor:
    """The decoder of ``decode=None``: the loss gets the final latents themselves."""
    return latents


@dataclass
class Objective:
    """The function that an optimisation minimises: chain, decoder and loss, one after the other.

    Attributes:
        chain: ``x0, y0 = chain(x, y)``, differentiable.
        decode: Final latents (B, C, ...) -> images, differentiable.
        loss: Images -> scalar, differentiable; or `Losses`.
        dtype: The dtype of the latents that the caller gave. A `decode` of the caller's own gets this dtype.
        members: 2 if the images of both x0 and y0 are scored, 1 if only those of x0 are.
        run: Runs the chain with the values of other variables: (starting latents, values) -> final latents. None if
            there are none.
        moves_start: Whether the starting latents are a variable.
        prompts: What losses are given that name the prompts.
        per_sample: Whether each sample of the batch has a loss of its own.
        variables: The names of the other variables.

    The cotangents that pass from the loss to the chain are float32 or float64, whatever `dtype` is.
    """

    chain: Callable[..., Pair]
    decode: Decode
    loss: Loss
    dtype: torch.dtype
    members: int
    run: Callable[[list[Tensor], Values], tuple[Tensor, ...]] | None = None
    moves_start: bool = True
    prompts: Sequence[str] | None = None
    per_sample: bool = False
    variables: tuple[str, ...] = ()
    _first: bool = field(default=True, repr=False)

    @property
    def starts(self) -> int:
        """How many latents the chain starts from: 2, unless the chain says that it has one.

        A chain of one latent gets x. Its gradient stands for y's too, so x and y stay equal.
        """
        return getattr(self.chain, "num_starts", 2)

    def gradient(self, latents: list[Tensor], step: int) -> Gradient:
        """Losses, images, and gradients with respect to the latents; see `evaluate`."""
        found = self.evaluate(latents, step)
        return found.losses, found.images, list(found.gradients)

    def evaluate(self, latents: list[Tensor], step: int, values: Values | None = None) -> Evaluation:
        """Losses, images, and gradients with respect to all variables.

        If memory runs out and the chain plans its memory, decoder and loss, then the chain's plan, are replaced by
        versions that need less memory, and the gradient is computed again.

        Args:
            latents: The noise latents [x, y], each (B, C, ...).
            step: Number of the optimisation step, for error messages.
            values: The tensors of the other variables.

        Raises:
            FloatingPointError: A loss or a gradient is not finite.
            ValueError: The loss does not depend on one of the variables.
        """
        if getattr(self.chain, "planner", None) is None:
            return self._evaluate(latents, step, values or {})
        random = random_state()
        while True:
            try:
                return self._evaluate(latents, step, values or {})
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # the traceback would keep the tensors of the failed attempt
            release(latents[0].device)
            if not self._shrink(latents[0]):
                raise failure
            restore_random_state(random)

    def _shrink(self, latents: Tensor) -> bool:
        """Makes the decoder, the loss or the chain's plan smaller; False if none of them can be."""
        pair = low_memory.next_smaller(self.decode, self.loss)
        if pair is None:
            return self.chain.planner.make_smaller_plan(latents) is not None  # type: ignore[attr-defined]
        self.decode, self.loss = pair
        return True

    @torch.enable_grad()
    def _evaluate(self, latents: list[Tensor], step: int, values: Values) -> Evaluation:
        # the chain gives its gradients in its inputs' dtype
        start = [wide(z.detach()).requires_grad_(self.moves_start) for z in latents[: self.starts]]
        leaves = {name: [wide(t.detach()).requires_grad_() for t in tensors] for name, tensors in values.items()}
        named = [(START, z) for z in start if self.moves_start]
        named += [(name, t) for name, tensors in leaves.items() for t in tensors]
        inputs = [leaf for _, leaf in named]
        scores, images, cotangents = [], [], []
        is_first = self._first
        sums: list[Tensor | None] = [None] * len(inputs)
        with together() as reads:
            ends = self._run(start, leaves)
            for number, end in enumerate(ends[: self.members]):
                # one member after the other, so that one decoder graph is alive at a time
                leaf = end.detach().to(decoder_dtype(self.decode, self.dtype, end.dtype)).requires_grad_()
                image, total, score = self._score(leaf, start[min(number, len(start) - 1)], leaves)
                if self._first:
                    self._first = False
                    warn_of_ignored_leaves(total, [leaf, *inputs])
                if self._names():
                    direct = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
                    sums = [_sum(before, more) for before, more in zip(sums, direct, strict=True)]
                cotangents.append(cotangent_of(total, leaf, image.numel()))
                scores.append(score)
                images.append(image.detach())
                del image, total
            numbers = self._numbers(reads.read(torch.stack(scores)), step)
        given = [tensor for tensor in (*cotangents, *sums) if tensor is not None]
        try:
            sums = _through(ends, cotangents, inputs, sums)
            gradients = _checked([name for name, _ in named], sums, step)
        except FloatingPointError:
            if not all_finite(given):  # The loss made it, and not the chain.
                self._blame(ends, start, leaves, inputs, step)
            raise
        if is_first:
            warn_of_zero_gradients([name for name, _ in named], gradients)
        return Evaluation(**numbers, images=as_images(images), starts=self.starts, **self._sorted(named, gradients))

    def _blame(
        self, ends: tuple[Tensor, ...], start: list[Tensor], leaves: Values, inputs: list[Tensor], step: int
    ) -> NoReturn:
        """Raises FloatingPointError that names the losses whose own gradient holds NaN or Inf."""
        losses = Losses.of(self.loss)
        bad = []
        for term in losses.terms:
            alone = replace(self, loss=replace(losses, terms=(replace(term, weight=1.0),)))
            for number, end in enumerate(ends[: self.members]):
                leaf = end.detach().to(decoder_dtype(self.decode, self.dtype, end.dtype)).requires_grad_()
                _, total, _ = alone._score(leaf, start[min(number, len(start) - 1)], leaves)
                if total.requires_grad:
                    found = torch.autograd.grad(total, [leaf, *inputs], allow_unused=True)
                    if not all_finite([gradient for gradient in found if gradient is not None]):
                        bad.append(losses.label(term))
                        break
        of = " and ".join(bad) or "the losses' weighted sum"
        raise FloatingPointError(
            f"gradient: NaN or Inf at optimisation step {step} in that of {of}, whose value is finite; look at it and "
            "at the decoder: a square root or a norm has no slope at 0, and float16 overflows"
        )

    def _run(self, start: list[Tensor], values: Values) -> tuple[Tensor, ...]:
        """Runs the chain."""
        return self.chain(*start) if self.run is None else self.run(start, values)

    def _names(self) -> set[str]:
        """The variables that the losses name, so that they depend on them directly."""
        known = frozenset((*NAMES, *self.variables))
        return Losses.of(self.loss).names(known) & {START, NOISE, *self.variables}

    def _sorted(self, named: list[tuple[str, Tensor]], gradients: list[Tensor]) -> dict[str, Any]:
        """The gradients of the start, and those of the other variables, by name."""
        of: dict[str, list[Tensor]] = {}
        for (name, _), gradient in zip(named, gradients, strict=True):
            of.setdefault(name, []).append(gradient if name == START else gradient / self.members)
        pair = of.pop(START, [])
        return {"gradients": tuple(pair if len(pair) != 1 else [pair[0], pair[0]]), "variables": of}

    @torch.no_grad()
    def value(self, latents: Pair) -> Scores:
        """Losses and images of the noise latents (x, y), without gradients."""
        found = self.score([*latents])
        return found.losses, found.images

    @torch.no_grad()
    def score(self, latents: list[Tensor], values: Values | None = None) -> Evaluation:
        """Losses and images of the noise latents [x, y] and the other variables' values, without gradients."""
        start = [wide(z) for z in latents[: self.starts]]
        scores, images = [], []
        with together() as reads:
            for number, end in enumerate(self._run(start, values or {})[: self.members]):
                leaf = end.to(decoder_dtype(self.decode, self.dtype, end.dtype))
                image, _, score = self._score(leaf, start[min(number, len(start) - 1)], values or {})
                scores.append(score)
                images.append(image)
            numbers = self._numbers(reads.read(torch.stack(scores)))
        return Evaluation(**numbers, images=as_images(images), starts=self.starts)

    def _score(self, end: Tensor, start: Tensor, values: Values) -> tuple[Tensor, Tensor, Tensor]:
        """Final latents -> their image, the sum of their losses, and the value of each loss (samples, losses)."""
        image = self.decode(end)
        if not isinstance(image, Tensor):
            hint = "return its .sample" if hasattr(image, "sample") else "return the images as one tensor"
            raise TypeError(f"decode: expected a function that returns a tensor, got {type(image).__name__}; {hint}")
        losses = Losses.of(self.loss)
        noise = values.get(NOISE, getattr(self.chain, "step_noise", None))
        given: dict[str, Any] = {"latents": end, "start": start, "prompts": self.prompts, "noise": noise}
        given |= {name: tensors[0] if len(tensors) == 1 else tensors for name, tensors in values.items()}
        given[NOISE] = noise
        if not self.per_sample:
            found = losses.values(image, {name: value for name, value in given.items() if value is not None})
            self._warn_once(losses, found)
            return image, losses.total(found), _row(found)[None]
        batch = end.shape[0]
        if image.shape[0] != batch:
            raise ValueError(
                f"decode: expected {batch} images of {batch} latents with per_sample=True, got {image.shape[0]}"
            )
        rows, total = [], None
        for sample in range(batch):
            own = {name: _of_sample(value, sample, batch) for name, value in given.items() if value is not None}
            found = losses.values(image[sample : sample + 1], {**own, "sample": sample})
            if not sample:
                self._warn_once(losses, found)
            rows.append(_row(found))
            total = losses.total(found) if total is None else total + losses.total(found)
        assert total is not None
        return image, total, torch.stack(rows)

    def _warn_once(self, losses: Losses, values: list[Tensor]) -> None:
        """Warns in the first evaluation of losses without a gradient."""
        if self._first and torch.is_grad_enabled():
            warn_of_constant_losses(losses, values)

    def _numbers(self, table: list[list[list[float]]], step: int | None = None) -> dict[str, Any]:
        """The sums and means of losses (members, samples, losses). Raises FloatingPointError if one is not finite."""
        losses = Losses.of(self.loss)
        for member in table:
            for sample, row in enumerate(member):
                for term, value in zip(losses.terms, row, strict=True):
                    if not math.isfinite(value):
                        where = "" if step is None else f" at optimisation step {step}"
                        where += f" for sample {sample}" if self.per_sample else ""
                        raise FloatingPointError(f"{losses.label(term)}: expected a finite value, got {value}{where}")
        sums = [[_weighted(losses, row) for row in member] for member in table]
        rows = [row for member in table for row in member]
        return {
            "losses": tuple(sum(member) / len(member) for member in sums),
            "terms": {
                term.name: sum(row[number] for row in rows) / len(rows) for number, term in enumerate(losses.terms)
            },
            "samples": tuple(tuple(member) for member in sums) if self.per_sample else (),
            "sample_terms": {
                term.name: [sum(m[sample][number] for m in table) / len(table) for sample in range(len(table[0]))]
                for number, term in enumerate(losses.terms)
            }
            if self.per_sample
            else {},
        }


def _weighted(losses: Losses, row: list[float]) -> float:
    """The weighted sum of the values of all losses."""
    if len(row) == 1 and losses.terms[0].weight == 1:
        return row[0]
    return sum(term.weight * value for term, value in zip(losses.terms, row, strict=True))


def _row(values: list[Tensor]) -> Tensor:
    """The values of all losses in one tensor, in the widest of their dtypes."""
    if len(values) == 1:
        return values[0].detach()[None]
    dtype = torch.float32
    for value in values:
        dtype = torch.promote_types(dtype, value.dtype)
    return torch.stack([value.detach().to(values[0].device, dtype) for value in values])


def _of_sample(value: Any, sample: int, batch: int) -> Any:
    """A sample's own part of what a loss may name."""
    if isinstance(value, (list, tuple)):
        if value and isinstance(value[0], str):
            return [value[sample if len(value) == batch else 0]]
        return [_of_sample(item, sample, batch) for item in value]
    return value[sample : sample + 1] if isinstance(value, Tensor) and value.ndim and len(value) == batch else value


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum of two gradients, either of which may be missing."""
    if before is None or more is None:
        return more if before is None else before
    return before + more


def _through(
    ends: tuple[Tensor, ...], cotangents: list[Tensor | None], inputs: list[Tensor], sums: list[Tensor | None]
) -> list[Tensor | None]:
    """Adds to gradients what flows back through the chain.

    Args:
        ends: The chain's final latents, with their graph.
        cotangents: The gradients of the losses with respect to the first of them, or None.
        inputs: What is differentiated.
        sums: The gradients so far.
    """
    if all(cotangent is None for cotangent in cotangents):
        return sums
    pairs = [
        (end, torch.zeros_like(end) if cotangent is None else cotangent.to(end.dtype))
        for end, cotangent in zip(ends, [*cotangents, *[None] * (len(ends) - len(cotangents))], strict=True)
        if end.requires_grad
    ]
    if not pairs:
        return sums
    flow = torch.autograd.grad(
        [end for end, _ in pairs], inputs, [cotangent for _, cotangent in pairs], allow_unused=True
    )
    return [_sum(before, more) for before, more in zip(sums, flow, strict=True)]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or Inf, in one transfer from each device."""
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        flags.setdefault(tensor.device, []).append(torch.isfinite(tensor).all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


def _checked(names: list[str], gradients: list[Tensor | None], step: int) -> list[Tensor]:
    """The gradients, all of which must be there and finite. The errors name the variable."""
    found = []
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"variables[{name!r}]: the loss does not depend on it in a way that can be differentiated, so it gets "
                "no gradient; leave it out, or add a loss that does"
            )
        found.append(gradient)
    if not all_finite(found):
        bad = next(name for name, g in zip(names, found, strict=True) if not bool(torch.isfinite(g).all()))
        of = "" if bad == START else f" of variables[{bad!r}]"
        raise FloatingPointError(
            f"gradient: NaN or Inf at optimisation step {step}{of}; a `Chain` names its own, so look at the loss and "
            "the decoder: try float32 for them, or a lower grad_scale"
        )
    return found


def decoder_dtype(decode: Decode, dtype: torch.dtype, chain_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `decode` gets the final latents.

    A `Decoder` casts to the dtype of its VAE itself and keeps cotangents in float32, so it gets at least float32. Any
    other function gets the dtype of the latents that the caller gave.
    """
    is_ours = isinstance(decode, Decoder) or decode is undecoded
    return torch.promote_types(dtype, chain_dtype) if is_ours else dtype
