"""The native kernels, called directly, refuse tensors of which they would read or write memory outside."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from ops_cases import require

X = torch.ones(2, 4, device=DEVICE)
ONE = torch.ones(1, device=DEVICE)
N = X.int()
FAULTS, BUFFER = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for size in ((1, 2), (1, 2, 4)))
MIX = (True, 1.0, 0.0, 1.0, 0.0)
COEFFICIENTS = (1.0, 0.5, 0.5, None)
UPDATE = (0.5, 1.0, 0.9, False, False, 0.1)
LATTICE = (0.5, 0.5, None, False)
LATTICE_MIX = (True, 1, 1, 0.0, 1, 1, 0.0, *LATTICE)


def new() -> torch.Tensor:
    return torch.zeros_like(X)


CALLS = {  # Each entry has the tensors of a call by name, and the numbers after them.
    "coupling": ({"out": new(), "target": X, "source": X, "eps": X}, COEFFICIENTS),
    "coupling_vjp": (
        {"out": new(), "out_source": new(), "out_eps": new(), "grad": X, "scale": ONE},
        COEFFICIENTS,
    ),
    "coupling_mix": (
        {"out": new(), "out_source": new(), "target": X, "source": X, "eps": X},
        (*MIX, *COEFFICIENTS),
    ),
    "coupling_mix_vjp": (
        {"out": new(), "out_source": new(), "out_eps": new(), "grad": X, "grad_source": X, "scale": ONE},
        (*MIX, *COEFFICIENTS),
    ),
    "latent_update": (
        {
            **{f"outputs{i}": new() for i in range(4)},
            "x": X,
            **{f"inputs{i}": X for i in range(5)},
            "noise": X,
            "starts": torch.ones(2, 2, dtype=torch.float64, device=DEVICE),
        },
        UPDATE,
    ),
    "lattice_coupling": ({"out": N, "target": N, "source": N, "eps": X, "faults": FAULTS}, (0, *LATTICE)),
    "lattice_mix": (
        {
            **{"out": N, "out_source": N, "out_target_buffer": BUFFER, "out_source_buffer": BUFFER},
            **{"target": N, "source": N, "target_buffer": BUFFER, "source_buffer": BUFFER},
            **{"eps": X, "faults": FAULTS},
        },
        (0, *LATTICE_MIX),
    ),
}


def strided(tensor: torch.Tensor) -> torch.Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()[:1].expand(tensor.shape)


@pytest.mark.parametrize("change", [strided, expanded])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, (tensors, _) in CALLS.items() for name in tensors])
def test_memory_with_gaps_or_overlaps_is_refused(op, name, change):
    require("native")
    tensors, numbers = CALLS[op]
    if tensors[name].numel() == 1:
        pytest.skip("one element is dense whatever its strides")
    tensors = {**tensors, name: change(tensors[name])}
    with pytest.raises(RuntimeError, match="expected dense memory, got expanded or strided"):
        getattr(torch.ops.doodl_fast_native, op)(*tensors.values(), *numbers)


@pytest.mark.parametrize("op", CALLS)
def test_dense_memory_is_taken(op):
    require("native")
    tensors, numbers = CALLS[op]
    getattr(torch.ops.doodl_fast_native, op)(*tensors.values(), *numbers)


def test_another_number_of_elements_is_refused():
    require("native")
    with pytest.raises(RuntimeError, match="scale: expected 1 elements, got 2"):
        torch.ops.doodl_fast_native.coupling_vjp(new(), None, new(), X, torch.ones(2, device=DEVICE), *COEFFICIENTS)
    starts = torch.ones(2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(RuntimeError, match="starts: expected 4 elements, got 2"):
        torch.ops.doodl_fast_native.latent_update(*[new() for _ in range(4)], *[X] * 6, None, starts, *UPDATE)
    small = BUFFER[:0]
    with pytest.raises(RuntimeError, match="target_buffer: expected at least one word"):
        torch.ops.doodl_fast_native.lattice_mix(N, N, small, small, N, N, small, small, None, FAULTS, 0, *LATTICE_MIX)


@pytest.mark.parametrize("row", [-1, 1, 2**62, 2**63 - 1])
def test_a_row_that_is_not_there_is_refused(row):
    require("native")
    with pytest.raises(RuntimeError, match="row: expected one of the faults' rows, got"):
        torch.ops.doodl_fast_native.lattice_coupling(N, N, N, None, FAULTS, row, *LATTICE)
