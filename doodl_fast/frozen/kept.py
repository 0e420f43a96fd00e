"""Counts what the autograd graph of a tensor keeps, by operator."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def kept_by_operator(output: Tensor, exclude: Iterable[Tensor] = ()) -> Counter[str]:
    """Returns the bytes that the graph of a tensor keeps, by the names of the operators that keep them.

    A storage counts once. If several operators keep it, it counts for all of their names together, such as
    "GeluBackward0 + MulBackward0". It works on the meta device too. What `torch.utils.checkpoint` will compute again is
    computed for this.

    Args:
        output: A tensor with a graph.
        exclude: Tensors whose storages do not count: the weights and the inputs.
    """
    skip = {tensor.untyped_storage()._cdata for tensor in exclude}
    names: dict[int, set[str]] = defaultdict(set)
    storages: dict[int, torch.UntypedStorage] = {}  # Each stays alive, so that none takes the place of another.
    for node in _nodes(output.grad_fn):
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            if storage._cdata not in skip:
                names[storage._cdata].add(node.name())
                storages[storage._cdata] = storage
    kept: Counter[str] = Counter()
    for key, found in names.items():
        kept[" + ".join(sorted(found))] += storages[key].nbytes()
    return kept


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of a graph."""
    seen, ahead = set(), [root]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            ahead += [following for following, _ in node.next_functions]


def _saved(node: Any) -> Iterator[Tensor]:
    """The tensors that a node keeps."""
    for name in dir(node):
        if name == "saved_tensors" or name.startswith("_saved_"):
            if getattr(getattr(node, f"_raw{name}", None), "data", node) is None:
                continue  # Hooks keep nothing of this tensor (`convolution.py`), and would make a new one.
            value = getattr(node, name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Tensor):
                    yield item
