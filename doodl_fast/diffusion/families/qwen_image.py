"""Qwen-Image: a flow whose guidance keeps the norm of the prediction for the prompt (arXiv 2508.02324)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import Decoder, vae_scale_factor
from ..denoiser import Denoiser
from ..guided import Guided
from ..hooks import device_of
from .base import DENOISER_OPTIONS, Family, Parts, Request, encoding_options, keep_given, refuse_unknown, say, take
from .flux import PATCH, TRAINING_STEPS, pack, unpack
from .transformer import (
    check_prompts,
    dynamic_shift,
    even_sigmas,
    no_grad_encode,
    padded,
    transformer_space,
    true_guidance,
)

NETWORK_OPTIONS = frozenset({"attention_kwargs"})
NEGATIVE = frozenset({"negative_prompt_embeds", "negative_prompt_embeds_mask"})
OTHER_OPTIONS = frozenset({"true_cfg_scale", "sigmas"})
MAX_TOKENS = 512
"""The default of the pipeline's `__call__`, not of its `encode_prompt`."""
MOST_TOKENS = 1024


class QwenImageCall(NetworkAdapter):
    """Calls Qwen-Image's transformer as `(x, t, cond, **kwargs)` on latents that are not packed."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the network's prediction, (B, C, h, w) like x."""
        height, width = x.shape[-2:]
        output = self.module(
            hidden_states=pack(x),
            timestep=t.expand(len(x)).to(x.dtype) / TRAINING_STEPS,
            encoder_hidden_states=cond,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(x),
            return_dict=False,
            **kwargs,
        )[0]
        return unpack(output, height, width)


class FrameDecoder(Decoder):
    """A VAE of videos (B, C, frames, h, w), for latents and pictures of one frame."""

    def _images(self, z: Tensor) -> Tensor:
        return super()._images(z[:, :, None])[:, :, 0]

    def _encode(self, images: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        return super()._encode(images[:, :, None], sample, generator)[:, :, 0]


def keep_norm(uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
    """Combines predictions (B, C, h, w) as `uncond + scale (cond - uncond)`, with the norms of cond's patches."""
    height, width = cond.shape[-2:]
    cond = pack(cond)
    uncond = pack(uncond)
    guided = uncond + scale * (cond - uncond)
    return unpack(guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)), height, width)


class QwenImage(Family):
    """Qwen-Image, with classifier-free guidance by `true_cfg_scale` where there is a negative prompt.

    Beside the arguments of `from_pipeline` it takes `prompt_embeds` and `prompt_embeds_mask`, their negative
    companions, `max_sequence_length`, `true_cfg_scale`, `sigmas` and `attention_kwargs`.
    """

    pipelines = ("QwenImagePipeline",)
    components = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 4.0
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe, ("transformer", "vae", "scheduler"))
        if pipe.transformer.config.guidance_embeds:
            raise ValueError(
                "pipe: expected a transformer with guidance_embeds=False, got True, whose forward fails in diffusers"
            )

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * PATCH
        shift = dynamic_shift(pipe.scheduler, (height // pixels) * (width // pixels), 1.15)
        return {**shift, **even_sigmas(pipe.scheduler, request)}

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        options = dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, negative, other = take(options, NETWORK_OPTIONS), take(options, NEGATIVE), take(options, OTHER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | NEGATIVE | OTHER_OPTIONS)
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        space = transformer_space(
            pipe,
            self.size(pipe, request),
            pipe.transformer.config.in_channels // PATCH**2,
            PATCH,
            fixed_by="this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None,
        )
        if request.guidance_scale != "auto":
            say(
                "guidance_scale: it is not used, because this network does not embed it; the scale of Qwen-Image's "
                "guidance is true_cfg_scale"
            )
        scale = float(other.get("true_cfg_scale", self.guidance_scale))
        guided = true_guidance(pipe, request, scale)
        cond, uncond, masks = self._encode(pipe, request, encoding, negative, guided)
        network = QwenImageCall(pipe.transformer)
        scale = scale if guided else 1.0
        extra["encoder_hidden_states_mask"] = masks
        denoiser = Denoiser(network, cond, uncond, scale, combine=keep_norm, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), FrameDecoder(pipe.vae))

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels."""
        own = pipe.default_sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def _encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], negative: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None, Guided | Tensor | None]:
        """Returns the embeddings of the prompts, those of the negative prompts, and the masks of their tokens."""
        prompts, negatives = check_prompts(
            pipe, request, {**encoding, **negative}, guided, None, ("text_encoder", "tokenizer")
        )
        tokens = encoding.pop("max_sequence_length", MAX_TOKENS)
        if tokens > MOST_TOKENS:
            raise ValueError(f"max_sequence_length: expected at most {MOST_TOKENS}, got {tokens}")
        cond, mask = _states(pipe, "", prompts, encoding, tokens)
        if not guided:
            return cond, None, None if _is_full(mask) else mask
        uncond, negative_mask = _states(pipe, "negative_", negatives, negative, tokens)
        # The pipeline calls the network twice. In one batch the shorter prompt is padded, and the mask hides that.
        longest = max(cond.shape[1], uncond.shape[1])
        cond, mask = padded(cond, mask, longest)
        uncond, negative_mask = padded(uncond, negative_mask, longest)
        masks = None if _is_full(mask) and _is_full(negative_mask) else Guided(negative_mask, mask)
        return cond, uncond, masks


def _is_full(mask: Tensor) -> bool:
    """Whether a mask hides no token. On the meta device, where its values are not known, it hides none."""
    return mask.is_meta or bool(mask.all())


def _states(
    pipe: Any, prefix: str, prompts: list[str] | None, given: dict[str, Any], tokens: int
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings (B, n, features) of prompts, or those that are given, and the mask (B, n) of their tokens.

    Args:
        pipe: The pipeline.
        prefix: "negative_" or "", before the names of the embeddings.
        prompts: The prompts, or None with embeddings.
        given: Embeddings and their mask, by name.
        tokens: The largest number of tokens.
    """
    names = ("prompt_embeds", "prompt_embeds_mask")
    states, mask = (given.get(prefix + name) for name in names)
    if states is not None and states.shape[1] > tokens:
        raise ValueError(
            f"{prefix}prompt_embeds: expected at most {tokens} tokens, got {states.shape[1]}; pass a larger "
            "max_sequence_length, or fewer tokens"
        )
    made = no_grad_encode(
        pipe, prompt=prompts, prompt_embeds=states, prompt_embeds_mask=mask, max_sequence_length=tokens
    )
    found = keep_given(
        dict(zip(names, made, strict=True)), {names[0]: states, names[1]: mask}, device_of(pipe.transformer)
    )
    states, mask = (found[name] for name in names)
    assert states is not None
    return states, torch.ones(states.shape[:2], dtype=torch.long, device=states.device) if mask is None else mask
