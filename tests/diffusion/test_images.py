"""Picture files are read by their real range or refused by name; images save themselves."""

from __future__ import annotations

import copy
import io
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from PIL import Image
from torch import Tensor

from doodl_fast.compat.quirks import Quirks
from doodl_fast.compat.start import source_pixels
from doodl_fast.diffusion.images import ImageTensor, eight_bits, open_picture, read_picture, write_picture

RAMP = np.linspace(0, 1, 12).reshape(3, 4)


def images(batch: int = 1, height: int = 4, width: int = 6) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def grey(picture: Any) -> Tensor:
    """The first channel in [0, 1], after a check that the three are equal."""
    opened = open_picture(picture)
    assert torch.equal(opened[:, 0], opened[:, 1]) and torch.equal(opened[:, 0], opened[:, 2])
    return (opened[0, 0] + 1) / 2


# Reading


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("16.png", (RAMP * 65535).astype(np.uint16)),
        ("16.tif", (RAMP * 65535).astype(np.uint16)),
        ("big_endian.tif", (RAMP * 65535).astype(">u2")),
        ("int16.tif", (RAMP * 65535).astype(np.int32)),
        ("int31.tif", (RAMP * (2**31 - 1)).astype(np.int32)),
        ("int8.tif", (RAMP * 255).astype(np.int32)),
        ("float.tif", RAMP.astype(np.float32)),
    ],
)
def test_grey_pictures_of_many_bits_are_read_by_their_range(tmp_path: Path, name: str, values: Any) -> None:
    Image.fromarray(values).save(tmp_path / name)
    tolerance = 1 / 255 if name == "int8.tif" else 1e-4
    assert (grey(tmp_path / name) - torch.from_numpy(RAMP)).abs().max() < tolerance
    # the same picture, not from a file, and as the reference's start reads it
    assert (grey(Image.fromarray(values)) - torch.from_numpy(RAMP)).abs().max() < tolerance
    read = np.asarray(read_picture(tmp_path / name))
    assert read.dtype == np.uint8 and np.abs(read / 255 - RAMP).max() < 1 / 255
    started = source_pixels(Image.fromarray(values), 3, Quirks())[0, 0]
    assert started.min() < -0.4 and started.max() > 0.4


def test_a_dark_16_bit_png_is_dark() -> None:
    """Older versions of PIL read it in mode I, whose range is otherwise that of the values."""
    picture = Image.fromarray(np.full((2, 2), 200, np.int32))
    assert grey(picture).max() > 0.7
    picture.format = "PNG"
    assert grey(picture).max() < 0.01


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((2, 2), 255, np.float32), r"images: expected a floating-point picture .* got 255 to 255; scale it"),
        (np.full((2, 2), -0.5, np.float32), "from 0 to 1, got -0.5 to -0.5"),
        (np.full((2, 2), np.nan, np.float32), "got nan to nan"),
        (np.full((2, 2), -7, np.int32), "images: expected an integer picture .* got -7 to -7"),
    ],
)
def test_values_out_of_range_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_picture(Image.fromarray(values))
    with pytest.raises(ValueError, match="picture: expected"):
        eight_bits(Image.fromarray(values), "picture")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_read_as_their_colours(mode: str) -> None:
    white = Image.new("RGB", (3, 2), "white").convert(mode)
    assert torch.equal(open_picture(white), torch.ones(1, 3, 2, 3))


def test_files_are_turned_upright_unless_told_otherwise(tmp_path: Path) -> None:
    picture, exif = Image.new("RGB", (6, 2)), Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    assert read_picture(tmp_path / "turned.png").size == (2, 6)
    assert open_picture(tmp_path / "turned.png").shape == (1, 3, 6, 2)
    assert read_picture(tmp_path / "turned.png", upright=False).size == (6, 2)


def bytes_of(format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_are_refused(tmp_path: Path, format: str) -> None:
    file = tmp_path / f"cut.{format.lower()}"
    whole = bytes_of(format)
    for length in (0, 4, len(whole) // 3, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"images: the file .*cut\.\w+' is no picture that PIL can read"):
            open_picture(file)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations_and_pages_are_refused(tmp_path: Path, format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "many", format, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"images: expected one picture, but the file .*many' holds 2 frames or pages"):
        open_picture(tmp_path / "many")
    frames[0].save(tmp_path / "one", format)
    assert open_picture(tmp_path / "one")[0, 0].mean() > 0.9


def test_a_phones_picture_with_a_second_view_is_one_picture(tmp_path: Path) -> None:
    views = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    views[0].save(tmp_path / "phone.mpo", save_all=True, append_images=views[1:])
    assert open_picture(tmp_path / "phone.mpo").mean() > 0.9


def test_a_decompression_bomb_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"images: the file .*bomb.png' has too many pixels .*MAX_IMAGE_PIXELS"):
        open_picture(tmp_path / "bomb.png")


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file, kind in ((tmp_path / "pipe", "pipe, a device"), (Path("/dev/null"), "device"), (tmp_path, "folder")):
        with pytest.raises(ValueError, match=f"images: expected a picture file, but .* is a .*{kind}"):
            open_picture(file)
    for name in ("a\0b.png", "x" * 5000):
        with pytest.raises(ValueError, match=r"images: the file .* cannot be read"):
            open_picture(name)
    with pytest.raises(ValueError, match=r"source_im: the file .*none' does not exist"):
        read_picture(tmp_path / "none", "source_im")
    with pytest.raises(ValueError, match=r"images: expected at least one pixel, got a picture of size \(0, 4\)"):
        open_picture(Image.new("RGB", (0, 4)))
    with pytest.raises(TypeError, match="images: expected a tensor, files or PIL pictures, got int"):
        open_picture(3)


# Writing


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".webp"])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"dog{suffix}"
    smooth = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    ImageTensor(smooth).save(file)
    lossy = suffix in (".jpg", ".jpeg", ".webp")
    assert (open_picture(file) - smooth).abs().max() < (0.1 if lossy else 1 / 127)
    with Image.open(file) as opened:
        assert opened.format == {"jpg": "JPEG", "tif": "TIFF"}.get(suffix[1:], suffix[1:].upper())
    assert os.listdir(tmp_path) == [file.name]


def test_a_batch_is_saved_side_by_side(tmp_path: Path) -> None:
    three = images(3)
    ImageTensor(three).save(str(tmp_path / "row.png"))
    row = open_picture(tmp_path / "row.png")
    assert row.shape == (1, 3, 4, 18)
    assert (row - torch.cat(list(three.split(1)), dim=-1)).abs().max() < 1 / 127
    assert [picture.size for picture in ImageTensor(three).pil()] == [(6, 4)] * 3


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_picture(tmp_path / "a.png", images())
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == 0o666 & ~mask
    before = (tmp_path / "a.png").read_bytes()

    def half(self: Image.Image, file: Any, format: str) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", half)
        with pytest.raises(KeyboardInterrupt):
            write_picture(tmp_path / "a.png", -images())
    assert (tmp_path / "a.png").read_bytes() == before and os.listdir(tmp_path) == ["a.png"]
    write_picture(tmp_path / "a.png", -images())
    assert (tmp_path / "a.png").read_bytes() != before


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    for name in ("dog", "dog.gif", "dog.safetensors"):
        with pytest.raises(ValueError, match=r"path: expected a name that ends in one of \.png.*; use dog\.png"):
            write_picture(tmp_path / name, images())
    with pytest.raises(ValueError, match=r"path: the folder .*none' does not exist; create it first"):
        write_picture(tmp_path / "none" / "dog.png", images())
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"path: expected the name of a picture file, got the folder"):
        write_picture(tmp_path / "folder.png", images())
    with pytest.raises(TypeError, match="path: expected the name of a picture file, got int"):
        write_picture(3, images())  # type: ignore[arg-type]
    for wrong in (images()[0], images()[:, :1], images()[None]):
        with pytest.raises(ValueError, match=r"images: expected shape \(B, 3, height, width\), got"):
            write_picture(tmp_path / "dog.png", wrong)
    with pytest.raises(ValueError, match=r"images: expected at least one pixel, got shape \(0, 3, 4, 6\)"):
        write_picture(tmp_path / "dog.png", images()[:0])
    with pytest.raises(ValueError, match="images: expected numbers, got NaN in some pixels"):
        write_picture(tmp_path / "dog.png", images() * torch.nan)
    assert os.listdir(tmp_path) == ["folder.png"]


# The tensor


def test_operations_give_plain_tensors() -> None:
    tensor = ImageTensor(images(2))
    others = [tensor + 1, tensor[0], tensor.clone(), tensor.detach(), torch.cat([tensor, tensor]), tensor.double()]
    assert all(type(other) is Tensor for other in others)
    assert torch.equal(tensor, images(2)) and "tensor" in repr(tensor).lower()


def test_it_shares_memory_and_graph_with_what_it_was_made_of() -> None:
    leaf = images().requires_grad_()
    tensor = ImageTensor(2 * leaf)
    (gradient,) = torch.autograd.grad(tensor.square().sum(), leaf)
    assert relative(gradient, 8 * leaf.detach()) < 1e-6
    plain = images()
    assert ImageTensor(plain).data_ptr() == plain.data_ptr()


def test_copies_and_pickles_are_of_the_same_class() -> None:
    tensor = ImageTensor(images(2))
    for other in (copy.copy(tensor), copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert type(other) is ImageTensor and torch.equal(other, tensor)
    twice = copy.deepcopy([tensor, tensor])
    assert twice[0] is twice[1] and twice[0].data_ptr() != tensor.data_ptr()


@pytest.mark.parametrize(
    ("wrong", "error"), [(torch.zeros(3, 4, 4), ValueError), (torch.zeros(1, 3, 4, 4).int(), TypeError), (3, TypeError)]
)
def test_other_tensors_are_no_images(wrong: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="images: expected"):
        ImageTensor(wrong)
