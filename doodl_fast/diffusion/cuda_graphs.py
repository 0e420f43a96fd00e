"""CUDA graphs of a `Denoiser`'s calls: when they are used, and when they are made anew.

A UNet launches many small kernels a call. On a fast GPU that takes longer than the kernels themselves. All calls
of a chain have the same shapes, so one recording of a call, and one of a call with its vector-Jacobian product (VJP),
serve all of them.

A recording repeats kernels, and not the Python code that launched them. So what it does must be what the network would
do. In the mode "auto" only networks are recorded whose modules all come from libraries whose modules do nothing on the
side, and which nobody has hooked; and at the first evaluation of every run the network itself is called once, and the
replayed value is compared with its value bit by bit.
"""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .active_calls import ActiveCall
from .calling import NetworkAdapter
from .graph_recorder import CudaRecorder, Recorder
from .networks import as_tensor
from .recorded_call import RecordedCall, Shared

_LOG = logging.getLogger(__name__)
AUTO = "auto"
OFF = "cuda_graphs is False"
OUTSIDE = "it was called outside of a chain's run"
TRAINED = "weights of the network are trained"
WATCHED = "a dispatch mode or a transform of torch.func watches every operator"
KNOWN_LIBRARIES = frozenset({"torch", "diffusers", "transformers", "peft", "doodl_fast"})
"""Libraries whose modules compute a value from their arguments and do nothing else that a caller could see."""
MOST_RECORDINGS = 6
"""How many recordings a denoiser has at most. The one that was used longest ago is dropped."""
FASTER = 0.8
"""A recording is used if a replay takes at most this share of the seconds of a call."""
CLOSE = 0.1
"""How far the replayed gradient may be from the network's own, which may differ from call to call: attention kernels
add up in the order in which they finish. |difference| / |gradient| in the 2-norm."""


Function = Callable[..., Tensor]


@dataclass(eq=False)
class Recording:
    """What is known of calls of one kind.

    Attributes:
        key: What the calls have in common.
        others: Their arguments that are no tensors.
        weights: The addresses of the network's weights when it was recorded.
        recorded: The recording, if there is one.
        refusal: Why there is none.
        seconds: What a call and a replay take, each with its VJP if it has one.
        checked: The run in which the recording was last compared with the network.
    """

    key: Any
    others: list[Any]
    weights: tuple[int, ...] = ()
    recorded: RecordedCall | None = None
    refusal: str | None = None
    seconds: tuple[float, float] | None = None
    checked: weakref.ref[Any] | None = None


@dataclass(eq=False)
class _Stream:
    """The recordings of one stream of a device, which share their memory."""

    shared: Shared
    recordings: list[Recording] = field(default_factory=list)

    def recording(self, key: Any, others: list[Any]) -> Recording:
        """What is known of a kind of calls, and moves it to the end of the list."""
        found = next((r for r in self.recordings if r.key == key and _equal(r.others, others)), None)
        if found is None:
            found = Recording(key, others)
        else:
            self.recordings.remove(found)
        self.recordings.append(found)
        del self.recordings[:-MOST_RECORDINGS]
        return found


class CudaGraphs:
    """Records a network's calls, and replays them in place of calls.

    Args:
        mode: "auto", True or False; see `Denoiser`.
        recorder: What records on a device.

    Attributes:
        why_not: Why the latest call was not replayed; None if it was.
        seconds: What a call like the latest one takes, and its replay, each with the VJP if it has a graph; None if it
            was not replayed.

    Raises:
        ValueError: `mode` is none of the three.
    """

    def __init__(self, mode: bool | str = AUTO, recorder: type[Recorder] = CudaRecorder) -> None:
        if mode not in (AUTO, True, False):
            raise ValueError(f'cuda_graphs: expected "auto", True or False, got {mode!r}')
        self.mode = mode
        self.why_not: str | None = "nothing was called yet" if mode else OFF
        self.seconds: tuple[float, float] | None = None
        self._recorder = recorder
        self._streams: dict[Any, _Stream] = {}
        self._run: weakref.ref[Any] | None = None
        self._reason_of_run: str | None = None
        self._lock = threading.Lock()
        self._said = False

    def __reduce__(self) -> Any:
        return CudaGraphs, (self.mode, self._recorder)  # A copy of a denoiser makes recordings of its own.

    def call(self, run: ActiveCall | None, trains: bool, new_call: Callable[[], Callable[..., Any]], *args: Any) -> Any:
        """The network's output for some arguments: replayed if that is possible, else by a call.

        Args:
            run: The run that is under way; None outside of runs.
            trains: Whether weights of the network get gradients.
            new_call: Gives the function that is called in this run.
            *args: Its arguments, (x, t, cond, kwargs).
        """
        if not self.mode:
            return new_call()(*args)
        if not self._lock.acquire(blocking=False):
            self.refuse("another thread calls the same denoiser")
            return new_call()(*args)
        try:
            reason = TRAINED if trains else self._why_not(run, args[0])
            if run is not None and reason is None:
                return self._replayed(run, new_call, args)
            self.refuse(reason or OUTSIDE)
            return new_call()(*args)
        finally:
            self._lock.release()

    def _replayed(self, run: ActiveCall, new_call: Callable[[], Callable[..., Any]], args: tuple[Any, ...]) -> Tensor:
        """The network's value for some arguments, by a recording if there is a sound one."""
        leaves, structure = tree_flatten(args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

        def function(*given: Tensor) -> Tensor:
            left = iter(given)
            filled = [next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return as_tensor(new_call()(*tree_unflatten(filled, structure)), "unet")

        if any(tensor.device != tensors[0].device for tensor in tensors):
            self.refuse("a condition lies on another device than the latents")
            return function(*tensors)
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
        key = (run.variant, str(structure), tuple(map(_kind, tensors)), tuple(wanted))
        stream = self._stream(tensors[0].device)
        found = stream.recording(key, others)
        expected: Tensor | None = None
        if found.refusal is None and (found.checked is None or found.checked() is not run):
            with torch.no_grad():
                expected = function(*(tensor.clone() for tensor in tensors))  # A network may change its arguments.
            found.checked = weakref.ref(run)
            weights = _addresses(run.module)
            if found.recorded is None or found.weights != weights or not _same(found.recorded, tensors, expected):
                found.recorded, found.weights = None, weights
                found.refusal = self._record(stream.shared, found, function, tensors, wanted, expected)
        if found.recorded is None:
            self.refuse(found.refusal or "")
        else:
            self.why_not, self.seconds = None, found.seconds
        if expected is not None and not any(wanted):
            return expected
        return function(*tensors) if found.recorded is None else found.recorded(*tensors)

    def _record(
        self,
        shared: Shared,
        found: Recording,
        function: Function,
        tensors: list[Tensor],
        wanted: list[bool],
        expected: Tensor,
    ) -> str | None:
        """Makes a recording. Returns the reason if it is of no use."""
        try:
            recorded = RecordedCall(shared, function, tensors, wanted)
            if not _same(recorded, tensors, expected):
                return "replayed, a call gives other bits than the network"
            ways = [functools.partial(_value_and_gradients, way, tensors, wanted) for way in (function, recorded)]
            if not all(map(_is_close, *(way() for way in reversed(ways)))):
                return "replayed, a call gives another gradient than the network"
            launching, replaying = (min(shared.recorder.seconds(way) for _ in range(2)) for way in ways)
        except RuntimeError as error:  # It may also be out of memory, which the recording takes as well as the network.
            return f"the network's call cannot be recorded: {str(error).splitlines()[0]}"
        if self.mode == AUTO and replaying > FASTER * launching:
            return f"a replay takes {replaying:.3g} s, and a call {launching:.3g} s"
        found.recorded, found.seconds = recorded, (launching, replaying)
        return None

    def records_on(self, device: torch.device) -> bool:
        """Whether calls on a device are recorded, if the network allows it."""
        return bool(self.mode) and device.type == self._recorder.device_type

    def clear(self) -> None:
        """Frees all recordings. Later calls are recorded anew."""
        self._streams.clear()

    def _stream(self, device: torch.device) -> _Stream:
        """The recordings of the current stream."""
        key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
        if key not in self._streams:
            self._streams[key] = _Stream(Shared(self._recorder(device)))
        return self._streams[key]

    def _why_not(self, run: ActiveCall | None, x: Tensor) -> str | None:
        """Why calls of a run are not replayed now, or None."""
        if run is None:
            return OUTSIDE
        if x.device.type != self._recorder.device_type:
            return f"the latents lie on {x.device}"
        if torch.is_inference_mode_enabled():
            return "inference mode is on"
        if torch._C._is_any_autocast_enabled():
            return "autocast is on"
        if _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active():
            return WATCHED
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return "the caller compiles or records the call"
        if _has_any_global_hook():
            return "a hook is registered for all modules"
        if self._run is None or self._run() is not run:
            self._run, self._reason_of_run = weakref.ref(run), _why_not_run(run, self.mode == AUTO)
        return self._reason_of_run

    def refuse(self, reason: str) -> None:
        """Notes why calls are not replayed: as a warning where that was asked for by name, else in the log."""
        self.seconds = None
        if self.why_not != reason:
            self.why_not = reason
            _LOG.info("CUDA graphs are not used: %s", reason)
        if self.mode is True and not self._said and reason not in (OUTSIDE, WATCHED):
            self._said = True
            warnings.warn(f"cuda_graphs: calls are not replayed, because {reason}", RuntimeWarning, stacklevel=6)


def _why_not_run(run: ActiveCall, careful: bool) -> str | None:
    """Why no call of a run's network can be replayed, or None. careful: whether strangers' code is refused."""
    if run.variant.cast_to is not None:
        return "VJPs are taken of a copy with other weights, which is made anew in each run"
    if run.original.compiles:
        return "the network is compiled"
    network = run.original.network
    if careful and not (isinstance(network, (nn.Module, NetworkAdapter)) and _is_known(network)):
        return f"{type(network).__name__} is called, which may do more than compute a value"
    for name, module in run.module.named_modules():
        where = f"module {name!r}" if name else "the network"
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in vars(module):
            return f"{where} has a hook, or its forward method was replaced"
        processor = getattr(module, "processor", None)
        for part in (module, *([] if processor is None else [processor])):
            if careful and not _is_known(part):
                return f"{where} has code of {type(part).__module__}, which may do more than compute a value"
    return None


def _is_known(part: Any) -> bool:
    """Whether an object's class is of a library whose modules do nothing on the side."""
    return type(part).__module__.partition(".")[0] in KNOWN_LIBRARIES


def _addresses(module: nn.Module) -> tuple[int, ...]:
    """Where a network's weights and buffers lie, which a recording reads them from."""
    return tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """What a recording depends on of an argument, beside its values."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _equal(others: list[Any], given: list[Any]) -> bool:
    """Whether arguments that are no tensors are the same. Objects without values of their own are told by identity."""
    return len(others) == len(given) and all(
        a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
        for a, b in zip(others, given, strict=True)
    )


def _same(recorded: RecordedCall, tensors: list[Tensor], expected: Tensor) -> bool:
    """Whether a replay gives the bits of the network."""
    value = recorded.forward(tensors)[0]
    return (
        value.dtype == expected.dtype
        and torch.equal(value.isnan(), expected.isnan())
        and torch.equal(value.nan_to_num(), expected.nan_to_num())
    )


def _value_and_gradients(function: Function, tensors: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    """A function's gradients for a cotangent that is the same each time, or its value if no gradient is wanted."""
    leaves = [t.detach().clone().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
    with torch.set_grad_enabled(any(wanted)):
        value = function(*leaves)
    if not any(wanted):
        return [value]
    generator = torch.Generator(value.device).manual_seed(0)
    cotangent = torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype)
    inputs = [leaf for leaf in leaves if leaf.requires_grad]
    found = torch.autograd.grad(value, inputs, cotangent, allow_unused=True, materialize_grads=True)
    return list(found)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    """Whether a gradient is another but for the order of sums; what is not finite is not compared."""
    found, expected = found.float().nan_to_num(0, 0, 0), expected.float().nan_to_num(0, 0, 0)
    return bool((found - expected).norm() <= CLOSE * expected.norm())
