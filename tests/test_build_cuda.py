"""How setup.py calls nvcc. There is none here: a script takes its place, and writes down what it is asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not all(map(shutil.which, ("g++", "ar"))), reason="needs g++ and ar on Linux"
)
NVCC = """#!/bin/sh
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.48"; exit 0; }
echo "$@" >> "$(dirname "$0")/calls"
[ -n "$FAIL" ] && { echo "nvcc fatal: $FAIL" >&2; exit 1; }
while [ "$1" != -o ]; do shift; done
exec g++ -c -x c++ /dev/null -o "$2"
"""


@pytest.fixture
def toolkit(tmp_path) -> Path:
    """Returns a folder with an empty torch for CUDA 13.0, and with nvcc and empty libraries to link with."""
    torch, home = tmp_path / "torch", tmp_path / "cuda"
    for folder in (torch / "include/torch/csrc/stable", torch / "lib", home / "bin", home / "lib64"):
        folder.mkdir(parents=True)
    (torch / "include/torch/csrc/stable/library.h").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0'\ncuda = '13.0'\n")
    for name in ("torch", "torch_cpu", "torch_cuda"):
        subprocess.run(["g++", "-shared", "-o", torch / f"lib/lib{name}.so", "-x", "c++", "/dev/null"], check=True)
    subprocess.run(["ar", "rc", home / "lib64/libcudart_static.a"], check=True)
    (home / "bin/nvcc").write_text(NVCC)
    (home / "bin/nvcc").chmod(0o755)
    return tmp_path


def build(folder: Path, **changes: str) -> tuple[dict[str, str], list[str]]:
    """Builds into a folder. Returns the report, and the command lines of nvcc."""
    variables = {"DOODL_FAST_TORCH": str(folder / "torch"), "CUDA_HOME": str(folder / "cuda"), **changes}
    names = ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("DOODL_FAST_") and key not in names}
    options = ("--build-lib", folder / "out", "--build-temp", folder / "temp")
    command = [sys.executable, "setup.py", "-q", "build_ext", *options]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = folder / "cuda/bin/calls"
    lines = calls.read_text().splitlines() if calls.exists() else []
    return json.loads((folder / "out/doodl_fast/_native_build.json").read_text()), lines


@pytest.mark.parametrize(
    ("given", "binaries", "ptx", "recorded"),
    [
        (None, ("80", "90"), "90", "80 90"),
        ("9.0", ("90",), "90", "90"),
        ("12.0+PTX;8.6 9.0a", ("86", "90", "120"), "120", "86 90 120"),
    ],
)
def test_the_cards_in_the_variable_are_compiled_for(toolkit, given, binaries, ptx, recorded):
    report, calls = build(toolkit, **({} if given is None else {"TORCH_CUDA_ARCH_LIST": given}))
    assert report["cuda"] == "built" and report["cuda architectures"] == recorded
    assert len(calls) == len(list((ROOT / "csrc").glob("*.cu")))
    for call in calls:
        codes = [word.split("=", 1)[1] for word in call.split() if word.startswith("-gencode")]
        expected = [f"arch=compute_{sm},code=sm_{sm}" for sm in binaries]
        assert codes == [*expected, f"arch=compute_{ptx},code=compute_{ptx}"]
        assert "-fmad=false" in call and "-DTORCH_TARGET_VERSION=0x020b000000000000" in call
    assert (toolkit / "out/doodl_fast/_native_cuda.abi3.so").is_file()


def test_a_name_in_the_variable_is_refused_and_the_installation_goes_on(toolkit):
    report, calls = build(toolkit, TORCH_CUDA_ARCH_LIST="Hopper")
    assert report["cuda"] == ("TORCH_CUDA_ARCH_LIST: expected compute capabilities, such as 8.0;9.0+PTX, got 'Hopper'")
    assert not calls and "cuda architectures" not in report


def test_an_error_of_nvcc_is_in_the_report(toolkit):
    report, _ = build(toolkit, FAIL="Unsupported gpu architecture 'compute_75'")
    assert report["cuda"].startswith("nvcc failed on cuda.cu: nvcc fatal: Unsupported gpu architecture")
    assert "cuda architectures" not in report
