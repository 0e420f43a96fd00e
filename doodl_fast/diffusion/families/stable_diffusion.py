"""The Stable Diffusion family (versions 1, 2 and XL): from a diffusers pipeline to a `Denoiser` and its latents.

Latent diffusion: Rombach et al., CVPR 2022, arXiv 2112.10752; SDXL: Podell et al., arXiv 2307.01952.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..decoder import Decoder
from ..denoiser import Denoiser
from ..latent_space import latent_space
from ..prompts import encode_conditions
from .additions import Addition, Build
from .base import BY_HAND, DENOISER_OPTIONS, Family, Parts, Request, components_of, take
from .controlnet import TEXT_TO_IMAGE as CONTROLLED
from .controlnet import ControlNet
from .image_to_image import IMAGE_TO_IMAGE, PARTS, ImageToImage, span_of
from .inpainting import INPAINTING, Inpainting
from .ip_adapter import IPAdapter
from .lora import LoRAScale
from .pag import PAG, PERTURBED
from .pix2pix import INSTRUCTED, InstructPix2Pix, OldEncoding
from .rescaling import GuidanceRescale
from .t2i_adapter import ADAPTED, T2IAdapter
from .xl_conditions import XLConditions

ADDITIONS: tuple[type[Addition], ...] = (
    *(LoRAScale, Inpainting, InstructPix2Pix, ImageToImage, XLConditions, IPAdapter, T2IAdapter, ControlNet, PAG),
    GuidanceRescale,
)
"""What may stand around the UNet, in the order in which it is put there."""

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Components that a chain uses, or whose absence changes no picture.
KNOWN_COMPONENTS = (
    *COMPONENTS,
    *("text_encoder_2", "tokenizer_2", "safety_checker", "feature_extractor", "image_encoder"),
)
VIDEO_UNETS = ("UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel", "I2VGenXLUNet")


class StableDiffusion(Family):
    """Stable Diffusion 1, 2 and XL (base models), with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` and of the UNet's
    `forward`.
    """

    # Text-to-image from noise is the same for these, whatever else they can start from.
    pipelines = (
        *("StableDiffusionPipeline", "StableDiffusionXLPipeline"),
        *("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
        *(*IMAGE_TO_IMAGE, *INPAINTING, *INSTRUCTED, *CONTROLLED, *ADAPTED, *PERTURBED),
    )
    components = KNOWN_COMPONENTS
    required = COMPONENTS

    def components_of_class(self, names: Sequence[str]) -> set[str]:
        """See `Family.components_of_class`."""
        return {*self.components, *(kind.component for kind in ADDITIONS if not set(names).isdisjoint(kind.pipelines))}

    def check_saved(self, parts: Mapping[str, str], names: Sequence[str], source: str) -> None:
        """See `Family.check_saved`."""
        if parts.get("unet") in VIDEO_UNETS or "motion_adapter" in parts:
            raise ValueError(
                f"model: {names[0]} in {source!r} makes videos, which is not supported; use a text-to-image model"
            )
        super().check_saved(parts, names, source)

    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that is no Stable Diffusion 1, 2 or XL, or a part of which would be ignored.

        Raises:
            TypeError: `pipe` has no UNet, VAE, scheduler or text encoder.
            ValueError: A component of `pipe` (a ControlNet, for instance) would be ignored, its UNet takes more than
                latents and a prompt, it cannot encode prompts, or it makes videos.

        Warns:
            RuntimeWarning: The class is unknown, but has all parts. What it does besides is not part of the chain.
        """
        name = type(pipe).__name__
        parts = components_of(pipe)
        missing = [part for part in ("unet", "vae", "scheduler") if parts.get(part) is None]
        if parts.get("text_encoder") is None and parts.get("text_encoder_2") is None:
            missing.append("text_encoder")
        unet: Any = getattr(parts.get("unet"), "_orig_mod", parts.get("unet"))
        if type(unet).__name__ in VIDEO_UNETS:
            raise ValueError(f"pipe: {name} makes videos, and from_pipeline does not know it; {BY_HAND}")
        if missing:
            raise TypeError(
                f"pipe: expected a Stable Diffusion pipeline with unet, vae, scheduler and text_encoder, got {name} "
                f"without {', '.join(missing)}; {BY_HAND}"
            )
        known = {*KNOWN_COMPONENTS, *(kind.component for kind in ADDITIONS if kind.is_in(pipe))}
        ignored = sorted(part for part, value in parts.items() if value is not None and part not in known)
        if ignored:
            raise ValueError(
                f"pipe: {name} has {', '.join(ignored)}, which from_pipeline would ignore; use a pipeline without it, "
                f"or {BY_HAND} and unet_kwargs"
            )
        channels, expected = unet.config.in_channels, parts["vae"].config.latent_channels
        if channels != expected and not any(kind.sees_more and kind.is_in(pipe) for kind in ADDITIONS):
            raise ValueError(
                f"pipe: expected a UNet of {expected} input channels (the latents'), got {channels}: inpainting and "
                f"editing models need their own pipelines, and upscaling and depth models are not known; {BY_HAND}"
            )
        if not callable(getattr(pipe, "encode_prompt", None)) and not InstructPix2Pix.is_in(pipe):
            raise ValueError(f"pipe: {name} has no encode_prompt method, by which prompts are encoded; {BY_HAND}")
        if name not in self.pipelines:
            warnings.warn(
                f"pipe: {name} is used as a Stable Diffusion text-to-image pipeline: its networks, prompts and "
                "scheduler are part of the chain, and anything that its __call__ does besides is not",
                RuntimeWarning,
                stacklevel=3,
            )

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        span = span_of(pipe, request)
        return {} if span is None else {"span": span}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`. The options are arguments of `encode_prompt`, of `Denoiser` and of the UNet's `forward`.

        Raises:
            TypeError: An option is none of these, or a prompt is no text.
            ValueError: An argument is out of range, or the UNet needs one that is not given.
        """
        guidance_scale = self.scale_of(request)
        options = dict(request.options)
        encoder = pipe if callable(getattr(pipe, "encode_prompt", None)) else OldEncoding(pipe)
        encoded = set(inspect.signature(encoder.encode_prompt).parameters) - _OURS
        encoding = take(options, encoded)
        own = take(options, DENOISER_OPTIONS)
        take(options, PARTS & inspect.signature(type(pipe).__call__).parameters.keys())
        additions = [kind(pipe, take(options, kind.takes(pipe)), request) for kind in ADDITIONS if kind.is_in(pipe)]
        unet = getattr(pipe.unet, "_orig_mod", pipe.unet)
        extra = take(options, set(inspect.signature(type(unet).forward).parameters) - _OURS)
        _refuse_left_over(options, pipe, unet)
        scale = (extra.get("cross_attention_kwargs") or {}).get("scale")
        if (
            scale is not None and "lora_scale" in encoded
        ):  # the weight of a LoRA, of which the text encoder may have a part
            encoding.setdefault("lora_scale", scale)
        distilled = getattr(unet.config, "time_cond_proj_dim", None)
        guided = guidance_scale > 1 and distilled is None
        if not guided and request.negative_prompt:
            warnings.warn(
                f"negative_prompt: it is not used with guidance_scale={guidance_scale:g}"
                + (" and a network that embeds the guidance scale" if distilled else "; guidance needs more than 1"),
                RuntimeWarning,
                stacklevel=3,
            )
        space = latent_space(pipe, *_size(additions, request))
        cond, uncond, conditions = encode_conditions(
            encoder,
            request.prompt,
            request.negative_texts,
            height=space.height,
            width=space.width,
            guided=guided,
            **encoding,
        )
        added = {**conditions.get("added_cond_kwargs", {}), **(extra.pop("added_cond_kwargs", None) or {})}
        extra |= {"added_cond_kwargs": added} if added else {}
        if distilled is not None:
            extra.setdefault(
                "timestep_cond",
                pipe.get_guidance_scale_embedding(torch.tensor([guidance_scale - 1.0]), embedding_dim=distilled).to(
                    cond.device
                ),
            )
        build = Build(
            pipe, request, guided, pipe.unet, pipe.unet, space.for_prompts(len(cond)), Decoder(pipe.vae), extra
        )
        for addition in additions:
            addition.add(build)
        denoiser = Denoiser(build.network, cond, uncond, guidance_scale if guided else 1.0, **own, **build.kwargs)
        return Parts(denoiser, build.space, build.decoder)


_OURS = {
    "self",
    "device",
    "num_images_per_prompt",
    "do_classifier_free_guidance",
    "sample",
    "timestep",
    "encoder_hidden_states",
    "return_dict",
    "args",
    "kwargs",
}
"""Parameters of `encode_prompt` and of the UNet's `forward` that are not the caller's to give."""


def _size(additions: list[Addition], request: Request) -> tuple[int | None, int | None]:
    """Returns the height and width that were asked for, or else those of a picture that is given."""
    height, width = request.height, request.width
    for addition in additions:
        own_height, own_width = addition.size()
        height, width = own_height if height is None else height, own_width if width is None else width
    return height, width


def _refuse_left_over(options: Mapping[str, Any], pipe: Any, unet: Any) -> None:
    """Raises TypeError for options that nobody has taken."""
    if options:
        raise TypeError(
            f"{', '.join(options)}: from_pipeline has no such argument, and neither have the solver, Denoiser, "
            f"{type(pipe).__name__}.encode_prompt and {type(unet).__name__}.forward"
        )
