"""Videos save themselves frame by frame; latents of videos have the shape that the VAE and the network can take."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from doodl_fast import ImageTensor, VideoTensor
from doodl_fast.diffusion.latent_space import LatentSpace
from doodl_fast.diffusion.video import VideoSpace
from doodl_fast.guidance.symmetry import Symmetry

SPACE = VideoSpace(4, 8, 64, 48, torch.device("cpu"), num_frames=9, frame_factor=4)


def videos(batch: int = 2, frames: int = 3) -> Tensor:
    return torch.rand(batch, frames, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("suffix", ["webp", "png"])
def test_an_animation_has_every_pixel_of_every_frame(tmp_path: Path, suffix: str) -> None:
    given = videos()
    VideoTensor(given).save(tmp_path / f"dog.{suffix}", fps=20)
    expected = given.add(1).mul(127.5).round().permute(1, 3, 0, 4, 2).flatten(2, 3)  # (F, H, B W, 3)
    with Image.open(tmp_path / f"dog.{suffix}") as opened:
        assert opened.n_frames == 3
        for number in range(3):
            opened.seek(number)
            frame = np.asarray(opened.convert("RGB"))
            assert np.array_equal(frame, expected[number].numpy().astype(np.uint8)) and opened.info["duration"] == 50


def test_a_gif_has_every_frame(tmp_path: Path) -> None:
    grey = torch.tensor([-1.0, 0.2, 1.0]).reshape(1, 3, 1, 1, 1).expand(1, 3, 3, 4, 6)
    VideoTensor(grey.contiguous()).save(tmp_path / "dog.gif", fps=10)
    with Image.open(tmp_path / "dog.gif") as opened:
        seen = []
        for number in range(opened.n_frames):
            opened.seek(number)
            seen.append((int(np.asarray(opened.convert("L")).mean()), opened.info["duration"]))
    assert seen == [(0, 100), (153, 100), (255, 100)]
    assert [path.name for path in tmp_path.iterdir()] == ["dog.gif"]


def test_a_video_tensor_is_a_tensor() -> None:
    made = VideoTensor(videos())
    assert type(made + 1) is Tensor and type(made[0]) is Tensor
    assert type(copy.deepcopy(made)) is VideoTensor and torch.equal(copy.deepcopy(made), made)
    frames = made.pil()
    assert [len(row) for row in frames] == [3, 3] and frames[0][0].size == (6, 4)
    assert ImageTensor(made[0]).pil() == frames[0]


def test_videos_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^videos: expected shape \(B, frames, 3, height, width\), got \(2, 3, 4, 6\)"
    ):
        VideoTensor(videos()[:, 0])
    with pytest.raises(ValueError, match=r"^videos: expected shape .*, got \(2, 3, 4, 6, 3\)"):
        VideoTensor(videos().permute(0, 2, 3, 4, 1))
    with pytest.raises(ValueError, match=r"^videos: expected at least one pixel, got shape \(2, 0, 3, 4, 6\)"):
        VideoTensor(videos(frames=0))
    with pytest.raises(TypeError, match=r"^videos: expected a floating tensor, got torch.int64"):
        VideoTensor(videos().long())
    with pytest.raises(
        ValueError, match=r"^path: expected a name that ends in one of .gif, .webp, .png, got 'a.mp4'; use"
    ):
        VideoTensor(videos()).save("a.mp4")
    with pytest.raises(ValueError, match=r"^fps: expected a number of frames per second from above 0 to 1000, got 0"):
        VideoTensor(videos()).save(tmp_path / "a.gif", fps=0)


def test_a_loss_on_pictures_says_what_to_do_with_a_video() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 3, 4, 6\); of videos .* videos.flatten\(0, 1\) are the frames"):
        Symmetry()(videos())
    with pytest.raises(ValueError, match=r"got \(2, 3, 3, 4, 6\); of videos .* videos.flatten\(0, 1\) are the frames"):
        ImageTensor(videos())
    assert Symmetry()(videos().flatten(0, 1)) > 0


def test_the_shape_of_noise() -> None:
    assert SPACE.noise().shape == (1, 4, 3, 8, 6)
    assert SPACE.noise(batch=2, height=16, num_frames=1).shape == (2, 4, 1, 2, 6)
    assert replace(SPACE, frames_first=True).noise().shape == (1, 3, 4, 8, 6)
    assert replace(SPACE, padding=1).noise().shape == (1, 4, 4, 8, 6)
    assert replace(SPACE, frame_factor=1, first_is_single=False).noise(num_frames=5).shape == (1, 4, 5, 8, 6)
    drawn = torch.randn(1, 4, 3, 8, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(SPACE.noise(seed=7), drawn)


@pytest.mark.parametrize(("count", "near"), [(8, 9), (0, 1), (-3, 1), (11, 9), (True, 1), (4.0, 5), ("9", 1)])
def test_numbers_of_frames_that_do_not_fit_are_refused(count: int, near: int) -> None:
    pattern = rf"^num_frames: expected a multiple of 4, plus 1, which .* got {count!r}; the nearest is {near}$"
    with pytest.raises(ValueError, match=pattern):
        SPACE.noise(num_frames=count)


def test_other_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^num_frames: expected at most 9, for which the network has positions, got 13"
    ):
        replace(SPACE, most_frames=9).noise(num_frames=13)
    with pytest.raises(ValueError, match=r"^num_frames: expected 9, for which the latents of this chain have 1 more"):
        replace(SPACE, padding=1).noise(num_frames=13)
    with pytest.raises(ValueError, match=r"^num_frames: expected a multiple of 4, which is .* got 3; the nearest is 4"):
        replace(SPACE, first_is_single=False).noise(num_frames=3)
    with pytest.raises(ValueError, match=r"^height: expected a positive multiple of 8 .* got 20; the nearest is 16"):
        SPACE.noise(height=20)
    pictures = LatentSpace(4, 8, 64, 48, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^num_frames: expected None, because this chain makes pictures, got 9"):
        pictures.noise(num_frames=9)
