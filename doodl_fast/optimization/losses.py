"""Losses that are given what their parameters name, several of them with weights, and one for each sample."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

IMAGES = "images"
NAMES = ("latents", "start", "noise", "prompts", "sample")
"""What a loss may name besides the images, and besides the variables of the optimisation."""
Values = dict[str, Any]


@dataclass(frozen=True)
class Term:
    """One loss of several.

    Attributes:
        name: Its name in the history.
        function: The loss itself.
        weight: What its value is multiplied by.
    """

    name: str
    function: Callable[..., Tensor]
    weight: float = 1.0

    def __call__(self, images: Tensor, given: Mapping[str, Any], label: str) -> Tensor:
        """Calls the loss with what its parameters name, and checks what it returns.

        Args:
            images: Pictures (B, 3, H, W), or whatever the decoder returns.
            given: What the loss may name.
            label: What the loss is called in error messages.

        Raises:
            ValueError: The loss returns no scalar, or it leaves PyTorch, so that there is no gradient.
        """
        takes_images, names = signature_of(self.function, frozenset(given))
        first = (images,) if takes_images else ()
        try:
            value = self.function(*first, **{name: given[name] for name in names})
        except RuntimeError as error:
            if "Can't call numpy() on Tensor that requires grad" not in str(error):
                raise
            raise ValueError(
                f"{label}: expected a loss that stays in PyTorch, as NumPy and PIL have no gradient; resize, crop and "
                f"normalise by torch.nn.functional.interpolate and arithmetic ({error})"
            ) from error
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{label}: expected a differentiable scalar tensor, got {got}; reduce it with .mean()")
        return value.reshape(())


@dataclass(frozen=True)
class Losses:
    """A weighted sum of losses, each of which gets what its parameters name.

    Attributes:
        terms: The losses.
        given: What they may name besides the images when they are called by ``losses(images)``.
        is_one: Whether the caller gave a single loss, so that error messages need not name it.
    """

    terms: tuple[Term, ...]
    given: Values = field(default_factory=dict)
    is_one: bool = False

    @classmethod
    def of(cls, loss: Any) -> Losses:
        """The losses that the argument `loss` of `optimize` describes.

        Raises:
            TypeError: It is neither a function, nor a list or a dict of functions and of pairs (function, weight).
            ValueError: It is empty, or a weight is not finite.
        """
        if isinstance(loss, Losses):
            return loss
        if callable(loss):
            return cls((Term(name_of(loss), loss),), is_one=True)
        if isinstance(loss, Mapping):
            terms = [_term(entry, str(key)) for key, entry in loss.items()]
        elif isinstance(loss, Sequence) and not isinstance(loss, str):
            terms = _with_own_names([_term(entry, None, number) for number, entry in enumerate(loss)])
        else:
            raise TypeError(
                f"loss: expected a function from images to a scalar tensor, or a list or dict of them, got "
                f"{type(loss).__name__}; pass a guide of doodl_fast.guidance, for instance"
            )
        if not terms:
            raise ValueError("loss: expected at least one loss, got none")
        return cls(tuple(terms))

    def label(self, term: Term) -> str:
        """What a loss is called in error messages."""
        return "loss" if self.is_one else f"loss {term.name!r}"

    def check(self, available: Mapping[str, str], batch: int) -> None:
        """Raises unless every loss can be given what it names.

        Args:
            available: The names that can be given. Those of `NAMES` that cannot have a reason as their value, and the
                others an empty text.
            batch: How many samples there are.

        Raises:
            TypeError: A loss has a parameter without a default that nothing is known of.
            ValueError: A loss names what this chain or this optimisation does not have, or `Each` has not one loss for
                each sample.
        """
        for term in self.terms:
            if isinstance(term.function, Each) and term.function.count != batch:
                raise ValueError(
                    f"losses: expected one for each of the {batch} samples, got {term.function.count}; pass Each a "
                    "list of that length"
                )
            _, names = signature_of(term.function, frozenset(available), self.label(term))
            for name in names:
                if available[name]:
                    raise ValueError(f"{self.label(term)}: its parameter {name!r} cannot be given: {available[name]}")

    def names(self, known: frozenset[str]) -> set[str]:
        """Which of the known names the losses are given."""
        return {name for term in self.terms for name in signature_of(term.function, known)[1]}

    def values(self, images: Tensor, given: Values) -> list[Tensor]:
        """The value of each loss, without its weight."""
        values = [term(images, given, self.label(term)) for term in self.terms]
        if torch.is_grad_enabled() and not any(value.requires_grad for value in values):
            raise ValueError(
                "loss: expected a differentiable scalar, got one without a graph; do not detach, and do not decode or "
                "score under torch.no_grad()"
            )
        return values

    def total(self, values: Sequence[Tensor]) -> Tensor:
        """The weighted sum of values."""
        first, *rest = [
            value if term.weight == 1 else term.weight * value for term, value in zip(self.terms, values, strict=True)
        ]
        for value in rest:
            first = first + value.to(first.device)
        return first

    def with_given(self, **given: Any) -> Losses:
        """The same losses, which `__call__` gives these values."""
        return replace(self, given={**self.given, **given})

    def __call__(self, images: Tensor) -> Tensor:
        """The weighted sum of the losses of some images."""
        return self.total(self.values(images, self.given))

    def leaner(self) -> Losses | None:
        """The same losses with one of them in its next version that needs less memory, or None if there is none."""
        for number, term in enumerate(self.terms):
            method = getattr(term.function, "leaner", None)
            other = None if method is None else method()
            if other is not None:
                changed = (*self.terms[:number], replace(term, function=other), *self.terms[number + 1 :])
                return replace(self, terms=changed)
        return None


class Each:
    """One loss for each sample of a batch, for ``optimize(..., per_sample=True)``.

    Args:
        losses: As many losses as there are samples, each with a text, a label or a reference picture of its own.

    Example:
        >>> loss = Each([ClipText(model, processor, text) for text in ("a dog", "a cat")])
    """

    def __init__(self, losses: Sequence[Callable[..., Tensor]]) -> None:
        if not isinstance(losses, Sequence) or not losses or not all(callable(loss) for loss in losses):
            raise TypeError(f"losses: expected a list of functions, one for each sample, got {losses!r}")
        for number, loss in enumerate(losses):
            setattr(self, f"loss_{number}", loss)
        self.count = len(losses)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return (getattr(self, f"loss_{number}") for number in range(self.count))

    def __call__(self, images: Tensor, sample: int) -> Tensor:
        """The loss of one sample's images (1, 3, H, W)."""
        value: Tensor = getattr(self, f"loss_{sample}")(images)
        return value


def signature_of(
    function: Callable[..., Any], known: frozenset[str], label: str = "loss"
) -> tuple[bool, tuple[str, ...]]:
    """Which arguments a loss is called with.

    Args:
        function: The loss. Its first parameter gets the images whatever it is called, unless it is called like one of
            the known names.
        known: The names that can be given besides the images.
        label: What the loss is called in error messages.

    Returns:
        Whether the images are its first argument, and the names of its keyword arguments.

    Raises:
        TypeError: A parameter without a default has an unknown name.
    """
    target = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # Some functions in C do not tell.
        return True, ()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    has_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    takes_images = has_rest and not positional
    if positional and (positional[0].kind is inspect.Parameter.POSITIONAL_ONLY or positional[0].name not in known):
        takes_images = True
        parameters = [p for p in parameters if p is not positional[0]]
    names = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in known and parameter.kind is not parameter.POSITIONAL_ONLY:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            raise TypeError(
                f"{label}: its parameter {parameter.name!r} has no default, and is none of images, "
                f"{', '.join(sorted(known))}; give it a default, or bind it with functools.partial"
            )
    return takes_images, tuple(names)


def _term(entry: Any, name: str | None, number: int = 0) -> Term:
    """One entry of a list or dict of losses: a function, or a pair of a function and a weight in either order."""
    weight: Any = 1.0
    function = entry
    if isinstance(entry, (tuple, list)) and len(entry) == 2:
        function, weight = entry if callable(entry[0]) else (entry[1], entry[0])
    shown = repr(name) if name is not None else f"[{number}]"
    if not callable(function):
        raise TypeError(
            f"loss {shown}: expected a function, or a pair (function, weight), got {type(entry).__name__}; pass a "
            "guide of doodl_fast.guidance, for instance"
        )
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ValueError(f"loss {shown}: expected a finite number as its weight, got {weight!r}")
    return Term(name_of(function) if name is None else name, function, float(weight))


def name_of(function: Any) -> str:
    """The name of a function, or that of an object's class."""
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__name__", None) or type(inner).__name__)


def _with_own_names(terms: list[Term]) -> list[Term]:
    """The terms, of which those with the name of an earlier one get a number behind it."""
    seen: dict[str, int] = {}
    named = []
    for term in terms:
        seen[term.name] = seen.get(term.name, 0) + 1
        named.append(replace(term, name=f"{term.name}_{seen[term.name]}") if seen[term.name] > 1 else term)
    return named
