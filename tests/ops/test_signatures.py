"""The ops that PyTorch, the native library and the Triton backend have are those of the table of signatures."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from ops_cases import require

from doodl_fast import ops
from doodl_fast.ops.backends import native, registry
from doodl_fast.ops.signatures import TABLE, Signature

NAMES = [signature.name for signature in TABLE]


@pytest.mark.parametrize("signature", TABLE, ids=NAMES)
def test_the_native_library_has_the_schemas_of_the_table(signature):
    require("native")
    assert native.load("cpu") is None
    schema = getattr(torch.ops.doodl_fast_native, signature.name).default._schema
    assert str(schema) == f"doodl_fast_native::{signature.kernel_schema}"


def test_the_native_library_has_no_other_op_with_kernels():
    require("native")
    found = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("doodl_fast_native::")
    }
    assert found == {*NAMES, "instruction_set"}


@pytest.mark.parametrize("signature", TABLE, ids=NAMES)
def test_the_registered_op_writes_what_the_table_says(signature):
    schema = getattr(torch.ops.doodl_fast, signature.name).default._schema
    assert tuple(z.name for z in schema.arguments if z.alias_info and z.alias_info.is_write) == signature.written


@pytest.mark.parametrize("backend", ["eager", "triton", "native"])
def test_every_backend_has_a_kernel_of_every_op(backend):
    """The native one has none of layers for CUDA, which it leaves to the next backend."""
    require(backend)
    with ops.backend(backend):
        assert all(callable(registry.select(name, torch.ones(1, device=DEVICE))) for name in NAMES)
    for_this_device = {signature.name for signature in TABLE if DEVICE.type in signature.native_devices}
    expected = for_this_device if backend == "native" else set(NAMES)
    assert backend == "eager" or set(registry._table(backend, DEVICE.type)) == expected


def test_schemas_of_a_row():
    row = Signature(
        "example",
        "Tensor x, float a, Tensor(a!) table, Tensor? eps, ScalarType? dtype",
        "Tensor out, Tensor? out_eps",
        not_for_kernels=("dtype",),
    )
    assert row.schema == "(Tensor x, float a, Tensor(a!) table, Tensor? eps, ScalarType? dtype) -> Tensor[]"
    assert row.kernel_schema == (
        "example(Tensor(a!) out, Tensor(b!)? out_eps, Tensor x, Tensor(c!) table, Tensor? eps, float a) -> ()"
    )
    assert row.written == ("table",)
    seen = []
    row.kernel(seen.append)(1, 2, 3, 4, 5, 6)
    assert (seen[0].out_eps, seen[0].table, seen[0].a) == (2, 4, 6)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'a'"):
        row.kernel(seen.append)(1, 2, 3, 4, 5)
    assert Signature("one", "Tensor x", "Tensor out").schema == "(Tensor x) -> Tensor"
    assert Signature("two", "Tensor x", "Tensor x1, Tensor x2").schema == "(Tensor x) -> (Tensor, Tensor)"
