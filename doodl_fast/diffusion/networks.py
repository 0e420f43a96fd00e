"""Helpers for calling networks: finding and loading them, freezing their weights, and gradients in fp16."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.arithmetic import power_of_two
from .block_checkpoint import checkpoint

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def check_source(source: str | Path, index: str, argument: str = "model") -> str:
    """Checks the name of a model without access to the internet.

    Args:
        source: A local folder or a hub id. What does not look like `org/name` is taken as a folder.
        index: The name of a file that a usable folder holds.
        argument: What errors call `source`.

    Returns:
        The folder or hub id as text.

    Raises:
        ValueError: The folder is missing, is a file, or does not hold `index`.
    """
    if not isinstance(source, (str, Path)) or not str(source):
        raise ValueError(f"{argument}: expected a folder or a hub id such as org/name, got {source!r}")
    text, path = str(source), Path(source).expanduser()
    if path.is_dir():
        if not (path / index).is_file():
            raise ValueError(
                f"{argument}: expected a folder with {index} in it, got {text!r}; save the model with save_pretrained()"
            )
        return str(path)
    if path.exists():
        raise ValueError(
            f"{argument}: expected a folder, got the file {text!r}; convert it with from_single_file() and "
            "save_pretrained()"
        )
    if isinstance(source, Path) or not HUB_ID.fullmatch(text):
        raise ValueError(f"{argument}: the folder {text!r} does not exist (a hub id has the form org/name)")
    return text


@contextlib.contextmanager
def loading(source: str, argument: str = "model") -> Iterator[None]:
    """Turns any error of the loading inside the context into a ValueError of one line.

    Args:
        source: What is loaded, as `check_source` returned it.
        argument: What the error calls it.
    """
    try:
        yield
    except Exception as error:  # The clients of a hub raise the errors of many libraries.
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(source).is_dir():
            raise ValueError(f"{argument}: the folder {source!r} cannot be loaded: {reason}") from error
        raise ValueError(
            f"{argument}: {source!r} is no local folder, and was not found on the hub or cannot be loaded from it "
            f"(offline? private? misspelt?): {reason}"
        ) from error


def module_tree(root: nn.Module) -> list[nn.Module]:
    """Returns what `root.modules()` yields, in that order, but faster. Every run walks through its network."""
    found: dict[int, nn.Module] = {}
    ahead: list[nn.Module | None] = [root]
    while ahead:
        module = ahead.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if module._modules:
                ahead += reversed(module._modules.values())
    return list(found.values())


@contextlib.contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """Sets modules to eval mode, and their weights to not require grad, for the length of the context.

    A graph that is built inside keeps no activations for the gradients of weights. The flags are set on the modules
    themselves, so other threads see them; `frozen_copy` leaves the modules alone, and is to be preferred. The contexts
    of several threads may overlap in any order: the flags are restored when the last of them ends.

    Args:
        *modules: Modules; other objects are left alone.
    """
    networks = [module for module in modules if isinstance(module, nn.Module)]
    everything = [module for network in networks for module in network.modules()]
    with without_weight_grad(*networks), _overridden((module, {"training": False}) for module in everything):
        yield


@contextlib.contextmanager
def without_weight_grad(*networks: nn.Module) -> Iterator[None]:
    """Sets the weights of modules to not require grad for the length of the context; else as `frozen`."""
    weights = [weight for network in networks for weight in network.parameters() if weight.is_leaf]
    with _overridden((weight, {"requires_grad": False}) for weight in weights):
        yield


class _Override:
    """An attribute that is set for the length of one or more contexts.

    Attributes:
        target: The object, which stays alive with this.
        before: The value that is restored at the end; `_MISSING` if the object has no such attribute of its own.
        values: The value that each active context asks for, by the context's token. The latest one holds.
    """

    def __init__(self, target: Any, name: str) -> None:
        self.target, self.name, self.values = target, name, dict[object, Any]()
        own = isinstance(target, Tensor) or name in vars(target)
        self.before = getattr(target, name) if own else _MISSING

    def apply(self) -> None:
        """Sets the attribute to what the active contexts ask for, or restores it if there are none."""
        value = next(reversed(self.values.values()), self.before)
        if value is _MISSING:
            vars(self.target).pop(self.name, None)
        elif isinstance(self.target, Tensor):
            # The method requires_grad_ is refused under torch.func's transforms.
            setattr(self.target, self.name, value)
        else:
            vars(self.target)[self.name] = value


_MISSING = object()
_OVERRIDES: dict[tuple[int, str], _Override] = {}
_OVERRIDES_LOCK = threading.RLock()


@contextlib.contextmanager
def _overridden(settings: Iterable[tuple[Any, dict[str, Any]]]) -> Iterator[None]:
    """Sets attributes of objects for the length of the context; contexts may overlap in any order, in any threads."""
    token, keys = object(), []
    try:
        with _OVERRIDES_LOCK:
            for target, values in settings:
                for name, value in values.items():
                    key = (id(target), name)
                    override = _OVERRIDES.get(key) or _Override(target, name)
                    if not override.values and override.before == value:
                        continue
                    _OVERRIDES[key] = override
                    keys.append(key)
                    override.values[token] = value
                    override.apply()
        yield
    finally:
        with _OVERRIDES_LOCK:
            for key in reversed(keys):
                override = _OVERRIDES[key]
                del override.values[token]
                override.apply()
                if not override.values:
                    del _OVERRIDES[key]


def as_tensor(output: Any, argument: str) -> Tensor:
    """Returns the tensor in a network's output.

    Args:
        output: A floating tensor, a tuple or list that begins with it, or an object that has it as `.sample`.
        argument: What the error calls the network.

    Raises:
        TypeError: It is none of these.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    output = getattr(output, "sample", output) if not isinstance(output, Tensor) else output
    if not isinstance(output, Tensor) or not output.is_floating_point():
        kind = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(
            f"{argument}: expected it to return a floating tensor, a tuple or an object with .sample, got {kind}"
        )
    return output


def refuse_stochastic(network: nn.Module) -> None:
    """Raises ValueError if a module is random or keeps running statistics, so that a second call differs."""
    for module in module_tree(network):
        if not module.training:
            continue
        dropout: float = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            dropout = module.p
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            dropout = module.dropout
        batch_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        # The power iteration of spectral norm goes on at every call.
        batch_statistics = batch_statistics or isinstance(module, nn.utils.parametrizations._SpectralNorm)
        if dropout > 0 or batch_statistics or isinstance(module, nn.RReLU):
            name = next(name for name, other in network.named_modules() if other is module)
            why = f"dropout p={dropout:g}" if dropout > 0 else "random or running statistics"
            raise ValueError(
                f"unet: {type(module).__name__} {name!r} is in training mode ({why}), so a second evaluation "
                "differs from the first and no gradient can be right; call unet.eval() first"
            )


def has_blocks(network: Any) -> bool:
    """Whether a network can checkpoint its blocks, as those of diffusers can."""
    return isinstance(network, nn.Module) and any(map(can_checkpoint, network.modules()))


def scalable_layers(network: Any) -> list[Any]:
    """Returns the layers of a network with LoRA adapters of peft, whose `scaling` a call may change for its length."""
    if not isinstance(network, nn.Module):
        return []
    return [m for m in network.modules() if hasattr(m, "scale_layer") and isinstance(getattr(m, "scaling", None), dict)]


def scales_adapters(network: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a network's arguments hold a scale for LoRA adapters that it has, for the length of a call.

    Args:
        network: The network.
        kwargs: Its arguments.
    """
    given = [kwargs.get(f"{name}attention_kwargs") for name in ("cross_", "joint_", "")]
    scales = [entry.get("scale") for entry in given if isinstance(entry, Mapping)]
    return any(scale not in (None, 1) for scale in scales) and bool(scalable_layers(network))


WRONG_WHEN_CHECKPOINTED = (
    *(
        f"diffusers.pipelines.audioldm2.modeling_audioldm2.{kind}"
        for kind in ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D", "UNetMidBlock2DCrossAttn")
    ),
    "diffusers.models.transformers.transformer_chroma.ChromaTransformer2DModel",
)
"""Classes of diffusers 0.42 that compute something else when they checkpoint what is in them: the blocks of AudioLDM 2
take the prompt's mask for that of the latents, and half of Chroma's blocks get no mask. What is in the former can be
checkpointed all the same."""


def can_checkpoint(module: nn.Module) -> bool:
    """Whether a module checkpoints what is in it, as diffusers' do, and computes the same then."""
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return hasattr(module, "gradient_checkpointing") and name not in WRONG_WHEN_CHECKPOINTED


@contextlib.contextmanager
def blocks_checkpointed(network: nn.Module) -> Iterator[None]:
    """Turns on diffusers' checkpointing of a network's blocks for the length of the context; else as `frozen`.

    Some versions of diffusers checkpoint in training mode alone, so the blocks are put into it, but not what is inside
    them, so that no dropout wakes up. A block may be called again for a gradient after the end of the context; it is
    set up in the same way for that call.
    """
    attributes = {"training": True, "gradient_checkpointing": True, "_gradient_checkpointing_func": _checkpoint}
    blocks = [module for module in network.modules() if can_checkpoint(module)]
    with _overridden((block, attributes) for block in blocks):
        yield


def _checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    """Calls a block so that its activations are computed again for a gradient, by a block that is frozen then too."""

    def call(*args: Any) -> Any:
        module = block if isinstance(block, nn.Module) else nn.Identity()
        with frozen(module), blocks_checkpointed(module):
            return block(*args)

    return checkpoint(call, *args)


def run_in_dtype(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """Calls a function in another dtype, differentiably.

    In fp16 and bf16 the cotangent is divided by a power of two before the function's VJP, so that its magnitude is near
    1, and multiplied by it afterwards. Otherwise the gradient of a mean over the pixels of a picture would be too small
    for fp16.

    Args:
        function: What is called.
        x: Its argument.
        dtype: The dtype that the argument is cast to.

    Returns:
        What the function returns, in float32 at least.
    """
    if dtype not in HALF_DTYPES:
        y = function(x.to(dtype))
        return y.to(torch.promote_types(y.dtype, torch.float32))
    power: list[Tensor] = []
    enter: Callable[..., Tensor] = _UnscaleGradient.apply
    leave: Callable[..., Tensor] = _ScaleGradient.apply
    return leave(function(enter(x, dtype, power)), power)


class _ScaleGradient(torch.autograd.Function):
    """Casts to float32. Backwards, it divides the cotangent by a power of two, which it notes in a list."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, power: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.power = y.dtype, power
        return y.to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        cotangent = grad_outputs[0]
        ctx.power[:] = [power_of_two(cotangent)]
        return (cotangent / ctx.power[0]).to(ctx.dtype), None


class _UnscaleGradient(torch.autograd.Function):
    """Casts to another dtype. Backwards, it multiplies the cotangent by the power of two in a list."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, power: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.power = x.dtype, power
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(ctx.dtype, torch.float32)
        return (grad_outputs[0].to(wide) * ctx.power[0]).to(ctx.dtype), None, None
