"""The ops for layers of frozen networks against eager PyTorch with autograd: time and bytes kept.

    python bench/layers.py [--op OP] [--device D] [--threads N] [--dtype D] [--layout L] [--rounds N] [--replayed]

Each round runs one implementation after the other. On a CPU it takes the processor time of the whole process, which
other processes on the machine disturb less than the time on the clock; on a GPU the time on the clock until the GPU is
idle, over many calls, which are launched from Python, or with `--replayed` replayed as CUDA graphs. A figure is the
median of the rounds, and "x" is how many times faster than eager the op is. "kept" is what autograd, or the op, keeps
for the backward pass. Eager computes the gradient of the input alone, as the weights do not ask for one.

`lean_norm` compares the same two layers in lean copies of a residual block, where PyTorch's own compute the norm again
in the backward pass: "eager" are lean layers without the op. `lean_gated` is the same for gated activations, GEGLU
without its projection, `lean_feed_forward` for the layer with its two products, `lean_quick_gelu` for quick GELU, and
`lean_rotary` for rotary embeddings by products of complex numbers, as Qwen-Image has them. These take contiguous
tensors alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, gated, kept_by_operator, quick_gelu, rotary
from doodl_fast.frozen.functions import recomputed

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


def lean_norm_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """The norm and SiLU of a lean residual block, by PyTorch's operators and by the op."""
    from diffusers.models.resnet import ResnetBlock2D

    with torch.device(device):
        block = ResnetBlock2D(in_channels=shape[1], temb_channels=None).to(dtype).eval()
    lean = ModuleCopies(block, lean=Level.ON).of(block)
    x, grad = (torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout) for _ in range(2))

    def both(x: Tensor) -> Tensor:
        y: Tensor = lean.nonlinearity(lean.norm1(x))
        return y

    def eager(x: Tensor) -> Tensor:
        with ops.backend("eager"):
            return both(x)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.detach().requires_grad_()
        y = both(leaf)
        return y, (y, leaf)

    def backward(kept: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        return torch.autograd.grad(*kept, grad, retain_graph=True)[0]

    return Case(f"lean norm and SiLU {'x'.join(map(str, shape))}", x, grad, eager, forward, backward)


def modulated_norm_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """LayerNorm and the modulation of a diffusion transformer, or for 4 dimensions the RMSNorm of diffusers."""
    from diffusers.models.normalization import RMSNorm

    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    scale, shift = torch.randn(2, shape[0], shape[-1], device=device).to(dtype)
    layer, centred = RMSNorm(shape[-1], 1e-6).to(device, dtype).requires_grad_(False), len(shape) == 3
    vectors = {"scale": scale, "shift": shift} if centred else {"weight": layer.weight}

    def eager(x: Tensor) -> Tensor:
        if centred:
            return F.layer_norm(x, shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        y: Tensor = layer(x)
        return y

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        y, mean, rstd = ops.modulated_norm(x, **vectors, center=centred)
        return y, (x, mean, rstd)

    def backward(kept: tuple[Tensor, ...], grad: Tensor) -> Tensor:
        others = {name: vector for name, vector in vectors.items() if name != "shift"}
        return ops.modulated_norm_backward(grad, *kept, **others, center=centred)

    name = f"{'modulated_norm' if centred else 'modulated_norm as RMSNorm'} {'x'.join(map(str, shape))}"
    return Case(name, x, grad, eager, forward, backward)


ROWS = ((1, 4608, 3072), (2, 4096, 1536), (2, 1024, 1536), (2, 256, 384), (2, 24, 4096, 64))
"""The rows of FLUX.1 and of Stable Diffusion 3 with images of 1024 x 1024 and 512 x 512, of a small transformer, and
those of a head's queries."""


def gated_operands(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """The projection of a feed-forward layer, and the gradient of what the gated activation makes of it."""
    x, grad = torch.randn(shape, device=device), torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    return x.to(dtype), grad.to(dtype)


def gated_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """GEGLU without its projection, as diffusers computes it and by the op."""

    def eager(x: Tensor) -> Tensor:
        hidden, gate = x.chunk(2, -1)
        return hidden * F.gelu(gate)

    return Case(
        f"gated_activation {'x'.join(map(str, shape))}",
        *gated_operands(shape, dtype, device),
        eager,
        lambda x: (ops.gated_activation(x, "gelu"), (x,)),
        lambda kept, grad: ops.gated_activation_backward(grad, *kept, "gelu"),
    )


def lean_gated_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """A lean GEGLU without its projection, by PyTorch's operators and by the op."""

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.detach().requires_grad_()
        y = gated.gated(leaf, gated.GELU, one_op=True)
        return y, (y, leaf)

    return Case(
        f"lean GEGLU {'x'.join(map(str, shape))}",
        *gated_operands(shape, dtype, device),
        lambda x: gated.gated(x, gated.GELU, one_op=False),
        forward,
        lambda kept, grad: torch.autograd.grad(*kept, grad, retain_graph=True)[0],
    )


def lean_feed_forward_case(
    shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str
) -> Case:
    """A lean feed-forward layer with GEGLU and its two matrix products, by PyTorch's operators and by the op."""
    from diffusers.models.attention import FeedForward

    with torch.device(device):
        layer = FeedForward(shape[-1], activation_fn="geglu").to(dtype).eval().requires_grad_(False)
    lean = ModuleCopies(layer, lean=Level.ON).of(layer)
    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))

    def eager(x: Tensor) -> Tensor:
        with ops.backend("eager"):
            y: Tensor = lean(x)
            return y

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.detach().requires_grad_()
        y = lean(leaf)
        return y, (y, leaf)

    return Case(
        f"lean feed-forward {'x'.join(map(str, shape))}",
        *(x, grad, eager, forward),
        lambda kept, grad: torch.autograd.grad(*kept, grad, retain_graph=True)[0],
    )


def rotary_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """Rotary embeddings of queries as diffusers' function computes them, whose graph keeps the tables alone as well."""
    from diffusers.models.embeddings import apply_rotary_emb

    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    angles = torch.rand(shape[1], shape[3] // 2, device=device).repeat_interleave(2, -1)
    tables = angles.cos(), angles.sin()

    def eager(x: Tensor) -> Tensor:
        y: Tensor = apply_rotary_emb(x, tables, sequence_dim=1)
        return y

    return Case(
        f"rotary_embedding {'x'.join(map(str, shape))}",
        *(x, grad, eager),
        lambda x: (ops.rotary_embedding(x, *tables), tables),
        lambda kept, grad: ops.rotary_embedding_backward(grad, *kept),
    )


def lean_rotary_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """The same as Qwen-Image computes it, by products of complex numbers, and as lean layers do."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    x, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    angles = torch.rand(shape[1], shape[3] // 2, device=device)
    factors = torch.polar(torch.ones_like(angles), angles)

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.detach().requires_grad_()
        y = rotary.of_qwen(apply_rotary_emb_qwen)(leaf, factors, use_real=False)
        return y, (y, leaf)

    return Case(
        f"lean rotary of complex numbers {'x'.join(map(str, shape))}",
        *(x, grad, lambda x: apply_rotary_emb_qwen(x, factors, use_real=False), forward),
        lambda kept, grad: torch.autograd.grad(*kept, grad, retain_graph=True)[0],
    )


HEADS = ((1, 4608, 24, 128), (1, 1536, 24, 128), (2, 1280, 16, 64), (1, 1040, 8, 32))
"""The queries of FLUX.1 with images of 1024 x 1024 and 512 x 512, and of two smaller transformers."""


def quick_gelu_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """Quick GELU, as transformers computes it and by the op."""
    return Case(
        f"quick_gelu {'x'.join(map(str, shape))}",
        *(torch.randn(shape, device=device).to(dtype) for _ in range(2)),
        quick_gelu.by_operators,
        lambda x: (ops.quick_gelu(x), (x,)),
        lambda kept, grad: ops.quick_gelu_backward(grad, *kept),
    )


def lean_quick_gelu_case(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format, device: str) -> Case:
    """A lean quick GELU, by PyTorch's operators and by the op."""

    def forward(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaf = x.detach().requires_grad_()
        y = quick_gelu.quick_gelu(leaf)
        assert y is not None, "lean layers do not use the op here"
        return y, (y, leaf)

    return Case(
        f"lean quick GELU {'x'.join(map(str, shape))}",
        *(torch.randn(shape, device=device).to(dtype) for _ in range(2)),
        lambda x: recomputed(quick_gelu.by_operators, x),
        forward,
        lambda kept, grad: torch.autograd.grad(*kept, grad, retain_graph=True)[0],
    )


NORMS = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8), (1, 512, 64, 64), (1, 128, 512, 512))
PROJECTIONS = ((2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240), (2, 64, 10240), (2, 4096, 5120))
"""Those of Stable Diffusion's four sizes of feed-forward layers, and one of SDXL's."""
TOKENS = ((16, 257, 4096), (1, 257, 4096), (1, 50, 3072), (8, 257, 1024))
"""Those of CLIP ViT-L/14 with 16 cutouts and with one, of ViT-B/32, and of the small CLIP of bench/lean.py."""
CASES: dict[str, tuple[Callable[..., Case], tuple[tuple[int, ...], ...]]] = {
    "group_norm_silu": (group_norm_case, NORMS),
    "modulated_norm": (modulated_norm_case, ROWS),
    "gated_activation": (gated_case, PROJECTIONS),
    "rotary_embedding": (rotary_case, HEADS),
    "lean_rotary": (lean_rotary_case, HEADS),
    "lean_gated": (lean_gated_case, PROJECTIONS),
    "lean_feed_forward": (lean_feed_forward_case, ((2, 4096, 320), (2, 1024, 640), (2, 256, 1280))),
    "quick_gelu": (quick_gelu_case, TOKENS),
    "lean_quick_gelu": (lean_quick_gelu_case, TOKENS),
    "lean_norm": (lean_norm_case, (*NORMS, (1, 512, 128, 128), (1, 256, 256, 256))),
}


def kept_bytes(case: Case) -> tuple[int, int]:
    """Returns how many bytes eager and the op keep for the backward pass."""
    eager = sum(kept_by_operator(case.eager(case.x.clone().requires_grad_())).values())
    y, kept = case.forward(case.x)
    return eager, sum(kept_by_operator(y).values()) if y.requires_grad else sum(z.nbytes for z in kept)


def recorded(call: Callable[[], object]) -> Callable[[], object]:
    """Records a call on the current stream as a CUDA graph, and returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        call()
    return graph.replay


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


def measured(case: Case, rounds: int, replayed: bool = False) -> dict[str, list[float]]:
    """Returns the seconds of each round, by what was measured. replayed: whether the calls are replayed on a GPU."""
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
    if replayed:
        calls = {name: recorded(call) for name, call in calls.items()}
    repeats = max(1, int(0.05 / max(seconds(calls["eager forward"], 2, on_gpu), 1e-6)))
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
    parser.add_argument("--replayed", action="store_true", help="replay calls as CUDA graphs, on a GPU")
    options = parser.parse_args()
    if options.replayed and not options.device.startswith("cuda"):
        parser.error(f"argument --replayed: expected --device cuda with it, got {options.device}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{options.threads} threads"
    how = "replayed" if options.replayed else "called"
    print(f"{options.dtype}, {options.layout}, {where}, {how}, backend of the couplings: {ops.resolve(device.type)}")
    print("| layer | eager ms forward, backward | op ms | x forward | x backward | x both | MiB kept eager, op |")
    print("|---|---|---|---|---|---|---|")
    for op in options.op or CASES:
        make, shapes = CASES[op]
        for shape in shapes:
            case = make(shape, DTYPES[options.dtype], LAYOUTS[options.layout], options.device)
            # A backward pass runs on the stream of its forward pass, and the default stream cannot be recorded.
            with torch.cuda.stream(torch.cuda.Stream()) if options.replayed else nullcontext():
                found = measured(case, options.rounds, options.replayed)
            ms = {name: 1e3 * statistics.median(values) for name, values in found.items()}
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
