"""`doodl-fast invert` and `doodl-fast generate`: pictures to noise and back, on the embedded and on tiny pipelines."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_pipeline
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli_run import refused

from doodl_fast import LatticeState, cli, shapes
from doodl_fast.cli import edit as editing
from doodl_fast.cli import files, invert, options
from doodl_fast.diffusion.schedule import Schedule

WRITTEN = {"picture.png", "encoded.png", "noise.safetensors", "image.safetensors", "invert.json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("models")
    tiny_pipeline.stable_diffusion(work / "words").save_pretrained(work / "sd")
    return work / "sd"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawing of the embedded pipeline's domain, wider than high."""
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    scene = shapes.Scene(shapes.Prompt.parse("a red circle"), (shapes.Object("red", "disc", 32, 30, 13),))
    wide = Image.new("RGB", (100, 64), (240, 240, 236))
    wide.paste(Image.fromarray(shapes.render(scene)), (18, 0))
    wide.save(path)
    return path


@pytest.fixture(scope="module")
def inverted(model: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("states") / "red"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(model.parent)
        assert cli.main(command(model.name, picture, out)) == 0
    return out


def command(model: Path | str, picture: Path, out: Path, *more: str) -> list[str]:
    line = [
        "invert",
        str(picture),
        "--model",
        str(model),
        "--prompt",
        "a red circle",
        "--steps",
        "4",
        "--device",
        "cpu",
    ]
    return [*line, "--out", str(out), *more]


def copied(inverted: Path, tmp_path: Path) -> Path:
    out = tmp_path / "state"
    out.mkdir()
    for path in inverted.iterdir():
        if path.name in WRITTEN:
            (out / path.name).write_bytes(path.read_bytes())
    return out


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), dtype=float)


def test_the_embedded_pipeline_there_and_back(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "red"
    assert cli.main(command("shapes", picture, out)) == 0
    assert {path.name for path in out.iterdir()} == WRITTEN and {path.name for path in out.parent.iterdir()} == {"red"}
    assert np.array_equal(pixels(out / "picture.png"), pixels(picture)[:, 18:82])
    index = json.loads((out / "invert.json").read_text())
    settings = {"model": "shapes", "height": 64, "width": 64, "steps": 4, "strength": 0.8, "guidance_scale": 3.0}
    assert settings.items() <= index["settings"].items()
    noise, image = (LatticeState.load(out / f"{end}.safetensors") for end in ("noise", "image"))
    assert (noise.end, image.end) == ("noise", "image") and not torch.equal(noise.x, image.x)
    said = capsys.readouterr().out
    assert "the VAE's error" in said and "louder" not in said

    assert cli.main(["generate", str(out)]) == 0
    said = capsys.readouterr().out
    assert "came back bit for bit" in said and "0 by the chain" in said
    assert (out / "reconstruction.png").read_bytes() == (out / "encoded.png").read_bytes()
    found = json.loads((out / "reconstruction.json").read_text())
    assert found["same_settings"] and found["report"]["equal"] and found["report"]["change"] == 0
    by_hand = np.sqrt(np.square(pixels(out / "reconstruction.png") - pixels(out / "picture.png")).mean())
    assert found["report"]["vae_error"] == pytest.approx(by_hand, rel=0.05)  # saved pictures are rounded

    assert cli.main(["generate", str(out), "--prompt", "a blue circle"]) == 0
    assert capsys.readouterr().out.startswith("edited: the picture changed by ")
    found = json.loads((out / "edit.json").read_text())
    assert (
        not found["same_settings"] and not found["report"]["equal"] and found["settings"]["prompt"] == "a blue circle"
    )
    blue = pixels(out / "edit.png") - pixels(out / "encoded.png")
    assert blue[20:40, 22:42, 2].mean() > 10 > blue[20:40, 22:42, 0].mean()


@pytest.mark.parametrize(
    "more",
    [
        ("--dtype", "fp16", "--guidance-scale", "1"),
        ("--dtype", "bf16", "--steps", "5", "--strength", "1"),
        ("--arithmetic", "exact64", "--mix-weight", "0.97", "--negative-prompt", "a cat"),
        ("--height", "64", "--width", "96"),
    ],
    ids=" ".join,
)
def test_other_options_there_and_back(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...]
) -> None:
    out = tmp_path / "state"
    assert cli.main(command(model, picture, out, *more)) == 0
    assert cli.main(["generate", str(out), "--device", "cpu", "--out", str(tmp_path / "back.png")]) == 0
    assert "came back bit for bit" in capsys.readouterr().out
    assert (tmp_path / "back.png").read_bytes() == (out / "encoded.png").read_bytes()
    size = (96, 64) if "--width" in more else (128, 128)
    assert Image.open(out / "picture.png").size == Image.open(tmp_path / "back.png").size == size


def test_sdxl(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline.stable_diffusion_xl(tmp_path / "words").save_pretrained(tmp_path / "xl")
    assert cli.main(command(tmp_path / "xl", picture, tmp_path / "state", "--steps", "2")) == 0
    assert cli.main(["generate", str(tmp_path / "state")]) == 0
    assert "came back bit for bit" in capsys.readouterr().out


def test_other_settings_are_an_edit(inverted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copied(inverted, tmp_path)
    for more in (("--guidance-scale", "1"), ("--negative-prompt", "a dog")):
        assert cli.main(["generate", str(out), *more, "--out", str(tmp_path / "other.png")]) == 0
        assert "edited: " in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--prompt", "a red circle", "--guidance-scale", "3"]) == 0
    assert "bit for bit" in capsys.readouterr().out


def test_what_makes_edits_poor_is_said(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random network under a guidance far beyond what any is made for."""
    out = tmp_path / "loud"
    assert cli.main(command(model, picture, out, "--steps", "10", "--guidance-scale", "1000")) == 0
    assert "louder than noise that the model knows" in capsys.readouterr().out
    assert cli.main(["generate", str(out), "--guidance-scale=-1000"]) == 0
    assert "the two latents have parted" in capsys.readouterr().out


def test_a_network_that_is_not_the_same_twice_is_reported(
    inverted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, load = copied(inverted, tmp_path), options.load_pipeline

    def noisy(*args: Any) -> Any:
        pipeline = load(*args)
        pipeline.unet.register_forward_hook(lambda _m, _i, output: (output[0] + 1e-4 * torch.randn_like(output[0]),))
        return pipeline

    monkeypatch.setattr(options, "load_pipeline", noisy)
    assert cli.main(["generate", str(out)]) == 1
    said = capsys.readouterr().out
    assert "did not come back" in said and "does not return the same bits twice" in said
    found = json.loads((out / "reconstruction.json").read_text())["report"]
    assert not found["equal"] and found["differing"] > 0.9 and found["change"] > 0


def test_a_moved_model_and_another_one(
    inverted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(inverted, tmp_path)
    model.rename(tmp_path / "moved")
    try:
        assert "model: the folder" in refused(["generate", str(out)], capsys)
        assert cli.main(["generate", str(out), "--model", str(tmp_path / "moved")]) == 0
        assert "bit for bit" in capsys.readouterr().out
        assert "made with other weights than those of 'shapes'" in refused(
            ["generate", str(out), "--model", "shapes", "--out", str(tmp_path / "a.png")], capsys
        )
        assert not (tmp_path / "a.png").exists()
    finally:
        (tmp_path / "moved").rename(model)


def test_the_fingerprint_sees_every_bit(tmp_path: Path) -> None:
    pipeline = tiny_pipeline.stable_diffusion(tmp_path / "words")
    before = editing.fingerprint(pipeline)
    assert before == editing.fingerprint(pipeline)
    weight = next(pipeline.text_encoder.parameters())
    with torch.no_grad():
        weight.view(torch.int32).view(-1)[3] ^= 1
    assert editing.fingerprint(pipeline) != before


BAD = [
    (["--strength", "0"], "--strength: expected a number in (0, 1], got 0.0"),
    (["--strength", "1.1"], "--strength: expected a number in (0, 1], got 1.1"),
    (["--steps", "0"], "num_inference_steps: expected an int from 1 to 1000"),
    (["--mix-weight", "2"], "mix_weight: expected a number in (0, 1]"),
    (["--guidance-scale", "nan"], "guidance_scale: expected a finite number"),
    (["--height", "33"], "height: expected a positive multiple of 8"),
    (["--arithmetic", "float"], "argument --arithmetic: invalid choice"),
    (["--model", "/nowhere/at/all"], "model: the folder '/nowhere/at/all' does not exist"),
    (["--mix-weight", "0.05", "--steps", "12"], "overflow: x, y: out of the range of exact arithmetic"),
    (["--mix-weight", "0.05", "--steps", "12"], "here 1e+26 times: try fewer --steps"),
]


@pytest.mark.parametrize(("more", "message"), BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    model: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert message in refused(command(model, picture, tmp_path / "out", *more), capsys)
    assert not any(tmp_path.iterdir())


def test_bad_pictures_and_taken_folders(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_text("no picture")
    for name, reason in (("b.png", "does not exist"), ("a.png", "is no picture that PIL can read")):
        assert reason in refused(command(model, tmp_path / name, tmp_path / "out"), capsys)
    assert "--out: expected a new or empty folder" in refused(command(model, tmp_path / "a.png", tmp_path), capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_interrupted_inversion_leaves_nothing(
    model: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(invert, "write_json", interrupted)
    assert cli.main(command(model, picture, tmp_path / "out")) == 130
    assert not any(tmp_path.iterdir())
    for way_out in (KeyboardInterrupt, ValueError):
        with pytest.raises(way_out), files.new_folder(tmp_path / "out") as folder:
            _fail_in(folder, way_out)
        assert not any(tmp_path.iterdir())


def _fail_in(folder: Path, error: type[BaseException]) -> None:
    (folder / "half").write_text("")
    raise error


def test_damaged_states(inverted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a folder that `doodl-fast invert` wrote" in refused(["generate", str(tmp_path)], capsys)
    out = copied(inverted, tmp_path)
    good = {path.name: path.read_bytes() for path in out.iterdir()}
    index = json.loads(good["invert.json"])
    tensors = load_file(out / "noise.safetensors")

    def damage(name: str, content: bytes, message: str) -> None:
        (out / name).write_bytes(content)
        assert message in refused(["generate", str(out)], capsys)
        (out / name).write_bytes(good[name])

    damage("invert.json", b'{"settings"', "is damaged (JSONDecodeError")
    damage("invert.json", json.dumps(index | {"settings": {}}).encode(), "is damaged (KeyError: 'model')")
    steps = json.dumps(index | {"settings": index["settings"] | {"steps": "4"}})
    damage("invert.json", steps.encode(), "is damaged (TypeError: steps is '4')")
    damage("noise.safetensors", good["noise.safetensors"][:-9], "is not a safetensors file")
    save_file(tensors, tmp_path / "plain")
    damage("noise.safetensors", (tmp_path / "plain").read_bytes(), "expected a doodl_fast.LatticeState")
    damage("noise.safetensors", good["image.safetensors"], "expected one at the noise's end")
    other = json.dumps(index | {"settings": index["settings"] | {"mix_weight": 0.9}})
    damage("invert.json", other.encode(), "made by a chain with another schedule, mix_weight")
    (out / "image.safetensors").unlink()
    assert "is damaged (FileNotFoundError" in refused(["generate", str(out)], capsys)


def test_states_of_another_shape_or_kind(
    inverted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(inverted, tmp_path)
    states = {end: LatticeState.load(inverted / f"{end}.safetensors") for end in ("noise", "image")}
    for end, state in states.items():
        parts = {name: getattr(state, name)[..., :8].clone() for name in ("x", "y", "x_buffer", "y_buffer")}
        replace(state, **parts).save(out / f"{end}.safetensors")
        expected = "is damaged (ValueError: noise.safetensors has shape" if end == "noise" else "latents of shape (1, "
        assert expected in refused(["generate", str(out), "--model", str(model)], capsys)
    index = json.loads((inverted / "invert.json").read_text())
    bad = {"dtype": "fp99", "arithmetic": "float", "strength": 2.0, "height": 10**9, "prompt": "\udcff", "model": "\0"}
    for name, value in bad.items():
        (out / "invert.json").write_text(json.dumps(index | {"settings": index["settings"] | {name: value}}))
        assert "is damaged (" in refused(["generate", str(out)], capsys)
    (out / "invert.json").write_text(json.dumps(index))
    (out / "noise.safetensors").unlink()
    os.mkfifo(out / "noise.safetensors")
    assert "no regular file" in refused(["generate", str(out)], capsys)


def test_where_a_picture_may_go(
    inverted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (tmp_path / "no" / "a.png", tmp_path, tmp_path / "a.jpg"):
        message = refused(["generate", str(inverted), "--out", str(place)], capsys)
        assert "--out: expected a .png file in an existing folder" in message
    before = (inverted / "invert.json").read_bytes()
    message = refused(["generate", str(inverted), "--out", str(inverted / "invert.png")], capsys)
    assert "--out: expected another name" in message and (inverted / "invert.json").read_bytes() == before
    out = copied(inverted, tmp_path)
    monkeypatch.chdir(tmp_path)  # the model's folder is stored in full
    assert cli.main(["generate", "state"]) == 0 and (out / "reconstruction.png").is_file()


# Pictures


def stripes(width: int, height: int) -> Image.Image:
    """Red, green and blue from left to right; the middle one is square."""
    image = Image.new("RGB", (width, height), "red")
    left = (width - height) // 2
    image.paste("lime", (left, 0, left + height, height))
    image.paste("blue", (left + height, 0, width, height))
    return image


@pytest.mark.parametrize(("width", "height"), [(300, 100), (97, 31), (20, 8), (5000, 1000)])
def test_the_centre_is_cut_out(width: int, height: int) -> None:
    assert editing.fit(stripes(width, height), 64, 64).getcolors() == [(64 * 64, (0, 255, 0))]
    tall = editing.fit(stripes(width, height).rotate(90, expand=True), 64, 64)
    assert tall.getcolors() == [(64 * 64, (0, 255, 0))]


def test_a_picture_is_cut_then_resized_as_pil_does() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 113, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    # half a pixel is rounded to even, as PIL's crop does
    expected = picture.crop((16, 0, 96, 80)).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(editing.fit(picture, 32, 32)), np.asarray(expected))
    expected = picture.crop((0, 12, 113, 68)).resize((64, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(editing.fit(picture, 32, 64)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16", "EXIF"])
def test_every_kind_of_picture(tmp_path: Path, mode: str) -> None:
    grey = Image.new("L", (40, 20), 255)
    grey.paste(0, (0, 0, 20, 20))  # black, then white
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "EXIF") else "a.png")
    if mode in ("RGBA", "LA"):
        clear = Image.new(mode, (40, 20))  # black, and transparent where it was white
        clear.putalpha(Image.eval(grey, lambda value: 255 - value))
        clear.save(path)
    elif mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(path)
    elif mode == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = 3  # upside down
        grey.rotate(180).convert("RGB").save(path, exif=exif, quality=95)
    else:
        grey.convert("RGB").convert(mode).save(path)
    found = np.asarray(editing.fit(editing.open_image(path), 20, 40), dtype=float)
    assert found[:, :18].max() < 12 and found[:, 22:].min() > 243


def test_the_last_part_of_a_schedule() -> None:
    whole = Schedule((9, 6, 3, 0), (0.1, 0.2, 0.3, 0.4), (0.2, 0.3, 0.4, 0.5), "v_prediction")
    assert options.last_part(whole, 1.0) == whole
    assert options.last_part(whole, 0.5) == Schedule((3, 0), (0.3, 0.4), (0.4, 0.5), "v_prediction")
    assert options.last_part(whole, 1e-9).timesteps == (0,)
