"""The solvers that follow a flow's noise levels: DDIM is the pipeline's own sampler, the invertible ones are undone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
import torch
from conftest import relative

from doodl_fast.diffusion.families.flux import pack
from doodl_fast.solvers.bdia import BDIA
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT
from doodl_fast.solvers.obelm import OBELM
from doodl_fast.solvers.rex import Rex
from doodl_fast.solvers.sampler import Sampler

STEPS = 4
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "max_sequence_length": 8, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("flows")
    made = {"sd3": tiny_families.stable_diffusion_3(work), "flux": tiny_families.flux(work)}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def embeddings(pipe: Any) -> dict[str, Any]:
    """The prompt's embeddings and the pooled ones, which require grad."""
    encoded = pipe.encode_prompt("a dog", prompt_2=None, device="cpu", max_sequence_length=8, **_more(pipe))
    cond, pooled = (encoded[0], encoded[2]) if len(encoded) == 4 else encoded[:2]
    given = {"prompt_embeds": cond, "pooled_prompt_embeds": pooled}
    return {name: value.detach().clone().requires_grad_() for name, value in given.items()}


def _more(pipe: Any) -> dict[str, Any]:
    return {"prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_ddim_is_the_pipelines_own_sampler(pipes: dict[str, Any], kind: str) -> None:
    pipe = pipes[kind]
    chain = DDIM.from_pipeline(pipe, "a dog", memory="checkpoint", height=16, width=24, **OPTIONS)
    x = chain.noise(seed=3)
    packed = pack if kind == "flux" else torch.clone
    options = {"latents": packed(x), "output_type": "latent", "height": 16, "width": 24}
    expected = pipe("a dog", **options, **OPTIONS).images
    with torch.no_grad():
        assert relative(packed(chain(x)[0]), expected) < 1e-5


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("solver", [EDICT, BDIA, OBELM, Rex])
@pytest.mark.parametrize("memory", ["reversible", "checkpoint"])
def test_gradient_of_invertible_solvers(pipes: dict[str, Any], kind: str, solver: Any, memory: str) -> None:
    pipe, gradients = pipes[kind], []
    options = {"num_inference_steps": STEPS, "guidance_scale": 1.0 if kind == "sd3" else 3.5}
    for mode in ("naive", memory):
        given = embeddings(pipe)
        chain = solver.from_pipeline(pipe, memory=mode, **options, **given)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        gradients.append(torch.autograd.grad(loss, [x, *given.values()]))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_edict_is_undone(pipes: dict[str, Any], kind: str) -> None:
    chain = EDICT.from_pipeline(pipes[kind], "a dog", memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=2)
    with torch.no_grad():
        ends = chain(x)
        starts = chain.inverse(*ends)
    assert all(relative(start, x) < 1e-5 < relative(ends[0], x) for start in starts)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
@pytest.mark.parametrize("solver", [EDICT, BDIA, OBELM, Rex])
def test_exact_arithmetic_comes_back_to_the_bit(pipes: dict[str, Any], kind: str, solver: Any) -> None:
    """0 differing bits from the noise to the picture and back, and from latents that no chain made to the noise."""
    options = {**OPTIONS, "memory": "checkpoint"}
    chain = solver.from_pipeline(pipes[kind], "a dog", arithmetic="exact", **options)
    x = chain.noise(seed=2)
    start = chain.state(x)
    picture = chain.forward_state(start)
    assert chain.inverse_state(picture).equals(start)
    plain = solver.from_pipeline(pipes[kind], "a dog", **options)
    with torch.no_grad():
        # O-BELM's coarse steps multiply a latent by numbers above 1, for which the lattice has fewer bits left.
        error = relative(picture.latents()[chain.picture_index], plain(x)[0])
        assert error < (1e-2 if solver is OBELM else 1e-4) < relative(plain(x)[0], x)
    given = chain.state(0.5 * chain.noise(seed=7), end="image")
    noise = chain.inverse_state(given)
    assert chain.forward_state(noise).equals(given)
    assert relative(noise.latents()[chain.picture_index], given.latents()[chain.picture_index]) > 0.01


def test_schedulers_that_are_no_flow_are_refused(tmp_path: Path) -> None:
    pipe = tiny_families.stable_diffusion_3(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    with pytest.raises(
        TypeError, match=r"^scheduler: expected one of flow matching .* got DDIMScheduler; use FlowMatch"
    ):
        DDIM.from_pipeline(pipe, "a dog", **OPTIONS)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipe.scheduler = diffusers.UniPCMultistepScheduler(**flow)
    chain = Sampler.from_pipeline(pipe, "a dog", memory="checkpoint", **OPTIONS)
    x = chain.noise(seed=3)
    expected = pipe("a dog", latents=x, output_type="latent", **OPTIONS).images
    with torch.no_grad():
        assert relative(chain(x)[0], expected) < 1e-5
