"""The Triton kernels of layers are compiled for GPUs from Turing to Blackwell, without spilled registers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = (75, 80, 90, 100, 120)

AOT = r"""
import json, sys
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from doodl_fast.ops.backends import triton_gated_kernels, triton_layer_kernels as k, triton_norm_kernels
from doodl_fast.ops.backends import triton_quick_gelu_kernels as quick
from doodl_fast.ops.backends import triton_rotary_kernels
from doodl_fast.ops.backends.triton_launch import warps_for

GROUP_NORM = (k.group_moments_kernel, k.group_norm_kernel, k.group_norm_backward_sums_kernel,
              k.group_norm_backward_kernel)
GATED = (triton_gated_kernels.gated_kernel, triton_gated_kernels.gated_backward_kernel)
NORM = (triton_norm_kernels.modulated_norm_kernel, triton_norm_kernels.modulated_norm_backward_kernel)
QUICK_GELU = (quick.quick_gelu_kernel, quick.quick_gelu_backward_kernel)
ROTARY = (triton_rotary_kernels.rotary_kernel, triton_rotary_kernels.rotary_backward_kernel)
WIDE = ("mean_ptr", "rstd_ptr", "parts_ptr", "cos_ptr", "sin_ptr")

def cases(architecture):
    for kernel in GROUP_NORM:
        kinds = [("fp16", False)]
        if architecture == 90:
            kinds += [("bf16", True), ("fp32", False), ("fp64", True)]
        for dtype, last in kinds:
            constants = dict(CHANNELS_LAST=last, WEIGHT=True, BIAS=True, SILU=True, PARTS=8)
            yield kernel, dtype, constants
    for kernel in GATED:
        for number, dtype in enumerate(("fp16", "bf16", "fp32", "fp64") if architecture == 90 else ("fp16",)):
            yield kernel, dtype, dict(ACTIVATION=number % 3)
    for kernel in ROTARY:
        for number, dtype in enumerate(("bf16", "fp16", "fp32", "fp64") if architecture == 90 else ("fp16",)):
            yield kernel, dtype, dict(HALVES=number % 2 == 1)
    for kernel in QUICK_GELU:
        for dtype in ("fp16", "bf16", "fp32", "fp64") if architecture == 90 else ("fp16",):
            yield kernel, dtype, {}
    for kernel in NORM:  # Rows of 64 channels, and of FLUX.1's and FLUX.2's transformers.
        for each, block, dtype in ((1, 4096, "fp16"), *((16, 64, "bf16"), (1, 8192, "bf16")) * (architecture == 90)):
            vectors = dict.fromkeys(("WEIGHT", "BIAS", "SCALE", "SHIFT", "CENTER"), each == 1)
            yield kernel, dtype, dict(vectors, WEIGHT=True, ROWS=each, BLOCK=block)

def warps(constants):
    return warps_for(constants["BLOCK"] * constants.get("ROWS", 1))

for architecture in json.loads(sys.argv[1]):
    for kernel, dtype, constants in cases(architecture):
        wide = "fp64" if dtype == "fp64" else "fp32"
        constants = dict(dict(BLOCK=1024), **constants, COMPUTE=tl.float64 if wide == "fp64" else tl.float32)
        signature, attributes, chosen = {}, {}, {}
        for index, name in enumerate(kernel.arg_names):
            if name.isupper():
                signature[name] = "constexpr"
                chosen[name] = constants[name]
            elif name.endswith("_ptr"):
                signature[name] = "*" + (wide if name in WIDE else dtype)
                attributes[(index,)] = [["tt.divisibility", 16]]
            elif name == "eps":
                signature[name] = "fp64"
            else:
                signature[name] = "i32"
                attributes[(index,)] = [["tt.divisibility", 16]]
        built = triton.compile(ASTSource(kernel, signature, chosen, attributes),
                               target=GPUTarget("cuda", architecture, 32),
                               options={"num_warps": warps(constants), "enable_fp_fusion": False})
        print(json.dumps(dict(kernel=kernel.__name__, architecture=architecture, dtype=dtype,
                              last=constants.get("CHANNELS_LAST", False), cubin=len(built.asm["cubin"]),
                              ptx=built.asm["ptx"])))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[dict]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-c", AOT, json.dumps(ARCHITECTURES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    cases, log = [], ""
    for line in done.stdout.splitlines():  # The log of ptxas on a kernel comes before the kernel's own line.
        if line.startswith("{"):
            cases.append({**json.loads(line), "log": log})
            log = ""
        else:
            log += line + "\n"
    return cases


def test_every_kernel_is_compiled_for_every_architecture(built):
    from doodl_fast.ops.backends import (
        triton_gated_kernels,
        triton_layer_kernels,
        triton_norm_kernels,
        triton_quick_gelu_kernels,
        triton_rotary_kernels,
    )

    modules = (
        *(triton_layer_kernels, triton_gated_kernels, triton_norm_kernels),
        *(triton_quick_gelu_kernels, triton_rotary_kernels),
    )
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    found = {(case["kernel"], case["architecture"]) for case in built}
    assert found == {(name, architecture) for name in kernels for architecture in ARCHITECTURES}
    assert all(case["cubin"] > 0 for case in built)


def test_no_kernel_spills(built):
    for case in built:
        assert re.findall(r"(\d+) bytes spill (?:stores|loads)", case["log"]) == ["0", "0"], case["kernel"]


def test_contiguous_tensors_are_read_16_bytes_at_once(built):
    for case in built:
        wide = re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", case["ptx"])
        assert wide or case["last"], (case["kernel"], case["architecture"], case["dtype"])
