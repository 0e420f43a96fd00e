"""Writes the fused operators as a kernel repository in the layout of Hugging Face's `kernels` package.

    python integrations/hub/write.py FOLDER

    import kernels
    ops = kernels.get_local_kernel(Path("FOLDER"))
    x = ops.coupling(x, y, eps, a=0.9, b=-0.1, g=7.5)

The folder has the operators of `doodl_fast.ops` in eager PyTorch and in Triton, without the C++ and CUDA libraries, as
`build/torch-cpu` and `build/torch-cuda`. These are variants without compiled code, which work with every torch that the
package supports. Each has its own name for Python and for PyTorch's dispatcher, so that it can be loaded beside other
versions and beside an installed doodl_fast. The layout: https://huggingface.co/docs/kernels/kernel-requirements
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "doodl_fast/ops"
NAME = "doodl-fast"
LICENSE = "BSD-3-Clause"
INTERFACE = 1
"""Raised when a caller of an earlier version would break: `kernels.get_kernel(..., version=1)`."""


def contents() -> str:
    """Returns a digest of the operators' sources, which makes the names of different versions differ."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        digest.update(str(path.relative_to(SOURCES)).encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def write(folder: Path) -> None:
    """Writes the repository.

    Args:
        folder: Where it goes. Its folder `build` is replaced.

    Raises:
        FileExistsError: `folder` has a `build` that this script did not write.
    """
    build = folder / "build"
    if build.exists() and not all((variant / "metadata.json").is_file() for variant in build.iterdir()):
        raise FileExistsError(f"folder: expected one without a build, got {folder}; move {build} away")
    shutil.rmtree(build, ignore_errors=True)
    for backend in ("cpu", "cuda"):
        variant = build / f"torch-{backend}"
        metadata = {
            "id": f"_{NAME.replace('-', '_')}_{backend}_{contents()}",
            "name": NAME,
            "version": INTERFACE,
            "license": LICENSE,
            "python-depends": [],
            "backend": {"type": backend},
        }
        variant.mkdir(parents=True)
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copytree(SOURCES, variant, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the fused operators as a repository of Hugging Face kernels.")
    parser.add_argument("folder", type=Path, help="where the repository goes")
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
