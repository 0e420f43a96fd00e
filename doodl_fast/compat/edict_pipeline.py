"""`EDICTPipeline`, with the arguments of the pipeline of this name among diffusers' community pipelines.

EDICT: Wallace, Gokul and Naik, CVPR 2023, arXiv 2211.12446. This is the one file of the package that imports diffusers
when it is imported, because a pipeline derives from one of its classes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ..chain.chain import Chain
from ..diffusion.denoiser import Denoiser
from ..diffusion.hooks import device_of
from ..diffusion.pipeline import Decoder, vae_scale_factor
from .edict import coupled_program
from .edict_scheduler import stepping_schedule

OUTPUTS = ("latent", "pt", "np", "pil")


class EDICTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Edits a picture by EDICT: it is inverted under one prompt and generated again under another.

    Its results are those of the community pipeline, with these differences. The latents between the steps are float64.
    The inversion undoes the generation for every number of steps; the community pipeline's undoes it for even numbers
    alone. A scheduler's prediction type is heeded. The networks are not changed, and their weights are not
    differentiated.

    Args:
        vae: An AutoencoderKL.
        text_encoder: A CLIPTextModel.
        tokenizer: A CLIPTokenizer.
        unet: A UNet2DConditionModel.
        scheduler: A DDIMScheduler, whose noise levels and timesteps are used.
        mixing_coeff: EDICT's mixing weight.
        leapfrog_steps: Whether the two latents take turns in going first.

    Example:
        >>> pipe = EDICTPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
        >>> pipe("a dog", "a golden retriever", picture)[0].save("edited.png")
    """

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        mixing_coeff: float = 0.93,
        leapfrog_steps: bool = True,
    ) -> None:
        super().__init__()
        self.mixing_coeff, self.leapfrog_steps = mixing_coeff, leapfrog_steps
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.vae_scale_factor = vae_scale_factor(vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        base_prompt: str,
        target_prompt: str,
        image: Any,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        strength: float = 0.8,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str | None = "pil",
    ) -> Any:
        """Edits a picture.

        Args:
            base_prompt: A description of the picture.
            target_prompt: A description of the wanted picture.
            image: A PIL picture, or what `VaeImageProcessor.preprocess` takes besides.
            guidance_scale: The scale of classifier-free guidance; up to 1 the prompt alone is used.
            num_inference_steps: The number of steps of the whole schedule.
            strength: The part of the schedule, from the picture's end, that is inverted. More changes more.
            negative_prompt: What to steer away from, in both directions.
            generator: Of the sample that the VAE draws when it encodes the picture.
            output_type: "pil" for a list of PIL pictures, "np" for an array (B, H, W, 3) and "pt" for a tensor
                (B, 3, H, W), both in [0, 1], or "latent" for latents (B, C, h, w).

        Returns:
            The edited picture, see `output_type`.

        Raises:
            ValueError: `strength` or `output_type` is out of range.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength: expected a number from 0 to 1, got {strength!r}")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUTS)}, got {output_type!r}")
        latents = self.prepare_latents(
            image, base_prompt, negative_prompt, guidance_scale, num_inference_steps, strength, generator
        )
        chain = self.chain(target_prompt, negative_prompt, guidance_scale, num_inference_steps, strength)
        final = latents[0] if chain is None else chain(*latents)[0]
        final = final.to(self.text_encoder.dtype)
        if output_type == "latent":
            return final
        images = (Decoder(self.vae)(final) / 2 + 0.5).clamp(0, 1)
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=[False] * len(images))

    def prepare_latents(
        self,
        image: Any,
        prompt: str,
        negative_prompt: str | None,
        guidance_scale: float,
        num_inference_steps: int,
        strength: float,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes and inverts a picture. Returns the two latents (B, C, h, w). Arguments are as in `__call__`."""
        pixels = self.image_processor.preprocess(image).to(device_of(self.vae))
        start = Decoder(self.vae).encode(pixels.to(self.vae.dtype), sample=True, generator=generator)
        chain = self.chain(prompt, negative_prompt, guidance_scale, num_inference_steps, strength)
        return (start, start) if chain is None else chain.inverse(start, start)

    def chain(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        guidance_scale: float = 3.0,
        num_inference_steps: int = 50,
        strength: float = 1.0,
    ) -> Chain | None:
        """Returns the chain of the last part of the schedule, which is differentiable, or None if it has no step.

        Args are those of `__call__`.
        """
        guided = guidance_scale > 1
        uncond = self._embed(negative_prompt or "") if guided else None
        denoiser = Denoiser(self.unet, self._embed(prompt), uncond, guidance_scale if guided else 1.0)
        self.scheduler.set_timesteps(num_inference_steps)
        timesteps = self.scheduler.timesteps.tolist()[num_inference_steps - int(num_inference_steps * strength) :]
        if not timesteps:
            return None
        stride = self.scheduler.config.num_train_timesteps / num_inference_steps
        schedule = stepping_schedule(self.scheduler, timesteps, stride, float(self.scheduler.final_alpha_cumprod))
        return Chain(denoiser, coupled_program(schedule, self.mixing_coeff, self.leapfrog_steps))

    def _embed(self, text: str) -> Tensor:
        """Returns the embedding (1, L, D) of a prompt."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        with torch.no_grad():
            embedding: Tensor = self.text_encoder(tokens.input_ids.to(device_of(self.text_encoder))).last_hidden_state
        return embedding
