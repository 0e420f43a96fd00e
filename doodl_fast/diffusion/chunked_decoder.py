"""Decoders of VAEs that decode a few frames at a time and remember the last ones, with less memory."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .module_copies import frozen_copy
from .video import VideoDecoder


class RecomputedInPlace(nn.Module):
    """Calls a decoder that keeps what it remembers in a list, so that its activations are computed again (Wan's).

    Args:
        decoder: It writes what it remembers into the list `feat_cache`, and its position there into `feat_idx`.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor, feat_cache: list[Any], feat_idx: list[int], **options: Any) -> Tensor:
        """Returns the frames (B, C, F, H, W) of one call."""

        def call(x: Tensor, remembered: list[Any], position: list[int]) -> tuple[Tensor, list[Any], list[int]]:
            # The lists are changed in place, and the second computation has to begin with what the first began with.
            after, position = list(remembered), list(position)
            frames = self.decoder(x, feat_cache=after, feat_idx=position, **options)
            return frames, after, position

        # The checkpoint of this package's blocks would not compute less again here, and its peak was 1.15 times as high
        # with a small Wan.
        frames: Tensor
        frames, feat_cache[:], feat_idx[:] = checkpoint(call, x, list(feat_cache), list(feat_idx), use_reentrant=False)
        return frames


class Recomputed(nn.Module):
    """Calls a decoder that returns what it remembers, so that its activations are computed again (CogVideoX').

    Args:
        decoder: It takes what it remembers as `conv_cache`, and returns frames and the next of it.
    """

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, sample: Tensor, temb: Tensor | None = None, conv_cache: Any = None) -> Any:
        """Returns the frames (B, C, F, H, W) of one call, and what it remembers."""
        return checkpoint(self.decoder, sample, temb, conv_cache, use_reentrant=False)


class ChunkedVideoDecoder(VideoDecoder):
    """The decoder of a causal VAE that calls its network for a few frames of the latents at a time.

    What a call remembers for the next one (the last frames that each convolution saw) is all that passes between them.
    So a version that needs less memory keeps that, and computes the rest of a call again for a gradient.
    """

    wrapper: ClassVar[type[nn.Module]] = RecomputedInPlace
    """How the network of this VAE is called again."""
    _calls_again = False

    def leaner(self) -> ChunkedVideoDecoder | None:
        """See `Decoder.leaner`. Between its two versions is one that computes whole calls again."""
        if self._calls_again or (self._can_checkpoint() and not self._checkpoints):
            return super().leaner()  # type: ignore[return-value]
        other = copy.copy(self)
        other._calls_again = True
        return other

    def _needed(self, frames: int, total: int) -> int:
        return frames

    def _images(self, z: Tensor) -> Tensor:
        with frozen_copy(self.vae, self._checkpoints) as vae:
            # A VAE that cannot be copied is not ours to change.
            if self._calls_again and vae is not self.vae:
                vae.decoder = self.wrapper(vae.decoder)
            images: Tensor = vae.decode(z, return_dict=False)[0]
        return images
