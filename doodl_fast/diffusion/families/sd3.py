"""Stable Diffusion 3 and 3.5: a flow with a transformer and three text encoders (Esser et al., arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
    take,
    warn_unused_negative_prompt,
)
from .skip_layers import SKIP_OPTIONS, network_call
from .transformer import (
    check_prompts,
    dynamic_shift,
    no_grad_encode,
    refuse_ip_adapter,
    transformer_space,
)

SCHEDULE_OPTIONS = frozenset({"mu", "sigmas"})
NETWORK_OPTIONS = frozenset({"joint_attention_kwargs"})


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_2, prompt_3,
    prompt_embeds, pooled_prompt_embeds, their negative companions, clip_skip, max_sequence_length, ...), `mu`, `sigmas`
    and `joint_attention_kwargs`; and those of skip-layer guidance (skip_guidance_layers, skip_layer_guidance_scale,
    skip_layer_guidance_start, skip_layer_guidance_stop).
    """

    pipelines = ("StableDiffusion3Pipeline",)
    components = (
        *("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer"),
        *("tokenizer_2", "tokenizer_3", "image_encoder", "feature_extractor"),
    )
    guidance_scale = 7.0
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        refuse_ip_adapter(pipe, bool(getattr(pipe, "is_ip_adapter_active", False)))

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        given = {name: request.options[name] for name in SCHEDULE_OPTIONS if request.options.get(name) is not None}
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * pipe.transformer.config.patch_size
        return {**dynamic_shift(pipe.scheduler, (height // pixels) * (width // pixels), 1.16), **given}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        config, guidance_scale = pipe.transformer.config, self.scale_of(request)
        options = dict(request.options)
        take(options, SCHEDULE_OPTIONS)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, skipped = take(options, NETWORK_OPTIONS), take(options, SKIP_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | SCHEDULE_OPTIONS | NETWORK_OPTIONS | SKIP_OPTIONS)
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting")) and request.options.get("mu") is None
        factor = vae_scale_factor(pipe.vae)
        space = transformer_space(
            pipe,
            self.size(pipe, request),
            config.in_channels,
            config.patch_size,
            fixed_by="this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None,
            largest=config.pos_embed_max_size * config.patch_size * factor,
        )
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        cond, uncond, pooled = self._encode(pipe, request, encoding, guided, extra)
        network = network_call(pipe.transformer, skipped, request, guided)
        scale = guidance_scale if guided else 1.0
        denoiser = Denoiser(network, cond, uncond, scale, pooled_projections=pooled, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), Decoder(pipe.vae))

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels."""
        own = pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def _encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool, extra: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, Tensor | Guided]:
        """Returns the embeddings of the prompts, those of the negative prompts, and the pooled ones."""
        encoders = ("text_encoder", "text_encoder_2")
        prompts, negatives = check_prompts(pipe, request, encoding, guided, "pooled_prompt_embeds", encoders)
        scale = (extra.get("joint_attention_kwargs") or {}).get("scale")
        made = no_grad_encode(
            pipe,
            prompt=prompts,
            negative_prompt=negatives,
            do_classifier_free_guidance=guided,
            **{"prompt_2": None, "prompt_3": None, "lora_scale": scale, **encoding},
        )
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        found = keep_given(dict(zip(names, made, strict=True)), encoding, device_of(pipe.transformer))
        cond, uncond, pooled, negative_pooled = (found[name] for name in names)
        assert cond is not None and pooled is not None
        if not guided:
            return cond, None, pooled
        assert uncond is not None and negative_pooled is not None
        return cond, uncond, Guided(negative_pooled, pooled)
