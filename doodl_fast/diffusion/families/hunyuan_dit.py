"""HunyuanDiT: diffusion with a transformer and two text encoders, CLIP and T5 (Li et al., arXiv 2405.08748)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..combining import RescaledGuidance
from ..decoder import vae_scale_factor
from ..guided import Guided
from ..hooks import device_of
from .base import Request, keep_given
from .encoding import NAMES
from .masked import MaskedFamily, warn_unbinned
from .transformer import TransformerCall, check_prompts, no_grad_encode

BASE_SIZE = 512
"""The height and width in pixels to which the places of patches are scaled."""
VAE_FACTOR = 8
"""The pipeline counts the patches of its rotary embedding with this factor, whatever its VAE's is."""
RETURNED = ("prompt_embeds", "negative_prompt_embeds", "prompt_attention_mask", "negative_prompt_attention_mask")
ENCODERS = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class HunyuanDiTCall(TransformerCall):
    """Calls HunyuanDiT's transformer as `(x, t, cond, **kwargs)`, and drops the variance that it predicts besides."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted noise, (B, C, h, w) like x."""
        places = _rotary_embedding(self.module, x.shape[-2], x.shape[-1], x.device)
        # The network computes its embedding of the time in the dtype of the timestep.
        output = super().__call__(x, t.to(x.dtype), cond, image_rotary_emb=places, **kwargs)
        return output[:, : x.shape[1]]


def _rotary_embedding(transformer: Any, height: int, width: int, device: torch.device) -> Any:
    """Returns the rotary embedding of latents (B, C, height, width), whose places are scaled to a square."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    patch = transformer.config.patch_size
    side, grid = BASE_SIZE // VAE_FACTOR // patch, (height // patch, width // patch)
    longest = max(grid)
    shape = [round(side / longest * count) for count in grid]
    corner = [round((side - length) / 2.0) for length in shape]
    end = [start + length for start, length in zip(corner, shape, strict=True)]
    head = transformer.inner_dim // transformer.num_heads
    return get_2d_rotary_pos_embed(head, (corner, end), grid, device=device, output_type="pt")


class HunyuanDiT(MaskedFamily):
    """HunyuanDiT, with classifier-free guidance in one batch.

    It takes the embeddings and masks of both text encoders (`prompt_embeds`, `prompt_embeds_2`,
    `prompt_attention_mask`, ...), `guidance_rescale`, `original_size`, `target_size` and `crops_coords_top_left`. Sizes
    are used as they are: the resolution binning of the pipeline is not part of the chain.
    """

    pipelines = ("HunyuanDiTPipeline",)
    components = (*MaskedFamily.components, *ENCODERS[2:], "safety_checker", "feature_extractor")
    guidance_scale = 5.0
    network_options = frozenset()
    own_options = frozenset({"guidance_rescale", "original_size", "target_size", "crops_coords_top_left"})

    def encoding_names(self, pipe: Any) -> set[str]:
        """See `MaskedFamily.encoding_names`."""
        return {f"{name}{suffix}" for name in NAMES for suffix in ("", "_2")}

    def network(self, pipe: Any) -> HunyuanDiTCall:
        """See `MaskedFamily.network`."""
        return HunyuanDiTCall(pipe.transformer)

    def conditions(self, pipe: Any, request: Request, size: tuple[int, int], encoded: Any) -> dict[str, Any]:
        """See `MaskedFamily.conditions`."""
        options = request.options
        sizes = [
            *options.get("original_size", (1024, 1024)),
            *(options.get("target_size") or size),
            *options.get("crops_coords_top_left", (0, 0)),
        ]
        like = {"device": device_of(pipe.transformer), "dtype": pipe.transformer.dtype}
        style = torch.zeros(1, dtype=torch.long, device=device_of(pipe.transformer))
        return {**encoded, "image_meta_size": torch.tensor([sizes], **like), "style": style}

    def combine(self, pipe: Any, request: Request) -> RescaledGuidance | None:
        """See `MaskedFamily.combine`."""
        rescale = request.options.get("guidance_rescale", 0.0)
        return RescaledGuidance(rescale) if rescale > 0 else None

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `MaskedFamily.size`; it says that other sizes than the pipeline's own are not binned."""
        size = super().size(pipe, request)
        warn_unbinned(pipe, request, size, pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae))
        return size

    def fixed_by(self, pipe: Any) -> str | None:
        """See `MaskedFamily.fixed_by`."""
        is_told = pipe.transformer.config.use_style_cond_and_image_meta_size
        return "this chain's conditions tell the network" if is_told else None

    def encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Returns CLIP's embeddings of the prompts and of the negative prompts, and the arguments with all others."""
        config = pipe.transformer.config
        pairs: list[dict[str, Tensor | None]] = []
        for suffix, encoders, tokens in (("", ENCODERS[:2], config.text_len), ("_2", ENCODERS[2:], config.text_len_t5)):
            given = {name: encoding.get(f"{name}{suffix}") for name in NAMES}
            _check_given(given, suffix, encoding, guided, tokens)
            prompts, negatives = check_prompts(pipe, request, given, guided, "prompt_attention_mask", encoders)
            made = no_grad_encode(
                pipe,
                prompt=prompts,
                negative_prompt=negatives,
                do_classifier_free_guidance=guided,
                dtype=pipe.transformer.dtype,
                max_sequence_length=tokens,
                text_encoder_index=len(pairs),
                **given,
            )
            pairs.append(keep_given(dict(zip(RETURNED, made, strict=True)), given, device_of(pipe.transformer)))
        clip, t5 = pairs
        cond, uncond = clip["prompt_embeds"], clip["negative_prompt_embeds"] if guided else None
        assert cond is not None
        encoded = {
            "text_embedding_mask": _pair(clip, "prompt_attention_mask", guided),
            "encoder_hidden_states_t5": _pair(t5, "prompt_embeds", guided),
            "text_embedding_mask_t5": _pair(t5, "prompt_attention_mask", guided),
        }
        return cond, uncond, encoded


def _pair(found: dict[str, Tensor | None], name: str, guided: bool) -> Tensor | Guided:
    """Returns what belongs to the prompts, with guidance paired with what belongs to the negative prompts."""
    own, other = found[name], found[f"negative_{name}"]
    assert own is not None
    if not guided:
        return own
    assert other is not None
    return Guided(other, own)


def _check_given(given: dict[str, Any], suffix: str, encoding: dict[str, Any], guided: bool, tokens: int) -> None:
    """Raises ValueError, naming the argument, for embeddings that do not fit the network or each other."""
    for prefix in ("", "negative_") if guided else ("",):
        name = f"{prefix}prompt_embeds"
        first, second = (encoding.get(f"{name}{end}") for end in ("", "_2"))
        if (first is None) != (second is None):
            lost, lone = (f"{name}_2", name) if second is None else (name, f"{name}_2")
            raise ValueError(f"{lost}: expected a tensor because {lone} is given, got None")
        states = given[name]
        if states is not None and states.shape[1] != tokens:
            raise ValueError(f"{name}{suffix}: expected {tokens} tokens, padding included, got {states.shape[1]}")
