"""Z-Image: a flow whose network takes every picture with its own prompt, in one sequence (arXiv 2511.22699)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..calling import NetworkAdapter
from ..decoder import vae_scale_factor
from ..guided import Guided
from ..hooks import device_of
from .base import Request
from .flux import PATCH, TRAINING_STEPS
from .masked import MaskedFamily
from .transformer import check_prompts, dynamic_shift, even_sigmas, no_grad_encode

OWN_SIZE = 1024
"""The height and width in pixels of the pipeline's pictures."""


class ZImageCall(NetworkAdapter):
    """Calls Z-Image's transformer as `(x, t, cond, **kwargs)`; it predicts the velocity from noise to picture."""

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor, **kwargs: Any) -> Tensor:
        """Returns the velocity from picture to noise, (B, C, h, w) like x.

        Args:
            x: Latents (B, C, h, w).
            t: The timestep, a 0-dim tensor.
            cond: The prompts' embeddings (B, tokens, features).
            **kwargs: `lengths`, how many tokens each prompt has, (B,); the rest are arguments of the transformer.
        """
        lengths = kwargs.pop("lengths")
        # Numbers on the meta device are not known; estimates are for the longest prompt.
        counts = [cond.shape[1]] * len(x) if lengths.is_meta else lengths.tolist()
        prompts = [states[:count] for states, count in zip(cond, counts, strict=True)]
        time = ((TRAINING_STEPS - t) / TRAINING_STEPS).expand(len(x))
        output = self.module(list(x[:, :, None]), time, prompts, return_dict=False, **kwargs)[0]
        return -torch.stack(list(output))[:, :, 0]


@dataclass(frozen=True)
class ZImageGuidance:
    """Classifier-free guidance as the pipeline has it.

    Attributes:
        largest_norm: A guided prediction has at most this multiple of the norm of the prompt's own; 0 is no bound.
        truncation: The prompt's own prediction is used alone from this time on, which runs from 0 (noise) to 1.
    """

    largest_norm: float
    truncation: float

    def __call__(self, uncond: Tensor, cond: Tensor, scale: float, t: Tensor) -> Tensor:
        """Combines predictions (B, C, h, w)."""
        guided = uncond + scale * (cond - uncond)
        if self.largest_norm > 0:
            dims = tuple(range(1, cond.ndim))
            own, norm = (torch.linalg.vector_norm(one, dim=dims, keepdim=True) for one in (cond, guided))
            guided = guided * (self.largest_norm * own / norm).clamp(max=1)
        time = (TRAINING_STEPS - t.float()) / TRAINING_STEPS
        return torch.where(time.double() > self.truncation, cond, guided)


class ZImage(MaskedFamily):
    """Z-Image and Z-Image-Turbo, whose guidance of scale s is classifier-free guidance of scale 1 + s.

    Beside the arguments of `from_pipeline` it takes `prompt_embeds` and `negative_prompt_embeds`, lists of embeddings
    (tokens, features), `max_sequence_length`, `cfg_normalization`, `cfg_truncation`, `sigmas` and
    `joint_attention_kwargs`.
    """

    pipelines = ("ZImagePipeline",)
    guidance_scale = 5.0
    takes_flows = True
    network_options = frozenset({"joint_attention_kwargs"})
    own_options = frozenset({"sigmas", "cfg_normalization", "cfg_truncation"})

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        height, width = self.size(pipe, request)
        pixels = vae_scale_factor(pipe.vae) * PATCH
        shift = dynamic_shift(pipe.scheduler, (height // pixels) * (width // pixels), 1.15)
        # The network's embedding of the time magnifies a difference in the last digit of float32.
        return {**shift, **even_sigmas(pipe.scheduler, request, torch.float32)}

    def encoding_names(self, pipe: Any) -> set[str]:
        """See `MaskedFamily.encoding_names`."""
        return {"prompt_embeds", "negative_prompt_embeds", "max_sequence_length"}

    def network(self, pipe: Any) -> ZImageCall:
        """See `MaskedFamily.network`."""
        return ZImageCall(pipe.transformer)

    def latents(self, pipe: Any) -> tuple[int, int]:
        """See `MaskedFamily.latents`."""
        return pipe.transformer.config.in_channels, PATCH

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """See `MaskedFamily.size`."""
        height, width = (OWN_SIZE if given is None else given for given in (request.height, request.width))
        return height, width

    def fixed_by(self, pipe: Any) -> str | None:
        """See `MaskedFamily.fixed_by`."""
        is_dynamic = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
        return "this chain's schedule is for (use_dynamic_shifting)" if is_dynamic else None

    def largest(self, pipe: Any) -> int:
        """See `MaskedFamily.largest`."""
        return min(pipe.transformer.config.axes_lens[1:]) * PATCH * vae_scale_factor(pipe.vae)

    def formula_scale(self, guidance_scale: float) -> float:
        """See `MaskedFamily.formula_scale`: the pipeline adds `s (cond - uncond)` to the prediction for the prompt."""
        return 1 + guidance_scale

    def conditions(self, pipe: Any, request: Request, size: tuple[int, int], encoded: Any) -> dict[str, Any]:
        """See `MaskedFamily.conditions`."""
        return {"lengths": encoded}

    def combine(self, pipe: Any, request: Request) -> ZImageGuidance | None:
        """See `MaskedFamily.combine`."""
        largest, truncation = (request.options.get(name) for name in ("cfg_normalization", "cfg_truncation"))
        truncation = 1.0 if truncation is None else float(truncation)
        return ZImageGuidance(float(largest or 0), truncation) if largest or truncation < 1 else None

    def encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | Guided]:
        """Returns the embeddings of the prompts, those of the negative prompts, and how many tokens each has."""
        texts = check_prompts(pipe, request, encoding, guided, None, ("text_encoder", "tokenizer"))
        prompts = [self._states(pipe, "", texts[0], encoding)]
        if guided:
            prompts.append(self._states(pipe, "negative_", texts[1], encoding))
        # Both are padded to one length; the network is given each without its padding.
        padded = pad_sequence([states for rows in prompts for states in rows], batch_first=True)
        cond, *uncond = padded.split([len(rows) for rows in prompts])
        lengths = [torch.tensor([len(states) for states in rows]) for rows in prompts]
        return cond, uncond[0] if guided else None, Guided(lengths[1], lengths[0]) if guided else lengths[0]

    def _states(self, pipe: Any, prefix: str, texts: list[str] | None, encoding: dict[str, Any]) -> list[Tensor]:
        """Returns the embeddings (tokens, features) of each prompt, or those that are given."""
        name = f"{prefix}prompt_embeds"
        given, device = encoding.get(name), device_of(pipe.transformer)
        if given is None:
            options = {key: value for key, value in encoding.items() if key == "max_sequence_length"}
            # The pipeline writes its template into the list that it is given.
            return list(no_grad_encode(pipe, prompt=list(texts or []), do_classifier_free_guidance=False, **options)[0])
        if not isinstance(given, (Sequence, Tensor)) or not all(states.ndim == 2 for states in given):
            raise TypeError(f"{name}: expected a list of tensors (tokens, features), got {type(given).__name__}")
        return [states.to(device) for states in given]
