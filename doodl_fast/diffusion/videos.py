"""`VideoTensor`: a tensor of videos that saves itself, as an animated picture.

Everywhere in this library videos are tensors (B, F, 3, H, W) whose values lie nominally in [-1, 1]: F frames, each of
which is a picture as `images` has it. That is the layout of `pipe(..., output_type="pt").frames` in diffusers, whose
values lie in [0, 1].
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .images import SavableTensor, check_target, in_a_row, to_pil, write_whole

if TYPE_CHECKING:
    from PIL import Image

ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}
OPTIONS: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "GIF": {}, "PNG": {}}


class VideoTensor(SavableTensor):
    """Videos (B, F, 3, H, W) in [-1, 1] that can be saved and shown.

    It is a tensor like any other; the result of any torch operation on it is a plain `torch.Tensor`.

    Args:
        videos: A floating-point tensor (B, F, 3, H, W). The new tensor shares its memory and its autograd graph.

    Raises:
        TypeError: `videos` is not a floating-point tensor.
        ValueError: `videos` has another shape.

    Example:
        >>> videos = VideoTensor(chain.decode(latents))
        >>> videos.save("dog.gif", fps=16)
        >>> ImageTensor(videos[0]).save("frames.png")  # the frames of the first video, side by side
    """

    @staticmethod
    def __new__(cls: type[VideoTensor], videos: Tensor) -> VideoTensor:
        check_videos(videos)
        return videos.as_subclass(cls)

    def pil(self) -> list[list[Image.Image]]:
        """Converts the videos to PIL pictures.

        Returns:
            For each of the B videos a list of F pictures in mode RGB. Values outside [-1, 1] are clipped.

        Raises:
            ValueError: The shape is not (B, F, 3, H, W), there is no pixel, or there is a NaN.
        """
        check_videos(self)
        return [to_pil(frames) for frames in self.as_subclass(Tensor)]

    def save(self, path: str | Path, fps: float = 8) -> None:
        """Saves the videos in one animation, side by side.

        The file appears under its name when it is complete; an interrupted call leaves what was there before.

        Args:
            path: Where to save. Its suffix chooses the format: .gif, which has at most 256 colours in a frame and
                durations in hundredths of a second, or .webp or .png (APNG), which keep every pixel.
            fps: Frames per second.

        Raises:
            TypeError: `path` is no name of a file.
            ValueError: The videos cannot be shown (see `pil`), fps is not positive, the suffix is missing or another
                one, the folder does not exist, or `path` is a folder.
        """
        target, format = check_target(path, ANIMATIONS, "animation")
        if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= 1000:
            raise ValueError(f"fps: expected a number of frames per second from above 0 to 1000, got {fps!r}")
        first, *rest = (in_a_row(pictures) for pictures in zip(*self.pil(), strict=True))
        options = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
        write_whole(target, lambda file: first.save(file, format=format, **options, **OPTIONS[format]))


def check_videos(videos: Any, argument: str = "videos") -> None:
    """Raises TypeError or ValueError, naming `argument`, unless it is a floating tensor (B, F, 3, H, W)."""
    if not isinstance(videos, Tensor) or not videos.is_floating_point():
        got = videos.dtype if isinstance(videos, Tensor) else type(videos).__name__
        raise TypeError(f"{argument}: expected a floating tensor, got {got}")
    if videos.ndim != 5 or videos.shape[2] != 3:
        raise ValueError(f"{argument}: expected shape (B, frames, 3, height, width), got {tuple(videos.shape)}")
    if not videos.numel():
        raise ValueError(f"{argument}: expected at least one pixel, got shape {tuple(videos.shape)}")
