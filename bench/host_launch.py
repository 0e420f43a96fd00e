"""How long the host takes to launch an op by Triton and by the native library, without a GPU.

    python bench/host_launch.py [--rounds 200] [--out FILE]

An op on latents is one small kernel on a GPU, which the host must launch in time. The native library does so from C++,
Triton from Python. This measures the processor time of a call of the public op, `ops.coupling(...)` for instance, up to
the point where the GPU's driver would be called:

- "native": the op on CPU tensors of 16 elements, through the same Python and the same dispatcher as on a GPU. The
  arithmetic takes next to nothing.
- "triton": the op with Triton's own launcher and kernels compiled for compute capability 9.0, on the same tensors. In
  the place of Triton's driver stands one that names a GPU and launches nothing, and `torch.cuda.current_device` gives
  the number that CPU tensors have for a device, so that theirs is the current one.

What both must do beyond that, the driver's own launch of some microseconds, is counted in neither, nor is what Triton's
launcher does in C, or asking CUDA which GPU is the current one. The ways run in turn; a figure is the median of the
rounds, each the mean of many calls. A step of EDICT calls four of the ops (docs/kernels.md).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # It is read when Triton is imported.

import torch

from doodl_fast import ops
from doodl_fast.ops.backends import registry

CALLS = 20
MIXING = ops.Mixing(True, 0.93, 0.07, 0.93, 0.07)


def cases() -> dict[str, Callable[[], Any]]:
    """A call of each op, on tensors like latents, queries and projections, but smaller."""
    generator = torch.Generator().manual_seed(0)
    x, y, grad = (torch.randn(1, 4, 2, 2, generator=generator) for _ in range(3))
    eps = torch.randn(2, 4, 2, 2, generator=generator).half()
    heads, table = torch.randn(1, 2, 2, 4, generator=generator), torch.randn(2, 4, generator=generator)
    numbers = {"a": 0.9, "b": -0.1, "g": 7.5}
    return {
        "coupling": lambda: ops.coupling(x, y, eps, **numbers),
        "coupling_vjp": lambda: ops.coupling_vjp(grad, **numbers, eps_dtype=eps.dtype),
        "coupling_mix": lambda: ops.coupling_mix(x, y, eps, MIXING, **numbers),
        "coupling_mix_vjp": lambda: ops.coupling_mix_vjp(grad, x, MIXING, **numbers, eps_dtype=eps.dtype),
        "gated_activation": lambda: ops.gated_activation(y),
        "modulated_norm": lambda: ops.modulated_norm(y, eps=1e-6),
        "rotary_embedding": lambda: ops.rotary_embedding(heads, table, table),
    }


class Driver:
    """Stands for Triton's driver: it names a GPU, and loads and launches nothing."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 1, 0, 0, 1024),
            unload_module=lambda *_: None,
            get_device_properties=lambda _: {"max_shared_mem": 232448},
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None


def _number_of_the_cpu() -> int:
    """What `Tensor.get_device` returns for CPU tensors."""
    return -1


@contextmanager
def by_triton() -> Iterator[None]:
    """Every op inside the block is launched by Triton, as on a GPU, and none is computed."""
    from doodl_fast.ops.backends import triton as backend

    kernels = backend.kernels("cuda")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(registry._chosen, {("cpu", registry._environment): kernels}))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", _number_of_the_cpu))
        stack.enter_context(mock.patch.object(torch.Tensor, "is_cpu", False))
        yield


@contextmanager
def by_native() -> Iterator[None]:
    """Every op inside the block is computed by the native library."""
    with ops.backend("native"):
        yield


WAYS = {"native": by_native, "triton": by_triton}


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """The microseconds of processor time of a call of each op in each way."""
    found: dict[str, dict[str, list[float]]] = {name: {way: [] for way in WAYS} for name in cases()}
    for number in range(rounds + 1):
        for way, entered in WAYS.items():
            with entered():
                for name, call in cases().items():
                    call()  # The first one of all compiles, and each first one warms up.
                    began = time.process_time()
                    for _ in range(CALLS):
                        call()
                    if number:
                        found[name][way].append((time.process_time() - began) / CALLS * 1e6)
    return {name: {way: statistics.median(each) for way, each in ways.items()} for name, ways in found.items()}


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="how often each way is timed (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"argument --rounds: expected at least 1, got {args.rounds}")
    for backend, why in (("native", ops.why_not("native", "cpu")), ("triton", _without_triton())):
        if why is not None:
            parser.error(f"the {backend} backend is needed: {why}")
    torch.set_num_threads(1)
    rows = measured(args.rounds)
    print("| op | native, us | Triton, us | difference |")
    print("|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row['native']:.1f} | {row['triton']:.1f} | {row['triton'] - row['native']:.1f} |")
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


def _without_triton() -> str | None:
    """Why Triton is not there, or None, when it is there with the driver that launches nothing."""
    try:
        import triton
    except ImportError as error:
        return str(error)
    triton.runtime.driver.set_active(Driver())
    return None


if __name__ == "__main__":
    main()
