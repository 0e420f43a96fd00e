"""The kernels are compiled for GPUs that this machine need not have: no spills, no stack, loads of 16 bytes.

`DOODL_FAST_EVERY_DTYPE=1` (continuous integration) compiles the CUDA kernels for all dtypes instead of fp16 and fp32.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
EVERY = os.environ.get("DOODL_FAST_EVERY_DTYPE") == "1"
ARCHITECTURES = ("80", "90")


def setup_constant(name: str) -> list[str]:
    """Returns a list of flags in setup.py, so that the tests compile as the build does."""
    found = re.search(rf"^{name} = (\[.*?\])$", (ROOT / "setup.py").read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc").glob("*.cu")))
def test_cuda(source, architecture, tmp_path):
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        pytest.skip("nvcc is not installed")
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, *setup_constant("NVCC_FLAGS"), f"-arch=sm_{architecture}", "-Xptxas", "-v", f"-I{include}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *([] if EVERY else ["-DDF_FEW_DTYPES"])]
    command += ["--keep", "--keep-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(said) >= 5 and set(said) == {("0", "0", "0")}
    ptx = next(tmp_path.glob("*.ptx")).read_text()
    assert not re.search(r"\bfma\.rn\.f(32|64)\b|\.ftz\b|\.approx\b", ptx)  # Nothing is fused, flushed or approximate.
    if source == "cuda.cu":
        # Every kernel that is compiled for complete pieces reads and writes 16 bytes at once.
        assert len(re.findall(r"ld\.global\S*\.v4\.\w?32|ld\.global\S*\.v2\.\w?64", ptx)) >= 50
        assert len(re.findall(r"st\.global\S*\.v4\.\w?32|st\.global\S*\.v2\.\w?64", ptx)) >= 50


AOT = r"""
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from doodl_fast.ops.backends import triton_kernels as k, triton_lattice
from triton import language as tl

COUPLING = dict(SOURCE=True, EPS=True, GUIDED=True, MIXES=True, TARGET_FIRST=True, HAS_C0=True, HAS_C1=True, BLOCK=1024)
VJP = dict(SOURCE=True, EPS=True, SCALED=True, GUIDED=True, MIXES=True, TARGET_FIRST=True, HAS_C=True, HAS_C0=True,
           HAS_C1=True, BLOCK=1024)
UPDATE = dict(SQUARES=True, NESTEROV=True, TIED=True, NOISY=True, BLOCK=1024)
LATTICE = dict(EPS=True, GUIDED=True, WORDS=4, BLOCK=triton_lattice.BLOCK)
NAMES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}

def cases():
    for state, eps in (("fp32", "fp32"), ("fp32", "fp16"), ("fp16", "fp16"), ("bf16", "bf16"), ("fp64", "fp16"),
                       ("fp64", "fp64")):
        compute = tl.float64 if "fp64" in (state, eps) else tl.float32
        wide = "fp64" if compute == tl.float64 else "fp32"
        types = dict(out_ptr=state, out_source_ptr=state, target_ptr=state, source_ptr=state, eps_ptr=eps)
        yield k.coupling_kernel, types, dict(COUPLING, COMPUTE=compute), state, eps
        yield k.coupling_kernel, types, dict(COUPLING, MIXES=False, COMPUTE=compute), state, eps
        types = dict(out_ptr=state, out_source_ptr=state, out_eps_ptr=eps, grad_ptr=state, grad_source_ptr=state,
                     scale_ptr=wide)
        yield k.vjp_kernel, types, dict(VJP, COMPUTE=compute), state, eps
    for state in ("fp32", "fp64"):
        compute = tl.float64 if state == "fp64" else tl.float32
        pointers = [name for name in k.update_kernel.arg_names if name.endswith("_ptr")]
        types = {name: "fp64" if name == "sums_ptr" else state for name in pointers}
        yield k.update_kernel, types, dict(UPDATE, COMPUTE=compute), state, state
        yield k.scale_kernel, dict(x_ptr=state, y_ptr=state, factors_ptr=state), dict(BLOCK=1024), state, state
    kernel = triton_lattice.lattice_kernel
    for state, digits, limit in (("i32", 2, 2**31 - 1), ("i64", 4, 2**49)):
        values = ("out_ptr", "out_source_ptr", "target_ptr", "source_ptr")
        words = ("out_buffer_ptr", "out_source_buffer_ptr", "buffer_ptr", "source_buffer_ptr", "faults_ptr")
        for eps, mixes, undo in (("fp16", True, False), ("fp32", True, True), ("bf16", False, False)):
            types = {**dict.fromkeys(values, state), **dict.fromkeys(words, "i32"), "eps_ptr": eps}
            constants = dict(LATTICE, MIXES=mixes, UNDO=undo, TARGET_FIRST=not undo, LIMIT=limit, DIGITS=digits)
            yield kernel, types, constants, state, eps

for architecture in (80, 90):
    for kernel, types, constants, state, eps in cases():
        signature, attributes = {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name in types:
                signature[name] = "*" + types[name]
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif name in ("n", "sample"):
                signature[name] = "i32"
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif name in ("row", "by0", "over0", "by1", "over1"):
                signature[name] = "i32"
            else:
                signature[name] = "fp64"
        source = ASTSource(kernel, signature, {k: v for k, v in constants.items()}, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", architecture, 32),
                               options={"num_warps": 4, "enable_fp_fusion": False})
        ptx = built.asm["ptx"]
        print(json.dumps(dict(kernel=kernel.__name__, architecture=architecture, state=state, eps=eps,
                              cubin=len(built.asm["cubin"]), ptx=ptx)))
"""


@pytest.fixture(scope="module")
def triton_built(tmp_path_factory) -> list[dict]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, "-c", AOT], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    cases, log = [], ""
    for line in done.stdout.splitlines():  # The log of ptxas on a kernel comes before the kernel's own line.
        if line.startswith("{"):
            cases.append({**json.loads(line), "log": log})
            log = ""
        else:
            log += line + "\n"
    return cases


def test_triton_compiles_every_kernel(triton_built):
    kernels = {(case["kernel"], case["architecture"]) for case in triton_built}
    names = ("coupling_kernel", "vjp_kernel", "update_kernel", "scale_kernel", "lattice_kernel")
    assert kernels == {(name, int(architecture)) for name in names for architecture in ARCHITECTURES}
    assert all(case["cubin"] > 0 for case in triton_built)


def test_triton_loads_16_bytes_and_contracts_nothing(triton_built):
    for case in triton_built:
        assert not re.search(r"\bfma\.rn\.f(32|64)\b|\.ftz\b|\.approx\b", case["ptx"]), case["kernel"]
        # The lattice kernel has small blocks, because its divisions take more time than its memory traffic.
        wide = re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", case["ptx"])
        assert wide or case["kernel"] == "lattice_kernel", case


def test_triton_spills_nothing(triton_built):
    for case in triton_built:
        log = case["log"]
        assert re.findall(r"(\d+) bytes spill (?:stores|loads)", log) == ["0", "0"], case["kernel"]
        assert re.search(r"\b0 bytes stack frame", log), case["kernel"]
