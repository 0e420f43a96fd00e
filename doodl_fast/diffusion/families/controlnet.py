"""ControlNet (Zhang et al., ICCV 2023, arXiv 2302.05543): networks that read a picture and steer the UNet by it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..guided import Guided
from ..hooks import device_of
from .additions import Addition, AroundUNet, Build, StepWeights, numbers
from .base import Request

TEXT_TO_IMAGE = ("StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline")
FROM_PICTURES = tuple(
    f"StableDiffusion{xl}ControlNet{kind}Pipeline" for xl in ("", "XL") for kind in ("Img2Img", "Inpaint")
)
NETWORKS = ("ControlNetModel", "MultiControlNetModel")
SHARED = ("text_embeds", "time_ids")
"""Of the UNet's added conditions, those that a pipeline gives to the control network too."""


class ControlNet(Addition):
    """One or several ControlNets, called with the latents in each evaluation; gradients flow through them as well.

    The picture that they read (the pipeline's `image`) gets a gradient if it is a tensor that requires grad.
    """

    component = "controlnet"
    pipelines = (*TEXT_TO_IMAGE, *FROM_PICTURES)
    options = frozenset(
        {"controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end", "guess_mode"}
    )

    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None:
        network = getattr(pipe.controlnet, "_orig_mod", pipe.controlnet)
        if type(network).__name__ not in NETWORKS:
            raise ValueError(
                f"controlnet: expected a {' or a '.join(NETWORKS)}, got {type(network).__name__}, whose further inputs "
                "from_pipeline does not know"
            )
        self._several = type(network).__name__ == "MultiControlNetModel"
        nets = list(network.nets) if self._several else [network]
        name = _argument(pipe)
        self._hints = _hints(pipe, name, options.get(name), len(nets), self._several, request)
        own = inspect.signature(type(pipe).__call__).parameters["controlnet_conditioning_scale"].default
        scale = options.get("controlnet_conditioning_scale", own)
        self._scales = numbers("controlnet_conditioning_scale", scale, len(nets))
        self._starts = numbers("control_guidance_start", options.get("control_guidance_start", 0.0), len(nets))
        self._ends = numbers("control_guidance_end", options.get("control_guidance_end", 1.0), len(nets))
        for start, end in zip(self._starts, self._ends, strict=True):
            if not 0 <= start < end <= 1:
                raise ValueError(
                    "control_guidance_start, control_guidance_end: expected 0 <= start < end <= 1, as fractions of the "
                    f"steps, got {start:g} and {end:g}"
                )
        self._guesses = bool(options.get("guess_mode", False)) or bool(nets[0].config.global_pool_conditions)

    @classmethod
    def takes(cls, pipe: Any) -> frozenset[str]:
        """See `Addition.takes`. The picture that ControlNets read has another name beside one to start from."""
        return cls.options | {_argument(pipe)}

    def size(self) -> tuple[int | None, int | None]:
        """Returns the size of the picture that the ControlNets read."""
        return self._hints[0].shape[-2], self._hints[0].shape[-1]

    def add(self, build: Build) -> None:
        """Calls the ControlNets before the UNet."""
        steps = build.request.timesteps
        scales: Any = self._scales
        if any(self._starts) or any(end < 1 for end in self._ends):
            if build.request.options.get("denoising_end") is not None:
                raise ValueError(
                    "denoising_end: expected None with control_guidance_start or control_guidance_end, got "
                    f"{build.request.options['denoising_end']!r}"
                )
            rows = [self._at_step(number, len(steps)) for number in range(len(steps))]
            names = "control_guidance_start, control_guidance_end"
            scales = StepWeights(steps, rows, names, device_of(build.pipe.unet))
        build.network = ControlledUNet(
            build.network, build.pipe.controlnet, scales, self._several, self._guesses, self._guesses and build.guided
        )
        build.kwargs["controlnet_cond"] = [Guided(hint, hint) for hint in self._hints]

    def _at_step(self, number: int, count: int) -> list[float]:
        """Returns the scale of each ControlNet in one step: 0 outside of the part of the steps that it steers."""
        return [
            scale * float(number / count >= start and (number + 1) / count <= end)
            for scale, start, end in zip(self._scales, self._starts, self._ends, strict=True)
        ]


def _argument(pipe: Any) -> str:
    """Returns the name of the pipeline's argument for the picture that the ControlNets read."""
    return "control_image" if hasattr(pipe, "prepare_control_image") else "image"


def _hints(pipe: Any, name: str, value: Any, count: int, is_list: bool, request: Request) -> list[Tensor]:
    """Returns the pictures that the ControlNets read, (1 or B, 3, H, W) in [0, 1], one for each of them.

    Raises:
        ValueError: There are not as many as ControlNets, or one has another size than was asked for.
        TypeError: There is none.
    """
    if value is None:
        raise TypeError(f"{name}: expected the picture that the ControlNet reads, got None")
    if is_list and not (isinstance(value, (list, tuple)) and len(value) == count):
        got = f"{len(value)} entries" if isinstance(value, (list, tuple)) else type(value).__name__
        raise ValueError(f"{name}: expected a list of {count} pictures, one for each ControlNet, got {got}")
    return [_hint(pipe, name, picture, request) for picture in (value if is_list else [value])]


def _hint(pipe: Any, name: str, picture: Any, request: Request) -> Tensor:
    """Returns one picture as the pipeline prepares it, or as it is if it gets a gradient."""
    network = pipe.controlnet
    if isinstance(picture, Tensor) and picture.requires_grad:
        size = (request.height or picture.shape[-2], request.width or picture.shape[-1])
        if picture.ndim != 4 or tuple(picture.shape[-2:]) != size:
            raise ValueError(
                f"{name}: expected a tensor (1 or B, 3, {size[0]}, {size[1]}) in [0, 1] because it requires grad, so "
                f"that it is not resized, got {tuple(picture.shape)}"
            )
        return picture
    prepare = pipe.prepare_image if name == "image" else pipe.prepare_control_image
    taken = inspect.signature(prepare).parameters
    uncropped = {"crops_coords": None, "resize_mode": "default"} if "crops_coords" in taken else {}
    prepared: Tensor = prepare(
        **uncropped,
        image=picture,
        width=request.width,
        height=request.height,
        batch_size=1,
        num_images_per_prompt=1,
        device=device_of(network),
        dtype=network.dtype,
    )
    return prepared


class ControlledUNet(AroundUNet):
    """A UNet with one or several ControlNets.

    Args:
        unet: The UNet.
        controlnet: The ControlNet, or diffusers' module of several.
        scales: The scale of each ControlNet, or how to find them by the timestep.
        several: Whether `controlnet` takes lists.
        guesses: Whether the ControlNets are to guess what the picture is without a prompt.
        on_cond_alone: Whether they are called for the second half of the batch, and change nothing in the first.
    """

    def __init__(
        self,
        unet: nn.Module,
        controlnet: nn.Module,
        scales: list[float] | StepWeights,
        several: bool,
        guesses: bool,
        on_cond_alone: bool,
    ) -> None:
        super().__init__(unet)
        self.controlnet, self.scales = controlnet, scales
        self.several, self.guesses, self.on_cond_alone = several, guesses, on_cond_alone

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor]:
        """Returns the UNet's prediction.

        Args:
            sample: Latents (B, C, h, w).
            timestep: A 0-dim tensor.
            encoder_hidden_states: The prompts' embeddings, (B, tokens, features).
            controlnet_cond: The picture for each ControlNet, (B, 3, H, W).
            **kwargs: Further arguments of the UNet.
        """
        added = {name: value for name, value in (kwargs.get("added_cond_kwargs") or {}).items() if name in SHARED}
        seen: dict[str, Any] = {"sample": sample, "encoder_hidden_states": encoder_hidden_states}
        seen |= {"pictures": controlnet_cond, "added": added}
        if self.on_cond_alone:
            seen = _second_half(seen)
        pictures, added = seen.pop("pictures"), seen.pop("added")
        scales = list(self.scales(timestep)) if isinstance(self.scales, StepWeights) else self.scales
        down, mid = self.controlnet(
            **seen,
            timestep=timestep,
            controlnet_cond=pictures if self.several else pictures[0],
            conditioning_scale=scales if self.several else scales[0],
            guess_mode=self.guesses,
            return_dict=False,
            **({"added_cond_kwargs": added} if added else {}),
        )
        if self.on_cond_alone:
            down = [torch.cat([torch.zeros_like(residual), residual]) for residual in down]
            mid = torch.cat([torch.zeros_like(mid), mid])
        kwargs |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return (self.predict(sample, timestep, encoder_hidden_states, **kwargs),)


def _second_half(tree: Any) -> Any:
    """Returns the second half of the rows of every tensor in dicts and lists."""
    if isinstance(tree, dict):
        return {name: _second_half(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_second_half(value) for value in tree]
    return tree.chunk(2)[1]
