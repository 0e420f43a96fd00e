"""The VAE of a pipeline as a differentiable function from latents to images, and back."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..chain.host_reads import check_later
from ..frozen import level_of
from .images import check_images
from .module_copies import frozen_copy, is_residual_layer, why_not_copied
from .networks import has_blocks, run_in_dtype


def vae_scale_factor(vae: Any) -> int:
    """Returns the number of pixels per latent along each axis."""
    ratio: int | None = getattr(vae, "spatial_compression_ratio", None)
    return ratio or 2 ** (len(vae.config.block_out_channels) - 1)


def latent_channels(vae: Any) -> int:
    """Returns the number of channels of the VAE's latents."""
    config = vae.config
    channels: int = config.latent_channels if hasattr(config, "latent_channels") else config.z_dim
    return channels


class Decoder:
    """The VAE's decoder as a differentiable function of latents alone, and its encoder.

    The VAE is called in its own dtype and in eval mode, and its weights get no gradients. The cotangents of an fp16 or
    bf16 VAE are scaled into range. `scaling_factor`, `shift_factor` and the means and deviations of the channels are
    read from its config.

    Args:
        vae: A diffusers autoencoder, `pipe.vae` for instance.
        lean: Whether graphs keep no more than the gradient needs (docs/lean.md).

    Raises:
        TypeError: `vae` is no diffusers autoencoder.
        ValueError: `lean` is neither True, False nor "recompute".

    Example:
        >>> images = Decoder(pipe.vae)(latents)
    """

    def __init__(self, vae: Any, lean: bool | str = True) -> None:
        config = getattr(vae, "config", None)
        is_scaled = any(hasattr(config, name) for name in ("scaling_factor", "latents_mean", "batch_norm_eps"))
        if not callable(getattr(vae, "decode", None)) or not is_scaled:
            raise TypeError(f"vae: expected a diffusers autoencoder (pipe.vae, for instance), got {type(vae).__name__}")
        self.vae, self.lean = vae, level_of(lean)
        self._checkpoints = self._singly = self._layers = False

    def leaner(self) -> Decoder | None:
        """Returns a decoder of the same images that needs less memory and more time for a gradient.

        The first call checkpoints the VAE's blocks, if they can be; the next decodes the images one at a time as well;
        the third checkpoints the residual layers inside the blocks too, when a block is computed again.

        Returns:
            The other decoder, or None where nothing is left to save.
        """
        other = copy.copy(self)
        if not self._checkpoints and self._can_checkpoint():
            other._checkpoints = True
        elif not self._singly:
            other._singly = True
        elif self._checkpoints and not self._layers and self._has_layers():
            other._layers = True
        else:
            return None
        return other

    def __call__(self, latents: Tensor) -> Tensor:
        """Decodes latents, differentiably.

        Args:
            latents: A floating-point tensor (B, C, h, w), as the diffusion model has them.

        Returns:
            Images (B, 3, H, W), nominally in [-1, 1], in float32 (float64 from a float64 VAE).

        Raises:
            TypeError: `latents` is no floating-point tensor.
            ValueError: `latents` has another shape, or the VAE overflows in fp16.
        """
        check_images(latents, "latents", latent_channels(self.vae))
        return self._decoded(latents)

    def _can_checkpoint(self) -> bool:
        """Whether there is a version that computes activations again."""
        # Some video autoencoders have the switch and never read it.
        return has_blocks(self.vae) and bool(getattr(self.vae, "_supports_gradient_checkpointing", True))

    def _has_layers(self) -> bool:
        """Whether the VAE has layers inside its blocks that can be checkpointed by themselves."""
        return why_not_copied(self.vae) is None and any(map(is_residual_layer, self.vae.modules()))

    def _decoded(self, latents: Tensor) -> Tensor:
        """Returns what the VAE makes of latents whose shape is checked."""
        images = run_in_dtype(self._decode, self.raw(latents), self.vae.dtype)
        if self.vae.dtype == torch.float16 and not latents.is_meta:  # Tensors on "meta" have a shape alone.
            finite = [torch.isfinite(tensor.detach()).all() for tensor in (latents, images)]
            check_later(torch.stack([flag.to(images.device) for flag in finite]), _check_overflow)
        return images

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encodes images, without gradient.

        Args:
            images: A floating-point tensor (B, 3, H, W) in [-1, 1].
            sample: Whether to draw from the posterior instead of taking its mean.
            generator: Where the sample is drawn from; it implies `sample`.

        Returns:
            Latents (B, C, h, w) in the dtype of `images`.

        Raises:
            TypeError: `images` is no floating-point tensor.
            ValueError: `images` has another shape, or H or W is no multiple of the VAE's scale factor.
        """
        check_images(images)
        factor = self._pixels()
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(f"images: expected height and width in multiples of {factor}, got {tuple(images.shape)}")
        latents = self._encode(images, sample, generator).to(torch.promote_types(images.dtype, torch.float32))
        scale, shift = self._affine(latents)
        return (latents * scale + shift).to(images.dtype)

    def _pixels(self) -> int:
        """The number of which the height and the width of a picture are multiples."""
        return vae_scale_factor(self.vae)

    def raw(self, latents: Tensor) -> Tensor:
        """Returns what the VAE itself has in the place of latents: without the scale and shift of its configuration."""
        scale, shift = self._affine(latents)
        return (latents - shift) / scale

    def _encode(self, images: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        """Returns the latents that the VAE makes of images."""
        with frozen_copy(self.vae) as vae:
            output = vae.encode(images.to(vae.dtype))
        posterior = getattr(output, "latent_dist", None)
        # Autoencoders such as AutoencoderTiny and AutoencoderDC have no posterior.
        latents: Tensor
        if posterior is None:
            latents = output.latents if hasattr(output, "latents") else output.latent
        else:
            latents = posterior.sample(generator) if sample or generator is not None else posterior.mode()
        return latents

    def _decode(self, z: Tensor) -> Tensor:
        """Decodes raw latents, all at once or one at a time."""
        from torch.utils.checkpoint import checkpoint

        if not self._singly or len(z) == 1:
            return self._images(z)
        # The checkpoint of this package's blocks would not compute less again here: with a small AutoencoderKL both had
        # the same peak and the same number of operations.
        return torch.cat(
            [checkpoint(self._images, one, use_reentrant=False, preserve_rng_state=False) for one in z.split(1)]
        )

    def _images(self, z: Tensor) -> Tensor:
        """Calls the VAE."""
        with frozen_copy(self.vae, self._checkpoints, self.lean, self._layers) as vae:
            images: Tensor = vae.decode(z, return_dict=False)[0]
        return images

    def _affine(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Returns (scale, shift) with `latents = raw * scale + shift`, where raw is what the VAE has."""
        config = self.vae.config
        scale = float(getattr(config, "scaling_factor", None) or 1.0)
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and deviation is not None:
            shape = 1, -1, *[1] * (like.ndim - 2)
            means, deviations = (like.new_tensor(values).reshape(shape) for values in (mean, deviation))
            return scale / deviations, -scale * means / deviations
        return scale, -scale * float(getattr(config, "shift_factor", None) or 0.0)


def _check_overflow(finite: list[float]) -> None:
    """Raises ValueError if latents are finite and their images are not."""
    if finite[0] and not finite[1]:
        raise ValueError(
            "vae: the decoded images hold NaN or Inf because this VAE overflows in fp16; expected finite images: "
            "run it in float32 with vae.float()"
        )
