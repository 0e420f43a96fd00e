"""Every family of pipelines refuses what it cannot do, in one line that names the argument."""

from __future__ import annotations

import copy
import re
from typing import Any

import diffusers
import pytest
from families_table import CASES, STEPS

from doodl_fast.diffusion.families import family_of
from doodl_fast.solvers.ddim import DDIM

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return CASES[name].make(tmp_path_factory.mktemp("words"))


def refused(pipe: Any, name: str, error: Any, match: str, **options: Any) -> None:
    """Checks that an error of one line says what is expected."""
    call = {key: value for key, value in {**CASES[name].call, **options}.items() if value is not ...}
    with pytest.raises(error, match=match) as found:
        DDIM.from_pipeline(pipe, num_inference_steps=STEPS, **call)
    assert "\n" not in str(found.value)


def test_a_component_that_would_be_ignored(name: str, pipe: Any) -> None:
    other = copy.copy(pipe)
    other.register_modules(style_encoder=pipe.scheduler)
    refused(other, name, ValueError, rf"^pipe: {type(pipe).__name__} has style_encoder, which from_pipeline would ign")


class UnheardPipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A class that derives from none that is known."""


def test_an_unknown_class(name: str, pipe: Any) -> None:
    made = UnheardPipeline()
    made.register_modules(**pipe.components)
    if CASES[name].family != "StableDiffusion":
        refused(made, name, (TypeError, ValueError), r"^pipe: .*UnheardPipeline.*docs/adapters.md says how to write")
        return
    made.encode_prompt = pipe.encode_prompt  # type: ignore[attr-defined]
    with pytest.warns(RuntimeWarning, match=r"^pipe: UnheardPipeline is used as a Stable Diffusion text-to-image"):
        DDIM.from_pipeline(made, num_inference_steps=STEPS, **CASES[name].call)


def test_a_scheduler_that_cannot_be_followed(name: str, pipe: Any) -> None:
    other = copy.copy(pipe)
    is_flow = family_of(pipe).takes_flows
    wrong = diffusers.DDIMScheduler(clip_sample=False) if is_flow else diffusers.FlowMatchEulerDiscreteScheduler()
    other.register_modules(scheduler=wrong)
    refused(other, name, (TypeError, ValueError), rf"^scheduler: .*{type(wrong).__name__}")
    if not is_flow and CASES[name].family != "StableAudio":
        other.register_modules(scheduler=diffusers.DDIMScheduler(clip_sample=True))
        refused(other, name, ValueError, r"^scheduler: .*clip_sample=True")


def test_prompts_that_do_not_fit(name: str, pipe: Any) -> None:
    if not family_of(pipe).takes_text:
        refused(pipe, name, (TypeError, ValueError), r"^prompt: expected None", prompt="a dog")
        return
    refused(pipe, name, TypeError, r"^prompt: expected a string or a list of strings, got 3", prompt=3)
    refused(pipe, name, TypeError, r"^prompt: expected a string or a list of strings, got None", prompt=...)
    if "negative_prompt" in CASES[name].call:
        texts = ["ugly", "blurred", "red"]
        refused(pipe, name, ValueError, r"^`?negative_prompt`?: ", negative_prompt=texts)


def test_a_size_that_does_not_fit(name: str, pipe: Any) -> None:
    if CASES[name].family in ("AudioLDM2", "StableAudio"):
        refused(pipe, name, ValueError, r"^height: expected None, because the pipeline makes audio", height=64)
        return
    for side in ("height", "width"):
        for pixels in (17, 0, -16):
            refused(pipe, name, ValueError, rf"^{side}: expected .*, got {re.escape(str(pixels))}", **{side: pixels})
    if "num_frames" in CASES[name].call:
        refused(pipe, name, ValueError, r"^num_frames: expected .*, got 0", num_frames=0)


def test_an_argument_that_nobody_takes(name: str, pipe: Any) -> None:
    refused(pipe, name, TypeError, r"^sharpness: from_pipeline has no such argument", sharpness=3)
