"""What identifies the chain, decoder and loss of a run, so that a run is resumed with the same ones."""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.chain import Chain
from ..chain.evaluator import as_evaluator
from .losses import Losses

Fingerprint = dict[str, dict[str, Any]]
SAMPLES = 256
TOLERANCE = 0.02
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MEANING = {
    "chain": "chain (its schedule, mixing weight, guidance scale or arithmetic)",
    "weights": "weights of the network",
    "conditions": "conditions of the network (its prompt, for instance)",
    "decode": "decoder",
    "loss": "loss (a guide's prompt or weights, for instance)",
}
LOW_MEMORY_SWITCHES = frozenset({"_checkpoints", "_calls_again", "_singly", "_layers", "_chunk"})
"""Attributes of our decoders and guides that change how much memory they take and not what they compute."""


def fingerprint(chain: Any, decode: Callable[..., Any], loss: Callable[..., Any]) -> Fingerprint:
    """Identifies the functions of a run.

    Weights and buffers are read once, to sum the bits of each tensor as integers: an exact number that depends on
    every value, whatever the order of summation and the device. That takes about 0.1 s for 1 GB on one core. Other
    tensors, as those that encode a prompt, are recomputed when a run is resumed, on another machine perhaps, so some
    of their values are kept and compared with a tolerance.

    Args:
        chain: Of a `Chain` its program, arithmetic, network weights and conditions count, of any other its class.
        decode: The decoder. Its class and the tensors in its attributes count; of a plain function its name.
        loss: The loss, in the same way.

    Returns:
        For each part a hash of what must be equal ("exact") and numbers that must be near ("near").
    """
    parts: Fingerprint = {"decode": _of_function(decode), "loss": _of_function(loss)}
    if not isinstance(chain, Chain):
        return {"chain": _of_function(chain), **parts}
    evaluator = as_evaluator(chain.evaluator)
    couplings = [(c.target, *(f"{v:.10g}" for v in (c.a, c.c, c.b)), c.step, str(c.tag)) for c in chain.program]
    scale = getattr(chain.evaluator, "guidance_scale", None)
    words = [type(chain).__qualname__, chain.arithmetic, str(chain.state_dtype), repr(scale), repr(couplings)]
    combine = getattr(chain.evaluator, "combine", None)
    if combine is not None:
        words.append(repr(_of_function(combine)))
    conditions = list(evaluator.tensors())
    return {
        "chain": {"exact": _hash(words), "near": []},
        "weights": {"exact": _hash(_exact(list(evaluator.weights()))), "near": []},
        "conditions": {"exact": _hash(_shapes(conditions)), "near": _samples(conditions)},
        **parts,
    }


def differing(ours: Fingerprint, stored: Any) -> str | None:
    """Says in words which part differs between two fingerprints, or None if they agree."""
    for part, mine in ours.items():
        theirs = stored.get(part) or {}
        if mine["exact"] != theirs.get("exact") or not _near(mine["near"], theirs.get("near")):
            return MEANING[part]
    return None if set(ours) == set(stored) else MEANING["chain"]


def check_same(what: str, home: Path, settings: dict[str, Any], stored: dict[str, Any], ours: Any, theirs: Any) -> None:
    """Raises ValueError unless what is continued is what was stored.

    Args:
        what: What is stored, in words: "run" or "search".
        home: Its folder.
        settings: What must be equal, by name.
        stored: The same as it was stored.
        ours: The fingerprint of the functions.
        theirs: The same as it was stored.
    """
    for name, value in settings.items():
        if stored.get(name) != value:
            raise ValueError(
                f"resume: the {what} in {str(home)!r} had {name}={stored.get(name)!r}, got {value!r}; pass what it was "
                "started with, or start anew in another folder"
            )
    differs = differing(ours, theirs)
    if differs is not None:
        raise ValueError(
            f"resume: the {what} in {str(home)!r} differs in its {differs}; pass the same as then, or start anew in "
            "another folder"
        )


def _near(ours: list[list[float]], theirs: Any) -> bool:
    """Whether the values of all tensors agree up to a tolerance, relative to the 2-norm of each tensor's values."""
    if not isinstance(theirs, list) or [len(values) for values in ours] != [len(values) for values in theirs]:
        return False
    pairs = [torch.tensor(pair, dtype=torch.float64) for pair in zip(ours, theirs, strict=True)]
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in pairs)


def _of_function(function: Any) -> dict[str, Any]:
    """The fingerprint of a decoder or a loss."""
    words: list[str] = []
    weights: list[tuple[str, Tensor]] = []
    others: list[Tensor] = []
    for name, value in _parts("", function, 0, set()):
        if isinstance(value, nn.Module):
            weights += [(f"{name}.{key}", t) for key, t in (*value.named_parameters(), *value.named_buffers())]
        elif isinstance(value, Tensor):
            others.append(value)
        words.append(f"{name}={value!r}" if isinstance(value, (str, int, float, tuple)) else f"{name}: {_name(value)}")
    return {"exact": _hash([*words, *_exact(weights), *_shapes(others)]), "near": _samples(others)}


def _parts(name: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """A function and what its result depends on, as far as can be seen, with names.

    Plain values count only in classes of this library: those of other classes may be counters or caches, and so may
    private attributes.
    """
    if id(value) in seen or depth > 4:
        return
    seen.add(id(value))
    if isinstance(value, Losses):
        if value.is_one:
            yield from _parts(name, value.terms[0].function, depth, seen)
            return
        yield name, tuple((term.name, term.weight) for term in value.terms)
        for term in value.terms:
            yield from _parts(f"{name}.{term.name}", term.function, depth, seen)
        return
    yield name, value
    if isinstance(value, (nn.Module, Tensor)):
        return
    if isinstance(value, functools.partial):
        items: dict[str, Any] = {"func": value.func, **{str(i): v for i, v in enumerate(value.args)}, **value.keywords}
    elif isinstance(value, types.MethodType):
        items = {"self": value.__self__}
    elif hasattr(value, "__qualname__"):  # functions and classes: their name is all that counts
        return
    else:
        items = getattr(value, "__dict__", {})
    own = type(value).__module__.partition(".")[0] == __name__.partition(".")[0]
    for key, item in items.items():
        if isinstance(item, (Tensor, nn.Module)) or callable(item):
            counts = own or not str(key).startswith("_")
        else:
            counts = own and isinstance(item, (str, int, float, tuple)) and key not in LOW_MEMORY_SWITCHES
        if counts:
            yield from _parts(f"{name}.{key}", item, depth + 1, seen)


def _name(value: Any) -> str:
    """The name of a function, or that of an object's class, without its module, which may be `__main__`."""
    return str(getattr(value, "__qualname__", None) or type(value).__qualname__)


def _hash(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def _shapes(tensors: list[Tensor]) -> list[str]:
    return [str(tuple(tensor.shape)) for tensor in tensors]


@torch.no_grad()
def _exact(tensors: list[tuple[str, Tensor]]) -> list[str]:
    """Name, shape, dtype and sum of bits of every tensor; one transfer from each device."""
    words = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in tensors]
    sums: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for index, (_, tensor) in enumerate(tensors):
        bits = _bit_sum(tensor)
        if bits is not None:
            sums.setdefault(bits.device, []).append((index, bits))
    for of_device in sums.values():
        values = torch.stack([bits for _, bits in of_device]).tolist()
        for (index, _), value in zip(of_device, values, strict=True):
            words[index] += f" {value}"
    return words


def _bit_sum(tensor: Tensor) -> Tensor | None:
    """The sum of a tensor's memory read as integers, modulo 2^64; None where the memory cannot be read.

    The integers have 64 bits if they fit evenly, which is four times as fast for float16 as integers of its size.
    """
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    try:
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        flat = real.detach().contiguous().flatten()
        size = flat.element_size()
        width = next(n for n in sorted(INTEGERS, reverse=True) if n >= size and flat.numel() * size % n == 0)
        if flat.storage_offset() * size % width:
            flat = flat.clone()
        return flat.view(INTEGERS[width]).sum(dtype=torch.int64)
    except (RuntimeError, NotImplementedError, StopIteration):  # quantised and other packed formats
        return None


@torch.no_grad()
def _samples(tensors: list[Tensor]) -> list[list[float]]:
    """Up to 256 evenly spaced values of every tensor that holds real numbers."""
    values: list[list[float]] = []
    for tensor in tensors:
        if tensor.is_meta or tensor.is_complex() or not tensor.numel():
            continue
        flat = tensor.detach().flatten()
        count = min(SAMPLES, flat.numel())
        places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
        values.append(torch.nan_to_num(flat[places].to("cpu", torch.float64)).tolist())
    return values
