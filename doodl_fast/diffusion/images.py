"""Picture files: the one reader, the one writer, and `ImageTensor`, a tensor of images that saves itself.

Everywhere in this library images are tensors (B, 3, H, W) whose values lie nominally in [-1, 1].
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
# In these formats the frames after the first are other views or layers of the one picture, not an animation.
STILL_FORMATS = ("MPO", "PSD")
INTEGER_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
INTEGER_RANGES = (2**8 - 1, 2**16 - 1, 2**31 - 1)


class SavableTensor(Tensor):
    """A tensor with methods to save and show it, for which the result of any torch operation is a plain tensor."""

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __deepcopy__(self, memo: dict[int, Any]) -> SavableTensor:
        # PyTorch's own method asks for a `new_empty` that returns the subclass, which no operation here does.
        copied = copy.deepcopy(self.as_subclass(Tensor), memo).as_subclass(type(self))
        memo[id(self)] = copied
        return copied


class ImageTensor(SavableTensor):
    """Images (B, 3, H, W) in [-1, 1] that can be saved and shown.

    It is a tensor like any other; the result of any torch operation on it is a plain `torch.Tensor`. Functions that
    `torch.compile` has compiled take plain tensors alone: give them `images.as_subclass(torch.Tensor)`.

    Args:
        images: A floating-point tensor (B, 3, H, W). The new tensor shares its memory and its autograd graph.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` has another shape.

    Example:
        >>> ImageTensor(decoder(latents)).save("dog.png")
    """

    @staticmethod
    def __new__(cls: type[ImageTensor], images: Tensor) -> ImageTensor:
        check_images(images)
        return images.as_subclass(cls)

    def pil(self) -> list[Image.Image]:
        """Converts the images to PIL pictures.

        Returns:
            A list of B pictures in mode RGB. Values outside [-1, 1] are clipped.

        Raises:
            ValueError: The shape is not (B, 3, H, W), or there is a NaN.
        """
        return to_pil(self)

    def save(self, path: str | Path) -> None:
        """Saves the images in one file, side by side in one row. See `write_picture`."""
        write_picture(path, self)


def check_images(images: Any, argument: str = "images", channels: int = 3) -> None:
    """Raises TypeError or ValueError, naming `argument`, unless `images` is a floating tensor (B, channels, H, W)."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{argument}: expected a floating tensor, got {got}")
    if images.ndim != 4 or images.shape[1] != channels:
        hint = video_hint(images) if channels == 3 else ""
        raise ValueError(f"{argument}: expected shape (B, {channels}, height, width), got {tuple(images.shape)}{hint}")


def video_hint(images: Tensor) -> str:
    """Returns what an error should say besides where videos (B, F, 3, H, W) came in the place of pictures."""
    if images.ndim != 5 or images.shape[2] != 3:
        return ""
    return "; of videos (B, F, 3, H, W), videos.flatten(0, 1) are the frames as pictures"


def to_pil(images: Tensor) -> list[Image.Image]:
    """Converts images to PIL pictures.

    Args:
        images: A floating-point tensor (B, 3, H, W) in [-1, 1]. Values outside are clipped.

    Returns:
        A list of B pictures in mode RGB.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` has another shape, no pixels, or holds a NaN, which no pixel can show.
    """
    from PIL import Image

    check_images(images)
    if not images.numel():
        raise ValueError(f"images: expected at least one pixel, got shape {tuple(images.shape)}")
    values = images.detach().float()
    if torch.isnan(values).any():
        raise ValueError("images: expected numbers, got NaN in some pixels; look for where the NaN first appears")
    pixels = values.add(1).mul(127.5).clamp(0, 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in pixels]


def write_picture(path: str | Path, images: Tensor) -> None:
    """Saves images in one file, side by side in one row.

    The file appears under its name when it is complete; an interrupted call leaves what was there before.

    Args:
        path: Where to save. Its suffix chooses the format: .png, .jpg, .jpeg, .webp, .bmp, .tif or .tiff.
        images: A floating-point tensor (B, 3, H, W) in [-1, 1].

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` cannot be shown (see `to_pil`), the suffix is missing or another one, the folder does not
            exist, or `path` is a folder.
    """
    target, format = check_target(path, SUFFIXES)
    row = in_a_row(to_pil(images))
    write_whole(target, lambda file: row.save(file, format=format))


def in_a_row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns one PIL picture with pictures of one size side by side."""
    from PIL import Image

    width, height = pictures[0].size
    row = Image.new("RGB", (width * len(pictures), height))
    for index, picture in enumerate(pictures):
        row.paste(picture, (index * width, 0))
    return row


def check_target(path: str | Path, formats: Mapping[str, str], kind: str = "picture") -> tuple[Path, str]:
    """Returns the path of a file that is to be written, and its format by its suffix.

    Args:
        path: Where to save.
        formats: The formats by suffix, of which the first is recommended in errors.
        kind: What is saved, in a word.

    Raises:
        TypeError: `path` is no name of a file.
        ValueError: The suffix is another one, the folder does not exist, or `path` is a folder.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path: expected the name of a {kind} file, got {type(path).__name__}")
    target = Path(path)
    format = formats.get(target.suffix.lower())
    if format is None:
        raise ValueError(
            f"path: expected a name that ends in one of {', '.join(formats)}, got {str(path)!r}; use "
            f"{target.stem}{next(iter(formats))}"
        )
    if not target.parent.is_dir():
        raise ValueError(f"path: the folder {str(target.parent)!r} does not exist; create it first")
    if target.is_dir():
        raise ValueError(f"path: expected the name of a {kind} file, got the folder {str(path)!r}")
    return target, format


def write_whole(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file that appears under its name when it is complete.

    Args:
        target: The file's name.
        write: Writes the content into the open file that it is given.
    """
    # A random name that must be new follows no symbolic link that somebody else has put there.
    partial = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            write(file)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_picture(file: str | Path, argument: str = "images", upright: bool = True) -> Image.Image:
    """Reads a picture file into memory.

    Args:
        file: A regular file in a format that PIL reads, with one picture in it.
        argument: The name that error messages give to the file.
        upright: Whether the picture is turned as its EXIF orientation says.

    Returns:
        The PIL picture, of 8 bits a channel; see `eight_bits` for pictures that have more.

    Raises:
        ValueError: The file does not exist, is no regular file (a pipe could block for ever), is damaged, holds an
            animation or several pages, has more pixels than PIL allows, or is no picture that PIL can read.
    """
    return eight_bits(_load(file, argument, upright), argument)


def read_upright(file: str | Path, argument: str) -> Image.Image:
    """Reads a picture file, turned as its EXIF orientation says. See `read_picture`."""
    return read_picture(file, argument)


def open_picture(picture: Any, argument: str = "images") -> Tensor:
    """Reads a picture as a tensor.

    Args:
        picture: A file, which is turned as its EXIF orientation says, or a PIL picture, which is taken as it is.
            Greyscale becomes RGB, and transparency is composed with white. Pictures of more than 8 bits keep their
            precision; `eight_bits` says how their values are read.
        argument: The name that error messages give to the picture.

    Returns:
        A float32 tensor (1, 3, H, W) in [-1, 1].

    Raises:
        TypeError: `picture` is neither a file nor a PIL picture.
        ValueError: The file or the picture cannot be read; see `read_picture`.
    """
    import numpy as np
    from PIL import Image

    if isinstance(picture, (str, Path)):
        picture = _load(picture, argument, upright=True)
    if not isinstance(picture, Image.Image):
        raise TypeError(f"{argument}: expected a tensor, files or PIL pictures, got {type(picture).__name__}")
    if 0 in picture.size:
        raise ValueError(f"{argument}: expected at least one pixel, got a picture of size {picture.size}")
    grey = _grey(picture, argument)
    if grey is not None:
        return torch.from_numpy(grey * 2 - 1).float()[None, None].expand(1, 3, -1, -1).contiguous()
    with _readable(f"a picture of mode {picture.mode!r}", argument):
        rgba = picture.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return torch.from_numpy(np.array(flat)).permute(2, 0, 1)[None].float() / 127.5 - 1


def eight_bits(picture: Image.Image, argument: str = "images") -> Image.Image:
    """Converts a PIL picture of 16-bit, 32-bit or floating-point grey values to 8 bits, and returns others unchanged.

    PIL's own conversion clips such values at 255, which shows a 16-bit picture as white.

    - 16-bit pictures (modes I;16, I;16B, ..., and PNG files in mode I) go from 0 (black) to 65535 (white).
    - Other pictures in mode I (32-bit integers) go from 0 to the first of 255, 65535 and 2147483647 that holds all
      their values.
    - Pictures in mode F (floating point) go from 0 to 1.

    Args:
        picture: A PIL picture.
        argument: The name that error messages give to it.

    Returns:
        A PIL picture, of mode L where values were converted.

    Raises:
        ValueError: A value lies outside the range, or is not a number.
    """
    from PIL import Image

    grey = _grey(picture, argument)
    return picture if grey is None else Image.fromarray((grey * 255).round().astype("uint8"))


def _grey(picture: Image.Image, argument: str) -> np.ndarray[Any, Any] | None:
    """Returns the values of a grey picture of more than 8 bits as float64 in [0, 1], None for any other picture."""
    import numpy as np

    if picture.mode not in (*INTEGER_MODES, "F"):
        return None
    with _readable(f"a picture of mode {picture.mode!r}", argument):
        # PIL does not give every byte order of 16-bit pictures to numpy.
        whole = picture.convert("I") if picture.mode.startswith("I;16") else picture
        values = np.asarray(whole).astype(np.float64)
    if picture.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"{argument}: expected a floating-point picture (mode F) with values from 0 to 1, got "
                f"{values.min():g} to {values.max():g}; scale it to that range first"
            )
        return values
    is_wide = picture.mode != "I" or picture.format == "PNG"
    top = next((top for top in INTEGER_RANGES[is_wide:] if values.max() <= top), None)
    if top is None or values.min() < 0:
        raise ValueError(
            f"{argument}: expected an integer picture (mode {picture.mode}) with values of at least 0, got "
            f"{values.min():g} to {values.max():g}; scale it to 0 to 65535 first"
        )
    return np.asarray(values / top)


def _load(file: str | Path, argument: str, upright: bool) -> Image.Image:
    """Reads a file as PIL has it, in any mode. Raises as `read_picture`."""
    from PIL import Image, ImageOps

    name = f"the file {str(file)!r}"
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        raise ValueError(f"{argument}: {name} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, or a name that cannot be one
        raise ValueError(f"{argument}: {name} cannot be read: {error}") from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe, a device or a socket"
        raise ValueError(f"{argument}: expected a picture file, but {str(file)!r} is a {kind}")
    with _readable(name, argument), Image.open(file) as opened:
        frames = getattr(opened, "n_frames", 1)
        if frames == 1 or opened.format in STILL_FORMATS:
            opened.load()
            picture = ImageOps.exif_transpose(opened) if upright else opened.copy()
            picture.format = opened.format  # copies forget it, and `_grey` asks for it
            return picture
    raise ValueError(
        f"{argument}: expected one picture, but {name} holds {frames} frames or pages; save the one that you mean alone"
    )


@contextlib.contextmanager
def _readable(what: str, argument: str) -> Iterator[None]:
    """Turns whatever PIL raises about a picture into one ValueError of one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{argument}: {what} has too many pixels (PIL says: {error}); make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{argument}: {what} is no picture that PIL can read") from error
    except Exception as error:  # damaged files raise errors of a dozen types in PIL's plugins
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{argument}: {what} is no picture that PIL can read, or a damaged one (PIL says: {reason})"
        ) from error
