"""The table of families that the generic tests go through: one `Case` for each, which is all that a new family adds.

A case says how to build a tiny pipeline and how to call it. `tests/solvers/test_families.py` takes each through
loading, the pipeline's own pictures, the gradient, exact inversion, the plan of memory and the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_families
import tiny_pipeline
import tiny_videos

STEPS = 2
OWN_FLAGS = ("prompt", "negative_prompt", "guidance_scale", "height", "width", "num_frames")
SIZE = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 8}


@dataclass(frozen=True)
class Case:
    """A kind of pipeline, small enough for tests.

    Attributes:
        build: Makes the pipeline; it may write files into the folder that it is given.
        call: The arguments that `from_pipeline` and the pipeline both take, the prompt among them.
        needs_accelerate: Whether diffusers loads the pipeline with the library accelerate alone.
    """

    build: Callable[[Path], Any]
    call: dict[str, Any] = field(default_factory=dict)
    needs_accelerate: bool = False

    def flags(self) -> list[str]:
        """The same arguments as options of the command line."""
        flags = []
        for name, value in self.call.items():
            if name in OWN_FLAGS:
                flags += [f"--{name.replace('_', '-')}", str(value)]
            else:
                flags += ["--option", f"{name}={json.dumps(value)}"]
        return flags


PROMPTS = {"prompt": "a dog", "negative_prompt": "ugly", "guidance_scale": 3.0}
CASES: dict[str, Case] = {
    "Stable Diffusion 1, 2": Case(tiny_pipeline.stable_diffusion, {**PROMPTS, "height": 64, "width": 64}),
    "Stable Diffusion XL": Case(tiny_pipeline.stable_diffusion_xl, {**PROMPTS, "height": 64, "width": 64}),
    "Stable Diffusion 3": Case(tiny_families.stable_diffusion_3, {**PROMPTS, **SHORT, **SIZE}),
    "FLUX.1 dev": Case(tiny_families.flux, {"prompt": "a dog", "guidance_scale": 3.0, **SHORT, **SIZE}),
    "FLUX.1 schnell": Case(
        lambda work: tiny_families.flux(work, guidance_embeds=False), {"prompt": "a dog", **SHORT, **SIZE}
    ),
    "PixArt-alpha": Case(lambda _: tiny_families.pixart("PixArtAlphaPipeline", is_told=True), {**PROMPTS, **SHORT}),
    "PixArt-sigma": Case(lambda _: tiny_families.pixart(), {**PROMPTS, **SHORT}),
    "Wan 2.1": Case(
        lambda _: tiny_videos.wan(),
        {**PROMPTS, **SHORT, "height": 16, "width": 32, "num_frames": 5},
        needs_accelerate=True,
    ),
    "CogVideoX": Case(
        lambda _: tiny_videos.cogvideox(), {**PROMPTS, **SHORT, "height": 16, "width": 32, "num_frames": 9}
    ),
    "Pixel space": Case(lambda _: tiny_families.pixel_space("DDIMPipeline")),
}
