"""Waveforms save themselves as sound files; latents of audio have one shape."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from doodl_fast.diffusion.audio import audio_space, write_audio

SPACE = audio_space((4, 8, 2), torch.device("cpu"), 1)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_sound_file_has_every_sample(tmp_path: Path, channels: int) -> None:
    waveform = torch.rand(channels, 50, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    write_audio(tmp_path / "a.wav", waveform if channels == 2 else waveform[0], 1600)
    with wave.open(str(tmp_path / "a.wav")) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getsampwidth()) == (channels, 1600, 2)
        samples = np.frombuffer(sound.readframes(50), dtype="<i2").reshape(50, channels)
    expected = (waveform.clamp(-1, 1) * 32767).round().t().numpy()
    assert np.array_equal(samples, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


def test_waveforms_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(ValueError, match=r"^waveform: expected shape \(samples,\), or .* got \(3, 5\); save the wavef"):
        write_audio(path, torch.zeros(3, 5), 1600)
    with pytest.raises(ValueError, match=r"^waveform: expected numbers, got NaN in some samples"):
        write_audio(path, torch.full([5], torch.nan), 1600)
    with pytest.raises(TypeError, match=r"^waveform: expected a floating tensor, got torch.int64"):
        write_audio(path, torch.zeros(5, dtype=torch.int64), 1600)
    with pytest.raises(ValueError, match=r"^path: expected a name that ends in one of .wav, got 'a.mp3'; use a.wav"):
        write_audio("a.mp3", torch.zeros(5), 1600)


def test_the_shape_of_noise() -> None:
    drawn = torch.randn(2, 4, 8, 2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(SPACE.noise(seed=3, batch=2), drawn)
    for name in ("height", "width", "num_frames"):
        with pytest.raises(ValueError, match=rf"^{name}: expected None, because this chain makes audio, got 8; its le"):
            SPACE.noise(**{name: 8})
