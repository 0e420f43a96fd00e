"""Exact arithmetic: there and back without a differing bit, the gradient of every memory mode, range, memory, calls.

Undoing EDICT's mixing multiplies the difference between x and y by 1/p^2 a step, in exact real arithmetic too: an
image whose two latents are equal, inverted with p = 0.93, is out of any range after some hundred steps. So fresh
images go through long chains with p near 1; with 0.93 long chains start from noise, or from where noise led.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from conftest import (
    DTYPES,
    Counting,
    TinyNet,
    golden,
    golden_denoiser,
    latents,
    pull,
    relative,
    sd_scheduler,
    tiny_chain,
)
from ops_cases import require

from doodl_fast import ops
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

MODES = ["checkpoint", 1, 3, "reversible"]


class Gentle(TinyNet):
    """A network whose guided chains stay in range from either end, as a trained one's do."""

    def forward(self, x, t, cond=None):
        return 0.1 * super().forward(x, t, cond)


def exact_chain(steps=5, memory="checkpoint", guidance_scale=7.5, dtype=torch.float32, arithmetic="exact", **options):
    network = options.pop("network", None) or Gentle().to(dtype)
    return tiny_chain(steps, memory, guidance_scale, dtype=dtype, arithmetic=arithmetic, network=network, **options)


# There and back


def assert_no_bit_differs(chain: EDICT, shape=(1, 3, 4, 4), image: bool = True) -> None:
    x, y = latents(*shape, dtype=torch.float32)
    start = chain.state(x, y)
    reached = chain.forward_state(start)
    assert reached.end == "image" and not torch.equal(reached.x, start.x)
    back = chain.inverse_state(reached)
    assert back.equals(start)
    assert chain.forward_state(back).equals(reached)
    if image:
        start = chain.state(x, end="image")
        assert chain.forward_state(chain.inverse_state(start)).equals(start)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("steps", [10, 49, 50])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_both_ways_without_a_differing_bit(backend, steps, guidance_scale, dtype):
    require(backend)
    with ops.backend(backend):
        assert_no_bit_differs(exact_chain(steps, guidance_scale=guidance_scale, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize(("steps", "near_one"), [(250, 0.998), (1000, 0.9995)])
def test_long_chains_without_a_differing_bit(steps, near_one, guidance_scale, dtype):
    options = {"guidance_scale": guidance_scale, "dtype": DTYPES[dtype]}
    assert_no_bit_differs(exact_chain(steps, **options), image=False)
    chain = exact_chain(steps, mix_weight=near_one, **options)
    start = chain.state(latents(1, 3, 4, 4, dtype=torch.float32)[0], end="image")
    assert chain.forward_state(chain.inverse_state(start)).equals(start)


@pytest.mark.parametrize(
    ("backend", "steps", "guidance_scale", "dtype"),
    [
        ("eager", 250, 7.5, "fp16"),
        ("eager", 1000, 1.0, "bf16"),
        ("triton", 9, 7.5, "fp16"),
        ("triton", 10, 1.0, "bf16"),
        ("triton", 10, 7.5, "fp32"),
    ],
)
def test_chains_under_the_other_backends(backend, steps, guidance_scale, dtype):
    require(backend)
    with ops.backend(backend):
        assert_no_bit_differs(exact_chain(steps, guidance_scale=guidance_scale, dtype=DTYPES[dtype]), (1, 3, 2), False)


@pytest.mark.parametrize("arithmetic", ["exact", "exact64"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_other_predictions_and_widths(prediction_type, arithmetic):
    chain = exact_chain(7, prediction_type=prediction_type, arithmetic=arithmetic)
    assert_no_bit_differs(chain, (2, 3, 5), image=False)
    assert chain.state(*latents(1, 3, 2)).x.dtype == (torch.int32 if arithmetic == "exact" else torch.int64)


def test_any_program():
    """Its couplings have a, b and c at once, negative ones and ones above 1; steps have several calls or none."""
    program = [
        Coupling(0, -0.7, 0.4, 0.9, step=0, tag=3),
        Coupling(0, 1.0, 0.0, -0.5, step=0, tag=4),
        Coupling(1, 1.3, -0.2, 0.0, step=1),
        Coupling(1, 0.8, 1.1, 0.6, step=2, tag=5),
        Coupling(0, 1.0, 0.3, 0.0, step=3),
        Coupling(1, 1.7, 0.0, 0.0, step=3),
    ]
    denoiser = Denoiser(Gentle().double(), None)
    chain, plain = (Chain(denoiser, program, arithmetic=name) for name in ("exact", "float"))
    assert_no_bit_differs(chain, (2, 3, 4))
    x, y = latents(2, 3, 4)
    for got, want in zip((*chain(x, y), *chain.inverse(x, y)), (*plain(x, y), *plain.inverse(x, y)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    memories = [pull(outputs, [x, y]) for outputs in _runs(chain, x.requires_grad_(), y.requires_grad_())]
    assert all(torch.equal(a, b) for grads in memories[1:] for a, b in zip(grads, memories[0], strict=True))


def _runs(chain, x, y):
    for memory in MODES:
        chain.memory = memory
        yield chain(x, y)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_recorded_unet_both_ways_without_a_differing_bit(dtype):
    schedule = Schedule.from_scheduler(sd_scheduler(), 49 if dtype == "fp16" else 10)
    chain = EDICT(golden_denoiser(DTYPES[dtype]), schedule, arithmetic="exact")
    x, y = golden("chain")["pair"].to(DTYPES[dtype]).split(1)
    noise = chain.state(x, y)
    image = chain.forward_state(noise)
    assert chain.inverse_state(image).equals(noise)
    encoded = chain.state(image.latents()[0], end="image")
    assert chain.forward_state(chain.inverse_state(encoded)).equals(encoded)


def test_plain_latents_take_the_same_lattice():
    chain = exact_chain(6)
    x, y = latents(1, 3, 4, dtype=torch.float32)
    for there, through, end in ((chain, chain.forward_state, "noise"), (chain.inverse, chain.inverse_state, "image")):
        for got, want in zip(there(x, y), through(chain.state(x, y, end=end)).latents(), strict=True):
            assert torch.equal(got, want)


# Precision


@pytest.mark.parametrize("steps", [10, 50])
def test_error_is_below_that_of_fp32_arithmetic(steps):
    """Against the fp64 chain with the recorded UNet in fp64, so that nothing but the chain's own arithmetic counts.

    Measured: 4e-8 and 6e-8, where fp32 has 8e-8 and 16e-8; exact64 2e-12 and 4e-12.
    """
    denoiser = golden_denoiser(torch.float64)
    schedule = Schedule.from_scheduler(sd_scheduler(), steps)
    pair = golden("chain")["pair"].float().double().split(1)  # These are numbers that fp32 has.
    with torch.no_grad():
        truth = torch.cat(EDICT(denoiser, schedule)(*pair))
        narrow = torch.cat(EDICT(denoiser, schedule, state_dtype=torch.float32)(*(half.float() for half in pair)))
        exact, wide = (torch.cat(EDICT(denoiser, schedule, arithmetic=name)(*pair)) for name in ("exact", "exact64"))
    assert relative(exact, truth) < 0.75 * relative(narrow, truth)
    assert relative(wide, truth) < 1e-10


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize(("arithmetic", "tolerance"), [("exact", 1e-5), ("exact64", 1e-9)])
def test_gradient_against_float64(arithmetic, tolerance, inverse):
    """A coupling is off by up to a unit (2e-7, 1.5e-11); so, relatively, is the gradient through a smooth network."""
    results = {}
    for name in ("float", arithmetic):
        chain = exact_chain(20, dtype=torch.float64, arithmetic=name)
        x, y = latents(1, 3, 4, grad=True)
        results[name] = pull((chain.inverse if inverse else chain)(x, y * 1 if not inverse else x * 1), [x])
    assert relative(results[arithmetic][0], results["float"][0]) < tolerance


def test_other_mix_weights_go_to_the_nearest_decimal():
    with pytest.warns(
        RuntimeWarning, match=r"uses a=0\.93 and c=0\.07 in place of a=0\.930041 and c=0\.069959 at step 0"
    ):
        chain = exact_chain(5, mix_weight=0.930041, dtype=torch.float64)
    mixing = [coupling for coupling in chain.program if not coupling.calls_network]
    assert {(k.by, k.over, k.a) for k in mixing} == {(93, 100, 0.93)}
    represented = Chain(
        chain.denoiser, [Coupling(k.target, k.a, k.c, k.b, k.step, k.tag) for k in chain.program], state_dtype=None
    )
    x, y = latents(1, 3, 4, grad=True)
    for got, want in zip(
        (*chain(x, y), *pull(chain(x, y), [x, y])), (*represented(x, y), *pull(represented(x, y), [x, y])), strict=True
    ):
        assert relative(got, want) < 2e-6  # The chain of 0.930041 itself is 4e-5 off.


@pytest.mark.parametrize("weight", [2 / 3, 1 / 3, 0.9, 0.93, 0.99996])
def test_a_rounded_mixing_is_that_of_the_rounded_weight(weight):
    """Against the float64 chain with the decimal of four digits, whose mixing leaves two equal latents as they are."""
    used = round(weight, 4)
    said = rf"arithmetic: exact arithmetic has mixing factors of 4 decimals, so it uses a={used:g} and c="
    with contextlib.nullcontext() if used == weight else pytest.warns(RuntimeWarning, match=said):
        chain = exact_chain(50, mix_weight=weight, dtype=torch.float64, arithmetic="exact64")
    assert {k.a + k.c for k in chain.program if not k.calls_network} == {1.0}
    truth = exact_chain(50, mix_weight=used, dtype=torch.float64, arithmetic="float")
    mixing = [[(k.a, k.c) for k in c.program if not k.calls_network] for c in (chain, truth)]
    assert set(mixing[0]) - {(1.0, 0.0)} == set(mixing[1])  # A float program leaves out what does nothing.
    x, y = latents(1, 3, 4, grad=True)
    for got, want in zip(
        (*chain(x, y), *pull(chain(x, y), [x, y])), (*truth(x, y), *pull(truth(x, y), [x, y])), strict=True
    ):
        assert relative(got, want) < 1e-9


# The gradient


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_memory_mode_has_the_same_bits(dtype, inverse):
    results = []
    for memory in MODES:
        chain = exact_chain(9, memory, dtype=DTYPES[dtype])
        x, y = latents(1, 3, 4, 5, dtype=torch.float32, grad=True)
        outputs = (chain.inverse if inverse else chain)(x, x * 1 if inverse else y)
        results.append([*outputs, *pull(outputs, [x] if inverse else [x, y])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_every_backend_has_the_same_bits(backend):
    require(backend)
    found = []
    for name in ("eager", backend):
        with ops.backend(name):
            chain = exact_chain(3, "reversible", dtype=torch.float16)
            x, y = latents(1, 3, 4, 5, dtype=torch.float32, grad=True)
            outputs = chain(x, y)
            found.append([*outputs, *pull(outputs, [x, y])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("memory", ["checkpoint", 7, "reversible"])
def test_number_of_network_calls(memory, inverse):
    net = Counting(Gentle())
    chain = exact_chain(50, memory, network=net)
    x, _ = latents(1, 3, 2, 2, dtype=torch.float32, grad=True)
    outputs = (chain.inverse if inverse else chain)(x)
    assert net.calls == [(2, False)] * 98
    net.calls.clear()
    pull(outputs, [x])
    assert net.calls == [(2, True)] * 98


def held(steps: int) -> tuple[int, int]:
    """How many bytes and how many tensors autograd holds between the forward run and the backward pass."""
    chain = exact_chain(steps, "reversible", dtype=torch.float16)
    x, y = latents(1, 3, 8, 8, dtype=torch.float32, grad=True)
    sizes: list[int] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t)
    with hooks:
        chain(x, y)
    return sum(sizes), len(sizes)


def test_memory_does_not_grow_with_the_number_of_steps():
    state = 2 * 3 * 64 * 4 * (1 + 4)  # Two latents of int32, each with four words.
    start = 2 * 3 * 64 * 4  # The undone start is compared with it.
    conditions = 2 * 5 * 4 * 2
    assert held(10) == held(1000) == (state + start + conditions, 4 + 2 + 2)


def test_caller_may_overwrite_everything_between_forward_and_backward():
    chain = exact_chain(4, "reversible")
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    expected = pull(chain(x, y), [x, y])
    outputs = chain(x, y)
    copies = tuple(out * 1 for out in outputs)
    with torch.no_grad():
        for tensor in (x, y, *outputs, chain.denoiser.cond):
            tensor.fill_(float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(pull(copies, [x, y]), expected, strict=True))
