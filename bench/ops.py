"""The fused ops against eager, torch.compile'd eager and a copy of the same bytes; writes a JSON and
docs/benchmarks.md.

    python bench/ops.py [--quick] [--no-compile] [--busy] [--threads N] [--json FILE] [--table FILE]

"eager" is the plain torch expression that a user would write, not this package's eager backend. Every figure is the
median of interleaved rounds: in each round every contender of a case is timed once, the copy among them, so that a
machine that slows down slows all of them. "bytes" counts every operand read once and every result written once. Two
copies are timed: into memory that is there, and `clone`, which allocates as the ops do; a fraction of 1 means as fast
as the clone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import doodl_fast
from doodl_fast import ops
from doodl_fast.ops import native

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"SD": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "video": (1, 4, 16, 64, 64), "2^24": (1, 2**24)}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32/fp16": (torch.float32, torch.float16),
    "fp64/fp16": (torch.float64, torch.float16),
    "fp16": (torch.float16, torch.float16),
}
A, B, G = 0.98, -0.12, 7.5
MIX = ops.Mixing(True, 0.93, 0.07, 0.93, 0.07)
Call = Callable[[], Any]


def plain_coupling(x: Tensor, eps: Tensor) -> Tensor:
    uncond, cond = eps.to(x.dtype).chunk(2)
    return A * x + B * (uncond + G * (cond - uncond))


def plain_coupling_mix(x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    x = plain_coupling(x, eps)
    x = 0.93 * x + 0.07 * y
    return x, 0.93 * y + 0.07 * x


def plain_coupling_mix_vjp(gx: Tensor, gy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    gx = gx + 0.07 * gy
    gy = 0.93 * gy + 0.07 * gx
    gx = 0.93 * gx
    cotangent = B * gx
    to_cond = G * cotangent
    return A * gx, gy, torch.cat([(cotangent - to_cond).to(dtype), to_cond.to(dtype)])


def plain_update(x: Tensor, y: Tensor, mx: Tensor, my: Tensor, gx: Tensor, gy: Tensor, starts: Tensor) -> list[Tensor]:
    gradient = (0.25 * (gx + gy)).clamp(-1e-3, 1e-3)
    mx, my = 0.9 * mx + gradient, 0.9 * my + gradient
    x = 0.5 * ((x - mx) + (y - my))
    x = x * (starts / torch.linalg.vector_norm(x))
    return [x, x.clone(), mx, my]


def cases(size: tuple[int, ...], state: torch.dtype, network: torch.dtype, device: str) -> dict[str, dict[str, Any]]:
    """For each op: the plain expression with its operands, the fused call, and the bytes that must move."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, y = draw(size, state), draw(size, state)
    eps = draw((2 * size[0], *size[1:]), network)
    latent, output = x.numel() * x.element_size(), eps.numel() * eps.element_size()
    found: dict[str, dict[str, Any]] = {
        "coupling": {
            "plain": (plain_coupling, (x, eps)),
            "fused": lambda: ops.coupling(x, None, eps, A, 0.0, B, G),
            "bytes": 2 * latent + output,
        },
        "coupling_mix": {
            "plain": (plain_coupling_mix, (x, y, eps)),
            "fused": lambda: ops.coupling_mix(x, y, eps, MIX, A, 0.0, B, G),
            "bytes": 4 * latent + output,
        },
        "coupling_mix_vjp": {
            "plain": (plain_coupling_mix_vjp, (x, y, network)),
            "fused": lambda: ops.coupling_mix_vjp(x, y, MIX, A, 0.0, B, G, None, network),
            "bytes": 4 * latent + output,
        },
    }
    if state in (torch.float32, torch.float64) and state == network:
        start = torch.linalg.vector_norm(x.double()).reshape(1)
        moments = (draw(size, state), draw(size, state))
        found["latent_update"] = {
            "plain": (plain_update, (x, y, *moments, y, x, start.to(state))),
            "fused": lambda: ops.latent_update(
                (x, y), moments, (y, x), None, (start, start), clip=1e-3, momentum=0.9, tied=True
            ),
            "bytes": 14 * latent,  # six read, four written, and x, y again for the norm
        }
    return found


def contenders(case: dict[str, Any], device: str, compiled: bool) -> dict[str, Call]:
    function, operands = case["plain"]
    calls: dict[str, Call] = {"eager": lambda: function(*operands)}
    if compiled:
        torch.compiler.reset()
        fast = torch.compile(function, fullgraph=True, dynamic=False)
        calls["compiled"] = lambda: fast(*operands)

    for name in ("native", "triton"):
        interpreted = name == "triton" and device == "cpu"
        if not interpreted and ops.why_not(name, device) is None:
            calls[name] = case["fused"]
    half = torch.empty(case["bytes"] // 2, dtype=torch.uint8, device=device)
    half.fill_(1)
    other = torch.zeros_like(half)
    calls["copy"] = lambda: other.copy_(half)
    calls["clone"] = lambda: half.clone()
    return calls


def seconds(call: Call, repeats: int, device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure(calls: dict[str, Call], rounds: int, budget: float, device: str) -> dict[str, float]:
    """Median seconds of each, from interleaved rounds."""
    repeats = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            with ops.backend(name if name in ops.NAMES else ops.AUTO):
                if turn < 0:
                    call(), call()
                    repeats[name] = max(1, min(1000, int(budget / max(seconds(call, 1, device), 1e-7))))
                else:
                    times[name].append(seconds(call, repeats[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def environment(device: str, busy: bool) -> dict[str, Any]:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(smi, capture_output=True, text=True).stdout.strip() if device == "cuda" else "none"
    except OSError:
        driver = "unknown"
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "doodl_fast": doodl_fast.__version__,
        "commit": git.stdout.strip(),
        "torch": torch.__version__,
        "triton": triton_version,
        "driver": driver,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set() or "none",
        "machine_was_busy": busy,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a page."""
    known = ("eager", "compiled", "native", "triton")
    names = [name for name in known if any(name in row["us"] for row in results["rows"])]
    head = ["op", "size", "dtype", *(f"{name} us" for name in names), "MB moved"]
    fused = [name for name in names if name in ("native", "triton")]
    for name in fused:
        head += [f"{name}: x eager", "GB/s", "of clone", "of copy"]
    lines = ["# Benchmarks", "", "Written by `bench/ops.py`, which says how it measures.", ""]
    if results["environment"]["machine_was_busy"]:
        lines += ["**Taken while the machine was busy with other work: compare within a row only.**", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results["environment"].items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in results["rows"]:
        us = row["us"]
        cells = [row["op"], row["size"], row["dtype"], *(f"{us[name]:.1f}" if name in us else "" for name in names)]
        cells.append(f"{row['bytes'] / 1e6:.2f}")
        for name in fused:
            if name in us:
                rate = row["bytes"] / us[name] / 1e3
                cells += [f"{us['eager'] / us[name]:.1f}", f"{rate:.1f}"]
                cells += [f"{us['clone'] / us[name]:.2f}", f"{us['copy'] / us[name]:.2f}"]
            else:
                cells += [""] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, fp32 alone")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--busy", action="store_true", help="mark the results as taken on a busy machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for size_name, size in SIZES.items():
        for dtype_name in ["fp32"] if options.quick else DTYPES:
            for op, case in cases(size, *DTYPES[dtype_name], options.device).items():
                calls = contenders(case, options.device, not options.no_compile)
                found = measure(calls, *((5, 0.01) if options.quick else (15, 0.03)), options.device)
                us = {name: value * 1e6 for name, value in found.items()}
                rows.append({"op": op, "size": size_name, "dtype": dtype_name, "bytes": case["bytes"], "us": us})
                print(rows[-1], flush=True)
    results = {"environment": environment(options.device, options.busy), "rows": rows}
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    options.table.write_text(table(results))


if __name__ == "__main__":
    with torch.no_grad():
        main()
