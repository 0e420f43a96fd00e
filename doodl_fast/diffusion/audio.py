"""Latents of audio, their decoders, and sound files.

Waveforms have the shape that the pipeline gives them, (B, samples) or (B, channels, samples), nominally in [-1, 1].
"""

from __future__ import annotations

import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..frozen import level_of
from .decoder import Decoder
from .images import check_target, write_whole
from .latent_space import LatentSpace
from .networks import run_in_dtype

LARGEST_SAMPLE = 2**15 - 1
MOST_CHANNELS = 2


@dataclass(frozen=True)
class AudioSpace(LatentSpace):
    """The shape of an audio pipeline's latents, which is fixed when the chain is made.

    Attributes:
        rest: The shape of the latents behind B.
    """

    rest: tuple[int, ...] = ()

    def _checked_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        for name, size in (("height", height), ("width", width)):
            self._refuse(name, size)
        return self.height, self.width

    def _shape(self, height: int, width: int, num_frames: int | None) -> tuple[int, ...]:
        self._refuse("num_frames", num_frames)
        return self.rest

    def _refuse(self, name: str, value: Any) -> None:
        """Raises ValueError for a size of pictures."""
        if value is not None:
            raise ValueError(
                f"{name}: expected None, because this chain makes audio, got {value!r}; its length is an argument of "
                "from_pipeline"
            )


def audio_space(rest: tuple[int, ...], device: torch.device, prompts: int) -> AudioSpace:
    """Returns the latent space of an audio pipeline.

    Args:
        rest: The shape of the latents behind B.
        device: Where the network lies.
        prompts: How many prompts the chain's conditions hold.
    """
    return AudioSpace(rest[0], 1, 1, 1, device, prompts=prompts, rest=rest)


class AudioDecoder(Decoder):
    """The decoder of an audio pipeline as a differentiable function of latents alone.

    Subclasses implement `_images`, which makes waveforms of the VAE's own latents.

    Args:
        vae: The pipeline's VAE.
        rest: The shape of the latents behind B.
        scaling_factor: What the VAE's own latents are multiplied by for the network.
        sampling_rate: Samples of a waveform per second.
        start: The first sample that is kept.
        end: The sample behind the last one that is kept.

    Attributes:
        sampling_rate: Samples of a waveform per second.
    """

    def __init__(
        self, vae: Any, rest: tuple[int, ...], scaling_factor: float, sampling_rate: int, start: int, end: int
    ) -> None:
        self.vae, self.sampling_rate, self.lean = vae, sampling_rate, level_of(True)
        self._rest, self._factor, self._start = rest, scaling_factor, start
        self._end: int | None = end
        self._checkpoints = self._singly = self._layers = False

    def __call__(self, latents: Tensor) -> Tensor:
        """Decodes latents, differentiably.

        Args:
            latents: A floating-point tensor (B, ...), as the diffusion model has them.

        Returns:
            Waveforms (B, samples) or (B, channels, samples), as the pipeline has them, nominally in [-1, 1], in float32
            (float64 from a float64 VAE).

        Raises:
            TypeError: `latents` is no floating-point tensor.
            ValueError: `latents` has another shape.
        """
        self._check(latents)
        return run_in_dtype(self._decode, latents / self._factor, self.vae.dtype)[..., self._start : self._end]

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Encodes what the VAE decodes to, without gradient.

        Args:
            images: A floating-point tensor, as the VAE decodes latents to it: waveforms (B, channels, samples) of the
                whole length that the network makes, or for AudioLDM 2 log-mel spectrograms (B, 1, frames, mel bins).
            sample: Whether to draw from the posterior instead of taking its mean.
            generator: Where the sample is drawn from; it implies `sample`.

        Returns:
            Latents (B, ...) in the dtype of `images`.

        Raises:
            TypeError: `images` is no floating-point tensor.
            ValueError: The VAE makes no latents of this chain's shape of it.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a floating tensor, got {got}")
        expected = self._encodes()
        if tuple(images.shape[1:]) != expected:
            shape = ", ".join(["B", *map(str, expected)])
            raise ValueError(
                f"images: expected shape ({shape}), the whole length that the network makes, got "
                f"{tuple(images.shape)}; torch.nn.functional.pad adds silence"
            )
        latents = self._encode(images, sample, generator).to(torch.promote_types(images.dtype, torch.float32))
        return (latents * self._factor).to(images.dtype)

    def _encodes(self) -> tuple[int, ...]:
        """Returns the shape behind B of what the VAE encodes to this chain's latents."""
        return int(self.vae.config.audio_channels), self._rest[-1] * int(self.vae.hop_length)

    def _check(self, latents: Any) -> None:
        """Raises TypeError or ValueError for what is no latents of this decoder."""
        if not isinstance(latents, Tensor) or not latents.is_floating_point():
            got = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise TypeError(f"latents: expected a floating tensor, got {got}")
        if tuple(latents.shape[1:]) != self._rest:
            expected = ", ".join(["B", *map(str, self._rest)])
            raise ValueError(f"latents: expected shape ({expected}), got {tuple(latents.shape)}")


def write_audio(path: str | Path, waveform: Tensor, sampling_rate: int) -> None:
    """Saves one waveform as a .wav file of 16 bits.

    The file appears under its name when it is complete; an interrupted call leaves what was there before.

    Args:
        path: Where to save, with the suffix .wav.
        waveform: A floating-point tensor (samples,) or (channels, samples) in [-1, 1]. Values outside are clipped.
        sampling_rate: Samples per second, `chain.decode.sampling_rate` for instance.

    Raises:
        TypeError: `waveform` is no floating-point tensor, or `path` no name of a file.
        ValueError: `waveform` has another shape, no sample or a NaN, or the file cannot be written under that name.

    Example:
        >>> write_audio("dog.wav", chain.decode(latents)[0], chain.decode.sampling_rate)
    """
    target, _ = check_target(path, {".wav": "WAV"}, "sound")
    if not isinstance(waveform, Tensor) or not waveform.is_floating_point():
        got = waveform.dtype if isinstance(waveform, Tensor) else type(waveform).__name__
        raise TypeError(f"waveform: expected a floating tensor, got {got}")
    channels = waveform[None] if waveform.ndim == 1 else waveform
    if channels.ndim != 2 or not 1 <= len(channels) <= MOST_CHANNELS or not channels.numel():
        raise ValueError(
            f"waveform: expected shape (samples,), or (channels, samples) with 1 or 2 channels, got "
            f"{tuple(waveform.shape)}; save the waveforms of a batch one at a time"
        )
    values = channels.detach().float().cpu()
    if torch.isnan(values).any():
        raise ValueError("waveform: expected numbers, got NaN in some samples")
    samples = values.mul(LARGEST_SAMPLE).clamp(-LARGEST_SAMPLE, LARGEST_SAMPLE).round().to(torch.int16)

    def write(file: Any) -> None:
        with wave.open(file, "wb") as sound:
            sound.setnchannels(len(samples))
            sound.setsampwidth(2)
            sound.setframerate(sampling_rate)
            sound.writeframes(samples.t().contiguous().numpy().astype("<i2").tobytes())

    write_whole(target, write)
