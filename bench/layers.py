"""The ops for layers of frozen networks against eager PyTorch with autograd: time and bytes kept.

    python bench/layers.py [--op OP] [--device D] [--threads N] [--dtype D] [--layout L] [--rounds N]

Each round runs one implementation after the other. On a CPU it takes the processor time of the whole process, which
other processes on the machine disturb less than the time on the clock; on a GPU the time on the clock until the GPU is
idle, over many calls. A figure is the median of the rounds, and "x" is how many times faster than eager the op is.
"kept" is what autograd, or the op, keeps for the backward pass. Eager computes the gradient of the input alone, as the
weights do not ask for one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doodl_fast import ops

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Case:
    """One layer at one size: its input, the gradient of its output, and the two implementations.

    eager: Computes the output from an input that requires a gradient.
    forward: Computes the output, and what the backward pass keeps.
    backward: Computes the gradient of the input from what was kept and the gradient of the output.
    """

    name: str
    x: Tensor
    grad: Tensor
    eager: Callable[[Tensor], Tensor]
    forward: Callable[[Tensor], tuple[Tensor, tuple[Tensor, ...]]]
    backward: Callable[[tuple[Tensor, ...], Tensor], Tensor]


def group_norm_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """GroupNorm with 32 groups and SiLU, of Stable Diffusion's UNet or VAE."""
    x, grad = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    weight, bias = torch.randn(2, shape[1], device=device).to(dtype)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = ops.group_norm_silu(x, weight, bias, 32)
        return y, (x, mean, rstd)

    return Case(
        f"group_norm_silu {'x'.join(map(str, shape))}",
        x,
        grad,
        lambda x: F.silu(F.group_norm(x, 32, weight, bias)),
        forward,
        lambda kept, grad: ops.group_norm_silu_backward(grad, *kept, weight, bias, 32),
    )


CASES: dict[str, tuple[Callable[..., Case], tuple[tuple[int, ...], ...]]] = {
    "group_norm_silu": (
        group_norm_case,
        ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8), (1, 512, 64, 64), (1, 128, 512, 512)),
    ),
}


def kept_bytes(case: Case) -> tuple[int, int]:
    """Returns how many bytes eager and the op keep beside their weights."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.eager(case.x.clone().requires_grad_())
    _, kept = case.forward(case.x)
    small = case.x.numel() // 100  # Weights and statistics are not counted, on either side.
    return sum(size for size in sizes.values() if size > small), sum(z.nbytes for z in kept if z.nbytes > small)


def seconds(call: Callable[[], object], repeats: int, on_gpu: bool) -> float:
    """Returns the processor time of one call, or on a GPU the time on the clock."""
    clock = time.perf_counter if on_gpu else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        call()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - start) / repeats


def measured(case: Case, rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each round, by what was measured."""
    leaf = case.x.clone().requires_grad_()
    y = case.eager(leaf)
    _, kept = case.forward(case.x)

    def eager_forward() -> None:
        case.eager(leaf)

    def eager_backward() -> None:
        torch.autograd.grad(y, leaf, case.grad, retain_graph=True)

    calls: dict[str, Callable[[], object]] = {
        "eager forward": eager_forward,
        "op forward": lambda: case.forward(case.x),
        "eager backward": eager_backward,
        "op backward": lambda: case.backward(kept, case.grad),
    }
    on_gpu = case.x.is_cuda
    for call in calls.values():  # Triton compiles its kernels.
        seconds(call, 2, on_gpu)
    repeats = max(1, int(0.05 / max(seconds(eager_forward, 2, on_gpu), 1e-6)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call, repeats, on_gpu))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=CASES, action="append", help="the op, which may be given again (default: all)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default: %(default)s)")
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    print(f"{options.dtype}, {options.layout}, {where}, backend {ops.resolve(device.type)}")
    print("| layer | eager ms forward, backward | op ms | x forward | x backward | x both | MiB kept eager, op |")
    print("|---|---|---|---|---|---|---|")
    for op in options.op or CASES:
        make, shapes = CASES[op]
        for shape in shapes:
            case = make(shape, DTYPES[options.dtype], LAYOUTS[options.layout], options.device)
            ms = {name: 1e3 * statistics.median(values) for name, values in measured(case, options.rounds).items()}
            eager, op_ms = (ms["eager forward"], ms["eager backward"]), (ms["op forward"], ms["op backward"])
            kept = (size / 2**20 for size in kept_bytes(case))
            print(
                f"| {case.name} | {eager[0]:.3f}, {eager[1]:.3f} | {op_ms[0]:.3f}, {op_ms[1]:.3f} "
                f"| {eager[0] / op_ms[0]:.2f} | {eager[1] / op_ms[1]:.2f} | {sum(eager) / sum(op_ms):.2f} "
                f"| {next(kept):.1f}, {next(kept):.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
