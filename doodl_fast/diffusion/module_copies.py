"""Copies of a module tree that share its weights, so that a caller's module is never changed for the length of a run.

A run calls a network whose weights do not require grad, because autograd would keep the activations that only their
gradients need. The network's blocks may be checkpointed, and its weights cast to another dtype. To set this on the
caller's own module would change it while other threads use it; `torch.func.functional_call` sets attributes of the
module as well.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..frozen import Level, substitute
from .block_checkpoint import checkpoint
from .calling import NetworkAdapter
from .hooks import CASTING, cast_for_calls, hooks_of
from .networks import FLOAT_DTYPES, blocks_checkpointed, can_checkpoint, frozen, module_tree

DEPTH = 3
"""How deep in lists, tuples and dicts of a module's attributes references to modules and weights are looked for."""
PLAIN = frozenset({bool, int, float, str, type(None), set, types.FunctionType, torch.dtype, torch.device, torch.Size})
"""Classes whose objects lead to no module and to no weight."""
CONTAINERS = frozenset({dict, OrderedDict, list, tuple})
LAYERS = frozenset({"diffusers.models.resnet.ResnetBlock2D"})
"""Classes of residual layers that compute the same when they are checkpointed, by their full names."""
TABLES = ("_parameters", "_buffers", "_modules")


_TYPES: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()
"""What `_why_type_is_not_copied` has found of each class. torch.compile warns of functools.cache."""


class ModuleCopies:
    """One shallow copy of each module of a tree, with the same weights, which do not require grad.

    A copy shares every attribute with its original, but for references to modules and weights of the tree: those lead
    to the copies. The weights share their storage and their version counters with the originals, unless they are cast.
    They are those of the moment at which the copies are made, so copies are made anew for each run. Non-leaf tensors in
    place of weights stay connected to their graph.

    Layers whose weights are cast for each call (diffusers' layerwise casting) have copies with cast weights, because
    the hook would take these away before a gradient is computed.

    Many threads may call the same copies, or copies of the same module, if the network's own `forward` allows that.

    Args:
        root: The module at the top of the tree.
        dtype: The dtype of floating weights and buffers; None keeps theirs.
        evaluation: Whether the copies are in eval mode.
        checkpoints: Whether blocks that can be checkpointed, as those of diffusers, are. With `lean=Level.ON` residual
            layers among them (see `LAYERS`) are not, because their lean graphs are small.
        layers: Whether the residual layers in those blocks (see `LAYERS`) are as well, when a block is computed again.
        lean: How little of what happens in the copies' layers their graphs keep.
        trained: Tensors that stand in the copies for some of the weights, which want gradients, by the `id` of the
            weight. They are cast to the weight's dtype. The layers that have them are those of plain PyTorch.

    Raises:
        RuntimeError: One of the weights for which another tensor is given is not in the tree any more.
    """

    def __init__(
        self,
        root: nn.Module,
        dtype: torch.dtype | None = None,
        evaluation: bool = False,
        checkpoints: bool = False,
        layers: bool = False,
        lean: Level = Level.OFF,
        trained: Mapping[int, Tensor] | None = None,
    ) -> None:
        self._dtype, self._trained = dtype, dict(trained or {})
        self._pairs = [(module, object.__new__(type(module))) for module in module_tree(root)]
        self._copies: dict[int, Any] = {id(module): copied for module, copied in self._pairs}
        self._weights: list[tuple[Tensor, Tensor]] = []
        for module, _ in self._pairs:
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None and id(tensor) not in self._copies:
                    weight = self._copies[id(tensor)] = self._weight(tensor, cast_for_calls(module))
                    self._weights.append((tensor, weight))
        for module, copied in self._pairs:
            object.__setattr__(copied, "__dict__", self._attributes(module))
            if evaluation:
                copied.training = False
            if checkpoints and can_checkpoint(copied):
                # Some versions of diffusers checkpoint in training mode alone. What is inside the block stays as it is.
                function = _checkpoint_but_residual if lean is Level.ON else checkpoint
                copied.__dict__.update(
                    training=True, gradient_checkpointing=True, _gradient_checkpointing_func=function
                )
        if not self._trained.keys() <= self._copies.keys():
            raise RuntimeError(
                "trainable: a weight that is trained was replaced by another parameter since the Denoiser was made; "
                "make the Denoiser after the network has its last parameters"
            )
        substitute(self._pairs, lean)
        for _, copied in self._pairs if layers else ():
            if is_residual_layer(copied):
                kind: Any = type(copied)
                copied.__class__ = _checkpointed_class(kind)
        self._before = [(copied.__dict__.copy(), copied._buffers.copy()) for _, copied in self._pairs]

    def of(self, network: Any) -> Any:
        """Returns a module, a bound method or a partial with every module of the tree in it replaced by its copy."""
        return rebound(network, self._copies)

    def write_back(self) -> None:
        """Gives the originals what the network's own calls have assigned to attributes of the copies.

        A network may count its calls, or keep an intermediate result for its user. Of cast copies no tensors are.
        """
        for (module, copied), (attributes, buffers) in zip(self._pairs, self._before, strict=True):
            if not _same(copied.__dict__, attributes):
                self._write_table(module.__dict__, copied.__dict__, attributes)
            if self._dtype is None and not _same(copied._buffers, buffers):
                self._write_table(module._buffers, copied._buffers, buffers)

    def release(self) -> None:
        """Lets go of all weights, even if the copies refer to each other in a cycle. They cannot be called again."""
        for _, copied in self._pairs:
            for name in TABLES:
                copied.__dict__[name].clear()
        for table in (self._copies, self._weights, self._before, self._pairs, self._trained):
            table.clear()

    def _write_table(self, table: dict[str, Any], changed: dict[str, Any], before: dict[str, Any]) -> None:
        """Writes the entries that have changed to the original's table, in terms of the originals."""
        originals = {id(copied): original for original, copied in (*self._pairs, *self._weights)}
        for name, value in changed.items():
            if name in TABLES or (name in before and before[name] is value):
                continue
            if self._dtype is None or not isinstance(value, Tensor):
                table[name] = rebound(value, originals)

    def _attributes(self, module: nn.Module) -> dict[str, Any]:
        """Returns the attributes of a module's copy."""
        copies, attributes = self._copies, module.__dict__.copy()
        if CASTING in hooks_of(module):
            del attributes["forward"], attributes["_diffusers_hook"]
        for name, value in attributes.items():
            kind = type(value)
            if kind in PLAIN or (kind in CONTAINERS and (not value or name in TABLES or _is_plain(value))):
                continue
            attributes[name] = rebound(value, copies)
        for name in TABLES:
            table = attributes[name]
            attributes[name] = {k: None if v is None else copies[id(v)] for k, v in table.items()} if table else {}
        return attributes

    def _weight(self, tensor: Tensor, cast: torch.dtype | None) -> Tensor:
        """Returns what the copies have in place of a weight or a buffer, which is cast for each call, or not."""
        trained = self._trained.get(id(tensor))
        if trained is not None:
            # The copies may be made without grad mode and called with it later.
            with torch.enable_grad():
                return trained.to(self._dtype or cast or tensor.dtype)
        if cast is not None and tensor.is_floating_point():
            return tensor.detach().to(self._dtype or cast)
        if self._dtype is not None and tensor.dtype in FLOAT_DTYPES:
            return tensor.detach().to(self._dtype)
        return tensor.detach() if tensor.requires_grad and tensor.is_leaf else tensor


def _is_plain(values: Any) -> bool:
    """Whether a list, a tuple or a dict has nothing but objects of plain classes in it, as most have."""
    return PLAIN.issuperset(map(type, values.values() if isinstance(values, dict) else values))


def _same(table: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a table has the very entries that it had, in the same order."""
    return [*table] == [*before] and all(map(operator.is_, table.values(), before.values()))


def rebound(value: Any, table: dict[int, Any], depth: int = DEPTH) -> Any:
    """Returns a value with every reference to a key of the table replaced, or the value itself if there is none.

    Args:
        value: An object whose `id` is a key, a bound method, a partial, a `NetworkAdapter`, or a list, tuple or dict of
            such. Other objects, closures for instance, are not looked into.
        table: What replaces an object, by the object's `id`.
        depth: How deep to look.
    """
    if id(value) in table:
        return table[id(value)]
    if depth == 0 or type(value) in PLAIN:
        return value
    inner = functools.partial(rebound, table=table, depth=depth - 1)
    if isinstance(value, types.MethodType):
        owner = inner(value.__self__)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, NetworkAdapter):
        module = inner(value.module)
        return value if module is value.module else value.of(module)
    if type(value) is functools.partial:
        parts = (value.func, value.args, value.keywords)
        function, args, keywords = found = tuple(map(inner, parts))
        same = all(a is b for a, b in zip(found, parts, strict=True))
        return value if same else functools.partial(function, *args, **keywords)
    if type(value) in (list, tuple):
        items = [inner(item) for item in value]
        return value if all(a is b for a, b in zip(items, value, strict=True)) else type(value)(items)
    if type(value) in (dict, OrderedDict):
        entries = {key: inner(item) for key, item in value.items()}
        return value if all(entries[key] is item for key, item in value.items()) else type(value)(entries)
    return value


def why_not_copied(root: nn.Module, network: Any = None) -> str | None:
    """Returns why copies of a module tree would not do what it does, or None if they do.

    Args:
        root: The module at the top of the tree.
        network: What is called, if that is not the module itself: a bound method of it for instance.
    """
    modules = module_tree(root)
    table: dict[int, Any] = {id(module): nn.Identity for module in modules}  # Only the keys matter.
    if network is not None and rebound(network, table) is network:
        return f"it is wrapped in {type(network).__name__}"
    reasons = {kind: _why_type_is_not_copied(kind) for kind in {type(module) for module in modules}}
    for module in modules:
        reason = reasons[type(module)] or _why_module_is_not_copied(module, table)
        if reason is not None:
            name = next(name for name, other in root.named_modules() if other is module)
            return reason.format(where=f"{type(module).__name__} {name!r}" if name else type(module).__name__)
    return None


def why_not_cast(root: nn.Module, network: Any = None) -> str | None:
    """Returns why no copies of a module tree with weights in another dtype can be made, or None if they can.

    Args:
        root: The module at the top of the tree.
        network: What is called, if that is not the module itself.
    """
    for name, weight in root.named_parameters():
        # A quantised weight has a class of its own, and says the dtype that it stands for, which it does not change.
        if weight.dtype in FLOAT_DTYPES and type(weight) not in (nn.Parameter, Tensor):
            return f"its weight {name!r} of type {type(weight).__name__} cannot be cast"
    return why_not_copied(root, network)


def _why_type_is_not_copied(kind: Any) -> str | None:
    """Returns why no module of a class can be copied, as a template with "{where}", or None."""
    if kind not in _TYPES:
        reason = None
        if issubclass(kind, torch.jit.ScriptModule):
            reason = "{where} is compiled by TorchScript"
        elif issubclass(kind, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            reason = "{where} wraps another module"
        elif any(getattr(base, "__slots__", ()) for base in kind.__mro__):
            reason = "{where} has attributes in slots"
        _TYPES[kind] = reason
    return _TYPES[kind]


def _why_module_is_not_copied(module: nn.Module, table: dict[int, Any]) -> str | None:
    """The same for one module, given the `id` of each module of its tree."""
    attributes = module.__dict__
    if "_orig_mod" in attributes or "_orig_mod" in module._modules:
        return "{where} wraps another module"
    if attributes.get("_compiled_call_impl") is not None:
        return "{where} is compiled in place"
    hooks, forward = hooks_of(module), attributes.get("forward")
    if hooks and (set(hooks) != {CASTING} or not _is_plainly_hooked(module)):
        return f"{{where}} has hooks of diffusers ({', '.join(map(repr, hooks))})"
    if hooks:
        forward = None
    if attributes.get("_hf_hook") is not None or (forward is not None and rebound(forward, table) is forward):
        return "the forward method of {where} was replaced, by a hook that moves its weights for instance"
    for key, weight in module._parameters.items():
        # Whatever is lazy, quantised or sharded has a class of its own.
        if weight is None or type(weight) is nn.Parameter:
            continue
        if nn.parameter.is_lazy(weight) or (weight.requires_grad and weight.is_leaf and type(weight) is not Tensor):
            return f"{{where}} has a weight {key!r} of type {type(weight).__name__}"
    return None


def _is_plainly_hooked(module: nn.Module) -> bool:
    """Whether a module with a hook of diffusers would call its class's `forward` without it."""
    references = getattr(module.__dict__["_diffusers_hook"], "_fn_refs", ())
    inner = getattr(references[0], "forward", None) if references else None
    return getattr(inner, "__func__", None) is type(module).forward


def _checkpoint_but_residual(block: Any, *args: Any) -> Any:
    """Calls a block as `checkpoint` does, unless it is a residual layer, whose graph is kept.

    The lean graph of a residual layer is a few tensors of its output's size, while its convolutions are expensive to
    compute again: of a UNet's blocks they spare the most operations for a byte (bench/block_mixes.py).
    """
    return block(*args) if isinstance(block, nn.Module) and is_residual_layer(block) else checkpoint(block, *args)


def is_residual_layer(module: nn.Module) -> bool:
    """Whether a module is one of the layers that blocks consist of, and can be checkpointed by itself."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in LAYERS and "forward" not in module.__dict__


@functools.cache
def _checkpointed_class(kind: Any) -> Any:
    """The subclass of a layer's class whose activations are computed again for a gradient."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(kind.forward, self)
        return checkpoint(call, *args, **kwargs)

    body = {"forward": forward, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), body)


@contextlib.contextmanager
def frozen_copy(network: Any, checkpoints: bool = False, lean: Level = Level.ON, layers: bool = False) -> Iterator[Any]:
    """Yields a copy of a module in eval mode whose weights do not require grad, and leaves the module as it is.

    It is safe in threads. A graph that is made with the copy may be differentiated after the context has ended. Where
    copies would not do what the module does (see `why_not_copied`), the module itself is yielded, and has its flags set
    for the length of the context; so many threads may use it in this way at once, but each sees the flags.

    Args:
        network: A module; any other object is yielded as it is.
        checkpoints: Whether blocks that can be checkpointed, as those of diffusers, are.
        lean: How little graphs keep.
        layers: Whether residual layers are checkpointed as well, if copies can be made.
    """
    if not isinstance(network, nn.Module):
        yield network
    elif why_not_copied(network) is None:
        copies = ModuleCopies(network, evaluation=True, checkpoints=checkpoints, layers=layers, lean=lean)
        try:
            yield copies.of(network)
        finally:
            copies.write_back()
    else:
        with frozen(network), blocks_checkpointed(network) if checkpoints else contextlib.nullcontext():
            yield network
