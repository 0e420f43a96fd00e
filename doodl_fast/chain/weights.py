"""What a chain checks about the weights of its network: that they stay the same, and whether they expect a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .evaluator import Evaluator

SHOWN = 3
"""How many names a message lists."""


@dataclass(frozen=True)
class Snapshot:
    """The weights of an evaluator as a forward run left them: names, tensors and the versions of the tensors.

    PyTorch counts the in-place changes of a tensor in its version; autograd checks the tensors that it saves by it.
    """

    weights: tuple[tuple[str, Tensor, int | None], ...]

    @classmethod
    def take(cls, evaluator: Evaluator) -> Snapshot:
        return cls(tuple((name, tensor, _version(tensor)) for name, tensor in evaluator.weights()))

    def check(self, evaluator: Evaluator) -> None:
        """Raises RuntimeError, naming the weight, if one was changed in place or replaced since the snapshot.

        Weights on the meta device are passed over: offloading to the CPU or to disk swaps them at every call.
        """
        now = dict(evaluator.weights())
        for name, tensor, version in self.weights:
            current = now.get(name)
            moved = current is None or current.is_meta or tensor.is_meta
            if _version(tensor) != version:
                what = f"was changed in place (it had version {version}, now {_version(tensor)})"
            elif current is not tensor and not moved:
                what = "was replaced by another tensor"
            else:
                continue
            raise RuntimeError(
                f"weights: {name!r} {what} between the chain's forward run and its backward pass, which evaluates the "
                "network again, so the gradient would be wrong; run the chain again after changing its network"
            )


def _version(tensor: Tensor) -> int | None:
    """None for inference tensors, which count no versions."""
    return None if tensor.is_inference() else tensor._version


def trained_subset(weights: Sequence[tuple[str, Tensor]]) -> list[str]:
    """The names of the weights that require grad, if others do not, as with a LoRA. None are named if all do: a module
    is made that way, so it says nothing of what its user expects."""
    named = [name for name, tensor in weights if tensor.requires_grad]
    others = any(isinstance(z, nn.Parameter) and z.is_floating_point() and not z.requires_grad for _, z in weights)
    return named if others else []


def listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    text = ", ".join(map(repr, names[:SHOWN]))
    return text if len(names) <= SHOWN else f"{text} and {len(names) - SHOWN} more"
