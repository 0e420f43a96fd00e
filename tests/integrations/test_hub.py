"""The operators as a kernel repository: loaded as Hugging Face's `kernels` loads one, beside the installed package."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from doodl_fast import ops

WRITE = Path(__file__).parents[2] / "integrations/hub/write.py"


def write(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(WRITE), str(folder)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for _ in range(2):  # A repository can be written anew.
        assert write(folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def loaded(repository: Path) -> Iterator[ModuleType]:
    """The module as the package `kernels` imports it: under the name in its metadata, from a path."""
    variant = repository / "build/torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for known in [known for known in sys.modules if known.partition(".")[0] == name]:
        del sys.modules[known]


def values_and_gradients(of: ModuleType) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 4, 8, 8, generator=generator).unbind()
    eps = torch.randn(2, 4, 8, 8, generator=generator)
    leaves = [tensor.requires_grad_() for tensor in (x, y, eps)]
    with of.backend("eager"):
        result = of.coupling(*leaves, a=0.9, b=-0.1, g=7.5)
        return [result, *torch.autograd.grad(result.square().sum(), leaves)]


def test_it_computes_the_same_beside_the_installed_package(loaded: ModuleType) -> None:
    for found, expected in zip(values_and_gradients(loaded), values_and_gradients(ops), strict=True):
        assert torch.equal(found, expected)


def test_its_ops_have_a_namespace_of_their_own(loaded: ModuleType) -> None:
    assert loaded.__name__ != "doodl_fast"
    assert "coupling" in dir(getattr(torch.ops, loaded.__name__))
    assert loaded.coupling is not ops.coupling
    assert "not built" in loaded.why_not("native", "cpu")


def test_compile_traces_it_without_a_graph_break(loaded: ModuleType) -> None:
    function = torch.compile(lambda x, y: loaded.coupling(x, y, a=0.9, c=0.1), backend="eager", fullgraph=True)
    x, y = torch.randn(2, 3, 8)
    torch.testing.assert_close(function(x, y), 0.9 * x + 0.1 * y)


def test_every_variant_says_which_backend_it_is_for(repository: Path) -> None:
    variants = {
        path.name: json.loads((path / "metadata.json").read_text()) for path in (repository / "build").iterdir()
    }
    assert {name: metadata["backend"]["type"] for name, metadata in variants.items()} == {
        "torch-cpu": "cpu",
        "torch-cuda": "cuda",
    }
    assert len({metadata["id"] for metadata in variants.values()}) == 2


def test_another_build_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "build/mine").mkdir(parents=True)
    said = write(tmp_path)
    assert said.returncode != 0 and "folder: expected one without a build" in said.stderr
    assert (tmp_path / "build/mine").is_dir()


def test_the_package_kernels_loads_it(repository: Path) -> None:
    kernels = pytest.importorskip("kernels")
    loaded = kernels.get_local_kernel(repository)
    for found, expected in zip(values_and_gradients(loaded), values_and_gradients(ops), strict=True):
        assert torch.equal(found, expected)
