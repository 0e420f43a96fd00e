"""Latents of videos: their shape, and the VAE that turns them into videos or into some of their frames.

Latents have frames in an axis of their own, where the pipeline has them: (B, C, F, h, w) most often. Videos are
(B, F, 3, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .decoder import Decoder
from .latent_space import LatentSpace
from .videos import check_videos


@dataclass(frozen=True)
class VideoSpace(LatentSpace):
    """The shape of a video pipeline's latents, and where they are drawn.

    Attributes:
        num_frames: Default number of frames of a video.
        frame_factor: Frames of a video per frame of the latents.
        first_is_single: Whether the first frame of the latents stands for a single frame, and each further one for
            `frame_factor`, as in the causal VAEs of most video models.
        frame_group: How many frames of the latents, without such a first one, the VAE takes at a time.
        frames_first: Whether the latents are (B, F, C, h, w) instead of (B, C, F, h, w).
        padding: Frames of the latents before those of the video, which the decoder drops. With any, the number of
            frames is that of the chain.
        most_frames: The most frames of a video that the network has positions for; None is no limit.
    """

    num_frames: int = 1
    frame_factor: int = 1
    first_is_single: bool = True
    frame_group: int = 1
    frames_first: bool = False
    padding: int = 0
    most_frames: int | None = None

    def latent_frames(self, num_frames: int | None = None) -> int:
        """Returns the number of frames that the latents of a video have.

        Args:
            num_frames: Of the video; None is the default.

        Raises:
            ValueError: The VAE makes no video of that many frames, or the network has no positions for them.
        """
        count: Any = self.num_frames if num_frames is None else num_frames
        more = int(self.first_is_single)
        step = self.frame_factor * self.frame_group
        least = 1 if self.first_is_single else step
        if isinstance(count, bool) or not isinstance(count, int) or count < least or (count - more) % step:
            near = max(least, round((count - more) / step) * step + more) if isinstance(count, (int, float)) else least
            expected = f"a multiple of {step}" + (", plus 1" if more else "")
            raise ValueError(
                f"num_frames: expected {expected}, which is what the VAE makes of whole frames of the latents, got "
                f"{count!r}; the nearest is {near}"
            )
        if self.most_frames is not None and count > self.most_frames:
            raise ValueError(
                f"num_frames: expected at most {self.most_frames}, for which the network has positions, got {count}"
            )
        if self.fixed_size and count != self.num_frames:
            raise ValueError(
                f"num_frames: expected {self.num_frames}, the size that {self.fixed_by}, got {count}; make the chain "
                f"with from_pipeline(..., num_frames={count})"
            )
        if self.padding and count != self.num_frames:
            raise ValueError(
                f"num_frames: expected {self.num_frames}, for which the latents of this chain have {self.padding} more "
                f"than the video needs, got {count}; make the chain with from_pipeline(..., num_frames={count})"
            )
        return (count - more) // self.frame_factor + more + self.padding

    def _shape(self, height: int, width: int, num_frames: int | None) -> tuple[int, ...]:
        channels, *size = super()._shape(height, width, None)
        frames = self.latent_frames(num_frames)
        return (frames, channels, *size) if self.frames_first else (channels, frames, *size)


class VideoDecoder(Decoder):
    """The decoder of a VAE of videos as a differentiable function of latents alone, and its encoder.

    It returns videos (B, F, 3, H, W) in [-1, 1], and everything else is as in `Decoder`. A loss on pictures takes their
    frames as a batch, `lambda videos: loss(videos.flatten(0, 1))`. `pictures` makes a decoder that returns frames in
    that form, all of them or a few, for which it decodes no more than the VAE needs.

    Args:
        vae: A diffusers autoencoder of videos, `pipe.vae` for instance.
        space: The shape of the latents.

    Example:
        >>> videos = chain.decode(latents)  # (B, F, 3, H, W)
        >>> result = optimize(chain, noise, chain.decode.pictures([0, 8, 16]), clip_loss)
    """

    def __init__(self, vae: Any, space: VideoSpace) -> None:
        super().__init__(vae)
        self._frames_first, self._padding = space.frames_first, space.padding
        self._channels, self._scale_factor = space.channels, space.scale_factor
        self._factor, self._first_is_single = space.frame_factor, space.first_is_single
        self._picks: tuple[int, ...] | None = None
        self._as_pictures = False

    def pictures(self, frames: Sequence[int] | None = None) -> VideoDecoder:
        """Returns a decoder of frames as pictures, (B * n, 3, H, W), which any loss on pictures takes.

        The n frames of the first video come first. They are those of the whole video to rounding. Decoding takes the
        most memory of a gradient of a long video: a causal VAE decodes up to the last of the chosen frames and no
        further, a VAE of pictures (AnimateDiff's) the chosen frames alone, and any other one (LTX's) the whole video.

        Args:
            frames: Which frames, counted from 0; negative numbers count from the end. None is all.

        Raises:
            TypeError: A frame is no int.
            ValueError: There is no frame.
        """
        if frames is not None and not all(isinstance(frame, int) and not isinstance(frame, bool) for frame in frames):
            raise TypeError(f"frames: expected ints, the numbers of frames counted from 0, got {frames!r}")
        if frames is not None and not len(frames):
            raise ValueError("frames: expected at least one, got none; None is all of them")
        other = copy.copy(self)
        other._picks, other._as_pictures = None if frames is None else tuple(frames), True
        return other

    def __call__(self, latents: Tensor) -> Tensor:
        """Decodes latents, differentiably.

        Args:
            latents: A floating-point tensor (B, C, F, h, w), or (B, F, C, h, w) where the pipeline has that, as the
                diffusion model has them.

        Returns:
            Videos (B, F, 3, H, W), nominally in [-1, 1], in float32 (float64 from a float64 VAE). A decoder that
            `pictures` has made returns frames, (B * n, 3, H, W).

        Raises:
            TypeError: `latents` is no floating-point tensor.
            ValueError: `latents` has another shape, the VAE overflows in fp16, or there is no such frame.
        """
        self._check_latents(latents)
        latents = latents.transpose(1, 2) if self._frames_first else latents
        latents = latents[:, :, self._padding :]
        picks = self._checked_picks(latents.shape[2])
        videos = self._videos(latents, picks)
        return videos.flatten(0, 1) if self._as_pictures else videos

    @torch.no_grad()
    def encode(self, videos: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encodes videos, without gradient.

        Args:
            videos: A floating-point tensor (B, F, 3, H, W) in [-1, 1].
            sample: Whether to draw from the posterior instead of taking its mean.
            generator: Where the sample is drawn from; it implies `sample`.

        Returns:
            Latents, as the decoder takes them, in the dtype of `videos`.

        Raises:
            TypeError: `videos` is no floating-point tensor.
            ValueError: `videos` has another shape, or a number of frames that the VAE cannot take.
        """
        check_videos(videos)
        if (videos.shape[1] - self._first_is_single) % self._factor:
            plus = ", plus 1" if self._first_is_single else ""
            raise ValueError(
                f"videos: expected a number of frames that is a multiple of {self._factor}{plus}, got shape "
                f"{tuple(videos.shape)}"
            )
        if any(size % self._scale_factor for size in videos.shape[-2:]):
            raise ValueError(
                f"videos: expected height and width in multiples of {self._scale_factor}, got shape "
                f"{tuple(videos.shape)}"
            )
        if self._padding:
            raise ValueError(
                f"videos: the latents of this chain begin with {self._padding} that no video has, so a video cannot be "
                "encoded for it; expected another num_frames of the chain"
            )
        raw = self._raw(videos, sample, generator)
        latents = raw.to(torch.promote_types(videos.dtype, torch.float32))
        scale, shift = self._affine(latents)
        latents = (latents * scale + shift).to(videos.dtype)
        return latents.transpose(1, 2) if self._frames_first else latents

    def _raw(self, videos: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        """Returns what the VAE makes of videos (B, F, 3, H, W), as (B, C, F, h, w)."""
        return self._encode(videos.transpose(1, 2), sample, generator)

    def _check_latents(self, latents: Tensor) -> None:
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise TypeError(f"latents: expected a floating tensor, got {got}")
        shape = list(latents.shape)
        if latents.ndim != 5 or shape[2 if self._frames_first else 1] != self._channels:
            axes = ("frames", str(self._channels)) if self._frames_first else (str(self._channels), "frames")
            raise ValueError(f"latents: expected shape (B, {', '.join(axes)}, height, width), got {tuple(shape)}")

    def _checked_picks(self, latent_frames: int) -> tuple[int, ...] | None:
        """Returns the numbers of the chosen frames, counted from 0; None is all."""
        if self._picks is None:
            return None
        more = int(self._first_is_single)
        count = (latent_frames - more) * self._factor + more
        for pick in self._picks:
            if not -count <= pick < count:
                raise ValueError(f"frames: expected numbers of the video's {count} frames, from 0, got {pick}")
        return tuple(pick % count for pick in self._picks)

    def _videos(self, latents: Tensor, picks: tuple[int, ...] | None) -> Tensor:
        """Returns the chosen frames, (B, n, 3, H, W), of latents (B, C, F, h, w) without padding."""
        if picks is not None:
            more = int(self._first_is_single)
            last = max(picks)
            needed = 1 if last < more else (last - more) // self._factor + more + 1
            latents = latents[:, :, : self._needed(needed, latents.shape[2])]
        videos = self._decoded(latents.contiguous()).transpose(1, 2)
        return videos if picks is None else videos[:, list(picks)]

    def _needed(self, frames: int, total: int) -> int:
        """Returns how many of the first frames of the latents the VAE has to decode for the first few of them.

        Args:
            frames: The number of frames of the latents in which the chosen frames lie.
            total: The number of all.
        """
        return total


class FrameDecoder(VideoDecoder):
    """The decoder of a VAE of pictures, which decodes each frame of the latents by itself."""

    def _videos(self, latents: Tensor, picks: tuple[int, ...] | None) -> Tensor:
        chosen = (latents if picks is None else latents[:, :, list(picks)]).transpose(1, 2)
        return self._decoded(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])

    def _raw(self, videos: Tensor, sample: bool, generator: torch.Generator | None) -> Tensor:
        frames = self._encode(videos.flatten(0, 1), sample, generator)
        return frames.unflatten(0, videos.shape[:2]).transpose(1, 2)
