"""Times what a gradient of a chain is made of, from one call of a UNet to a step of an optimisation, mostly for a GPU.

    python bench/end_to_end.py [PART ...] [--device cuda] [--json FILE] [--steps 50] [--rounds 3]

On a GPU the network is a UNet in the shape of Stable Diffusion 1.5 with seeded random weights in fp16, its latents are
those of a picture of 512 x 512 pixels, and every call is guided (a batch of 2). On a CPU it is a small UNet in fp32,
and `--steps` is 3 and `--rounds` 1 unless they are given, so that the script can be tried out there. The parts, in the
order of their use:

- `evaluation`: one call and its vector-Jacobian product (VJP), by memory layout and attention kernel.
- `chains`: gradients of EDICT and DDIM chains by memory plan: seconds, the peak beside the planned one, the drift.
- `lean`: the same with lean graphs and without.
- `replayed`: chains with `Denoiser(cuda_graphs="auto")` and without.
- `graphs`: one call and its VJP, launched and replayed.
- `compile`: chains with `Denoiser(compile=True)`; the seconds that compilation takes are apart.
- `decode`: the VAE's decoder and its VJP.
- `optimize`: a step of `doodl_fast.optimize` with a decoder, and how often it waits for the GPU.

Every row goes to the JSON file at once, so that nothing is lost when time runs out. Seconds are medians of `--rounds`
after one round to warm up, and read when the device is idle. Peaks are above what was allocated before: those of the
allocator on a GPU, and of all living storages on a CPU, in a round of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lean import SD15_UNET, one_way, unet, vae
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from waits import waits

import doodl_fast
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli.published import PUBLISHED

SMALL = {
    **SD15_UNET,
    "block_out_channels": (32,),
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "layers_per_block": 1,
}
ATTENTION = {
    "chosen by torch": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
WAYS = (("plain", "auto"), ("lean", "eager"), ("lean", "auto"))
"""Networks of plain and of lean layers, and the backend that computes the ops in these."""
NORMS = {"auto": "", "eager": ", norms by PyTorch"}
Row = dict[str, Any]


@dataclass
class Setup:
    """Where the networks are, the dtype of their weights, a chain's steps, and how often something is timed."""

    device: torch.device
    dtype: torch.dtype
    steps: int
    rounds: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def side(self) -> int:
        """The side of the latents."""
        return 64 if self.on_gpu else 8

    def unet(self) -> tuple[nn.Module, Tensor, Callable[[Any, Tensor], Tensor]]:
        """A UNet with frozen weights, an input for a guided call, and how it is called."""
        torch.manual_seed(0)
        with torch.device(self.device):
            net, x, call = unet(SD15_UNET if self.on_gpu else SMALL, self.side, self.dtype)
        return net.eval().requires_grad_(False), x, call

    def vae(self) -> tuple[nn.Module, Tensor, Callable[[Any, Tensor], Tensor]]:
        """A VAE with frozen weights, latents, and how they are decoded."""
        torch.manual_seed(3)
        changes = {} if self.on_gpu else {"block_out_channels": (32, 32, 32, 32)}
        with torch.device(self.device):
            net, z, call = vae(self.side, self.dtype, **changes)
        return net.requires_grad_(False), z, call

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], Any], warm: int = 1) -> float:
        """The median of the seconds that a function takes."""
        found = []
        for turn in range(warm + self.rounds):
            self.synchronize()
            began = time.perf_counter()
            function()
            self.synchronize()
            if turn >= warm:
                found.append(time.perf_counter() - began)
        return statistics.median(found)

    def peak(self, function: Callable[[], Any]) -> int:
        """The bytes that a function allocates at most, above what was allocated before."""
        if not self.on_gpu:
            with Tracker("cpu") as tracker:
                function()
            return tracker.peak
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def vjp(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value, and the gradient of its sum."""
    leaf = x.detach().requires_grad_()
    output = call(leaf)
    return output.detach(), torch.autograd.grad(output, leaf, torch.ones_like(output))[0]


def off(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the 2-norm."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def evaluation(setup: Setup) -> Iterator[Row]:
    """One guided call of the UNet, by memory layout and attention kernel."""
    net, x, call = setup.unet()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        call(net, x)
    with FlopCounterMode(display=False) as both:
        _, expected = vjp(lambda x: call(net, x * 1), x)  # The counter's hooks do not bear a leaf as the first input.
    flops = {"forward": forward.get_total_flops(), "with VJP": both.get_total_flops()}
    yield {"name": "operations", "TFLOP": {key: value / 1e12 for key, value in flops.items()}}
    for layout, memory_format in LAYOUTS.items():
        net.to(memory_format=memory_format)
        given = x.contiguous(memory_format=memory_format)
        for name, kernel in ATTENTION.items():
            with nullcontext() if kernel is None else sdpa_kernel(kernel):
                yield {"name": f"{layout}, attention: {name}", **_evaluation(setup, net, given, call, expected, flops)}


def _evaluation(
    setup: Setup,
    net: nn.Module,
    x: Tensor,
    call: Callable[[Any, Tensor], Tensor],
    expected: Tensor,
    flops: dict[str, int],
) -> Row:
    """A row of `evaluation`, for a lean copy of the network."""
    with one_way(net, "lean") as lean:
        run = functools.partial(call, lean)
        try:
            with torch.no_grad():
                plain = run(x)
                forward = setup.seconds(lambda: run(x))
            both = setup.seconds(lambda: vjp(run, x))
        except RuntimeError as error:  # Not every kernel takes every dtype, head width and device.
            return {"not possible": str(error).splitlines()[0]}
        once, twice = vjp(run, x), vjp(run, x)
        return {
            "forward, ms": 1e3 * forward,
            "forward and VJP, ms": 1e3 * both,
            "TFLOP/s": flops["with VJP"] / both / 1e12,
            "peak, MiB": setup.peak(lambda: vjp(run, x)) / 2**20,
            "same bits with a graph": torch.equal(plain, once[0]),
            "same gradient twice": torch.equal(once[1], twice[1]),
            "gradient off": off(once[1], expected),
        }


def make_chain(setup: Setup, net: nn.Module, kind: str = "EDICT", compile: bool = False, **options: Any) -> Any:
    """A guided chain of one picture over a network, with the schedule of Stable Diffusion."""
    from diffusers import DDIMScheduler

    torch.manual_seed(1)
    width = int(net.config.cross_attention_dim)  # type: ignore[union-attr, arg-type]
    cond, uncond = torch.randn(2, 1, 77, width).to(setup.device, setup.dtype)
    lean, cuda_graphs = options.pop("lean", True), options.pop("cuda_graphs", False)
    denoiser = doodl_fast.Denoiser(net, cond, uncond, 7.5, compile=compile, lean=lean, cuda_graphs=cuda_graphs)
    schedule = doodl_fast.Schedule.from_scheduler(DDIMScheduler(**PUBLISHED["sd15"].scheduler[1]), setup.steps)
    return getattr(doodl_fast, kind)(denoiser, schedule, **options)


def gradient(chain: Any, x: Tensor) -> Tensor:
    """The gradient of a linear function of the final latents."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(chain(leaf)[0].sum(), leaf)[0]


def start(setup: Setup) -> Tensor:
    """The starting latents of one picture, in fp32."""
    return torch.randn(1, 4, setup.side, setup.side, generator=torch.Generator().manual_seed(2)).to(setup.device)


def chain_row(setup: Setup, name: str, chain: Any, expected: Tensor | None = None) -> tuple[Row, Tensor]:
    """Seconds and peak of a chain's gradient; and the gradient."""
    x = start(setup)
    found = gradient(chain, x)
    row: Row = {"name": name, "steps": setup.steps}
    row["gradient, s"] = setup.seconds(lambda: gradient(chain, x), warm=0)
    row["peak, MiB"] = setup.peak(lambda: gradient(chain, x)) / 2**20
    if chain.plan is not None:
        row |= {"planned peak, MiB": chain.plan.peak / 2**20, "plan": str(chain.plan.kept)}
    if chain.drift is not None:
        row["drift"] = float(chain.drift)
    row["same gradient twice"] = torch.equal(found, gradient(chain, x))
    row["gradient off"] = None if expected is None else off(found, expected)
    return row, found


def chains(setup: Setup) -> Iterator[Row]:
    """Gradients by memory plan and arithmetic."""
    net, _, _ = setup.unet()
    first = make_chain(setup, net, memory="checkpoint")
    row, expected = chain_row(setup, "EDICT, checkpoint", first)
    yield row
    yield chain_row(setup, "EDICT, auto", make_chain(setup, net, memory="auto"), expected)[0]
    exact = make_chain(setup, net, memory="reversible", arithmetic="exact")
    yield chain_row(setup, "EDICT, reversible, exact arithmetic", exact, expected)[0]
    smallest = make_chain(setup, net, memory="auto").smallest_plan(start(setup))
    least = make_chain(setup, net, memory="auto", memory_budget=smallest.peak)
    yield chain_row(setup, "EDICT, auto, smallest plan", least, expected)[0]
    for memory in ("checkpoint", "auto"):
        yield chain_row(setup, f"DDIM, {memory}", make_chain(setup, net, "DDIM", memory=memory))[0]


def lean(setup: Setup) -> Iterator[Row]:
    """Gradients with PyTorch's own graphs, lean ones, and leaner ones that compute matrix products again."""
    net, expected = setup.unet()[0], None
    for memory in ("checkpoint", "auto"):
        for lean in (False, True, "recompute"):
            chain = make_chain(setup, net, memory=memory, lean=lean)
            row, found = chain_row(setup, f"EDICT, {memory}, lean={lean}", chain, expected)
            expected = found if expected is None else expected
            yield row


def replayed(setup: Setup) -> Iterator[Row]:
    """Gradients whose calls are launched kernel by kernel, and replayed as CUDA graphs, by memory plan and lean."""
    net, expected = setup.unet()[0], None
    ways = (("checkpoint", "float", True), ("checkpoint", "float", False), ("reversible", "exact", True))
    for memory, arithmetic, lean in ways:
        for cuda_graphs in ("auto", False):
            options = {"arithmetic": arithmetic, "lean": lean, "cuda_graphs": cuda_graphs}
            chain = make_chain(setup, net, memory=memory, **options)
            row, found = chain_row(setup, f"EDICT, {memory}, lean={lean}, cuda_graphs={cuda_graphs}", chain, expected)
            expected = found if expected is None else expected
            yield {**row, "why not replayed": chain.evaluator.cuda_graphs.why_not}


def graphs(setup: Setup) -> Iterator[Row]:
    """One call and its VJP, launched one kernel after the other, and replayed as two CUDA graphs."""
    net, x, call = setup.unet()
    for way, backend in WAYS:
        with one_way(net, way) as copied, doodl_fast.backend(backend):
            run = functools.partial(call, copied)
            pieces: dict[str, Callable[[], Any]] = {
                "forward": torch.no_grad()(functools.partial(run, x)),
                "forward and VJP": lambda run=run: vjp(run, x)[1],
            }
            for name, function in pieces.items():
                row: Row = {"name": f"{name}, {way}{NORMS[backend]}"}
                expected = function().clone()
                row["launched, ms"] = 1e3 * setup.seconds(function)
                replay, output = captured(setup, function)
                row["replayed, ms"] = 1e3 * setup.seconds(replay)
                yield {**row, "same bits": torch.equal(output, expected)}


def captured(setup: Setup, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    """A function that replays a captured one, and the output that it writes. On a CPU nothing is captured."""
    if not setup.on_gpu:
        return function, function()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    graph.replay()
    return graph.replay, output


def compiled(setup: Setup) -> Iterator[Row]:
    """Gradients with a compiled network, by memory layout."""
    for layout, memory_format in LAYOUTS.items():
        net, _, _ = setup.unet()
        net.to(memory_format=memory_format)
        expected = gradient(make_chain(setup, net, memory="checkpoint"), start(setup))
        chain = make_chain(setup, net, memory="checkpoint", compile=True)
        began = time.perf_counter()
        gradient(chain, start(setup))
        setup.synchronize()
        first = time.perf_counter() - began
        row, _ = chain_row(setup, f"EDICT, checkpoint, compiled, {layout}", chain, expected)
        yield {**row, "first gradient, s": first}


def decode(setup: Setup) -> Iterator[Row]:
    """The decoder of Stable Diffusion's VAE, and its VJP."""
    (net, z, call), expected = setup.vae(), None
    for way, backend in (*WAYS, ("blocks", "auto")):
        with one_way(net, way) as copied, doodl_fast.backend(backend):
            run = functools.partial(vjp, functools.partial(call, copied), z)
            _, found = run()
            expected = found if expected is None else expected
            yield {
                "name": f"decode and VJP, {way}{NORMS[backend]}",
                "ms": 1e3 * setup.seconds(run),
                "peak, MiB": setup.peak(run) / 2**20,
                "gradient off": off(found, expected),
            }


def optimize(setup: Setup) -> Iterator[Row]:
    """Steps of an optimisation: the seconds of one, and how often it waits for the device."""
    net, _, _ = setup.unet()
    chain, decoder = make_chain(setup, net, memory="auto"), doodl_fast.Decoder(setup.vae()[0])

    def run(steps: int) -> float:
        setup.synchronize()
        began = time.perf_counter()
        doodl_fast.optimize(
            chain, start(setup), decoder, lambda images: images.square().mean(), num_optimization_steps=steps
        )
        setup.synchronize()
        return time.perf_counter() - began

    run(1)
    counts = [waits(setup.on_gpu, lambda n=n: run(n)) for n in (1, 3)]
    yield {
        "name": "EDICT, auto, with a decoder",
        "a step, s": (run(3) - run(1)) / 2,
        "times that a step waits for the GPU": None if counts[0] is None else (counts[1] - counts[0]) / 2,
    }


PARTS: dict[str, Callable[[Setup], Iterator[Row]]] = {
    "evaluation": evaluation,
    "chains": chains,
    "lean": lean,
    "replayed": replayed,
    "graphs": graphs,
    "compile": compiled,
    "decode": decode,
    "optimize": optimize,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of what a gradient is made of.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="a file for the rows; those of other parts in it are kept")
    parser.add_argument("--steps", type=int, help="of a chain; default: 50, or 3 on a CPU")
    parser.add_argument("--rounds", type=int, help="how often something is timed; default: 3, or once on a CPU")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    dtype, steps, rounds = (torch.float16, 50, 3) if on_gpu else (torch.float32, 3, 1)
    setup = Setup(device, dtype, args.steps or steps, args.rounds or rounds)
    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    rows: list[Row] = json.loads(args.json.read_text()) if args.json and args.json.is_file() else []
    for part in args.parts or PARTS:
        rows = [row for row in rows if row["part"] != part]
        for row in PARTS[part](setup):
            rows.append({"part": part, "on": where, "torch": torch.__version__, **row})
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
