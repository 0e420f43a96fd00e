"""AudioLDM 2: diffusion of spectrograms with two text encoders and a language model (arXiv 2308.05734)."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from ..audio import AudioDecoder, audio_space
from ..decoder import vae_scale_factor
from ..denoiser import Denoiser
from ..guided import Guided
from ..hooks import device_of
from ..module_copies import frozen_copy
from ..networks import run_in_dtype
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
from .transformer import check_prompts, no_grad_encode

LENGTH = "audio_length_in_s"
EMBEDDINGS = ("generated_prompt_embeds", "prompt_embeds", "attention_mask")


class SpectrogramDecoder(AudioDecoder):
    """The decoder of AudioLDM 2: the VAE makes spectrograms, and the vocoder makes waveforms (B, samples) of them.

    Args:
        pipe: The pipeline.
        rest: The shape of the latents behind B.
        samples: How many samples of a waveform are kept.
    """

    def __init__(self, pipe: Any, rest: tuple[int, ...], samples: int) -> None:
        super().__init__(pipe.vae, rest, pipe.vae.config.scaling_factor, pipe.vocoder.config.sampling_rate, 0, samples)
        self.vocoder = pipe.vocoder
        self._is_spectrogram = False

    def spectrogram(self) -> SpectrogramDecoder:
        """Returns a decoder that gives log-mel spectrograms (B, 1, frames, mel bins) in the place of waveforms.

        A loss on them needs no vocoder, which takes memory and time.
        """
        other = copy.copy(self)
        other._is_spectrogram, other._end = True, None
        return other

    def _encodes(self) -> tuple[int, ...]:
        factor = vae_scale_factor(self.vae)
        return 1, self._rest[1] * factor, self._rest[2] * factor

    def _images(self, z: Tensor) -> Tensor:
        spectrogram = super()._images(z)
        if self._is_spectrogram:
            return spectrogram
        # The vocoder may have another dtype than the VAE.
        return run_in_dtype(self._waveform, spectrogram.squeeze(1), self.vocoder.dtype)

    def _waveform(self, spectrogram: Tensor) -> Tensor:
        """Returns the waveforms (B, samples) of log-mel spectrograms (B, frames, mel bins)."""
        with frozen_copy(self.vocoder) as vocoder:
            waveform: Tensor = vocoder(spectrogram)
        return waveform


class AudioLDM2(Family):
    """AudioLDM 2, from text to audio, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (transcription,
    max_new_tokens, generated_prompt_embeds, prompt_embeds, attention_mask and their negative companions), and
    `audio_length_in_s`.
    """

    pipelines = ("AudioLDM2Pipeline",)
    components = (
        *("unet", "vae", "scheduler", "vocoder", "text_encoder", "text_encoder_2", "projection_model"),
        *("language_model", "tokenizer", "tokenizer_2", "feature_extractor"),
    )
    required = ("unet", "vae", "scheduler", "vocoder")
    guidance_scale = 3.5

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        channels, expected = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != expected:
            raise ValueError(f"pipe: expected a UNet of {expected} input channels (the latents'), got {channels}")

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        refuse_sizes(request, LENGTH)
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        length = options.pop(LENGTH, None)
        refuse_unknown(options, pipe, encoding_options(pipe) | {LENGTH})
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        rest, samples = self._shape(pipe, length)
        found = self._encode(pipe, request, encoding, guided)
        conds = [found[name] for name in EMBEDDINGS]
        unconds = [found[f"negative_{name}"] for name in EMBEDDINGS] if guided else [None] * 3
        # The UNet attends to the language model's embeddings and to those of the second text encoder.
        states, mask = (
            Guided(uncond, cond) if uncond is not None else cond
            for uncond, cond in zip(unconds[1:], conds[1:], strict=True)
        )
        denoiser = Denoiser(
            pipe.unet,
            conds[0],
            unconds[0],
            guidance_scale if guided else 1.0,
            encoder_hidden_states_1=states,
            encoder_attention_mask_1=mask,
            **own,
        )
        space = audio_space(rest, device_of(pipe.unet), len(conds[0]))
        return Parts(denoiser, space, SpectrogramDecoder(pipe, rest, samples))

    def _shape(self, pipe: Any, length: Any) -> tuple[tuple[int, ...], int]:
        """Returns the shape of the latents behind B, and the samples of a waveform, of a length in seconds."""
        vocoder, factor = pipe.vocoder.config, vae_scale_factor(pipe.vae)
        seconds_per_frame = math.prod(vocoder.upsample_rates) / vocoder.sampling_rate
        if length is None:
            length = pipe.unet.config.sample_size * factor * seconds_per_frame
        if isinstance(length, bool) or not isinstance(length, (int, float)) or length < seconds_per_frame * factor:
            raise ValueError(
                f"{LENGTH}: expected a number of seconds of at least {seconds_per_frame * factor:g}, got {length!r}"
            )
        frames = math.ceil(int(length / seconds_per_frame) / factor)
        rest = pipe.unet.config.in_channels, frames, int(vocoder.model_in_dim) // factor
        return rest, int(length * vocoder.sampling_rate)

    def _encode(self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool) -> dict[str, Any]:
        """Returns the embeddings of the prompts and their masks by name, and those of the negative prompts."""
        encoders = ("text_encoder", "text_encoder_2", "projection_model", "language_model", "tokenizer", "tokenizer_2")
        prompts, negatives = check_prompts(pipe, request, encoding, guided, "generated_prompt_embeds", encoders)
        by_name: dict[str, Tensor | None] = {}
        if prompts is None and (negatives is None or not guided):
            for prefix in ("", "negative_") if guided else ("",):
                by_name |= dict.fromkeys(f"{prefix}{name}" for name in EMBEDDINGS)
                states = encoding[f"{prefix}prompt_embeds"]
                by_name[f"{prefix}attention_mask"] = torch.ones(states.shape[:2], dtype=torch.long)
            return keep_given(by_name, encoding, device_of(pipe.unet))
        made = no_grad_encode(
            pipe, prompt=prompts, negative_prompt=negatives, do_classifier_free_guidance=guided, **encoding
        )
        states, mask, generated = made
        for name, value in zip(EMBEDDINGS, (generated, states, mask), strict=True):
            if guided:
                by_name[f"negative_{name}"], by_name[name] = value.chunk(2)
            else:
                by_name[name] = value
        return keep_given(by_name, encoding, device_of(pipe.unet))


def refuse_sizes(request: Request, length: str) -> None:
    """Raises ValueError for the height or the width of a picture.

    Args:
        request: The request.
        length: The name of the argument that says how long the audio is.
    """
    for name, value in (("height", request.height), ("width", request.width)):
        if value is not None:
            raise ValueError(f"{name}: expected None, because the pipeline makes audio, got {value!r}; use {length}")
