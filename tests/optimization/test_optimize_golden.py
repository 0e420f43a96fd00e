"""The optimisation loop against the reference's own `gen()`, step by step (tests/golden/README.md, stage gen).

The recordings are fp32 with the reference's rounding; a latent has norm 128 and a step moves it by about 0.1, so 1e-6
relative on the latents still resolves 0.1% of a step.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from conftest import DEVICE, GOLDEN, golden, golden_denoiser, golden_meta, recorded_schedule, relative
from tolerances import FP32
from torch import Tensor

import doodl_fast
from doodl_fast.optimization.update import LatentUpdate, UpdateSettings

RENAMED = {
    "tied_latents": "tied_latents",
    "clip_grad_val": "clip_grad_value",
    "renormalize_latents": "renormalize_latents",
    "perturb_grad_scale": "perturbation_scale",
    "optimize_first_edict_image_only": "first_image_only",
}


def meta() -> dict[str, Any]:
    return golden_meta("gen")


@cache
def vae() -> Any:
    from diffusers import AutoencoderKL

    model = AutoencoderKL(**json.loads((GOLDEN / "vae_config.json").read_text()))
    model.load_state_dict({k[4:]: v for k, v in golden("models").items() if k.startswith("vae/")})
    return model.to(DEVICE).eval().requires_grad_(False)


def decode(latents: Tensor) -> Tensor:
    return vae().decode(latents / 0.18215).sample


def symmetry(image: Tensor) -> Tensor:
    return (image - image.flip(-1)).square().mean()


def probe(pair: Tensor) -> Tensor:
    return pair.flatten()[::257]


def pairwise(recorded: Tensor) -> Tensor:
    return recorded if recorded.shape[0] == 2 else recorded.repeat(2, 1, 1, 1)


@pytest.mark.parametrize(
    "case",
    [
        "default",
        "no_momentum",
        "untied",
        "first_image_only_untied",
        "noclip_norenorm_mix0.7",
        "latent_seed5_gs1",
        "perturb",
    ],
)
def test_reference_loop_step_by_step(case: str) -> None:
    options = {**meta()["base"], **meta()[case]["options"]}
    steps = min(options["num_traversal_steps"], 3)
    settings = {RENAMED[k]: v for k, v in options.items() if k in RENAMED}
    if options.get("use_momentum") is False:
        settings["momentum"] = 0.0
    chain = doodl_fast.EDICT(
        golden_denoiser(torch.float32, options.get("sd_guidance_scale", 7.5)),
        recorded_schedule("reference", options["steps"]),
        options.get("mix_weight", 0.93),
    )
    start = golden("gen").get(f"{case}/start", golden("gen")["init/latent"])[:1]
    seen: list[doodl_fast.StepInfo] = []
    result = doodl_fast.optimize(
        chain,
        start,
        decode,
        symmetry,
        steps,
        grad_scale=options["grad_scale"],
        generator=torch.Generator().manual_seed(options["seed"]),
        callback_on_step_end=seen.append,
        progress=False,
        **settings,
    )
    recorded_losses = meta()[case]["step_losses"][:steps]
    assert torch.allclose(
        torch.tensor(result.pair_losses) * options["grad_scale"], torch.tensor(recorded_losses), rtol=2e-6
    )
    trajectory = [torch.cat(info.latents) for info in seen[1:]] + [torch.cat(result.latents)]
    for step, latents in enumerate(trajectory, start=1):
        whole = golden("gen").get(f"{case}/step{step}/latent")
        if whole is not None:
            assert relative(latents, pairwise(whole)) < 1e-6
        else:
            assert relative(probe(latents), golden("gen")[f"{case}/step{step}/latent_probe"]) < 1e-6


def test_momentum_of_the_reference() -> None:
    """Fed with the recorded gradients alone, the update's buffers and latents are the reference's."""
    recorded = golden("gen")
    start = recorded["init/latent"]
    update = LatentUpdate(start, start, UpdateSettings(perturbation_scale=0), torch.Generator())
    gradient = recorded["default/step1/raw_grad"]
    update.step(gradient[:1], gradient[1:])
    # the reference's fp32 norm lets its latents grow by 2e-7 where ours, summed in float64, holds the norm
    assert relative(torch.cat(update.latents), pairwise(recorded["default/step1/latent"])) < 3e-7
    assert abs(float(update.latents[0].double().norm() / start.double().norm()) - 1) < 2e-8
    momentum = torch.cat(update.momenta)
    assert relative(-probe(momentum), recorded["default/step1/momentum_probe"]) < FP32
