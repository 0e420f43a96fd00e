"""Builds the native kernels in csrc/ if that is possible. The metadata of the package is in pyproject.toml.

The libraries use torch's stable ABI and no Python API, so one binary works with torch 2.11 and later and with Python
3.10 and later. TORCH_CUDA_ARCH_LIST says which cards the CUDA kernels are compiled for. The libraries are optional.
Without a compiler, without torch's headers, without CUDA, or with the environment variables DOODL_FAST_NO_NATIVE=1 or
DOODL_FAST_NO_CUDA=1, the installation goes on in pure Python, prints what is missing, and records it for
`doodl-fast doctor`.

This file does not import torch but looks for it on disk: pip's isolated builds hide the packages of the environment,
and a build requirement on torch would download it once more. If the build uses another interpreter, torch is not found;
then use --no-build-isolation, or DOODL_FAST_TORCH=/path/to/site-packages/torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
TARGET = "0x020b000000000000"  # The stable ABI of torch 2.11, to which the headers of a newer torch are restricted.
PYTHON = "cp310"
DEFINES = [("TORCH_TARGET_VERSION", TARGET)]
# -ffp-contract=off forbids fused multiply-adds (csrc/scalar.h). -fno-trapping-math and -fno-math-errno change no
# result; they let the compiler vectorise loops.
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
ARCHITECTURES = (80, 90)  # compute capabilities 8.0 and 9.0, unless TORCH_CUDA_ARCH_LIST has others
# Some compilers link the C++ library statically. If its symbols were then exported, they would be mixed up with those
# of the copy that torch uses, and an error raised by a kernel would end the process.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"] if sys.platform.startswith("linux") else []
CPU, CUDA = "doodl_fast._native", "doodl_fast._native_cuda"
CPU_SOURCES = (
    *("cpu", "cpu_default", "cpu_avx2", "cpu_lattice"),
    *("layers", "layers_default", "layers_avx2", "layers_avx512", "gated", "modulated_norm", "quick_gelu", "rotary"),
)
KINDS = {CPU: "cpu", CUDA: "cuda"}


class Missing(Exception):
    """Raised with the reason for which a library is not built."""


def switched_off(variable: str) -> bool:
    """Whether an environment variable such as DOODL_FAST_NO_CUDA is set to something other than 0, false or no."""
    return os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no")


def find_torch() -> Path:
    """Returns the directory of torch, without importing it. Raises Missing if it is not found."""
    places = [Path(os.environ["DOODL_FAST_TORCH"])] if "DOODL_FAST_TORCH" in os.environ else []
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    places += [Path(folder) / "torch" for folder in folders if folder]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").is_file() and (place / "version.py").is_file():
            return place
    raise Missing("torch was not found; install it first, then build with --no-build-isolation")


def torch_says(torch: Path, name: str) -> str:
    """Returns a string constant in torch/version.py, or "" if it is None or absent."""
    found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", (torch / "version.py").read_text(), re.MULTILINE)
    return found.group(1) if found else ""


def torch_for_building() -> Path:
    """Returns the directory of torch. Raises Missing if it is too old, or if native kernels are switched off."""
    if switched_off("DOODL_FAST_NO_NATIVE"):
        raise Missing("DOODL_FAST_NO_NATIVE is set")
    torch = find_torch()
    version = torch_says(torch, "__version__")
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_TORCH:
        raise Missing(f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    return torch


def find_nvcc(torch: Path) -> Path:
    """Returns the nvcc of the CUDA version that torch was built with. Raises Missing if there is none."""
    if switched_off("DOODL_FAST_NO_CUDA"):
        raise Missing("DOODL_FAST_NO_CUDA is set")
    wanted = torch_says(torch, "cuda")
    if not wanted:
        raise Missing(f"torch {torch_says(torch, '__version__')} is a build without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = str(Path(home) / "bin/nvcc") if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    nvcc = Path(found).resolve()
    if not nvcc.is_file():
        raise Missing(f"no nvcc at {nvcc}; install the CUDA {wanted} toolkit or set CUDA_HOME")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)", said)
    if release is None or release.group(1) != wanted.split(".")[0]:
        raise Missing(f"nvcc is of CUDA {release.group(1) if release else '?'}, torch of CUDA {wanted}")
    return nvcc


def architectures() -> list[int]:
    """Returns the compute capabilities to compile for, 90 for 9.0, in ascending order.

    TORCH_CUDA_ARCH_LIST is read as torch reads it, "8.0;9.0+PTX" for instance, but for one thing: the newest is always
    compiled to PTX as well, because later cards can run that. Raises Missing if the variable has something else in it.
    """
    found = set()
    for word in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()):
        match = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", word)
        if match:
            found.add(10 * int(match[1]) + int(match[2]))
        elif word:
            raise Missing(f"TORCH_CUDA_ARCH_LIST: expected compute capabilities, such as 8.0;9.0+PTX, got {word!r}")
    return sorted(found or ARCHITECTURES)


class BuildNative(build_ext):
    """Builds the libraries that can be built, and records for the others why not."""

    report: dict[str, str]

    def run(self) -> None:
        """Builds all libraries and writes the report."""
        self.report = {}
        super().run()
        for folder in {Path(self.build_lib) / "doodl_fast", *([ROOT / "doodl_fast"] if self.inplace else [])}:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_native_build.json").write_text(json.dumps(self.report, indent=1) + "\n")
        for kind in KINDS.values():
            if self.report[kind] != "built":
                print(f"doodl_fast: no native {kind} kernels: {self.report[kind]}", file=sys.stderr)

    def build_extension(self, ext: Extension) -> None:
        """Builds one library, or records why it is not built."""
        try:
            torch = torch_for_building()
            ext.include_dirs += [str(torch / "include")]
            ext.library_dirs += [str(torch / "lib")]
            if ext.name == CUDA:
                self.prepare_cuda(ext, torch)
            super().build_extension(ext)
            self.report[KINDS[ext.name]] = "built"
            if ext.name == CUDA:
                self.report["cuda architectures"] = " ".join(
                    map(str, architectures())
                )  # ops/backends/native.py reads it
        except Exception as error:  # It is optional, so no failure of a tool may stop the installation.
            self.report[KINDS[ext.name]] = str(error) or type(error).__name__
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # An earlier build may have left one.

    def prepare_cuda(self, ext: Extension, torch: Path) -> None:
        """Compiles the .cu files, which the rest of the build links."""
        nvcc, capabilities = find_nvcc(torch), architectures()
        code = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in capabilities]
        code += [f"-gencode=arch=compute_{capabilities[-1]},code=compute_{capabilities[-1]}"]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        options = [*NVCC_FLAGS, *code, *(f"-D{name}={value}" for name, value in DEFINES), f"-I{torch / 'include'}"]

        def compiled(source: Path) -> str:
            target = Path(self.build_temp) / f"{source.stem}_cu.o"
            done = subprocess.run([nvcc, *options, "-c", source, "-o", target], capture_output=True, text=True)
            if done.returncode:
                raise Missing(f"nvcc failed on {source.name}: {done.stderr.strip()[-2000:]}")
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            ext.extra_objects += pool.map(compiled, sorted((ROOT / "csrc").glob("*.cu")))
        # nvcc may be a wrapper script outside its toolkit, so several places are searched for the runtime library.
        toolkits = (nvcc.parent.parent, Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), Path("/usr/local/cuda"))
        folders = [toolkit / name for toolkit in toolkits for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        ext.library_dirs += [str(folder) for folder in folders if (folder / "libcudart_static.a").is_file()]

    def copy_extensions_to_source(self) -> None:
        """Copies the libraries that were built into the package, and removes earlier ones of the others."""
        built = [ext for ext in self.extensions if self.report[KINDS[ext.name]] == "built"]
        everything, self.extensions = self.extensions, built
        super().copy_extensions_to_source()
        self.extensions = everything
        for ext in everything:
            if ext not in built:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        """Returns the files that were built."""
        return [path for path in super().get_outputs() if Path(path).exists()]


class Wheel(bdist_wheel):
    """Tags a wheel as pure Python if it has no libraries."""

    def get_tag(self) -> tuple[str, str, str]:
        """Returns the tags for Python, ABI and platform."""
        command = self.get_finalized_command("build_ext")
        report = getattr(command, "report", None)
        if report is not None and "built" not in report.values():
            return ("py3", "none", "any")
        return super().get_tag()


def extension(name: str, sources: list[str], libraries: list[str]) -> Extension:
    """Returns the description of one library, with the flags that both have in common."""
    return Extension(
        name,
        sources,
        language="c++",
        define_macros=DEFINES,
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.h"))],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=LINK_FLAGS,
        libraries=libraries,
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension(CPU, [f"csrc/{name}.cpp" for name in CPU_SOURCES], ["torch", "torch_cpu"]),
        extension(CUDA, [], ["torch", "torch_cpu", "torch_cuda", "cudart_static", "rt", "dl"]),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
    options={"bdist_wheel": {"py_limited_api": PYTHON}},
)
