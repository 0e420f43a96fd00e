"""Everything Stable-Diffusion-style: loading a diffusers pipeline, its prompts, its starting noise, its decoder.

diffusers is imported when a pipeline is loaded. Latent diffusion: Rombach et al., CVPR 2022, arXiv 2112.10752.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .images import check_images, to_pil
from .networks import blocks_checkpointed, check_source, frozen, has_blocks, loading, run_in_dtype

__all__ = ["Decoder", "encode_prompt", "initial_latents", "load_pipeline", "to_pil", "vae_scale_factor"]
COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
PIPELINE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_pipeline(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Any:
    """A text-to-image diffusers pipeline from a local folder or a hub id, in eval mode, its weights frozen.

    model: a folder with model_index.json, or `org/name`. Only safetensors are read, never pickles. The safety checker
        is left out. variant: of the weight files, e.g. "fp16".
    dtype: of all networks; an SDXL VAE that asks for it (`force_upcast`) stays in float32 under fp16, where it
        overflows.

    Raises ValueError: no such folder, no diffusers folder, not on the hub or offline, no UNet pipeline with a VAE, a
    text encoder, a tokenizer and a scheduler, or a UNet that takes more than latents (inpainting, for instance).
    """
    from diffusers import DiffusionPipeline

    source = check_source(model, "model_index.json")
    if dtype not in PIPELINE_DTYPES:
        raise ValueError(f"dtype: expected one of {PIPELINE_DTYPES}, got {dtype!r}")
    with loading(source):
        index = DiffusionPipeline.load_config(source)
    missing = [name for name in COMPONENTS if not any(index.get(name) or ())]
    if missing:
        raise ValueError(
            f"model: expected a pipeline with {', '.join(COMPONENTS)}, got {index.get('_class_name')} in {source!r} "
            f"without {', '.join(missing)}; use a Stable-Diffusion-style model"
        )
    is_xl = "text_encoder_2" in index
    dtypes = {"vae": torch.float32, "default": dtype} if is_xl and dtype == torch.float16 else {"default": dtype}
    options: dict[str, Any] = {"use_safetensors": True, "dtype": dtypes}
    options |= {"safety_checker": None} if "safety_checker" in index else {}
    options |= {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    options |= {"variant": variant} if variant else {}
    with loading(source):
        pipeline = DiffusionPipeline.from_pretrained(source, **options)
    channels, expected = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if channels != expected:
        raise ValueError(
            f"model: expected a UNet of {expected} input channels (the latents'), got {channels} in {source!r}; "
            "inpainting, upscaling and depth models take more than a prompt"
        )
    networks: dict[str, Any] = {k: v for k, v in pipeline.components.items() if isinstance(v, torch.nn.Module)}
    for name, network in networks.items():
        network.eval().requires_grad_(False).to(device)
        wanted = torch.float32 if name == "vae" and "vae" in dtypes and network.config.force_upcast else dtype
        if network.dtype != wanted:  # also where a version of diffusers does not know `dtype` yet
            network.to(wanted)
    return pipeline


@torch.no_grad()
def encode_prompt(
    pipeline: Any,
    prompt: str | list[str],
    negative_prompt: str | list[str] = "",
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """`(cond, uncond, unet_kwargs)` for `Denoiser(pipeline.unet, cond, uncond, **unet_kwargs)`.

    cond, uncond: (N, tokens, features), N prompts. unet_kwargs: {} for Stable Diffusion 1 and 2; for SDXL (arXiv
    2307.01952) `added_cond_kwargs` of text_embeds (2B, features) and time_ids (2B, 6), unconditional half first.
    height, width: of the picture in pixels, for SDXL's time_ids (default: the pipeline's own size).
    batch: B of the latents, of which one prompt serves all.

    Raises TypeError for a prompt that is not text.
    """
    for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        texts = value if isinstance(value, list) else [value]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"{name}: expected a string or a list of strings, got {value!r}")
    count = len(prompt) if isinstance(prompt, list) else 1
    if isinstance(negative_prompt, str):
        # None is the pipelines' word for "no negative prompt": SDXL has embeddings of zeros for it
        negatives: list[str] | None = [negative_prompt] * count if negative_prompt else None
    else:
        negatives = negative_prompt
    device = pipeline.unet.device
    encoded = pipeline.encode_prompt(
        prompt=prompt if isinstance(prompt, list) else [prompt],
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=negatives,
    )
    cond, uncond = encoded[0], encoded[1]
    if len(encoded) < 4:
        return cond, uncond, {}
    pooled = torch.cat([half.expand(max(batch, count), -1) for half in (encoded[3], encoded[2])])
    height, width = _default_size(pipeline, height, width)
    sizes = [height, width, 0, 0, height, width]  # original size, top left corner of the crop, target size
    time_ids = torch.tensor([sizes] * len(pooled), device=device, dtype=cond.dtype)
    return cond, uncond, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def initial_latents(
    pipeline: Any,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    batch: int = 1,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal latents (batch, C, height / f, width / f), f being the VAE's scale factor.

    Drawn in float32 on the CPU, so that a seed means the same picture on every device and in every dtype. Sizes that
    the UNet cannot halve evenly are fine: diffusers' UNets interpolate. device: default the pipeline's.

    Raises ValueError for a height or width that is not a positive multiple of f, or a batch below 1.
    """
    factor = vae_scale_factor(pipeline.vae)
    height, width = _default_size(pipeline, height, width)
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < factor or size % factor:
            near = max(factor, round(size / factor) * factor) if isinstance(size, (int, float)) else factor
            raise ValueError(
                f"{name}: expected a positive multiple of {factor} (the VAE's scale factor), got {size!r}; "
                f"the nearest is {near}"
            )
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch: expected an int of at least 1, got {batch!r}")
    shape = (batch, pipeline.unet.config.in_channels, height // factor, width // factor)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return noise.to(pipeline.unet.device if device is None else device, dtype)


def vae_scale_factor(vae: Any) -> int:
    """Pixels per latent along each axis."""
    factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
    return factor


def _default_size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    size = pipeline.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    factor = vae_scale_factor(pipeline.vae)
    return rows * factor if height is None else height, columns * factor if width is None else width


class Decoder:
    """`images = Decoder(vae)(latents)`: the VAE's decoder as a function of latents alone.

    vae: a diffusers autoencoder. It is called in its own dtype, and the cotangents of fp16 and bf16 are scaled into
    range; its weights get no gradients and it is in eval mode meanwhile. `scaling_factor`, `shift_factor` and
    per-channel means and deviations are read from its config.
    """

    def __init__(self, vae: Any) -> None:
        if not callable(getattr(vae, "decode", None)) or not hasattr(getattr(vae, "config", None), "scaling_factor"):
            raise TypeError(f"vae: expected a diffusers autoencoder (pipe.vae, for instance), got {type(vae).__name__}")
        self.vae = vae
        self._checkpoints = self._singly = False

    def leaner(self) -> Decoder | None:
        """The same decoder for less memory: first its blocks are checkpointed, if they can be, then images are decoded
        one at a time too; both are computed again for a gradient. None after that."""
        other = copy.copy(self)
        if not self._checkpoints and has_blocks(self.vae):
            other._checkpoints = True
        elif not self._singly:
            other._singly = True
        else:
            return None
        return other

    def __call__(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [-1, 1], float32 (float64 from a float64 VAE), of latents (B, C, h, w).

        Differentiable in the latents. Raises ValueError for another shape, and when the VAE overflows in fp16.
        """
        check_images(latents, "latents", self.vae.config.latent_channels)
        scale, shift = self._affine(latents)
        images = run_in_dtype(self._decode, (latents - shift) / scale, self.vae.dtype)
        if self.vae.dtype == torch.float16 and torch.isfinite(latents).all() and not torch.isfinite(images).all():
            raise ValueError(
                "vae: the decoded images hold NaN or Inf because this VAE overflows in fp16; expected finite images: "
                "run it in float32 with vae.float()"
            )
        return images

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, h, w) in the dtype of images (B, 3, H, W) in [-1, 1]: the posterior's mean, or a sample.

        generator: of the sample. H and W must be multiples of the VAE's scale factor (ValueError).
        """
        check_images(images)
        factor = vae_scale_factor(self.vae)
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(f"images: expected height and width in multiples of {factor}, got {tuple(images.shape)}")
        with frozen(self.vae):
            output = self.vae.encode(images.to(self.vae.dtype))
        posterior = getattr(output, "latent_dist", None)
        if posterior is None:  # an autoencoder without a posterior, AutoencoderTiny for instance
            latents = output.latents
        else:
            latents = posterior.sample(generator) if sample or generator is not None else posterior.mode()
        latents = latents.to(torch.promote_types(images.dtype, torch.float32))
        scale, shift = self._affine(latents)
        return (latents * scale + shift).to(images.dtype)

    def _decode(self, z: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        if not self._singly:
            return self._images(z)
        return torch.cat([checkpoint(self._images, one, use_reentrant=False) for one in z.split(1)])

    def _images(self, z: Tensor) -> Tensor:
        blocks = blocks_checkpointed(self.vae) if self._checkpoints else contextlib.nullcontext()
        with frozen(self.vae), blocks:
            images: Tensor = self.vae.decode(z, return_dict=False)[0]
        return images

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """(scale, shift) with `latents = raw * scale + shift`."""
        config = self.vae.config
        scale = float(config.scaling_factor)
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and deviation is not None:
            means, deviations = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, deviation))
            return scale / deviations, -scale * means / deviations
        return scale, -scale * float(getattr(config, "shift_factor", None) or 0.0)
