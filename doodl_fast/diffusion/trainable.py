"""Which weights of a network a chain differentiates: `Denoiser(..., trainable=...)`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .module_copies import why_not_copied

Trainable = bool | Callable[[str], bool] | Iterable[nn.Parameter]
"""What `Denoiser` accepts as `trainable`."""
WHOLE_CHAIN = (
    "give the Denoiser the network itself, and wrap a module whose forward runs the whole chain in "
    "DistributedDataParallel (docs/weights.md)"
)


def trained_weights(module: nn.Module | None, network: Any, trainable: Any, compiles: bool) -> tuple[nn.Parameter, ...]:
    """Finds the weights that `trainable` asks for, in the order in which the network names them.

    Args:
        module: The module behind the network, or None for a plain callable.
        network: The network, as the `Denoiser` was given it.
        trainable: False for none, True for all that require grad, a predicate on names, or parameters.
        compiles: Whether the network is called through `torch.compile`.

    Raises:
        TypeError: `trainable` is something else.
        ValueError: It asks for no weight, for one that is not the network's or does not require grad, or of a network
            whose weights cannot be replaced for the length of a run.
    """
    if trainable is False or trainable is None:
        return ()
    if module is None:
        raise ValueError(
            f"trainable: expected False for a network without weights, got {type(network).__name__}; use a module, or "
            "a NetworkAdapter around one"
        )
    refuse_uncopied(module, network, compiles)
    named = dict(module.named_parameters())
    if trainable is True:
        chosen = {name: weight for name, weight in named.items() if weight.requires_grad}
    elif callable(trainable):
        chosen = {name: weight for name, weight in named.items() if trainable(name)}
    else:
        chosen = _listed(named, trainable)
    if not chosen:
        raise ValueError(
            f"trainable: expected it to ask for some of the network's {len(named)} weights, got none; call "
            "requires_grad_(True) on those that are trained, or look at network.named_parameters()"
        )
    still = [name for name, weight in chosen.items() if not weight.requires_grad]
    if still:
        raise ValueError(
            f"trainable: expected weights that require grad, got {len(still)} that do not, {still[0]!r} for instance; "
            "call requires_grad_(True) on them"
        )
    return tuple(chosen.values())


def _listed(named: dict[str, nn.Parameter], trainable: Any) -> dict[str, nn.Parameter]:
    """The weights of a list of parameters, by name.

    Raises:
        TypeError: It is no list of parameters.
        ValueError: One is not among the named weights.
    """
    if isinstance(trainable, Tensor) or not isinstance(trainable, Iterable):
        raise TypeError(
            f"trainable: expected True, a predicate on names or a list of parameters, got {type(trainable).__name__}"
        )
    wanted = list(trainable)
    names = {id(weight): name for name, weight in named.items()}
    for index, weight in enumerate(wanted):
        if not isinstance(weight, nn.Parameter):
            raise TypeError(f"trainable[{index}]: expected a parameter, got {type(weight).__name__}")
        if id(weight) not in names:
            raise ValueError(
                f"trainable[{index}]: expected a parameter of the network, got one of shape {tuple(weight.shape)} "
                "that it does not have; parameters that make conditions get their gradient through those, and are "
                "not listed here"
            )
    ids = {id(weight) for weight in wanted}
    return {name: weight for name, weight in named.items() if id(weight) in ids}


def refuse_uncopied(module: nn.Module, network: Any, compiles: bool = False) -> None:
    """Raises ValueError if weights of a network cannot be differentiated, because no copies of it can be made."""
    if compiles:
        raise ValueError("trainable: expected compile=False, got True; weights of compiled networks get no gradients")
    reason = why_not_copied(module, network)
    if reason is not None:
        raise ValueError(
            "trainable: gradients of weights need a copy of the network that shares them, which cannot be made because "
            f"{reason}; {WHOLE_CHAIN}, or call the network without hooks"
        )
