"""The peephole: which couplings become one pass, and that results do not depend on it or on the backend."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from conftest import DTYPES, MEMORIES, golden, golden_denoiser, latents, pull, relative, sd_scheduler, tiny_chain
from hypothesis import given
from hypothesis import strategies as st
from ops_cases import BACKENDS, require
from tolerances import FP64
from torch import Tensor

from doodl_fast import ops
from doodl_fast.chain import arithmetic
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling, invert, step_boundaries
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.ops.backends import registry
from doodl_fast.solvers.edict import EDICT


def flat(groups) -> list[Coupling]:
    return [c for g in groups for c in ((g.coupling,) if g.coupling else ()) + (g.mixing or ())]


def test_edict_takes_two_passes_a_step():
    program = tiny_chain(10).program
    groups = arithmetic.group(program, step_boundaries(program, 1))
    assert tuple(flat(groups)) == program
    # nine steps of a coupling and a fused pass; the last one, at t = 0, is the mixing alone
    assert [(g.coupling is not None, g.mixing is not None) for g in groups] == [(True, False), (True, True)] * 9 + [
        (False, True)
    ]
    assert {g.end for g in groups} >= step_boundaries(program, 1)


def test_the_inverse_fuses_across_steps_where_nothing_is_stored_between():
    program = invert(tiny_chain(10).program)
    free = arithmetic.group(program)
    assert tuple(flat(free)) == program
    assert sum(g.mixing is not None and g.calls_network for g in free) == 8  # between nine steps with a network
    anchored = arithmetic.group(program, step_boundaries(program, 1))
    assert tuple(flat(anchored)) == program and not any(g.mixing and g.calls_network for g in anchored)
    assert {g.end for g in anchored} >= step_boundaries(program, 1)


couplings = st.builds(
    Coupling,
    target=st.sampled_from([0, 1]),
    a=st.floats(0.5, 2.0),
    c=st.just(0.0) | st.floats(-1, 1),
    b=st.just(0.0) | st.floats(0.1, 1),
    step=st.integers(0, 3),
    tag=st.integers(0, 999),
)


@given(st.lists(couplings, max_size=9), st.sets(st.integers(0, 9)))
def test_any_program_is_covered_in_order(program, boundaries):
    groups = arithmetic.group(tuple(program), boundaries)
    assert flat(groups) == program
    ends = {g.end for g in groups} | {0}
    assert {b for b in boundaries if b <= len(program)} <= ends


@given(st.lists(couplings, max_size=7), st.sampled_from([*MEMORIES]))
def test_fused_and_unfused_runs_have_the_same_bits(program, memory):
    x, y = latents(2, 3, 2, grad=True)
    chain = Chain(Denoiser(lambda x, t, cond: torch.sin(x) + t / 1000, None), program, memory)
    fused = chain(x, y)
    one_by_one = [arithmetic.Group(c, None, i) for i, c in enumerate(program, start=1)]
    with mock.patch.object(arithmetic, "group", return_value=tuple(one_by_one)):
        plain = chain(x, y)
        plain_gradients = pull(plain, [x, y])
    assert all(torch.equal(f, p) for f, p in zip(fused, plain, strict=True))
    for got, want in zip(pull(fused, [x, y]), plain_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def bits_of_a_run(dtype: str, memory, inverse: bool) -> list[Tensor]:
    # guided, fp32 state with a network of any dtype, mixing: every op the engine has
    chain = tiny_chain(3, memory, dtype=DTYPES[dtype], state_dtype=torch.float32)
    x, y = latents(1, 3, 4, 5, dtype=torch.float32, grad=True)
    outputs = (chain.inverse if inverse else chain)(x, y)
    return [*outputs, *pull(outputs, [x, y])]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_every_backend_gives_the_same_bits(backend, dtype, memory, inverse):
    require(backend)
    with ops.backend("eager"):
        want = bits_of_a_run(dtype, memory, inverse)
    with ops.backend(backend):
        got = bits_of_a_run(dtype, memory, inverse)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_recorded_chain_under_every_backend(backend, memory):
    require(backend)
    recorded = golden("chain")
    x, y = (half.clone().requires_grad_() for half in recorded["pair"].split(1))
    with ops.backend(backend):
        out = torch.cat(
            EDICT(golden_denoiser(torch.float64), Schedule.from_scheduler(sd_scheduler(), 10), memory=memory)(x, y)
        )
        (out * recorded["w"]).sum().backward()
    name = "diffusers_scheduler/T10/fp64"
    assert relative(out, recorded[f"{name}/out"]) < FP64
    assert relative(torch.cat([x.grad, y.grad]), recorded[f"{name}/keep_input/grad"]) < 1e-9


def test_the_naive_mode_uses_no_op():
    chain = tiny_chain(2, "naive")
    x, y = latents(1, 3, 4, grad=True)
    with mock.patch.multiple(
        arithmetic.ops, coupling=None, coupling_mix=None, coupling_vjp=None, coupling_mix_vjp=None
    ):
        pull(chain(x, y), [x, y])
        chain.memory = "checkpoint"
        with pytest.raises(TypeError):
            chain(x, y)


def test_a_subclass_that_overrides_call_is_called():
    class Twice(Denoiser):
        def __call__(self, x, *args):
            return 2 * super().__call__(x, *args)

    network = lambda x, t, cond: torch.sin(x)  # noqa: E731
    program = [Coupling(0, b=0.5, tag=1)]
    x, y = latents(1, 3, 4)
    assert torch.equal(Chain(Twice(network, None), program)(x, y)[0], x + 0.5 * (2 * torch.sin(y)))


def test_fewer_launches():
    """Kernel calls of the engine in a guided EDICT step: forward 2, where one a coupling were 4."""
    calls: list[str] = []
    kernels = {
        name: (lambda *a, _name=name, _k=kernel, **k: (calls.append(_name), _k(*a, **k))[1])
        for name, kernel in registry.EAGER.items()
    }
    chain = tiny_chain(3)
    x, y = latents(1, 3, 4, grad=True)
    with (
        mock.patch.object(registry, "select", None),
        mock.patch.multiple("doodl_fast.ops.coupling_op", select=lambda op, _: kernels[op]),
        mock.patch.multiple("doodl_fast.ops.coupling_mix_op", select=lambda op, _: kernels[op]),
    ):
        outputs = chain(x, y)
        assert calls == ["coupling", "coupling_mix"] * 2 + ["coupling_mix"]
        calls.clear()
        pull(outputs, [x, y])
    assert calls == ["coupling_mix_vjp"] + ["coupling_mix_vjp", "coupling_vjp"] * 2
