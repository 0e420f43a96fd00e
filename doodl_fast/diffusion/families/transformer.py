"""What the families whose network is a diffusers transformer share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import vae_scale_factor
from ..hooks import device_of
from ..latent_space import LatentSpace, check_size
from ..prompts import prompt_texts
from .base import Request, network_of, say, warn_unused_negative_prompt


class TransformerCall(NetworkAdapter):
    """Calls a diffusers transformer as `(x, t, cond, **kwargs)`, with one timestep for each row of the batch.

    Args:
        module: The transformer.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """Returns the network's prediction.

        Args:
            x: Latents (B, C, h, w).
            t: The timestep, a 0-dim tensor.
            cond: The prompts' embeddings, (B, tokens, features).
            **kwargs: Further arguments of the transformer.
        """
        output: Tensor = self.module(
            x, timestep=t.expand(len(x)), encoder_hidden_states=cond, return_dict=False, **kwargs
        )[0]
        return output


def check_prompts(
    pipe: Any,
    request: Request,
    encoding: Mapping[str, Any],
    guided: bool,
    companion: str | None,
    encoders: tuple[str, ...],
) -> tuple[list[str] | None, list[str] | None]:
    """Checks the prompts and embeddings, and returns the prompts as lists, or None where there are embeddings.

    Args:
        pipe: The pipeline.
        request: Its prompt and negative prompt.
        encoding: The embeddings that are given, and other arguments of `encode_prompt`.
        guided: Whether the negative prompt is used.
        companion: The name of what belongs to `prompt_embeds`, the pooled embeddings for instance; None if nothing
            does.
        encoders: The components without which no text can be encoded.

    Raises:
        TypeError: A prompt is no text.
        ValueError: A prompt and its embeddings are both given, embeddings lack their companion, the pipeline has no
            text encoder, or there are not as many negative prompts as prompts.
    """
    texts, count = prompt_texts(request.prompt, request.negative_texts, encoding)
    lacking = [part for part in encoders if getattr(pipe, part, None) is None]
    for prefix in ("", "negative_") if guided else ("",):
        name, embeds, other = f"{prefix}prompt", f"{prefix}prompt_embeds", f"{prefix}{companion}"
        if companion is not None and (encoding.get(other) is None) != (encoding.get(embeds) is None):
            lone, lost = (embeds, other) if encoding.get(other) is None else (other, embeds)
            raise ValueError(f"{lost}: expected a tensor because {lone} is given, got None")
        if texts[name] is not None and lacking:
            raise ValueError(
                f"{name}: {type(pipe).__name__} has no {', '.join(lacking)}, so it cannot encode a text; pass "
                f"{embeds}{'' if companion is None else f' and {other}'} instead"
            )
    prompts, negative = texts["prompt"], texts["negative_prompt"]
    negatives = [negative] * count if isinstance(negative, str) else negative
    if guided and negatives is not None and len(negatives) != count:
        raise ValueError(f"negative_prompt: expected one text, or {count}, one for each prompt, got {len(negatives)}")
    return [prompts] if isinstance(prompts, str) else prompts, negatives


def transformer_space(
    pipe: Any,
    size: tuple[int, int],
    channels: int,
    patch: int,
    prompts: int = 1,
    fixed_by: str | None = None,
    largest: int | None = None,
) -> LatentSpace:
    """Returns the latent space of a pipeline with a transformer and a VAE.

    Args:
        pipe: The pipeline.
        size: Default height and width of a picture in pixels.
        channels: Channels of the latents.
        patch: Latents per patch of the network, along each axis.
        prompts: How many prompts the chain's conditions hold.
        fixed_by: What holds the size, in words, if noise of another size would be wrong.
        largest: The largest height and width in pixels that the network has positions for.

    Raises:
        ValueError: A size is no positive multiple of the VAE's scale factor times the patch size, or too large.
    """
    factor = vae_scale_factor(pipe.vae)
    for name, pixels in zip(("height", "width"), size, strict=True):
        check_size(name, pixels, factor, patch, largest)
    return LatentSpace(
        channels,
        factor,
        *size,
        device=device_of(pipe.transformer),
        fixed_size=fixed_by is not None,
        prompts=prompts,
        patch=patch,
        largest=largest,
        fixed_by=fixed_by or "",
    )


def dynamic_shift(scheduler: Any, tokens: int, max_shift: float) -> dict[str, float]:
    """Returns `mu`, by which a flow-matching scheduler with dynamic shifting moves its noise levels for large pictures.

    It is linear in the number of patches (Esser et al., arXiv 2403.03206).

    Args:
        scheduler: The pipeline's scheduler.
        tokens: How many patches a picture has.
        max_shift: What `mu` is at the scheduler's `max_image_seq_len`, where its settings do not say.

    Returns:
        A dictionary with mu, or an empty one where the scheduler does not shift dynamically.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (high - low) / (most - least)
    return {"mu": tokens * slope + (low - slope * least)}


def even_sigmas(scheduler: Any, request: Request, dtype: torch.dtype = torch.float64) -> dict[str, list[float]]:
    """Returns the `sigmas` that pipelines such as FLUX's give their scheduler: evenly spaced, or the caller's.

    Args:
        scheduler: The pipeline's scheduler.
        request: The arguments of `from_pipeline`.
        dtype: In which the pipeline spaces them.

    Returns:
        A dictionary with sigmas, or an empty one where the scheduler chooses them itself.
    """
    sigmas, steps = request.options.get("sigmas"), request.num_inference_steps
    if sigmas is not None:
        return {"sigmas": sigmas}
    takes_sigmas = "sigmas" in inspect.signature(scheduler.set_timesteps).parameters
    if scheduler.config.get("use_flow_sigmas") or not takes_sigmas:
        return {}
    return {"sigmas": torch.linspace(1, 1 / steps, steps, dtype=dtype).tolist()}


def has_negative_prompt(request: Request) -> bool:
    """Whether a negative prompt or its embeddings are given, without which some pipelines do not guide."""
    return request.negative_prompt is not None or request.options.get("negative_prompt_embeds") is not None


def true_guidance(pipe: Any, request: Request, scale: float) -> bool:
    """Whether a pipeline with `true_cfg_scale` guides, which takes a scale above 1 and a negative prompt; says why not.

    Args:
        pipe: The pipeline.
        request: Its negative prompt.
        scale: The `true_cfg_scale`.
    """
    if scale > 1 and not has_negative_prompt(request):
        say(
            f"true_cfg_scale: {scale:g} is not used without a negative prompt, as in {type(pipe).__name__}; pass one, "
            'negative_prompt="" for instance'
        )
        return False
    if scale <= 1:
        why = f"with true_cfg_scale={scale:g}; classifier-free guidance needs more than 1"
        warn_unused_negative_prompt(request, why)
    return scale > 1


def padded(states: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Returns embeddings (B, n, features) and their mask (B, n) with zeros behind, so that they have more tokens."""
    missing = tokens - states.shape[1]
    return F.pad(states, (0, 0, 0, missing)), F.pad(mask, (0, missing))


def refuse_ip_adapter(pipe: Any, is_loaded: bool) -> None:
    """Raises ValueError for a transformer with an IP-Adapter, whose pictures from_pipeline does not take."""
    if is_loaded:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has an IP-Adapter, which from_pipeline would ignore; remove it with "
            "pipe.unload_ip_adapter()"
        )


def no_grad_encode(pipe: Any, **arguments: Any) -> Any:
    """Calls the pipeline's `encode_prompt` without gradient, for one picture, video or waveform of each prompt."""
    known = inspect.signature(pipe.encode_prompt).parameters
    counts = {name: 1 for name in known if name.startswith("num_") and name.endswith("_per_prompt")}
    with torch.no_grad():
        return pipe.encode_prompt(device=device_of(network_of(pipe)), **counts, **arguments)
