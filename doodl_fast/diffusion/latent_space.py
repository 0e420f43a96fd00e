"""The shape of a pipeline's latents, and the noise that is drawn in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .decoder import vae_scale_factor
from .hooks import device_of


@dataclass(frozen=True)
class LatentSpace:
    """The shape of a pipeline's latents, and where they are drawn.

    Attributes:
        channels: Channels of the latents.
        scale_factor: Pixels per latent along each axis.
        height: Default height of a picture, in pixels.
        width: Default width of a picture, in pixels.
        device: Default device of the latents.
        fixed_size: Whether the conditions hold the size (SDXL's time_ids), so that latents must have it.
        prompts: How many prompts the conditions hold; 1 serves any batch.
        patch: Latents per patch of the network, along each axis.
        largest: The largest height and width in pixels that the network takes; None is no limit.
        fixed_by: What holds the size, in words.
    """

    channels: int
    scale_factor: int
    height: int
    width: int
    device: torch.device
    fixed_size: bool = False
    prompts: int = 1
    patch: int = 1
    largest: int | None = None
    fixed_by: str = "this chain's conditions tell the network (SDXL's time_ids)"

    def for_prompts(self, prompts: int) -> LatentSpace:
        """Returns the same space for another number of prompts."""
        return replace(self, prompts=prompts)

    def noise(
        self,
        seed: int | Sequence[int] = 0,
        batch: int | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        num_frames: int | None = None,
    ) -> Tensor:
        """Draws standard normal latents. See `DiffusionChain.noise`."""
        rest = self._shape(*self._checked_size(height, width), num_frames)
        seeds = [0] if generator is not None else checked_seeds(seed)
        if batch is None:
            batch = max(self.prompts, len(seeds))
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected an int of at least 1, got {batch!r}")
        if self.prompts not in (1, batch):
            raise ValueError(f"batch: expected {self.prompts}, one for each prompt of the chain, got {batch}")
        if len(seeds) not in (1, batch):
            raise ValueError(f"seed: expected one seed, or {batch}, one for each picture, got {len(seeds)}")
        generators = [torch.Generator().manual_seed(one) for one in seeds] if generator is None else [generator]
        shape = (batch // len(generators), *rest)
        drawn = [torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators]
        return torch.cat(drawn).to(self.device if device is None else device, dtype)

    def _checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Returns the size in pixels that is asked for. Raises ValueError for one that does not fit."""
        height, width = self.height if height is None else height, self.width if width is None else width
        for name, size, own in (("height", height, self.height), ("width", width, self.width)):
            check_size(name, size, self.scale_factor, self.patch, self.largest)
            if self.fixed_size and size != own:
                raise ValueError(
                    f"{name}: expected {own}, the size that {self.fixed_by}, got {size}; make the chain with "
                    f"from_pipeline(..., {name}={size})"
                )
        return height, width

    def _shape(self, height: int, width: int, num_frames: int | None) -> tuple[int, ...]:
        """Returns the shape of the latents behind B, for a size in pixels that is checked.

        Raises:
            ValueError: `num_frames` does not fit.
        """
        if num_frames is not None:
            raise ValueError(f"num_frames: expected None, because this chain makes pictures, got {num_frames!r}")
        return self.channels, height // self.scale_factor, width // self.scale_factor


def checked_seeds(seed: Any) -> list[int]:
    """Returns one seed, or the seed of each picture, as a list. Raises ValueError for what is no int."""
    seeds = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    if not seeds or any(isinstance(one, bool) or not isinstance(one, Integral) for one in seeds):
        raise ValueError(f"seed: expected an int, or a list of ints, one for each picture, got {seed!r}")
    return [int(one) for one in seeds]


def check_size(name: str, size: Any, factor: int, patch: int = 1, largest: int | None = None) -> None:
    """Raises ValueError, naming the argument, for a size in pixels that the VAE or the network cannot take.

    Args:
        name: Of the argument.
        size: Height or width in pixels.
        factor: The VAE's scale factor.
        patch: Latents per patch of the network; a size is a positive multiple of `factor * patch`.
        largest: The largest size that the network takes; None is no limit.
    """
    step = factor * patch
    if isinstance(size, bool) or not isinstance(size, int) or size < step or size % step:
        near = max(step, round(size / step) * step) if isinstance(size, (int, float)) else step
        meaning = "the VAE's scale factor" + ("" if patch == 1 else f", {factor}, times the network's patch of {patch}")
        raise ValueError(
            f"{name}: expected a positive multiple of {step} ({meaning}), got {size!r}; the nearest is {near}"
        )
    if largest is not None and size > largest:
        raise ValueError(f"{name}: expected at most {largest}, for which the network has positions, got {size}")


def latent_space(
    pipe: Any, height: int | None = None, width: int | None = None, prompts: int = 1, size_is_free: bool = False
) -> LatentSpace:
    """Returns the latent space of a pipeline.

    Args:
        pipe: A diffusers pipeline with a UNet and a VAE.
        height: Default height of a picture in pixels; None is the pipeline's own.
        width: Default width of a picture in pixels; None is the pipeline's own.
        prompts: How many prompts the chain's conditions hold.
        size_is_free: Whether noise of another size is allowed although SDXL's conditions hold the size.

    Raises:
        ValueError: A size is no positive multiple of the VAE's scale factor.
    """
    rows, columns = default_size(pipe, height, width)
    factor = vae_scale_factor(pipe.vae)
    for name, size in (("height", rows), ("width", columns)):
        check_size(name, size, factor)
    return LatentSpace(
        channels=pipe.vae.config.latent_channels,
        scale_factor=factor,
        height=rows,
        width=columns,
        device=device_of(pipe.unet),
        fixed_size=not size_is_free and getattr(pipe, "text_encoder_2", None) is not None,
        prompts=prompts,
    )


def default_size(pipe: Any, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    """Returns the height and width in pixels that were given, with the pipeline's own in place of None."""
    size = pipe.unet.config.sample_size
    rows, columns = (size, size) if isinstance(size, int) else size
    factor = vae_scale_factor(pipe.vae)
    return rows * factor if height is None else height, columns * factor if width is None else width
