"""`doodl-fast run` with several guides and weights, own losses, optimizers, arithmetics, devices and a target."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from doodl_fast import cli
from doodl_fast.cli.losses import find_optimizer
from doodl_fast.guidance import Picture, Symmetry
from doodl_fast.optimization import loop

LINE = ["run", "--model", "shapes", "--prompt", "a red circle", "--steps", "2", "--optimization-steps", "1"]


def refused(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that a bad command line ends in."""
    capsys.readouterr()
    try:
        code = cli.main(line)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    from PIL import Image

    file = tmp_path / "target.png"
    Image.new("RGB", (32, 32), (255, 0, 0)).save(file)
    return file


def seen(line: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command line gives to `optimize`."""
    found: dict[str, Any] = {}

    def spy(chain: Any, latents: Any, decode: Any, loss: Any, steps: int, **options: Any) -> Any:
        found.update(options, chain=chain, loss=loss)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "optimize", spy)
    assert cli.main(line) == 130
    return found


def test_everything_reaches_the_loop(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_losses.py").write_text(
        "def dark(images, latents):\n    return images.mean() + 0 * latents.mean()\n"
    )
    monkeypatch.chdir(tmp_path)
    guides = ["--guidance", "symmetry:0.5", "picture", "--target", str(picture), "--loss", "my_losses:dark:-2"]
    more = ["--optimizer", "adam", "--lr", "0.03", "--arithmetic", "exact", "--device", "cpu"]
    found = seen([*LINE, "--out", str(tmp_path / "out"), *guides, *more], monkeypatch)
    assert list(found["loss"]) == ["symmetry", "picture", "my_losses:dark"]
    assert [weight for _, weight in found["loss"].values()] == [0.5, 1.0, -2.0]
    assert isinstance(found["loss"]["symmetry"][0], Symmetry) and isinstance(found["loss"]["picture"][0], Picture)
    assert found["chain"].arithmetic == "exact"
    optimizer = found["optimizer"]([torch.ones(1, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["lr"] == 0.03


def test_a_run_with_several_losses_is_logged_and_resumed(tmp_path: Path, picture: Path) -> None:
    line = [*LINE, "--out", str(tmp_path / "out"), "--guidance", "symmetry:0.5", "picture", "--target", str(picture)]
    assert cli.main(line) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    history = result["history"]
    assert result["losses"][0] == pytest.approx(0.5 * history["symmetry"][0] + history["picture"][0])
    assert cli.main([*line[:8], "2", *line[9:], "--resume"]) == 0
    again = json.loads((tmp_path / "out" / "result.json").read_text())
    assert again["losses"][0] == result["losses"][0] and len(again["losses"]) == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--guidance: expected one of clip-text, .*, or --loss, got neither"),
        (["--guidance", "beauty"], "invalid choice: 'beauty'"),
        (["--guidance", "symmetry:big"], "expected a finite number as the weight, got 'big'"),
        (["--guidance", "symmetry", "symmetry:2"], "--guidance: expected each guide once, got symmetry symmetry"),
        (["--guidance", "picture"], "--target: expected a picture file with --guidance picture, got none"),
        (["--guidance", "symmetry", "--target", "a.png"], "--target: expected --guidance picture or .* with it"),
        (["--loss", "nowhere"], "expected MODULE:FUNCTION or MODULE:FUNCTION:WEIGHT, got 'nowhere'"),
        (["--loss", "no_such_module:f"], "--loss: cannot import 'no_such_module' from"),
        (["--loss", "math:no_such"], "--loss: expected a function 'no_such' in the module 'math'"),
        (["--loss", "math:pi"], "--loss: expected a function, got math:pi, a float"),
        (["--guidance", "symmetry", "--optimizer", "best"], "--optimizer: expected one of .*Adam.*, got 'best'"),
        (["--guidance", "symmetry", "--lr", "1"], "--lr: expected --optimizer with it, got none"),
        (["--guidance", "symmetry", "--optimizer", "sgd", "--lr", "0"], "--lr: expected a positive number, got 0.0"),
        (["--guidance", "symmetry", "--device", "tpu"], "expected cpu, cuda, cuda:N or mps, got 'tpu'"),
        (["--guidance", "symmetry", "--arithmetic", "wrong"], "invalid choice: 'wrong'"),
    ],
)
def test_what_is_refused(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*LINE, "--out", str(tmp_path / "out"), *more], capsys)
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(), reason="the device is there")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_devices_that_are_not_there(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused([*LINE, "--out", str(tmp_path / "out"), "--guidance", "symmetry", "--device", device], capsys)
    assert line.startswith("doodl-fast: error: --device: expected a ") and "use --device cpu" in line


def test_no_optimizer_is_momentum_sgd() -> None:
    assert find_optimizer(None, None) is None


def test_the_distance_to_a_picture(picture: Path) -> None:
    red = Picture(picture)
    images = torch.zeros(2, 3, 16, 24, dtype=torch.float64, requires_grad=True)
    value = red(images)
    assert value.item() == pytest.approx(1.0)  # every channel of red is 1 from grey
    (gradient,) = torch.autograd.grad(value, images)
    signs = torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    assert torch.allclose(gradient, 2 * signs.expand_as(images) / images.numel())
