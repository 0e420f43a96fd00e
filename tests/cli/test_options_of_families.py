"""Options that a family of pipelines does not take end in exit code 2 and one line that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny_families
from PIL import Image
from test_cli_run import refused

from doodl_fast import cli
from doodl_fast.cli.families import own_options

RUN = ["run", "--guidance", "symmetry", "--steps", "2", "--optimization-steps", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixels")
    tiny_families.pixel_space("DDIMPipeline").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sd3")
    tiny_families.stable_diffusion_3(work / "words").save_pretrained(work / "sd3")
    return work / "sd3"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a dog"], "--prompt: expected none, because models of the family PixelSpace have no text, got"),
        (["--negative-prompt", "ugly"], "--negative-prompt: expected none, because models of the family PixelSpace"),
        (["--guidance-scale", "3"], "guidance_scale: expected 1, because DDIMPipeline has no guidance, got 3.0"),
        (["--num-frames", "5"], "num_frames: from_pipeline has no such argument for DDIMPipeline"),
        (["--height", "17"], "height: expected a positive multiple of 2"),
    ],
)
def test_pixel_space(
    pixels: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert message in refused([*RUN, "--model", str(pixels), "--out", str(out), *options], capsys)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--prompt: expected a text, which says what the picture shows, got none"),
        (["--prompt", "a dog", "--num-frames", "5"], "num_frames: from_pipeline has no such argument for StableDiff"),
        (["--prompt", "a dog", "--option", "true_cfg_scale=3"], "true_cfg_scale: from_pipeline has no such argument"),
        (["--prompt", "a dog", "--width", "68"], "width: expected at most 64, for which the network has positions"),
        (["--prompt", "a dog", "--height", "18"], "height: expected a positive multiple of 4"),
        (
            ["--prompt", "a dog", "--solver", "dpm-solver"],
            "scheduler: FlowMatchEulerDiscreteScheduler cannot be turned",
        ),
    ],
)
def test_stable_diffusion_3(
    sd3: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*RUN, "--model", str(sd3), "--out", str(tmp_path / "out"), "--option", "max_sequence_length=8", *options]
    assert message in refused(line, capsys)


def test_a_scheduler_that_cannot_be_followed(sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = sd3 / "model_index.json"
    before = index.read_text()
    made = diffusers.DDIMScheduler(clip_sample=False)
    folder = tmp_path / "model"
    folder.mkdir()
    for path in sd3.iterdir():
        if path.name not in ("scheduler", "model_index.json"):
            (folder / path.name).symlink_to(path)
    made.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        json.dumps({**json.loads(before), "scheduler": ["diffusers", "DDIMScheduler"]})
    )
    line = [*RUN, "--model", str(folder), "--prompt", "a dog", "--out", str(tmp_path / "out")]
    said = refused(line, capsys)
    assert "scheduler: expected one of flow matching for pipelines of the family StableDiffusion3" in said


def test_videos_are_not_inverted_by_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import tiny_videos

    tiny_videos.cogvideox().save_pretrained(tmp_path / "video")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    line = ["invert", str(tmp_path / "a.png"), "--model", str(tmp_path / "video"), "--prompt", "a dog", "--steps", "2"]
    line += ["--height", "16", "--width", "32", "--num-frames", "9", "--option", "max_sequence_length=8"]
    said = refused([*line, "--device", "cpu", "--out", str(tmp_path / "out")], capsys)
    assert "IMAGE: expected --num-frames 1 with a model of videos, as a picture is one frame, got 9 frames" in said


def test_values_are_json_or_texts_or_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.png")
    texts = ["scale=3.5", "class_labels=[1, 2]", "prompt_2=a cat", "clean=true", f"control_image={tmp_path / 'a.png'}"]
    args: Any = type("Args", (), {})()
    args.num_frames, args.option = 5, texts
    found = own_options(args)
    picture = found.pop("control_image")
    assert picture.size == (8, 4) and picture.mode == "RGB"
    expected = {"num_frames": 5, "scale": 3.5, "class_labels": [1, 2], "prompt_2": "a cat", "clean": True}
    assert found == expected


def test_class_labels_on_the_command_line(tmp_path: Path) -> None:
    pipe = tiny_families.pixel_space("DDIMPipeline", num_class_embeds=4)
    pipe.save_pretrained(tmp_path / "model")
    losses = []
    for label in (1, 2):
        out = tmp_path / str(label)
        assert cli.main([*RUN, "--model", str(tmp_path / "model"), "--option", f"class_labels=[{label}]", "--out",
                         str(out)]) == 0  # fmt: skip
        losses.append(json.loads((out / "result.json").read_text())["losses"][0])
    assert losses[0] != losses[1]
