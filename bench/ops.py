"""The fused ops against eager, torch.compile'd eager and copies of the same bytes: pytest-benchmark's JSON and a table.

    python bench/ops.py [--quick] [--no-compile] [--busy] [--threads N] [--device D] [--json FILE] [--table FILE]

runs this file under pytest and writes the table from the JSON, in place of a page's beginning up to its first section;
`pytest bench/ops.py` takes the same options.

"eager" is the plain torch expression that a user would write, not this package's eager backend. Every figure is the
median of interleaved rounds: a test is one round of one implementation, the tests of a round follow each other, and the
rounds of a implementation are put together when the JSON is written; so a machine that slows down slows all of them.

"moved" counts every operand read once and every result written once, "allocated" every tensor that a call makes: the
ops make their outputs (`latent_update` also a few numbers a sample, for the norms), eager its intermediate results,
too. Two copies of the bytes moved are timed: into memory that is there, and `clone`, which allocates as the ops do:
fresh memory costs page faults. "out=" is the op writing into memory that is there, as `copy` does. A fraction of 1 is
as fast as that copy. On CUDA a round ends with a synchronisation.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import doodl_fast
from doodl_fast import ops
from doodl_fast.ops.backends import native

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"SD": (1, 4, 64, 64), "SDXL": (1, 4, 128, 128), "video": (1, 4, 16, 64, 64), "2^24": (1, 2**24)}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32/fp16": (torch.float32, torch.float16),
    "fp64/fp16": (torch.float64, torch.float16),
    "fp16": (torch.float16, torch.float16),
}
INTRODUCTION = (
    "`bench/ops.py` measured the ops and wrote this table; the text at its head says how, and what the columns mean. "
    "The line below names what was measured. Other versions may differ."
)
OPS = ("coupling", "coupling_mix", "coupling_mix_vjp", "latent_update")
PLAIN, FUSED, COPIES = ("eager", "compiled"), ("native", "triton"), ("copy", "clone")
INTO = {name: f"{name} out=" for name in FUSED}
BACKENDS = {**{name: name for name in FUSED}, **{into: name for name, into in INTO.items()}}
OPTIONS: dict[str, dict[str, Any]] = {
    "--quick": {"action": "store_true", "help": "fewer and shorter rounds, fp32 alone"},
    "--sizes": {"default": ",".join(SIZES), "help": "of these sizes, separated by commas (default: %(default)s)"},
    "--no-compile": {"action": "store_true", "help": "leave torch.compile out"},
    "--busy": {"action": "store_true", "help": "mark the results as taken on a busy machine"},
    "--threads": {"type": int, "default": torch.get_num_threads(), "help": "torch's threads"},
    "--device": {"default": "cuda" if torch.cuda.is_available() else "cpu", "help": "cpu or cuda"},
}
A, B, G = 0.98, -0.12, 7.5
MIX = ops.Mixing(True, 0.93, 0.07, 0.93, 0.07)
Call = Callable[[], Any]


# What is measured


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


def plain_update(
    x: Tensor, y: Tensor, mx: Tensor, my: Tensor, gx: Tensor, gy: Tensor, start: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    gradient = (0.25 * (gx + gy)).clamp(-1e-3, 1e-3)
    mx, my = 0.9 * mx + gradient, 0.9 * my + gradient
    x = 0.5 * ((x - mx) + (y - my))
    x = x * (start / torch.linalg.vector_norm(x))
    return (x, x.clone()), (mx, my)


@dataclass
class Case:
    """One op at one size and dtype: the plain expression and its operands, the fused call, the bytes that must move."""

    plain: Callable[..., Any]
    operands: tuple[Any, ...]
    fused: Call
    moved: int
    into: Call | None = None
    compiled: Callable[..., Any] | None = None
    repeats: dict[str, int] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)


def make_case(op: str, size: tuple[int, ...], state: torch.dtype, network: torch.dtype, device: str) -> Case:
    """The case of an op. state, network: the dtypes of the latents and of eps, which is guided."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, y = draw(size, state), draw(size, state)
    latent = x.numel() * x.element_size()
    output = 2 * x.numel() * network.itemsize
    if op == "coupling_mix_vjp":
        return Case(
            plain_coupling_mix_vjp,
            (x, y, network),
            lambda: ops.coupling_mix_vjp(x, y, MIX, A, 0.0, B, G, None, network),
            4 * latent + output,
        )
    if op == "latent_update":
        moments = (draw(size, state), draw(size, state))
        start = torch.linalg.vector_norm(x.double()).reshape(1)
        options: dict[str, Any] = {"clip": 1e-3, "momentum": 0.9, "tied": True}
        return Case(
            plain_update,
            (x, y, *moments, y, x, start.to(state)),
            lambda: ops.latent_update((x, y), moments, (y, x), None, (start, start), **options),
            14 * latent,  # six read, four written, and x, y read and written again for the norm
        )
    eps = draw((2 * size[0], *size[1:]), network)
    outs = torch.ones_like(x), torch.ones_like(x)
    if op == "coupling":
        return Case(
            plain_coupling,
            (x, eps),
            lambda: ops.coupling(x, None, eps, A, 0.0, B, G),
            2 * latent + output,
            lambda: ops.coupling(x, None, eps, A, 0.0, B, G, out=outs[0]),
        )
    return Case(
        plain_coupling_mix,
        (x, y, eps),
        lambda: ops.coupling_mix(x, y, eps, MIX, A, 0.0, B, G),
        4 * latent + output,
        lambda: ops.coupling_mix(x, y, eps, MIX, A, 0.0, B, G, out=outs),
    )


# How it is measured


def clock() -> float:
    """Seconds, after what the GPU still has to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=clock, disable_gc=True)


class Allocations(TorchDispatchMode):
    """Adds up the bytes of the tensors that torch makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        values = (result,) if isinstance(result, Tensor) else result or ()
        for value, returned in zip(values, func._schema.returns, strict=False):
            if isinstance(value, Tensor) and returned.alias_info is None:
                self.total += value.numel() * value.element_size()
        return result


@lru_cache(maxsize=1)  # the tests of a case follow each other
def prepared(op: str, size: str, dtype: str, device: str) -> Case:
    torch.compiler.reset()
    case = make_case(op, SIZES[size], *DTYPES[dtype], device)
    case.compiled = torch.compile(case.plain, fullgraph=True, dynamic=False)
    for name, call in (("eager", lambda: case.plain(*case.operands)), ("ops", case.fused)):
        with Allocations() as seen:
            call()
        case.allocated[name] = seen.total
    return case


@lru_cache(maxsize=2)
def copy_of(moved: int, device: str) -> dict[str, Call]:
    half, other = (torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return {"copy": lambda: other.copy_(half), "clone": half.clone}


def call_of(case: Case, implementation: str, device: str) -> Call:
    if implementation in COPIES:
        return copy_of(case.moved, device)[implementation]
    if implementation in INTO.values():
        assert case.into is not None
        return case.into
    if implementation in FUSED:
        return case.fused
    function = case.compiled if implementation == "compiled" else case.plain
    assert function is not None
    return lambda: function(*case.operands)


def implementations(options: Any) -> list[str]:
    """The names of the implementations that this machine has."""
    there = [name for name in PLAIN if name != "compiled" or not options.no_compile]
    for name in FUSED:
        interpreted = name == "triton" and options.device == "cpu"
        if not interpreted and ops.why_not(name, options.device) is None:
            there += [name, INTO[name]]
    return [*there, *COPIES]


def cases(options: Any) -> Iterator[tuple[str, str, str]]:
    """(op, size, dtype), the latent update where it has one."""
    for size in options.sizes.split(","):
        for dtype in ["fp32"] if options.quick else DTYPES:
            yield from ((op, size, dtype) for op in OPS if op != "latent_update" or dtype == "fp32")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    rounds = range(5 if options.quick else 15)
    runs = [
        (*case, turn, name)
        for case in cases(options)
        for turn in rounds
        for name in implementations(options)
        if name not in INTO.values() or case[0] in ("coupling", "coupling_mix")
    ]
    metafunc.parametrize(
        ("op", "size", "dtype", "turn", "implementation"), runs, ids=["-".join(map(str, run)) for run in runs]
    )


@torch.no_grad()
def test_op(
    benchmark: Any, pytestconfig: pytest.Config, op: str, size: str, dtype: str, turn: int, implementation: str
):
    """One round of one implementation."""
    options = pytestconfig.option
    case = prepared(op, size, dtype, options.device)
    call = call_of(case, implementation, options.device)
    with ops.backend(BACKENDS.get(implementation, ops.AUTO)):
        if turn == 0:
            call(), call()
            start = clock()
            call()
            budget = 0.01 if options.quick else 0.03
            case.repeats[implementation] = max(1, min(1000, int(budget / max(clock() - start, 1e-7))))
        elif implementation not in case.repeats:
            pytest.skip(f"{implementation} failed in the first round")
        benchmark.group = f"{op} {size} {dtype}"
        benchmark.pedantic(call, iterations=case.repeats[implementation])
    benchmark.extra_info.update(op=op, size=size, dtype=dtype, implementation=implementation, bytes_moved=case.moved)
    benchmark.extra_info["bytes_allocated"] = case.allocated.get("ops" if implementation in FUSED else implementation)


# What is written


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("doodl_fast's benchmarks")
    for name, how in OPTIONS.items():
        group.addoption(name, **how)


def pytest_configure(config: pytest.Config) -> None:
    unknown = set(config.option.sizes.split(",")) - SIZES.keys()
    if unknown:
        raise pytest.UsageError(f"--sizes: expected some of {', '.join(SIZES)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(config.option.threads)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["doodl_fast"] = environment(config.option.device, config.option.busy)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Puts the rounds of each implementation together."""
    from pytest_benchmark.stats import Stats

    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in output_json["benchmarks"]:
        rounds.setdefault((entry["group"], entry["extra_info"]["implementation"]), []).append(entry)
    for (group, implementation), entries in rounds.items():
        stats = Stats()
        stats.data = [seconds for entry in entries for seconds in entry["stats"]["data"]]
        name = f"{group} {implementation}"
        entries[0].update(name=name, fullname=name, param=None, params=None)
        entries[0]["stats"].update(stats.as_dict(), data=stats.data)
    output_json["benchmarks"][:] = [entries[0] for entries in rounds.values()]


def environment(device: str, busy: bool) -> dict[str, Any]:
    """What the results are keyed by."""

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip() or "unknown"
        except OSError:
            return "unknown"

    try:
        triton_version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton_version = "none"
    cuda = device == "cuda"
    return {
        "doodl_fast": doodl_fast.__version__,
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "torch": torch.__version__,
        "triton": triton_version,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "none",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "instruction_set": native.instruction_set() or "none",
        "machine_was_busy": busy,
    }


def table(results: dict[str, Any]) -> str:
    """The page of pytest-benchmark's JSON."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in results["benchmarks"]:
        info = entry["extra_info"]
        row = rows.setdefault((info["op"], info["size"], info["dtype"]), {"us": {}, "MB": {}})
        row["us"][info["implementation"]] = entry["stats"]["median"] * 1e6
        row["MB"]["moved"] = info["bytes_moved"] / 1e6
        if info["bytes_allocated"] is not None:
            row["MB"]["eager" if info["implementation"] == "eager" else "ops"] = info["bytes_allocated"] / 1e6
    names = [name for name in (*PLAIN, *FUSED) if any(name in row["us"] for row in rows.values())]
    fused = [name for name in names if name in FUSED]
    head = ["op", "size", "dtype", *(f"{name} us" for name in names)]
    head += ["MB moved", "eager allocates", "ops allocate"]
    for name in fused:
        head += [f"{name}: x eager", "x compiled", "GB/s", "of clone", "of copy", "out=: of copy"]
    about = results["machine_info"]["doodl_fast"]
    lines = ["# Benchmarks", "", INTRODUCTION, ""]
    if about["machine_was_busy"]:
        lines += ["**Taken while the machine was busy with other work: compare within a row only.**", ""]
    lines += [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, row in rows.items():
        us, size = row["us"], row["MB"]
        cells = [*key, *(f"{us[name]:.1f}" if name in us else "" for name in names)]
        cells += [f"{size[kind]:.2f}" if kind in size else "" for kind in ("moved", "eager", "ops")]
        for name in fused:
            pairs = [("eager", name), ("compiled", name), ("clone", name), ("copy", name), ("copy", INTO[name])]
            ratios = [f"{us[other] / us[ours]:.2f}" if {ours, other} <= us.keys() else "" for other, ours in pairs]
            speed = f"{size['moved'] / us[name] * 1e3:.1f}" if name in us else ""
            cells += [*ratios[:2], speed, *ratios[2:]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Runs pytest on this file, then writes the table. Returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, how in OPTIONS.items():
        parser.add_argument(name, **how)
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "benchmarks.md")
    options = parser.parse_args(arguments)
    passed = []
    for name, how in OPTIONS.items():
        value = getattr(options, name[2:].replace("-", "_"))
        passed += ([name] if value else []) if "action" in how else [f"{name}={value}"]
    options.json.unlink(missing_ok=True)
    status = pytest.main([__file__, "-q", "--benchmark-quiet", f"--benchmark-json={options.json}", *passed])
    if options.json.is_file():
        old = options.table.read_text() if options.table.is_file() else ""
        sections = old[old.find("\n## ") :] if "\n## " in old else ""
        options.table.write_text(table(json.loads(options.json.read_text())) + sections)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
