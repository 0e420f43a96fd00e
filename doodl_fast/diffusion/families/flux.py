"""FLUX.1 dev and schnell: a flow whose transformer takes latents packed in patches of 2 x 2, with position numbers.

A chain carries the latents as pictures (B, 16, h, w); they are packed for each call of the network alone. `pack` gives
what the pipeline itself returns as its latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import Decoder, vae_scale_factor
from ..denoiser import Denoiser
from ..guided import Guided
from ..hooks import device_of
from .base import (
    DENOISER_OPTIONS,
    Family,
    Parts,
    Request,
    encoding_options,
    keep_given,
    refuse_unknown,
    say,
    take,
)
from .transformer import (
    check_prompts,
    dynamic_shift,
    even_sigmas,
    no_grad_encode,
    refuse_ip_adapter,
    transformer_space,
    true_guidance,
)

PATCH = 2
TRAINING_STEPS = 1000
"""FLUX takes its timesteps from 0 to 1, and its schedulers number them from 0 to 1000."""
NETWORK_OPTIONS = frozenset({"joint_attention_kwargs"})
NEGATIVE = frozenset({"negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds"})
OTHER_OPTIONS = frozenset({"true_cfg_scale", "sigmas"})


def pack(latents: Tensor) -> Tensor:
    """Packs latents (B, C, h, w) into patches (B, h / 2 * w / 2, 4 C), as FLUX's pipelines have them."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """Undoes `pack`.

    Args:
        patches: (B, h / 2 * w / 2, 4 C).
        height: Rows h of the latents. With a VAE of scale factor 8 a picture of 1024 pixels has 128.
        width: Columns w of the latents.

    Returns:
        Latents (B, C, h, w).
    """
    batch, _, features = patches.shape
    split = patches.reshape(batch, height // PATCH, width // PATCH, features // PATCH**2, PATCH, PATCH)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def image_places(x: Tensor) -> Tensor:
    """Returns the places (h / 2 * w / 2, 3) of the patches of latents (B, C, h, w): 0, the row and the column."""
    rows, columns = (torch.arange(size // PATCH, device=x.device, dtype=x.dtype) for size in x.shape[-2:])
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1).reshape(-1, 3)


class FluxCall(NetworkAdapter):
    """Calls FLUX's transformer as `(x, t, cond, **kwargs)` on latents that are not packed."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x."""
        height, width = x.shape[-2:]
        output = self.module(
            hidden_states=pack(x),
            timestep=t.expand(len(x)).to(x.dtype) / TRAINING_STEPS,
            encoder_hidden_states=cond,
            txt_ids=torch.zeros(cond.shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=image_places(x),
            return_dict=False,
            **kwargs,
        )[0]
        return unpack(output, height, width)


class Flux(Family):
    """FLUX.1 dev, whose network takes the guidance scale as an input, and schnell, which has no guidance.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_2, prompt_embeds,
    pooled_prompt_embeds, max_sequence_length, ...), `sigmas`, `joint_attention_kwargs`, and `true_cfg_scale`, which
    above 1 adds classifier-free guidance where there is a negative prompt, with `negative_prompt_2`,
    `negative_prompt_embeds` and `negative_pooled_prompt_embeds`.
    """

    pipelines = ("FluxPipeline",)
    components = (
        *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        *("image_encoder", "feature_extractor"),
    )
    guidance_scale = 3.5
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        refuse_ip_adapter(pipe, getattr(pipe.transformer, "encoder_hid_proj", None) is not None)
        channels, expected = pipe.transformer.config.in_channels, PATCH**2 * pipe.vae.config.latent_channels
        if channels != expected:
            raise ValueError(
                f"pipe: expected a transformer of {expected} input channels (the packed latents'), got {channels}: "
                "FLUX's Fill, Canny and Depth models take more than a prompt"
            )

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * PATCH
        shift = dynamic_shift(pipe.scheduler, (height // pixels) * (width // pixels), 1.15)
        return {**shift, **even_sigmas(pipe.scheduler, request)}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        config, guidance_scale = pipe.transformer.config, self.scale_of(request)
        options = dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, negative = take(options, NETWORK_OPTIONS), take(options, NEGATIVE)
        true_cfg_scale = float(take(options, OTHER_OPTIONS).get("true_cfg_scale", 1.0))
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | NEGATIVE | OTHER_OPTIONS)
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        fixed_by = "this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None
        channels = config.in_channels // PATCH**2
        space = transformer_space(pipe, self.size(pipe, request), channels, PATCH, fixed_by=fixed_by)
        guided = true_guidance(pipe, request, true_cfg_scale)
        cond, uncond, pooled = self._encode(pipe, request, encoding, negative, guided)
        if config.guidance_embeds:
            extra["guidance"] = torch.full([1], guidance_scale, device=device_of(pipe.transformer))
        elif request.guidance_scale != "auto":
            say(
                "guidance_scale: it is not used, because this network (FLUX.1 schnell, for instance) does not embed "
                "it; true_cfg_scale adds classifier-free guidance"
            )
        scale = true_cfg_scale if guided else 1.0
        denoiser = Denoiser(FluxCall(pipe.transformer), cond, uncond, scale, pooled_projections=pooled, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), Decoder(pipe.vae))

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels."""
        own = pipe.default_sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def _encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], negative: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | Guided]:
        """Returns the embeddings of the prompts, those of the negative prompts, and the pooled ones."""
        given = {**encoding, **negative}
        encoders = ("text_encoder", "text_encoder_2")
        prompts, negatives = check_prompts(pipe, request, given, guided, "pooled_prompt_embeds", encoders)
        names = ("prompt_embeds", "pooled_prompt_embeds")
        device = device_of(pipe.transformer)
        made = dict(zip(names, no_grad_encode(pipe, prompt=prompts, **encoding), strict=False))
        cond, pooled = keep_given(made, encoding, device).values()
        assert cond is not None and pooled is not None
        if not guided:
            return cond, None, pooled
        other = {**encoding, **dict.fromkeys(("prompt_2", *names))}
        other |= {name.removeprefix("negative_"): value for name, value in negative.items()}
        made = dict(zip(names, no_grad_encode(pipe, prompt=negatives, **other), strict=False))
        uncond, negative_pooled = keep_given(made, other, device).values()
        assert uncond is not None and negative_pooled is not None
        return cond, uncond, Guided(negative_pooled, pooled)
