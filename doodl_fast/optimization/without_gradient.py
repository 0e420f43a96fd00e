"""Names the losses and the variables whose gradient is missing or zero, which would change nothing in silence."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import Losses

REASONS = "a rounding, a comparison, an argmax or a clamp has no slope"


def warn_of_constant_losses(losses: Losses, values: Sequence[Tensor]) -> None:
    """Warns of losses without a graph beside others that have one: they change the sum and never the update.

    Losses with the weight 0 are only logged, and are not warned about.

    Args:
        losses: The losses.
        values: Their values, as the first step has computed them.
    """
    terms = [term for term, value in zip(losses.terms, values, strict=True) if term.weight and not value.requires_grad]
    if terms:
        names = " and ".join(losses.label(term) for term in terms)
        warnings.warn(
            f"{names}: the value has no gradient, so it is logged and changes nothing. Is it detached, computed under "
            "torch.no_grad(), by NumPy or PIL, or of something that is no variable? With the weight 0 it is logged "
            "without this warning",
            RuntimeWarning,
            stacklevel=2,
        )


def warn_of_zero_gradients(names: Sequence[str], gradients: Sequence[Tensor]) -> None:
    """Warns of variables whose gradient is zero in every entry, as the first step has computed it.

    Args:
        names: The variable of each tensor.
        gradients: Their gradients.
    """
    for name in dict.fromkeys(names):
        own = [gradient for other, gradient in zip(names, gradients, strict=True) if other == name]
        if not bool(torch.stack([gradient.any().to(own[0].device) for gradient in own]).any()):
            warnings.warn(
                f"variables[{name!r}]: its gradient is 0 everywhere in the first step, so it stays as it is for as "
                f"long as that holds. Look at the losses and the decoder: {REASONS}",
                RuntimeWarning,
                stacklevel=2,
            )
