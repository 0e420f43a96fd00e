"""Wan 2.1 and 2.2: flows of videos from text (arXiv 2503.20314).

Wan 2.2's model of 14 B parameters has two transformers: one for the steps with much noise and one for those with
little, each with a guidance scale of its own. Its model of 5 B parameters gives each token a timestep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked_decoder import ChunkedVideoDecoder
from ..denoiser import Denoiser
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
from .encoding import encode_pair
from .transformer import TransformerCall
from .video_shape import video_space

DEFAULTS = (81, 480, 832)
"""Frames, height and width where the caller of the pipeline gives none."""
MAX_SEQUENCE_LENGTH = 512
"""Tokens of a prompt, where the caller of the pipeline gives none; its `encode_prompt` has another default."""
OTHER_OPTIONS = frozenset({"num_frames", "guidance_scale_2"})
NETWORK_OPTIONS = frozenset({"attention_kwargs"})


class TwoExperts(nn.Module):
    """Two transformers as one network: one for timesteps from a boundary on, the other for those below.

    Args:
        high_noise: The pipeline's `transformer`.
        low_noise: The pipeline's `transformer_2`.
        boundary: The lowest timestep of the first one.
    """

    def __init__(self, high_noise: nn.Module, low_noise: nn.Module, boundary: float) -> None:
        super().__init__()
        self.high_noise, self.low_noise, self.boundary = high_noise, low_noise, boundary
        self.training = high_noise.training or low_noise.training
        self._keep_in_fp32_modules = getattr(high_noise, "_keep_in_fp32_modules", None)

    def forward(self, x: Tensor, timestep: Tensor, **kwargs: Any) -> tuple[Tensor]:
        """Returns the prediction of the transformer that the timestep belongs to, in a tuple."""
        # On the meta device timesteps have no values; the two networks are of one size.
        is_high = timestep.is_meta or bool(timestep.flatten()[0] >= self.boundary)
        network = self.high_noise if is_high else self.low_noise
        return (network(x, timestep=timestep, **kwargs)[0],)


@dataclass(frozen=True)
class TwoScales:
    """Guidance with another scale for the timesteps below a boundary.

    Attributes:
        boundary: The lowest timestep of the denoiser's own scale.
        scale: The guidance scale below.
    """

    boundary: float
    scale: float

    def __call__(self, uncond: Tensor, cond: Tensor, guidance_scale: float, t: Tensor) -> Tensor:
        """Returns the combined prediction. See `Denoiser`."""
        scale = torch.where(t >= self.boundary, guidance_scale, self.scale)
        return uncond + scale * (cond - uncond)


class WanCall(TransformerCall):
    """Calls Wan's transformer as `(x, t, cond, **kwargs)`, where it wants that with a timestep for each token.

    Args:
        module: The transformer, or `TwoExperts`.
        expands: Whether each token gets a timestep.
    """

    def __init__(self, module: nn.Module, expands: bool) -> None:
        super().__init__(module)
        self.expands = expands

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the predicted velocity, (B, C, F, h, w) like x."""
        if not self.expands:
            return super().__call__(x, t, cond, **kwargs)
        frames, height, width = x.shape[2:]
        tokens = t.expand(len(x), frames * (height // 2) * (width // 2))
        output: Tensor = self.module(x, timestep=tokens, encoder_hidden_states=cond, return_dict=False, **kwargs)[0]
        return output


class Wan(Family):
    """Wan 2.1 and 2.2, from text to video, with classifier-free guidance in one batch.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds,
    negative_prompt_embeds, max_sequence_length), `num_frames`, `attention_kwargs`, and for Wan 2.2's two transformers
    `guidance_scale_2`, the guidance scale of the second one.
    """

    pipelines = ("WanPipeline",)
    components = ("transformer", "transformer_2", "vae", "scheduler", "text_encoder", "tokenizer")
    guidance_scale = 5.0
    takes_flows = True

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe)
        boundary = pipe.config.get("boundary_ratio")
        if (getattr(pipe, "transformer_2", None) is None) != (boundary is None):
            has, lacks = ("transformer_2", "boundary_ratio")[:: 1 if boundary is None else -1]
            raise ValueError(
                f"pipe: expected {type(pipe).__name__} with both transformer_2 and boundary_ratio, or neither, got one "
                f"with {has} and no {lacks}, which says from which timestep on the second transformer is called"
            )
        for name in ("transformer", "transformer_2"):
            network, expected = getattr(pipe, name, None), pipe.vae.config.z_dim
            if network is not None and network.config.in_channels != expected:
                raise ValueError(
                    f"pipe: expected a {name} of {expected} input channels (the latents'), got "
                    f"{network.config.in_channels}: Wan's models that start from a picture take more than a prompt"
                )

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale, options = self.scale_of(request), dict(request.options)
        encoding, own = take(options, encoding_options(pipe)), take(options, DENOISER_OPTIONS)
        extra, others = take(options, NETWORK_OPTIONS), take(options, OTHER_OPTIONS)
        refuse_unknown(options, pipe, encoding_options(pipe) | NETWORK_OPTIONS | OTHER_OPTIONS)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        network, combine = self._network(pipe, guidance_scale, others.get("guidance_scale_2"))
        vae = pipe.vae.config
        space = video_space(
            pipe,
            request,
            DEFAULTS,
            pipe.transformer.config.patch_size[1],
            channels=vae.z_dim,
            scale_factor=vae.scale_factor_spatial,
            frame_factor=vae.scale_factor_temporal,
        )
        cond, uncond = encode_pair(pipe, request, encoding, guided, max_sequence_length=MAX_SEQUENCE_LENGTH)
        call = WanCall(network, bool(pipe.config.get("expand_timesteps")))
        denoiser = Denoiser(call, cond, uncond, guidance_scale if guided else 1.0, combine=combine, **own, **extra)
        return Parts(denoiser, space.for_prompts(len(cond)), ChunkedVideoDecoder(pipe.vae, space))

    def _network(self, pipe: Any, guidance_scale: float, second: Any) -> tuple[nn.Module, TwoScales | None]:
        """Returns the network of all timesteps, and how its predictions are combined if that changes with them."""
        low_noise = getattr(pipe, "transformer_2", None)
        if second is not None and (low_noise is None or guidance_scale <= 1):
            why = "there is no transformer_2" if low_noise is None else f"guidance_scale is {guidance_scale:g}"
            raise ValueError(f"guidance_scale_2: expected None because {why}, got {second!r}")
        if low_noise is None:
            return pipe.transformer, None
        boundary = pipe.config.boundary_ratio * pipe.scheduler.config.num_train_timesteps
        experts = TwoExperts(pipe.transformer, low_noise, boundary)
        if second is None:
            return experts, None
        return experts, TwoScales(boundary, self.scale_of(Request(guidance_scale=second)))
