"""What share each kind of operator has of a network's forward pass and its vector-Jacobian product (VJP).

    python bench/op_shares.py [--networks sd15 sdxl ...] [--tflops 790] [--tbytes 4.8]  # bounds, on the meta device
    python bench/op_shares.py --measure [--networks sd15 flux sd35] [--rounds 3]         # CPU time, small networks

The layers are PyTorch's own, with one kernel for each operator. No kernel takes less time than its floating-point
operations or its reads and writes take on a card of the given speed, whichever takes longer. Their sum bounds the time
of a call. The columns of a kind of operators are shares of all kinds together:

- "bytes": what its kernels read and write.
- "time": its kernels' part of the bound.
- "fused": what that part would be if operators of this kind that follow each other were one kernel, which reads what
  comes from outside of it (what the forward pass has kept, too) and writes one result. A kernel for this kind can save
  "time" less "fused". The last row does so for everything that stands between two products.

A bound is no measurement: real kernels are slower, and launches take time of their own. `--measure` takes the
processor's time of each operator on one thread instead, the smallest sum of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from lean import REAL, SMALL, Network
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PRODUCT, ATTENTION, GROUP, EMBED = "matrix products, convolutions", "attention", "GroupNorm, SiLU", "add of timestep"
NORM, RMS, GATED, GATE = "LayerNorm, modulation", "RMSNorm", "GELU, GEGLU", "residual adds, gates"
ROTARY, UPSAMPLE, SUM, COPY, OTHER = (
    "rotary embeddings, other in attention",
    "upsampling",
    "sums of gradients",
    "copies, joins",
    "other",
)
KINDS = (PRODUCT, ATTENTION, GROUP, EMBED, NORM, RMS, GATED, GATE, ROTARY, UPSAMPLE, SUM, COPY, OTHER)
BETWEEN = "all but products and attention"
BY_NAME = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn"), PRODUCT),
    **{"scaled_dot_product": ATTENTION, "native_group_norm": GROUP, "silu": GROUP, "native_layer_norm": NORM},
    **{"gelu": GATED, "upsample": UPSAMPLE},
    **dict.fromkeys(("cat", "stack", "copy", "to_copy", "clone", "slice_backward", "select_backward"), COPY),
}
"""The kinds of operators by how their names begin."""
BY_LAYER = {"RMSNorm": RMS, "GEGLU": GATED, "GELU": GATED, "Attention": ROTARY, "FluxAttention": ROTARY}
"""The kinds of other operators in layers of some classes."""
SMALL_BYTES = 2**18
"""Operators on smaller tensors, of a batch's embeddings for instance, do not part two others."""


@dataclass
class Kernel:
    """One kernel: its kind, the size of each memory that it reads and writes, its FLOPs, and on the CPU its seconds."""

    kind: str
    read: dict[int, int]
    written: dict[int, int]
    flops: int
    seconds: float

    @property
    def bytes(self) -> int:
        """What it reads and writes."""
        return sum(self.read.values()) + sum(self.written.values())


def sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The bytes of tensors by their storage. What is broadcast counts once."""
    found: dict[int, int] = defaultdict(int)
    for tensor in tensors:
        count = tensor.element_size()
        for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= n if stride else 1
        found[tensor.untyped_storage()._cdata] += count
    return found


class Kernels(TorchDispatchMode):
    """Notes every kernel of a call of a network and of its VJP. Operators that return views have none.

    Attributes:
        found: The kernels, in their order.
        forward: Whether the forward pass runs.
    """

    def __init__(self, network: nn.Module, keep: bool) -> None:
        super().__init__()
        self.found: list[Kernel] = []
        self.forward = True
        self.kept: list[Any] | None = [] if keep else None  # So that no other tensor gets the same storage.
        self.layers: list[str] = []
        self.kinds: dict[int, str] = {}  # The kind of each node of the graph, by its number.
        self.hooks: list[Any] = []
        for layer in network.modules():
            name = type(layer).__name__
            self.hooks.append(layer.register_forward_pre_hook(lambda *_, name=name: self.layers.append(name)))
            self.hooks.append(layer.register_forward_hook(lambda *_: self.layers.pop() and None))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = time.process_time()
        result = func(*args, **kwargs)
        seconds = time.process_time() - began
        name = func._schema.name.removeprefix("aten::").lstrip("_")
        read, written = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), result))
        if self.kept is not None:
            self.kept += read + written
        if func.is_view or name.startswith(("empty", "new_empty", "detach", "reshape_alias", "unsafe_view")):
            if self.forward and self.layers and self.layers[-1] in BY_LAYER:
                self._note(read, BY_LAYER[self.layers[-1]])
            return result
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        kind = self._of_forward(name, read, written) if self.forward else self._of_backward(name)
        self.found.append(Kernel(kind, sizes(read), sizes(written), flops, seconds))
        return result

    def _of_forward(self, name: str, read: list[Tensor], written: list[Tensor]) -> str:
        kind = next((kind for start, kind in BY_NAME.items() if name.startswith(start)), None)
        layer = BY_LAYER.get(self.layers[-1]) if self.layers else None
        if kind is None or layer == RMS or (layer and name in ("stack", "to_copy")):
            kind = layer if layer and name != "div" else _elementwise(name, read, written)
        if name == "native_layer_norm" and kind == NORM:
            written[0]._normalised = True  # type: ignore[attr-defined]
        self._note(read, kind)
        return kind

    def _note(self, read: list[Tensor], kind: str) -> None:
        """Notes the kind of the node that the graph has for an operator."""
        if any(tensor.requires_grad for tensor in read):
            self.kinds.setdefault(torch.autograd._get_sequence_nr() - 1, kind)  # type: ignore[attr-defined]

    def _of_backward(self, name: str) -> str:
        node = torch._C._current_autograd_node()
        noted = None if node is None else self.kinds.get(node._sequence_nr())
        if name == "add" and noted not in (RMS, ROTARY):  # One is made where a tensor has been used twice.
            return SUM
        return noted or (COPY if name in BY_NAME or name == "clone" else OTHER)


def _elementwise(name: str, read: list[Tensor], written: list[Tensor]) -> str:
    """The kind of an addition or a multiplication in the forward pass, by its operands."""
    normalised = any(getattr(tensor, "_normalised", False) for tensor in read)
    if normalised and name in ("mul", "add"):
        if name == "mul":
            written[0]._normalised = True  # type: ignore[attr-defined]
        return NORM
    if name == "add" and len(read) == 2 and read[0].ndim == 4 and read[1].shape[2:] == (1, 1) != read[0].shape[2:]:
        return EMBED
    return GATE if name in ("mul", "add", "div") and written and written[0].ndim > 2 else OTHER


def kernels(network: Network) -> list[Kernel]:
    """The kernels of one call and its VJP."""
    net, given, call = network
    x = given.clone().requires_grad_()
    mode = Kernels(net, keep=x.is_meta)
    with mode:
        output = call(net, x)
        mode.forward = False
        torch.autograd.grad(output, x, torch.ones_like(output))
    for hook in mode.hooks:
        hook.remove()
    return mode.found


def fused(found: list[Kernel], kinds: tuple[str, ...]) -> list[Kernel]:
    """The kernels of some kinds, with those that follow each other made one."""
    runs: list[list[Kernel]] = [[]]
    for kernel in found:
        if kernel.kind in kinds:
            runs[-1].append(kernel)
        elif kernel.bytes >= SMALL_BYTES and runs[-1]:
            runs.append([])
    result = []
    for run in filter(None, runs):
        inside = {memory for kernel in run for memory in kernel.written}
        outside = {memory: n for kernel in run for memory, n in kernel.read.items() if memory not in inside}
        last = max(run[::-1], key=lambda kernel: kernel.bytes >= SMALL_BYTES)
        result.append(Kernel(run[0].kind, outside, last.written, sum(kernel.flops for kernel in run), 0.0))
    return result


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
    """Attention as one kernel."""
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention.default(query, key, value, 0.0, False, False)[0]
    return result


def rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """PyTorch's RMSNorm as one kernel, as on a GPU. That of LayerNorm reads and writes as much."""
    return nn.functional.layer_norm(x, shape, weight)


def bounds(network: Network, flops: float, bandwidth: float) -> tuple[str, list[str]]:
    """The head line and the rows of a network's table."""

    def least(some: Iterable[Kernel]) -> float:
        return sum(max(kernel.flops / flops, kernel.bytes / bandwidth) for kernel in some)

    with (  # What is one kernel on a GPU.
        mock.patch.object(nn.functional, "scaled_dot_product_attention", attention),
        mock.patch.object(nn.functional, "rms_norm", rms_norm),
    ):
        found = kernels(network)
    whole, total = sum(kernel.bytes for kernel in found), least(found)
    between = tuple(kind for kind in KINDS if kind not in (PRODUCT, ATTENTION))
    rows = []
    for name, kinds in (*((kind, (kind,)) for kind in KINDS), (BETWEEN, between)):
        some = [kernel for kernel in found if kernel.kind in kinds]
        if not some:
            continue
        shares = [sum(kernel.bytes for kernel in some) / whole, least(some) / total]
        if kinds[0] in between and kinds != (OTHER,):
            shares.append(least(fused(found, kinds)) / total)
        rows.append(
            " | ".join([name, f"{len(some)}", *(f"{share:.1%}" for share in shares), *[""] * (3 - len(shares))])
        )
    operations = sum(kernel.flops for kernel in found)
    return f"{whole / 1e9:.1f} GB, {operations / 1e12:.2f} TFLOP, at least {1e3 * total:.1f} ms", rows


def measured(network: Network, rounds: int) -> tuple[str, list[str]]:
    """The head line and the rows of a network's table, from the time of each operator on the CPU."""
    tables = []
    for _ in range(rounds):
        seconds = dict.fromkeys(KINDS, 0.0)
        for kernel in kernels(network):
            seconds[kernel.kind] += kernel.seconds
        tables.append(seconds)
    least = min(tables, key=lambda table: sum(table.values()))
    total = sum(least.values())
    rows = [f"{kind} | {1e3 * value:.1f} ms | {value / total:.1%}" for kind, value in least.items() if value]
    return f"{total:.3f} s", rows


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=REAL | SMALL, help="which networks; default: see above")
    parser.add_argument("--tflops", type=float, default=790.0, help="of the card, for matrices (%(default)s)")
    parser.add_argument("--tbytes", type=float, default=4.8, help="of the card's memory, a second (%(default)s)")
    parser.add_argument("--measure", action="store_true", help="small networks on the CPU, with the time of operators")
    parser.add_argument("--rounds", type=int, default=3, help="how often each network is timed (%(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    table = SMALL if args.measure else REAL
    for name in args.networks or (
        ("sd15", "flux", "sd35") if args.measure else ("sd15", "sdxl", "flux", "sd3", "sd35")
    ):
        if name not in table:
            continue
        title, make = table[name]
        with torch.device("cpu" if args.measure else "meta"):
            network = make()
            network[0].eval().requires_grad_(False)
            if args.measure:
                head, rows = measured(network, args.rounds)
            else:
                head, rows = bounds(network, args.tflops * 1e12, args.tbytes * 1e12)
        print(f"\n{title}: {head}\n")
        columns = ["kind", "time", "share"] if args.measure else ["kind", "kernels", "bytes", "time", "fused"]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", *(f"| {row} |" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
