"""Compares the DOODL reference's own layers with ours on one network: time, calls, memory and differences.

    python bench/against_reference.py --reference DIR [--sizes tiny,small] [--steps 10] [--device D] [--dtype fp32]

DIR is a checkout of the DOODL repository (github.com/salesforce/DOODL). Its layers, its step functions and its MemCNN
are run unchanged. Nothing else of `doodl.py` and `helper_functions.py` is run, because they load models when they are
imported. In the table "reference" is the reference's layers in the reference's wrapper, "memcnn" is the reference's
layers in our wrapper, and "layers" is our layers in our wrapper. The network is a diffusers UNet with seeded random
weights that require grad, as those of a loaded network do. The guidance scale is 7.5, the mixing weight 0.93, and the
schedule that of Stable Diffusion.

One gradient is a forward loop over all steps, a linear loss and its backward pass. The implementations take turns for
`--rounds` rounds after one round to warm up. Times are medians: of the process's CPU seconds on a CPU, which other work
disturbs less, and of seconds on a GPU. Memory is counted in separate runs, with `--steps` steps and with twice as many:
on a CPU as the storage of every living tensor, on a GPU by the allocator. The peak is counted above what was there
before, and includes the gradients of the weights. The growth is how much more is held between the forward and the
backward pass for every further step. Differences are relative in the 2-norm, and taken from plain autograd through the
reference's layers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import time
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import ReferenceUnavailable, definitions
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import doodl_fast
from doodl_fast.compat import memcnn
from doodl_fast.compat.doodl import MixingLayer, SteppingLayer
from doodl_fast.compat.schedule import ReferenceScheduler

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
IMPLEMENTATIONS = ("reference", "memcnn", "layers")
Layers = tuple[Callable[..., nn.Module], Callable[..., nn.Module]]
# Block widths, layers per block, width of the text embedding, its length, heads, side of the latent.
SIZES: dict[str, tuple[tuple[int, ...], int, int, int, int, int]] = {
    "tiny": ((16, 32, 32), 1, 16, 8, 2, 16),
    "small": ((64, 96, 160), 1, 64, 16, 4, 32),
    "medium": ((128, 256, 384, 384), 1, 256, 77, 8, 64),
    "sd15": ((320, 640, 1280, 1280), 2, 768, 77, 8, 64),
}


def network(size: str, dtype: torch.dtype, device: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Makes a UNet, its unconditional and conditional embeddings, and a pair of starting latents."""
    from diffusers import UNet2DConditionModel

    widths, layers, features, length, heads, side = SIZES[size]
    attention = len(widths) - 1 if size in ("medium", "sd15") else 1
    down = ["CrossAttnDownBlock2D"] * attention + ["DownBlock2D"] * (len(widths) - attention)
    up = ["UpBlock2D"] * (len(widths) - attention) + ["CrossAttnUpBlock2D"] * attention
    if attention == 1:  # The small networks have attention where it is cheap.
        down, up = down[::-1], up[::-1]
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        cross_attention_dim=features,
        attention_head_dim=heads,
        norm_num_groups=min(32, widths[0] // 4),
    )
    embeddings = torch.randn(2, 1, length, features)
    latent = torch.randn(1, 4, side, side)
    parts = [value.to(device, dtype) for value in (*embeddings, torch.cat([latent, latent]))]
    return unet.to(device, dtype).eval(), parts[0], parts[1], parts[2]


def reference_layers(folder: Path, device: str) -> Layers:
    """The two classes of layers of `doodl.py`, with the functions of `helper_functions.py` that they call."""
    try:
        found = definitions(folder, torch.device(device))
    except ReferenceUnavailable as error:
        raise SystemExit(f"--reference: {error}") from error
    return found["SteppingLayer"], found["MixingLayer"]


def reference_memcnn(folder: Path) -> types.ModuleType:
    """Imports the MemCNN of a checkout."""
    sys.path.insert(0, str(folder))
    try:
        # It prints when it is imported, and torch warns of the deprecated functions that it names.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return __import__("memcnn")
    finally:
        sys.path.remove(str(folder))


class Bench:
    """A network, and the implementations that run on it."""

    def __init__(self, folder: Path, size: str, dtype: torch.dtype, device: str) -> None:
        self.device = device
        self.unet, self.uncond, self.cond, self.start = network(size, dtype, device)
        self.weight = torch.randn(self.start.shape, generator=torch.Generator().manual_seed(1)).to(self.start)
        theirs, wrapper = reference_layers(folder, device), reference_memcnn(folder).InvertibleModuleWrapper
        ours = memcnn.InvertibleModuleWrapper
        self.parts: dict[str, tuple[Layers, Callable[..., Any]]] = {
            "reference": (theirs, wrapper),
            "memcnn": (theirs, ours),
            "layers": ((SteppingLayer, MixingLayer), ours),
        }
        self.calls = 0
        self.unet.register_forward_pre_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def gradient(
        self, name: str, steps: int, keep: bool, held: Callable[[], None] = lambda: None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Takes one gradient.

        Args:
            name: The implementation.
            steps: The number of diffusion steps.
            keep: Whether the wrappers keep their inputs.
            held: Called between the forward and the backward pass.
            **options: Further arguments of the wrappers.

        Returns:
            The output and the gradient.
        """
        (stepping, mixing), wrapper = self.parts[name]
        scheduler = ReferenceScheduler()
        s = stepping(self.unet, self.uncond, self.cond, scheduler=scheduler, num_timesteps=steps)
        s = wrapper(s, keep_input=keep, keep_input_inverse=keep, **options)
        mix = wrapper(mixing(0.93), keep_input=keep, keep_input_inverse=keep, **options)
        start = self.start.clone().requires_grad_()
        pair = start.clone()
        for index, timestep in enumerate(scheduler.timesteps):
            i, t = (torch.tensor([value], dtype=pair.dtype, device=self.device) for value in (index, timestep))
            i, t, pair = s(i, t, pair)
            pair = mix(pair)
        held()
        loss = (pair.float() * self.weight.float()).sum()
        loss.backward()
        assert start.grad is not None
        return pair.detach(), start.grad

    def forget(self) -> None:
        """Frees the gradients of the weights, which the reference leaves behind."""
        self.unet.zero_grad(set_to_none=True)

    def clock(self) -> float:
        """The CPU seconds of the process on a CPU, and the seconds of the clock on a GPU."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def times(self, steps: int, keep: bool, rounds: int) -> dict[str, list[float]]:
        """The times of all rounds, by implementation."""
        found: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS}
        for turn in range(rounds + 1):
            for name in IMPLEMENTATIONS:
                begin = self.clock()
                self.gradient(name, steps, keep)
                if turn:
                    found[name].append(self.clock() - begin)
                self.forget()
        return found

    def memory(self, name: str, steps: int, keep: bool) -> tuple[int, int]:
        """The peak, and what is held between forward and backward, in bytes above what was there before."""
        middle: list[int] = []
        if self.device == "cpu":
            with Storages() as storages:
                self.gradient(name, steps, keep, lambda: middle.append(storages.living()))
            self.forget()
            return storages.peak, middle[0]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.gradient(name, steps, keep, lambda: middle.append(torch.cuda.memory_allocated() - before))
        peak = torch.cuda.max_memory_allocated() - before
        self.forget()
        return peak, middle[0]

    def rows(self, steps: int, keep: bool, rounds: int) -> list[dict[str, Any]]:
        """Measures all implementations, and returns a row of the table for each."""
        out, grad = self.gradient("reference", steps, True, disable=True)
        self.forget()
        seconds = self.times(steps, keep, rounds)
        rows = []
        for name in IMPLEMENTATIONS:
            self.calls = 0
            result = self.gradient(name, steps, keep)
            calls, spent = self.calls, statistics.median(seconds[name])
            self.forget()
            peak, held = self.memory(name, steps, keep)
            growth = (self.memory(name, 2 * steps, keep)[1] - held) / steps
            rows.append(
                {
                    "keep_input": keep,
                    "implementation": name,
                    "seconds": spent,
                    "ratio": spent / statistics.median(seconds["reference"]),
                    "calls": calls,
                    "peak": peak,
                    "growth": growth,
                    "output": difference(result[0], out),
                    "gradient": difference(result[1], grad),
                }
            )
        return rows


class Storages(TorchDispatchMode):
    """Counts the bytes of all living storages that are made within the context.

    A storage that was emptied by hand counts as empty.

    Attributes:
        peak: The largest count after any operation, to within 1%.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, StorageWeakRef] = {}
        self.bound = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                key = value.untyped_storage()._cdata
                if key not in given and key not in self.known:
                    self._meet(value.untyped_storage())
        if self.bound > 1.01 * self.peak:  # The bound does not know which storages were emptied.
            self.peak = max(self.peak, self.living())
        return result

    def _meet(self, storage: torch.UntypedStorage) -> None:
        """Begins to count a new storage."""
        self.known[storage._cdata] = StorageWeakRef(storage)
        self.bound += storage.nbytes()
        weakref.finalize(storage, self._lose, storage._cdata, storage.nbytes())

    def _lose(self, key: int, size: int) -> None:
        """Stops counting a storage that was freed."""
        self.known.pop(key, None)
        self.bound -= size

    def living(self) -> int:
        """The bytes of all storages that are alive."""
        storages = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in list(self.known.values()))
        return sum(storage.nbytes() for storage in storages if storage is not None)


def difference(got: Tensor, want: Tensor) -> float:
    """The relative difference in the 2-norm."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def mebibytes(value: float) -> str:
    """A number of bytes in MiB."""
    return f"{value / 2**20:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The DOODL reference's layers against ours, side by side.")
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of the DOODL repository")
    parser.add_argument("--sizes", default="tiny,small", help=f"of {', '.join(SIZES)}; default: %(default)s")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(
        f"doodl_fast {doodl_fast.__version__}, torch {torch.__version__}, {machine}, threads {args.threads}, "
        f"{args.dtype}, {args.steps} steps\n"
    )
    print("| UNet | keep_input | | s a gradient | ratio | calls | peak MiB | growth MiB a step | output | gradient |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    found = []
    for size in args.sizes.split(","):
        bench = Bench(args.reference, size, DTYPES[args.dtype], args.device)
        millions = sum(weight.numel() for weight in bench.unet.parameters()) / 1e6
        for keep in (True, False):
            for row in bench.rows(args.steps, keep, args.rounds):
                found.append({"size": size, "parameters": millions, **row})
                print(
                    f"| {size}, {millions:.1f} M | {keep} | {row['implementation']} | {row['seconds']:.3f} "
                    f"| {row['ratio']:.2f} | {row['calls']} | {mebibytes(row['peak'])} | {mebibytes(row['growth'])} "
                    f"| {row['output']:.1e} | {row['gradient']:.1e} |",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "arguments": vars(args), "rows": found}, default=str))


if __name__ == "__main__":
    main()
