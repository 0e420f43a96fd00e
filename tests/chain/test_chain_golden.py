"""The chain against what the unmodified reference computed (tests/golden/README.md).

Tolerances are relative in the 2-norm. fp64: 1e-12, and 1e-9 where states are rebuilt (undoing the mixing multiplies
rounding by 1/p^2 a step); fp32: 2e-5. The reference's fp32 and fp16 numbers carry its own rounding, so there they bound
the sum of both.
"""

from __future__ import annotations

import pytest
import torch
from conftest import DTYPES, golden, golden_denoiser, recorded_schedule, relative, sd_scheduler

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling, step_boundaries
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers import edict_program
from doodl_fast.solvers.edict import EDICT

REBUILDING = ("reversible", 7)


def tolerance(dtype: str, memory: str | int = "checkpoint") -> float:
    if dtype == "fp64":
        return 1e-9 if memory in REBUILDING else 1e-12
    return {"fp32": 2e-5, "fp16": 4e-3}[dtype]


def run(chain: Chain, pair: torch.Tensor, weight: torch.Tensor, inverse: bool = False):
    """(output, gradient of (output * weight).sum()) as pairs (2, ...)."""
    x, y = (half.clone().requires_grad_() for half in pair.split(1))
    out = torch.cat((chain.inverse if inverse else chain)(x, y))
    (out * weight).sum().backward()
    return out.detach(), torch.cat([x.grad, y.grad])


@pytest.mark.parametrize("memory", ["checkpoint", *REBUILDING, "naive"])
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_whole_chain_with_diffusers_scheduler_10(dtype, memory):
    check_diffusers_chain(10, dtype, memory)


@pytest.mark.parametrize(
    ("dtype", "memory"), [("fp64", "checkpoint"), ("fp64", "reversible"), ("fp64", 7), ("fp32", "reversible")]
)
def test_whole_chain_with_diffusers_scheduler_50(dtype, memory):
    check_diffusers_chain(50, dtype, memory)


def check_diffusers_chain(steps: int, dtype: str, memory: str | int) -> None:
    schedule = Schedule.from_scheduler(sd_scheduler(), steps)
    chain = EDICT(golden_denoiser(DTYPES[dtype]), schedule, memory=memory)
    recorded = golden("chain")
    out, grad = run(chain, recorded["pair"].to(DTYPES[dtype]), recorded["w"].to(DTYPES[dtype]))
    name = f"diffusers_scheduler/T{steps}/{dtype}"
    assert out.dtype == grad.dtype == DTYPES[dtype]
    assert relative(out, recorded[f"{name}/out"]) < tolerance(dtype)
    assert relative(grad, recorded[f"{name}/keep_input/grad"]) < tolerance(dtype, memory)


@pytest.mark.parametrize(("steps", "dtype"), [(10, "fp64"), (10, "fp32"), (50, "fp64")])
def test_whole_chain_with_the_references_own_scheduler(steps, dtype):
    chain = EDICT(golden_denoiser(DTYPES[dtype]), recorded_schedule("reference", steps), memory="reversible")
    recorded = golden("chain")
    out, grad = run(chain, recorded["pair"].to(DTYPES[dtype]), recorded["w"].to(DTYPES[dtype]))
    assert relative(out, recorded[f"T{steps}/{dtype}/out"]) < tolerance(dtype)
    assert relative(grad, recorded[f"T{steps}/{dtype}/keep_input/grad"]) < tolerance(dtype, "reversible")
    # What it computes when it rebuilds its inputs is 18% and 2.7% off: the two are told apart.
    assert relative(grad, recorded[f"T{steps}/{dtype}/rebuild_input/grad"]) > 0.02

    with torch.no_grad():
        back = torch.cat(chain.inverse(*recorded[f"T{steps}/{dtype}/out"].split(1)))
    assert relative(back, recorded[f"T{steps}/{dtype}/inverted"]) < (1e-11 if dtype == "fp64" else 2e-5)


@pytest.mark.parametrize(("steps", "latents"), [(10, "fp16"), (10, "fp32")])
def test_fp16_network_is_no_worse_than_the_reference(steps, latents):
    chain = EDICT(golden_denoiser(torch.float16), recorded_schedule("reference", steps))
    recorded, name = golden("chain"), f"T{steps}"
    pair, weight = recorded["pair"].half().to(DTYPES[latents]), recorded["w"].half().to(DTYPES[latents])
    out, grad = run(chain, pair, weight)
    truth = recorded[f"{name}/fp64_fp16weights/out"], recorded[f"{name}/fp64_fp16weights/grad"]
    assert relative(out, truth[0]) < 1.05 * relative(recorded[f"{name}/fp16/out"], truth[0])
    assert relative(grad, truth[1]) < 1.05 * relative(recorded[f"{name}/fp16/keep_input/grad"], truth[1])


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "naive"])
@pytest.mark.parametrize("p", [0.93, 0.7, 1.0])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_mixing(kind, dtype, p, memory):
    recorded = {k.split("/", 2)[2]: v for k, v in golden("mixing").items() if k.startswith(f"{kind}/{dtype}/")}
    program = [Coupling(0, p, 1 - p), Coupling(1, p, 1 - p)]
    chain = Chain(Denoiser(lambda x, t, cond: pytest.fail("b = 0 calls no network"), None), program, memory)
    for inverse, name in ((False, "forward"), (True, "inverse")):
        out, grad = run(chain, recorded["x"], recorded["w"], inverse)
        assert relative(out, recorded[f"p{p}/{name}"]) < tolerance(dtype)
        assert relative(grad, recorded[f"p{p}/{name}_vjp"]) < tolerance(dtype)


STEPPING = sorted(
    key.removesuffix("/forward")
    for key in golden("stepping")
    if "/pair/" in key and key.endswith("/forward") and not key.endswith("fp16/forward")
)


@pytest.mark.parametrize("case", STEPPING)
def test_stepping(case):
    """One step of the chain, at even and odd indices: x first or y first."""
    steps, scale, _, index, dtype = case.split("/")
    chain = EDICT(
        golden_denoiser(DTYPES[dtype], float(scale.removeprefix("gs"))),
        recorded_schedule("reference", int(steps.removeprefix("T"))),
        mix_weight=1.0,
    )
    step = [coupling for coupling in chain.program if coupling.step == int(index.removeprefix("i"))]
    single = Chain(chain.denoiser, step)
    pair = golden("stepping")["pair"].to(DTYPES[dtype]).split(1)
    with torch.no_grad():
        assert relative(torch.cat(single(*pair)), golden("stepping")[f"{case}/forward"]) < tolerance(dtype)
        # At T = 30 the reference runs 31 steps and inverts with the parity of 30, in the wrong order: nothing to match.
        if steps != "T30":
            back = torch.cat(single.inverse(*pair))
            assert relative(back, golden("stepping")[f"{case}/inverse_loop_index"]) < tolerance(dtype)


def test_stepping_cases_are_there():
    assert len(STEPPING) == 22
    assert {case.split("/")[3] for case in STEPPING} == {"i0", "i1", "i4", "i9", "i30"}


def test_program_of_the_references_schedule():
    program = edict_program(recorded_schedule("reference", 50))
    assert step_boundaries(program, 1) >= {4, 8, 196} and len(program) == 198
