"""Recipes: how a tensor follows from others, so that a gradient can save those instead of the tensor.

An operator that needs one of its inputs for its gradient saves it, even if that input is cheap to compute from what
another operator saves anyway. So the output of a cheap layer, a norm for instance, carries a recipe: a function and its
arguments. The next layer saves the arguments instead, and computes the tensor again, to the same bits, when its
gradient is taken. Saving goes through autograd's own storage, so in-place changes of what was saved are noticed, and
checkpoints (`torch.utils.checkpoint`) and `saved_tensors_hooks` around a layer hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

ATTRIBUTE = "_doodl_fast_recipe"


def active(x: Tensor) -> bool:
    """Whether autograd is about to record what is done to x, in the way that the functions of this package replace.

    It is not under `torch.no_grad`, which keeps nothing; under `torch.compile`, whose compiler decides itself what to
    keep; under autocast, as casts are part of autograd's own operators; under `torch.func` and forward-mode AD.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        x.requires_grad
        and torch.is_grad_enabled()
        and type(x) in (Tensor, nn.Parameter)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class Recipe:
    """A function and its arguments, which give a tensor again.

    Attributes:
        function: It returns the same bits for the same arguments, and changes none of them.
        args: Tensors, recipes of tensors, other values, and lists, tuples and dicts of these.
        version: The tensor's version when it was made. If it was changed in place, the recipe is void.
    """

    __slots__ = ("args", "function", "version")

    def __init__(self, function: Callable[..., Tensor], args: tuple[Any, ...], version: int) -> None:
        self.function, self.args, self.version = function, args, version


def remember(output: Tensor, function: Callable[..., Any], *args: Any) -> Tensor:
    """Gives a tensor the recipe `function(*args)`, and returns it. Recipes of the arguments become parts of it."""
    setattr(output, ATTRIBUTE, Recipe(function, _resolved(args), output._version))
    return output


def recipe_of(tensor: Any) -> Recipe | None:
    """The recipe of a tensor, or None if it has none or was changed in place."""
    recipe: Recipe | None = getattr(tensor, ATTRIBUTE, None)
    return recipe if recipe is not None and recipe.version == tensor._version else None


def _resolved(value: Any) -> Any:
    """A value in which recipes stand for the tensors that have one."""
    if isinstance(value, Tensor):
        return recipe_of(value) or value
    if type(value) in (list, tuple):
        return type(value)(map(_resolved, value))
    if type(value) is dict:
        return {key: _resolved(item) for key, item in value.items()}
    return value


class _Leaf(int):
    """The place of a tensor among those that were saved."""


class _Step:
    """A recipe in which places stand for tensors."""

    __slots__ = ("args", "function")

    def __init__(self, function: Callable[..., Tensor], args: Any) -> None:
        self.function, self.args = function, args


def save(ctx: Any, *values: Any, also: Sequence[Tensor] = ()) -> None:
    """Saves tensors, or what their recipes need, for the backward pass of a function.

    Args:
        ctx: The context of a `torch.autograd.Function`.
        *values: Tensors and recipes.
        also: Tensors that `load` need not return, such as weights: a change of them in place will be an error.
    """
    leaves: list[Tensor] = []
    steps: dict[int, _Step] = {}
    ctx.places = [_place(value, leaves, steps) for value in values]
    ctx.save_for_backward(*leaves, *also)


def load(ctx: Any) -> list[Tensor]:
    """What was saved: the tensors, computed again where a recipe was saved. It is differentiable in grad mode alone."""
    saved: Sequence[Tensor] = ctx.saved_tensors
    made: dict[int, Tensor] = {}
    if not torch._C._is_any_autocast_enabled():
        return [_take(place, saved, made) for place in ctx.places]
    with _without_autocast():
        return [_take(place, saved, made) for place in ctx.places]


def _place(value: Any, leaves: list[Tensor], steps: dict[int, _Step]) -> Any:
    """A value in which places stand for tensors. Appends the tensors, and notes each recipe's step by its `id`."""
    # These two functions are no closures: one that calls itself would keep the tensors until the garbage is collected.
    if isinstance(value, Tensor):
        found = next((i for i, leaf in enumerate(leaves) if leaf is value), None)
        if found is None:
            leaves.append(value)
        return _Leaf(len(leaves) - 1 if found is None else found)
    if isinstance(value, Recipe):
        if id(value) not in steps:
            steps[id(value)] = _Step(value.function, _place(value.args, leaves, steps))
        return steps[id(value)]
    if type(value) in (list, tuple):
        return type(value)([_place(item, leaves, steps) for item in value])
    if type(value) is dict:
        return {key: _place(item, leaves, steps) for key, item in value.items()}
    return value


def _take(place: Any, saved: Sequence[Tensor], made: dict[int, Tensor]) -> Any:
    """The value of a place. What a step gives is made once."""
    if type(place) is _Leaf:
        return saved[place]
    if type(place) is _Step:
        if id(place) not in made:
            made[id(place)] = place.function(*_take(place.args, saved, made))
        return made[id(place)]
    if type(place) in (list, tuple):
        return type(place)([_take(item, saved, made) for item in place])
    if type(place) is dict:
        return {key: _take(item, saved, made) for key, item in place.items()}
    return place


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """A backward pass that somebody runs under autocast computes again what was computed without it."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
