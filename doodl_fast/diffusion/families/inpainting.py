"""Inpainting: a mask says which part of a picture is made anew (Rombach et al., CVPR 2022, arXiv 2112.10752)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoder import Decoder
from ..guided import Guided
from ..hooks import device_of
from ..schedule import noise_levels
from .additions import Addition, AroundUNet, Build
from .base import Request
from .image_to_image import from_picture, prepared, strength_of

INPAINTING = tuple(f"StableDiffusion{xl}{kind}InpaintPipeline" for xl in ("", "XL") for kind in ("", "ControlNet"))


class Inpainting(Addition):
    """A picture of which a mask says what is made anew.

    A UNet of 9 channels sees the mask and the masked picture beside the latents. With a UNet of 4 channels the pipeline
    puts the known part of the picture, with noise, into the latents after each step. Here the picture that the network
    predicts is replaced by the known one outside of the mask, which gives the same latents there at every noise level,
    and the decoder puts in the known part without noise, as the pipeline does after its last step.
    """

    pipelines = INPAINTING
    sees_more = True
    options = frozenset({"image", "mask_image", "masked_image_latents", "strength", "padding_mask_crop"})

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        self._image, self._mask = options.get("image"), options.get("mask_image")
        self._masked = options.get("masked_image_latents")
        channels = pipe.unet.config.in_channels
        if options.get("padding_mask_crop") is not None:
            raise ValueError(
                "padding_mask_crop: expected None, because from_pipeline makes no crop of the picture and puts none "
                "back; crop the picture and the mask before"
            )
        if (self._image is None) != (self._mask is None) or (self._image is None and channels == 9):
            missing = "image" if self._image is None else "mask_image"
            raise TypeError(f"{missing}: expected a picture, because {type(pipe).__name__} paints in a part of one")
        if channels not in (4, 9):
            raise ValueError(f"pipe: expected a UNet of 4 or 9 input channels for inpainting, got {channels}")
        self._sees = channels == 9
        for name in ("denoising_start", "denoising_end"):
            if self._image is not None and request.options.get(name) is not None:
                raise ValueError(f"{name}: expected None with a mask, got {request.options[name]!r}")
        if self._image is not None and not self._sees and strength_of(pipe, options) == 1:
            _refuse_pure_noise(pipe, request)

    def add(self, build: Build) -> None:
        """Gives the UNet the mask and the masked picture, or keeps the known part of the latents."""
        if self._image is None:
            return
        pipe, space = build.pipe, build.space
        size = (space.height, space.width)
        image = prepared(pipe, self._image, *size).to(space.device)
        mask = pipe.mask_processor.preprocess(self._mask, *size).to(space.device, torch.float32)
        small = F.interpolate(mask, size=(size[0] // space.scale_factor, size[1] // space.scale_factor))
        is_latent, draws_first = image.shape[1] == space.channels, False
        if self._sees:
            masked = self._masked
            if masked is None:
                if is_latent:
                    raise TypeError("masked_image_latents: expected a tensor because image holds latents, got None")
                masked = build.decoder.encode(image * (mask < 0.5))
            shown = torch.cat([small.expand(len(masked), -1, -1, -1), masked.to(small)], dim=1)
            build.network = SeeingUNet(build.network)
            build.kwargs["shown"] = Guided(shown, shown)
        else:
            known = image if is_latent else build.decoder.encode(image)
            build.network = KnowingUNet(build.network, pipe.scheduler, build.request.timesteps)
            build.kwargs["mask"], build.kwargs["known"] = Guided(small, small), Guided(known, known)
            build.decoder = PastingDecoder(build.decoder, small, known)
            image, draws_first = known, not is_latent
        if not self._sees or strength_of(pipe, build.request.options) < 1:
            build.space = from_picture(space, image, build.decoder, build.request.start, draws_first)


def _refuse_pure_noise(pipe: Any, request: Request) -> None:
    """Raises ValueError where the first noise level is not pure noise, but the pipeline would start from that."""
    share = noise_levels(pipe.scheduler)[int(request.timesteps[0])] ** 0.5
    if share > 0:
        raise ValueError(
            "strength: expected a number below 1, 0.99 for instance, with a mask and a UNet of 4 channels, got 1: the "
            "pipeline then starts from noise alone also where the picture is known, which is no noise level of this "
            f"schedule (its first one has {share:.2g} of the picture)"
        )


class SeeingUNet(AroundUNet):
    """A UNet that sees more channels than the latents have."""

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, shown: Tensor, **kwargs: Any
    ) -> tuple[Tensor]:
        """Returns the UNet's prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            shown: The other channels, (B, channels, h, w).
            **kwargs: Further arguments of the UNet.
        """
        return (self.predict(torch.cat([sample, shown], dim=1), timestep, encoder_hidden_states, **kwargs),)


class KnowingUNet(AroundUNet):
    """A UNet whose predicted picture is replaced by a known one outside of a mask.

    Args:
        unet: The UNet.
        scheduler: The pipeline's scheduler, whose noise levels belong to the timesteps.
        timesteps: Those of the chain.

    Raises:
        ValueError: A timestep has a fraction, so that its noise level is not known, or the level is zero.
    """

    levels: Tensor

    def __init__(self, unet: Any, scheduler: Any, timesteps: tuple[int | float, ...]) -> None:
        super().__init__(unet)
        if any(t != int(t) for t in timesteps):
            raise ValueError(
                "mask_image: expected a scheduler with whole timesteps, because the noise level of the known part of "
                f"the picture is found by them, got timesteps such as {next(t for t in timesteps if t != int(t)):g}"
            )
        alphas = torch.tensor(noise_levels(scheduler), dtype=torch.float64)
        levels = torch.stack([alphas.sqrt(), (1 - alphas).sqrt()], dim=1).float()
        self.register_buffer("levels", levels.to(device_of(unet)))
        self.predicts = scheduler.config.get("prediction_type", "epsilon")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        mask: Tensor,
        known: Tensor,
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """Returns the prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            mask: (B, 1, h, w), 1 where the picture is made anew.
            known: The known picture's latents, (B, C, h, w).
            **kwargs: Further arguments of the UNet.
        """
        found = self.predict(sample, timestep, encoder_hidden_states, **kwargs)
        signal, noise = self.levels.index_select(0, timestep.reshape(1).long())[0]
        drawn = (sample - signal * known) / noise
        right = {"epsilon": drawn, "sample": known, "v_prediction": signal * drawn - noise * known}[self.predicts]
        return (mask * found + (1 - mask) * right,)


class PastingDecoder(Decoder):
    """A decoder that puts the known part of a picture into the latents first.

    Args:
        decoder: The VAE.
        mask: (1 or B, 1, h, w), 1 where the picture is made anew.
        known: The known picture's latents, (1 or B, C, h, w).
    """

    def __init__(self, decoder: Decoder, mask: Tensor, known: Tensor) -> None:
        self.__dict__.update(copy.copy(decoder).__dict__)
        self._mask, self._known = mask, known

    def __call__(self, latents: Tensor) -> Tensor:
        """See `Decoder.__call__`."""
        mask, known = self._mask.to(latents), self._known.to(latents)
        return super().__call__(mask * latents + (1 - mask) * known)
