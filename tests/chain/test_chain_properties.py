"""inverse(forward(x)) = x, for any program, shape and dtype; and what stays equal whatever the mode."""

from __future__ import annotations

import torch
from conftest import DTYPES, TinyNet, conditions, latents, pull, relative
from hypothesis import given
from hypothesis import strategies as st

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

# One rounding of the result to the latents' dtype, amplified by the inverse; the state itself is fp64 throughout.
EPSILON = {name: torch.finfo(dtype).eps for name, dtype in DTYPES.items()}

factors = st.floats(0.5, 2.0) | st.floats(-2.0, -0.5)
couplings = st.builds(
    Coupling,
    target=st.sampled_from([0, 1]),
    a=factors,
    c=st.just(0.0) | st.floats(-1, 1),
    b=st.just(0.0) | st.floats(-1, 1),
    step=st.integers(0, 4),
    tag=st.integers(0, 999),
)
shapes = st.tuples(st.integers(1, 3), st.just(3)) | st.tuples(
    st.integers(1, 3), st.just(3), st.integers(1, 3), st.integers(1, 3)
)
memories = st.sampled_from(["checkpoint", "reversible", "naive"]) | st.integers(1, 4)


def gain(program: list[Coupling]) -> float:
    """A bound on how much the inverse multiplies an error (the network's own slope is below 4)."""
    bound = 1.0
    for coupling in program:
        bound *= max(1.0, (1 + abs(coupling.c) + 4 * abs(coupling.b)) / abs(coupling.a)) * 2
    return bound


@given(st.lists(couplings, max_size=5), shapes, st.sampled_from(sorted(DTYPES)), st.sampled_from([1.0, 2.0]), memories)
def test_inverse_undoes_forward(program, shape, dtype, guidance_scale, memory):
    cond, uncond = conditions()
    # The network stays fp64: what is tested is the chain's own rounding.
    chain = Chain(Denoiser(TinyNet().double(), cond, uncond, guidance_scale), program, memory)
    x, y = latents(*shape, dtype=DTYPES[dtype])
    forth = chain(x, y)
    assert all(t.dtype == DTYPES[dtype] and t.shape == shape for t in forth)
    scale = max(1.0, *(float(t.abs().max()) for t in (x, y, *forth)))
    for got, want in zip(chain.inverse(*forth), (x, y), strict=True):
        assert (got.double() - want.double()).abs().max() <= 4 * EPSILON[dtype] * gain(program) * scale


@given(st.lists(couplings, max_size=6), memories, st.booleans())
def test_every_mode_has_the_same_gradient(program, memory, inverse):
    x, y = latents(2, 3, 2, grad=True)
    cond, uncond = conditions()
    results = []
    for mode in ("naive", memory):
        chain = Chain(Denoiser(TinyNet().double(), cond, uncond, 2.0), program, mode)
        results.append(pull((chain.inverse if inverse else chain)(x, y), [x, y]))
    for want, got in zip(*results, strict=True):
        assert relative(got, want) < 1e-9


alphas = st.lists(st.floats(0.01, 0.99), min_size=1, max_size=7, unique=True).map(sorted)


@given(
    alphas, st.floats(0.5, 1.0), st.sampled_from(["epsilon", "v_prediction", "sample"]), st.sampled_from([0.995, 1.0])
)
def test_edict_is_undone_for_any_schedule(alphas, mix_weight, prediction_type, last):
    """Any noise levels, odd and even numbers of steps, every prediction type, in both orders."""
    steps = tuple(range(len(alphas) - 1, -1, -1))
    schedule = Schedule(steps, tuple(alphas), (*alphas[1:], last), prediction_type)
    chain = EDICT(Denoiser(TinyNet().double(), conditions()[0]), schedule, mix_weight)
    x, y = latents(1, 3, 2, 2)
    for there, back in ((chain, chain.inverse), (chain.inverse, chain)):
        for got, want in zip(back(*there(x, y)), (x, y), strict=True):
            assert relative(got, want) < 1e-7
