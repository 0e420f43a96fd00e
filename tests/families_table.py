"""The table of families that the generic tests go through: one `Case` for each, which is all that a new family adds.

A case says how to build a tiny pipeline and how to call it. `tests/solvers/test_families.py` takes each through
loading, the pipeline's own pictures, the gradient, exact inversion, plans of memory and the command line, and renders
the table on the page docs/families.md from it: `python tests/families_table.py` writes the page.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_audio
import tiny_dits
import tiny_families
import tiny_flows
import tiny_pipeline
import tiny_videos

STEPS = 2
OWN_FLAGS = ("prompt", "negative_prompt", "guidance_scale", "height", "width", "num_frames")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
COLUMNS = {
    "pictures": "forward = pipeline",
    "gradient": "gradient",
    "exact": "exact inversion",
    "plan": "plan",
    "estimate": "estimate",
    "run": "run",
    "edit": "invert, generate",
    "measure": "drift, profile",
}
"""What each test shows, by the name of the test's column; the values are the heads of the page's columns."""
OF_FOLDERS = ("estimate", "run", "edit", "measure")
"""The columns whose tests read a folder."""


@dataclass(frozen=True)
class No:
    """Something that a family does not do.

    Attributes:
        why: The reason, as the page has it.
        match: What the error says.
    """

    why: str
    match: str


@dataclass(frozen=True)
class Case:
    """One family, with a tiny pipeline of random weights.

    Attributes:
        family: The name of its class.
        build: Makes the pipeline; it may write files into the folder that it is given.
        call: The arguments that `from_pipeline` and the pipeline both take, the prompt among them.
        pipeline_only: Arguments of the pipeline alone.
        output_type: In which the pipeline returns pictures, or waveforms.
        lowest: The value of black in the pictures that the pipeline returns.
        oracle: Makes the pipeline whose pictures the chain's are compared with; None is the same pipeline.
        arithmetic: In which couplings are undone without loss.
        needs_accelerate: Whether diffusers loads the pipeline with the library accelerate alone.
        no: What the family does not do, by column.
    """

    family: str
    build: Callable[[Path], Any]
    call: dict[str, Any] = field(default_factory=dict)
    pipeline_only: dict[str, Any] = field(default_factory=dict)
    output_type: str = "pt"
    lowest: float = 0.0
    oracle: Callable[[], Any] | None = None
    arithmetic: str = "exact"
    needs_accelerate: bool = False
    no: dict[str, No] = field(default_factory=dict)

    def make(self, folder: Path) -> Any:
        """The pipeline, with its class's own templates for prompts, which a folder does not hold."""
        made = self.build(folder)
        accepted = inspect.signature(type(made)).parameters.keys() & made.config.keys()
        settings = {name: made.config[name] for name in accepted - made.components.keys()}
        fresh = type(made)(**made.components, **settings)
        for name in TEMPLATES:
            if hasattr(fresh, name):
                setattr(made, name, getattr(fresh, name))
        made.set_progress_bar_config(disable=True)
        return made

    def flags(self) -> list[str]:
        """The same arguments as options of the command line."""
        flags: list[str] = []
        for name, value in self.call.items():
            if name in OWN_FLAGS:
                flags += [f"--{name.replace('_', '-')}", str(value)]
            else:
                flags += ["--option", f"{name}={json.dumps(value)}"]
        return flags


TEMPLATES = ("prompt_template_encode", "prompt_template_encode_start_idx", "system_message", "system_prompt")
SHORT: dict[str, Any] = {"max_sequence_length": 8}
PROMPTS: dict[str, Any] = {"prompt": "a dog", "negative_prompt": "ugly", "guidance_scale": 3.0}
EMBEDDED: dict[str, Any] = {"prompt": "a dog", "guidance_scale": 3.0}
SIZE = {"height": 16, "width": 16}
WHOLE = {"use_resolution_binning": False}
LAYERS = {"text_encoder_out_layers": [0, 1, 2], "max_sequence_length": 64}
NO_SOUND = {
    "run": No("its guides score pictures", "makes waveforms, which the guides"),
    "edit": No("it starts from a picture file", "makes waveforms, of which a picture is no example"),
}


def _video(height: int, width: int, frames: int, **more: Any) -> dict[str, Any]:
    return {**PROMPTS, "height": height, "width": width, "num_frames": frames, **more}


CASES: dict[str, Case] = {
    "Stable Diffusion 1, 2": Case(
        "StableDiffusion", tiny_pipeline.stable_diffusion, {**PROMPTS, "height": 64, "width": 64}
    ),
    "Stable Diffusion XL": Case(
        "StableDiffusion", tiny_pipeline.stable_diffusion_xl, {**PROMPTS, "height": 64, "width": 64}
    ),
    "Stable Diffusion 3": Case("StableDiffusion3", tiny_families.stable_diffusion_3, {**PROMPTS, **SHORT, **SIZE}),
    "FLUX.1 dev": Case("Flux", tiny_families.flux, {**EMBEDDED, **SHORT, **SIZE}),
    "FLUX.1 schnell": Case(
        "Flux", lambda work: tiny_families.flux(work, guidance_embeds=False), {"prompt": "a dog", **SHORT, **SIZE}
    ),
    "FLUX.2 dev": Case("Flux2", lambda _: tiny_flows.flux2(), {**EMBEDDED, **SIZE, **LAYERS}),
    "FLUX.2 klein": Case("Flux2", lambda _: tiny_flows.flux2(is_klein=True), {**EMBEDDED, **SIZE, **LAYERS}),
    "Qwen-Image": Case(
        "QwenImage",
        lambda _: tiny_flows.qwen_image(),
        {"prompt": "a dog", "negative_prompt": "ugly", "true_cfg_scale": 3.0, **SIZE},
    ),
    "Sana": Case(
        "Sana",
        lambda _: tiny_flows.sana(),
        {**PROMPTS, **SHORT, "complex_human_instruction": None, "height": 32, "width": 32},
        WHOLE,
    ),
    "Lumina-Image 2.0": Case("Lumina2", lambda _: tiny_flows.lumina2(), {**PROMPTS, "max_sequence_length": 39, **SIZE}),
    "AuraFlow": Case("AuraFlow", lambda _: tiny_flows.aura_flow(), {**PROMPTS, **SHORT, **SIZE}, arithmetic="exact64"),
    "Chroma": Case("Chroma", lambda _: tiny_flows.chroma(), {**PROMPTS, **SHORT, **SIZE}),
    "Z-Image": Case("ZImage", lambda _: tiny_flows.z_image(), {**PROMPTS, "max_sequence_length": 16, **SIZE}),
    "PixArt-alpha": Case(
        "PixArt",  # The pipeline tells a network the size of the picture where its own is 128 latents.
        lambda _: tiny_families.pixart("PixArtAlphaPipeline", is_told=True, sample_size=128),
        {**PROMPTS, **SHORT, **SIZE},
        WHOLE,
    ),
    "PixArt-sigma": Case("PixArt", lambda _: tiny_families.pixart(), {**PROMPTS, **SHORT}, WHOLE),
    "HunyuanDiT": Case("HunyuanDiT", lambda _: tiny_dits.hunyuan_dit(), {**PROMPTS, "height": 32, "width": 32}, WHOLE),
    "DiT": Case("DiT", lambda _: tiny_dits.dit(), {"class_labels": [7], "guidance_scale": 3.0}),
    "Wan 2.1": Case("Wan", lambda _: tiny_videos.wan(), _video(16, 32, 5, **SHORT), needs_accelerate=True),
    "Wan 2.2": Case(
        "Wan",
        lambda _: tiny_videos.wan(transformer_2=tiny_videos.wan_transformer(9), boundary_ratio=0.875),
        _video(16, 32, 5, **SHORT),
        needs_accelerate=True,
    ),
    "CogVideoX": Case("CogVideoX", lambda _: tiny_videos.cogvideox(), _video(16, 32, 9, **SHORT)),
    "LTX-Video": Case("LTX", lambda _: tiny_videos.ltx(), _video(32, 64, 5, **SHORT)),
    "AnimateDiff": Case("AnimateDiff", tiny_videos.animatediff, _video(16, 24, 4)),
    "AudioLDM 2": Case("AudioLDM2", lambda _: tiny_audio.audioldm2(), dict(PROMPTS), no=NO_SOUND),
    "Stable Audio": Case(
        "StableAudio",
        lambda _: tiny_audio.stable_audio(),
        dict(PROMPTS),
        oracle=lambda: tiny_audio.stable_audio(tiny_audio.euler_scheduler()),
        no=NO_SOUND,
    ),
    "DeepFloyd IF": Case("DeepFloydIF", lambda _: tiny_families.deepfloyd_if(), dict(PROMPTS), lowest=-1.0),
    "Pixel space": Case("PixelSpace", lambda _: tiny_families.pixel_space("DDIMPipeline"), output_type="np"),
}

HEAD = """# What is tested for each family

This page is written by `python tests/families_table.py`, out of the table that `tests/solvers/test_families.py` goes
through with tiny pipelines of random weights. Each yes is a test that passes on the CPU, and each no is a refusal that
is tested by its message. What each family is and takes is in [pipelines.md](pipelines.md).

"""
TAIL = """
- **forward = pipeline**: pictures, videos or waveforms of the deterministic chain (`DDIM`) are those of `pipe(...)`
  with the same scheduler, noise and guidance, to 1e-5 in fp32. Waveforms of Stable Audio are those of the steps of
  `EDMEulerScheduler`, because the steps of its own scheduler add noise.
- **gradient**: those of EDICT with `memory="auto"`, and with `memory="reversible"` in exact arithmetic (`"exact64"`),
  are plain autograd's to 1e-5 in fp32, for the noise. Embeddings and `memory="checkpoint"` are in the tests of each
  family. With `arithmetic="exact"` the gradient is that at latents rounded more coarsely. In most of these networks
  it differs by 5e-7, in the tiny Stable Audio by 4e-5, and in the tiny Sana, whose attention has kinks, by 9e-4.
- **exact inversion**: EDICT in exact arithmetic comes back to the bit, from the noise and from a picture.
- **plan**: the peak that `chain.make_plan` predicts for `memory="auto"` is the measured one to 15%.
- **estimate**: what `doodl-fast estimate FOLDER` computes of the configs alone is the measured peak of a gradient and
  of the decoder, to 15%.
- **run**, **invert, generate**, **drift, profile**: the commands, on a folder that `pipe.save_pretrained` wrote.
  Pictures of `run` are the chain's, and editing comes back to the bit.
- **with accelerate**: diffusers loads these folders with the library accelerate alone. Without it the tests of these
  columns check that the error says so.
"""


def _cell(case: Case, column: str) -> str:
    """What the page says of a family."""
    if column in case.no:
        return f"no: {case.no[column].why}"
    return "yes, with accelerate" if case.needs_accelerate and column in OF_FOLDERS else "yes"


def page() -> str:
    """The page of the documentation."""
    lines = [["family", *COLUMNS.values()], ["---"] * (len(COLUMNS) + 1)]
    for name, case in CASES.items():
        lines.append([name, *(_cell(case, column) for column in COLUMNS)])
    return HEAD + "".join(f"| {' | '.join(line)} |\n" for line in lines) + TAIL


if __name__ == "__main__":
    PAGE.write_text(page())
