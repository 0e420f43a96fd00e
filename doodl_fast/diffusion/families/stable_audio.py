"""Stable Audio Open: diffusion of audio latents with a transformer (arXiv 2404.10301, 2407.14358).

DITTO (arXiv 2401.12179) optimises the starting noise of such models for music.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..audio import AudioDecoder, audio_space
from ..calling import NetworkAdapter
from ..denoiser import Denoiser
from ..edm import EDM_SCHEDULERS, is_edm
from ..hooks import device_of
from ..networks import frozen
from .audioldm2 import refuse_sizes
from .base import (
    DENOISER_OPTIONS,
    Family,
    Parts,
    Request,
    encoding_options,
    refuse_unknown,
    take,
    warn_unused_negative_prompt,
)
from .transformer import check_prompts

LENGTHS = ("audio_start_in_s", "audio_end_in_s")


class StableAudioCall(NetworkAdapter):
    """Calls Stable Audio's transformer as `(x, t, cond, **kwargs)`, with its rotary embeddings."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the predicted v, (B, C, length) like x."""
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        config: Any = self.module.config
        tokens = x.shape[2] + kwargs["global_hidden_states"].shape[1]
        rotary = get_1d_rotary_pos_embed(
            config.attention_head_dim // 2, tokens, use_real=True, repeat_interleave_real=False
        )
        output: Tensor = self.module(
            x, t.expand(len(x)), encoder_hidden_states=cond, rotary_embedding=rotary, return_dict=False, **kwargs
        )[0]
        return output


class StableAudio(Family):
    """Stable Audio Open, from text to audio, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds,
    attention_mask and their negative companions), `audio_start_in_s` and `audio_end_in_s`.
    """

    pipelines = ("StableAudioPipeline",)
    components = ("transformer", "vae", "scheduler", "text_encoder", "projection_model", "tokenizer")
    required = ("transformer", "vae", "scheduler", "projection_model")
    guidance_scale = 7.0

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        if not is_edm(pipe.scheduler):
            raise ValueError(
                f"scheduler: expected {EDM_SCHEDULERS[0]}, whose timesteps go from 0 to 1 as the network wants them, "
                f"got {type(pipe.scheduler).__name__}"
            )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        refuse_sizes(request, LENGTHS[1])
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        lengths = take(options, set(LENGTHS))
        refuse_unknown(options, pipe, encoding_options(pipe) | set(LENGTHS))
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        start, end = self._seconds(pipe, lengths)
        cond, uncond, duration = self._encode(pipe, request, encoding, guided, start, end)
        denoiser = Denoiser(
            StableAudioCall(pipe.transformer),
            cond,
            uncond,
            guidance_scale if guided else 1.0,
            global_hidden_states=duration,
            **own,
        )
        config, rate = pipe.transformer.config, pipe.vae.config.sampling_rate
        rest = config.in_channels, int(config.sample_size)
        decoder = AudioDecoder(pipe.vae, rest, 1.0, rate, int(start * rate), int(end * rate))
        return Parts(denoiser, audio_space(rest, device_of(pipe.transformer), len(cond)), decoder)

    def _seconds(self, pipe: Any, given: dict[str, Any]) -> tuple[float, float]:
        """Returns the start and the end of the audio in seconds."""
        longest = pipe.transformer.config.sample_size * pipe.vae.hop_length / pipe.vae.config.sampling_rate
        start, end = given.get(LENGTHS[0], 0.0), given.get(LENGTHS[1])
        end = longest if end is None else end
        least, most = pipe.projection_model.config.min_value, pipe.projection_model.config.max_value
        for name, value in zip(LENGTHS, (start, end), strict=True):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
                raise ValueError(f"{name}: expected a number of seconds from {least} to {most}, got {value!r}")
        if not 0 < end - start <= longest:
            raise ValueError(
                f"audio_end_in_s: expected more than audio_start_in_s={start:g}, and at most {longest:g} seconds more, "
                f"the longest audio that the network makes, got {end:g}"
            )
        return float(start), float(end)

    def _encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool, start: float, end: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the conditions of the prompts, those of the negative prompts, and those of the duration alone."""
        prompts, negatives = check_prompts(pipe, request, encoding, guided, None, ("text_encoder", "tokenizer"))
        has_negative = guided and (
            request.negative_prompt is not None or encoding.get("negative_prompt_embeds") is not None
        )
        # Embeddings that the caller gives go through the projection, so their gradient does too.
        needs_grad = any(isinstance(value, Tensor) and value.requires_grad for value in encoding.values())
        with torch.set_grad_enabled(needs_grad), frozen(pipe.text_encoder, pipe.projection_model):
            texts = pipe.encode_prompt(
                prompt=prompts,
                device=device_of(pipe.transformer),
                do_classifier_free_guidance=guided,
                negative_prompt=negatives if has_negative else None,
                **encoding,
            )
            seconds = pipe.encode_duration(start, end, device_of(pipe.transformer), False, 1)
        duration = torch.cat(seconds, dim=2)
        halves = [
            torch.cat([half, *(second.expand(len(half), -1, -1) for second in seconds)], dim=1)
            for half in texts.chunk(2 if has_negative else 1)
        ]
        cond = halves[-1]
        if has_negative:
            return cond, halves[0], duration
        return cond, torch.zeros_like(cond) if guided else None, duration
