"""The recorded runs of the reference's `gen` (tests/golden/README.md, stage gen), and how to repeat them with ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from conftest import golden, golden_denoiser, golden_meta, golden_unet, relative, sd_scheduler
from PIL import Image
from recorded_guide import tiny_guide
from torch import Tensor

from doodl_fast.compat import Quirks
from doodl_fast.compat import gen_modes as modes
from doodl_fast.compat.conditioning import Sampler, pipeline_schedule
from doodl_fast.compat.gen import gen
from doodl_fast.compat.gen_modes import GenResult
from doodl_fast.compat.losses import symmetry_loss_fn
from doodl_fast.compat.schedule import DEFAULT
from doodl_fast.diffusion.pipeline import Decoder
from doodl_fast.optimization import OneStepGuidance


def meta() -> dict[str, Any]:
    return golden_meta("gen")


def pipeline(dtype: torch.dtype = torch.float32) -> Any:
    """Returns a pipeline whose prompts have the recorded embeddings."""
    models = golden("models")

    def encode_prompt(**options: Any) -> tuple[Tensor, Tensor]:
        texts = (options["prompt"], options["negative_prompt"])
        assert texts == (["a dog"], None)
        return models["embedding_conditional"].to(dtype), models["embedding_unconditional"].to(dtype)

    return SimpleNamespace(
        unet=golden_unet(dtype),
        vae=tiny_pipeline.golden_vae(dtype),
        scheduler=sd_scheduler(),
        encode_prompt=encode_prompt,
    )


def recorded_sampler(steps: int = 10, dtype: torch.dtype = torch.float32, quirks: Quirks = DEFAULT) -> Sampler:
    return Sampler(golden_denoiser(dtype), pipeline_schedule(pipeline(), steps, quirks), steps, quirks=quirks)


def quick(**options: Any) -> dict[str, Any]:
    """Returns the options of a small fast run with symmetry guidance that writes no files."""
    return {
        "model_guidance_type": "symmetry",
        "model_guidance_dict": {},
        "save_str": None,
        "grad_scale": 30.0,
        "steps": 4,
        "num_traversal_steps": 1,
        "perturb_grad_scale": 0,
        "size": 64,
        "pipeline": pipeline(),
        "progress": False,
        **options,
    }


def picture(mode: str = "RGB", side: int = 64, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(values).resize((side, side), Image.Resampling.BILINEAR).convert(mode)


@cache
def inverted_source(case: str) -> tuple[Tensor, ...]:
    """The pair (x, y) that inverting the source picture, which was not recorded, led to.

    It was recorded for "edit"; for the one-step cases it is what the guided steps, undone, make of the recorded final
    latents, and agrees with the 128 recorded numbers of it.
    """
    recorded = golden("gen")
    if case == "edit":
        return recorded["edit/start"].split(1)
    begin, sampler = meta()[case]["options"].get("opt_t", 0), recorded_sampler()
    decoder, loss_fn = Decoder(tiny_pipeline.golden_vae()), symmetry_loss_fn("horizontal", 30.0)
    guided = OneStepGuidance(sampler.denoiser, sampler.schedule, decoder, loss_fn)
    with torch.no_grad():
        pair = sampler.chain(sampler.program(begin), guided).inverse(*recorded[f"{case}/final_latent"].split(1))
    assert relative(torch.cat(pair).flatten()[::257], recorded[f"{case}/chain_probe"][10 - begin]) < 1e-4
    return pair


class Recorder(modes.ReferenceUpdate):
    """An update that keeps what each step was given and what it returned."""

    last: Recorder

    def __init__(self, x: Tensor, y: Tensor, *arguments: Any, **options: Any) -> None:
        super().__init__(x, y, *arguments, **options)
        Recorder.last = self
        self.start = list(self.latents)
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self, grad_x: Tensor, grad_y: Tensor) -> None:
        super().step(grad_x, grad_y)
        self.steps.append(tuple(torch.cat(pair) for pair in ([grad_x, grad_y], self.momenta, self.latents)))


def run(
    case: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int | None = None,
    inverted: tuple[Tensor, ...] | None = None,
) -> GenResult:
    """`gen` with a case's options; steps: at most that many of the optimisation's; inverted: see `inverted_source`."""
    dtype = torch.float16 if case.endswith("_fp16") else torch.float32
    options = {**meta()["base"], **meta()[case].get("options", {"num_traversal_steps": 1})}
    if steps is not None:
        options["num_traversal_steps"] = min(steps, options["num_traversal_steps"])
    if options["model_guidance_type"] == "CLIP":
        options["model_guidance_dict"] = {**options["model_guidance_dict"], "clip_models": {"vit_g_14": tiny_guide()}}
    if "source_im" in options:
        monkeypatch.setattr(modes, "source_noise", lambda *_: inverted or inverted_source(case))
    monkeypatch.setattr(modes, "ReferenceUpdate", Recorder)
    return gen(**options, pipeline=pipeline(dtype), folder=folder, progress=False)


def errors(case: str, result: GenResult, folder: Path) -> dict[str, float]:
    """Returns how far a run is from its recording: relative errors, and for pictures grey levels of 255."""
    found: dict[str, list[float]] = {}
    recorded, case_meta = golden("gen"), meta()[case]

    def note(name: str, got: Tensor, key: str) -> None:
        """Compares a tensor with the recorded one, if there is one: a pair, one of two equal tensors, or a probe."""
        if f"{key}_probe" in recorded:
            found.setdefault(name, []).append(relative(got.flatten()[::257], recorded[f"{key}_probe"]))
        if key in recorded:
            whole = recorded[key]
            found.setdefault(name, []).append(relative(got, whole.repeat(len(got) // len(whole), 1, 1, 1)))

    losses = [(a, b) for a, b in zip(result.losses, case_meta["losses"], strict=False)]
    if losses:
        found["loss"] = [abs(a / b - 1) for a, b in losses]
    if result.optimization is None:
        note("latents", torch.cat(result.latents), f"{case}/final_latent")
    else:
        note("start", torch.cat(Recorder.last.start), f"{case}/start")
        for number, (gradient, momentum, latents) in enumerate(Recorder.last.steps, start=1):
            note("gradient", gradient, f"{case}/step{number}/raw_grad")
            note("momentum", -momentum, f"{case}/step{number}/momentum")
            note("latents", latents, f"{case}/step{number}/latent")
    for file in result.files:
        if f"{case}/image/{file.name}" not in recorded:
            continue
        expected = recorded[f"{case}/image/{file.name}"].cpu().numpy().astype(int)
        stride = 512 // len(expected)
        got = np.asarray(Image.open(file))[::stride, ::stride].astype(int)
        found.setdefault("image", []).append(float(np.abs(got - expected).max()))
    return {name: max(values) for name, values in found.items()}
