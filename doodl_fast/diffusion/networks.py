"""What every caller of somebody else's network needs: where it lies, frozen weights, gradients that survive fp16."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.arithmetic import power_of_two

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (*HALF_DTYPES, torch.float32, torch.float64)


def check_source(source: str | Path, index: str, argument: str = "model") -> str:
    """The local folder or hub id that `source` names, without any network access.

    index: a file that a usable local folder holds. Anything that does not look like `org/name` is taken as a path.
    Raises ValueError, naming `argument`: missing folder, a file, or a folder without `index`.
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
    """Turns whatever the loading of `source`, checked by `check_source`, raises into one ValueError of one line."""
    try:
        yield
    except Exception as error:  # a hub's clients raise errors of half a dozen libraries
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if Path(source).is_dir():
            raise ValueError(f"{argument}: the folder {source!r} cannot be loaded: {reason}") from error
        raise ValueError(
            f"{argument}: {source!r} is no local folder, and was not found on the hub or cannot be loaded from it "
            f"(offline? private? misspelt?): {reason}"
        ) from error


@contextlib.contextmanager
def frozen(*modules: Any) -> Iterator[None]:
    """For its duration no weight requires grad and every module is in eval mode; both are restored, also after errors.

    A graph that is built inside keeps no activations for weight gradients and never produces any. Objects that are not
    modules are left alone.
    """
    networks = [module for module in modules if isinstance(module, nn.Module)]
    training = [m for network in networks for m in network.modules() if m.training]
    with without_weight_grad(*networks):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


@contextlib.contextmanager
def without_weight_grad(*networks: nn.Module) -> Iterator[None]:
    """For its duration no weight requires grad; the flags are restored, also after errors."""
    weights: list[Tensor] = []
    for network in networks:
        with lock_of(network):
            weights += [p for p in network.parameters() if p.requires_grad and p.is_leaf]
    try:
        for weight in weights:
            weight.requires_grad = False  # The method requires_grad_ is refused under torch.func's transforms.
        yield
    finally:
        for weight in weights:
            weight.requires_grad = True


def as_tensor(output: Any, argument: str) -> Tensor:
    """A network's output: a tensor, the first of a tuple, or what has `.sample`.

    Raises TypeError, naming the argument, for anything else, and for a tensor that is not floating.
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


def has_blocks(network: Any) -> bool:
    """Whether a network can checkpoint its blocks, as those of diffusers can."""
    return isinstance(network, nn.Module) and any(hasattr(m, "gradient_checkpointing") for m in network.modules())


@contextlib.contextmanager
def blocks_checkpointed(network: nn.Module) -> Iterator[None]:
    """For its duration diffusers' own checkpointing of a network's blocks is on; all is restored, also after errors.

    Some versions of diffusers checkpoint in training mode alone, so the blocks are put into it, but not what is inside
    them: no dropout wakes up. A block is `frozen` also when it is called again, which may be after the end of this.
    """
    blocks: list[Any] = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
    names = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: vars(block)[name] for name in names if name in vars(block)} for block in blocks]
    try:
        for block in blocks:
            block.training = block.gradient_checkpointing = True
            block._gradient_checkpointing_func = _checkpoint
        yield
    finally:
        for block, attributes in zip(blocks, before, strict=True):
            for name in names:
                vars(block).pop(name, None)
            vars(block).update(attributes)


def _checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    def call(*args: Any) -> Any:
        module = block if isinstance(block, nn.Module) else nn.Identity()
        with frozen(module), blocks_checkpointed(module):
            return block(*args)

    return checkpoint(call, *args, use_reentrant=False)


def run_in_dtype(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """`function(x.to(dtype))` in float32 at least.

    In fp16 and bf16 the cotangent is scaled by a power of two to a magnitude near 1 before it enters the function, and
    back behind it: the gradient of a mean over a picture's pixels would otherwise lie among fp16's subnormals.
    """
    if dtype not in HALF_DTYPES:
        y = function(x.to(dtype))
        return y.to(torch.promote_types(y.dtype, torch.float32))
    power: list[Tensor] = []
    enter: Callable[..., Tensor] = _UnscaleGradient.apply
    leave: Callable[..., Tensor] = _ScaleGradient.apply
    return leave(function(enter(x, dtype, power)), power)


class _ScaleGradient(torch.autograd.Function):
    """Casts to float32; its cotangent, divided by a power of two that it notes, goes on in the input's dtype."""

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
    """Casts to a dtype; its cotangent is multiplied by the noted power of two in float32 at least."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, power: list[Tensor]) -> Tensor:
        ctx.dtype, ctx.power = x.dtype, power
        return x.to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        wide = torch.promote_types(ctx.dtype, torch.float32)
        return (grad_outputs[0].to(wide) * ctx.power[0]).to(ctx.dtype), None, None


_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()  # type: ignore[valid-type]


def lock_of(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """The lock that a thread holds while it calls a network or has cast its weights: one for each network."""
    lock: contextlib.AbstractContextManager[Any] = _locks.setdefault(network, threading.RLock())
    return lock


@contextlib.contextmanager
def weights_cast(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """For its duration the floating weights and buffers of a network are copies in another dtype.

    No other thread calls the network through a `Denoiser`, or casts its weights, until it ends.
    """
    with lock_of(network):
        yield from _cast_weights(network, dtype)


def _cast_weights(network: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replaces the weights and buffers, pauses, and puts the originals back."""
    replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []
    copies: dict[Tensor, Tensor] = {}  # shared weights stay shared

    def cast(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.dtype not in FLOAT_DTYPES:
            return tensor
        if tensor not in copies:
            copies[tensor] = tensor.detach().to(dtype)
        return copies[tensor]

    try:
        for module in network.modules():
            tables: list[dict[str, Any]] = [module._parameters, module._buffers]
            for tensors in tables:
                replaced.append((tensors, dict(tensors)))
                tensors.update({name: cast(tensor) for name, tensor in tensors.items()})
        yield
    finally:
        for tensors, originals in replaced:
            tensors.update(originals)
