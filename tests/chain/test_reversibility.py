"""check_reversibility and the drift command."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch
from conftest import DependsOnGradMode, TinyNet, conditions, latents, relative, sd_scheduler, tiny_chain
from PIL import Image

from doodl_fast import check_reversibility, cli
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.program import Coupling
from doodl_fast.cli import drift
from doodl_fast.diffusion.denoiser import Denoiser


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_errors_are_those_of_going_there_and_back(state_dtype):
    chain = tiny_chain(12, dtype=torch.float32, state_dtype=state_dtype)
    x, y = latents(1, 3, 4, 4, dtype=state_dtype)
    found = check_reversibility(chain, x, y)
    assert len(found.forward) == len(found.inverse) == 13  # 12 steps and the start
    back = torch.cat(chain.inverse(*chain(x, y)))
    again = torch.cat(chain(*chain.inverse(x, y)))
    eps = torch.finfo(state_dtype).eps
    for errors, direct in ((found.forward, back), (found.inverse, again)):
        assert errors[-1] == 0 and errors[-2] < 8 * eps
        assert errors[0] > 4 * errors[-2] and errors[0] < 1e4 * eps
        # The direct way divides where undoing does not, so it rounds elsewhere: the errors agree in size alone.
        assert 1 / 2 < errors[0] / relative(direct, torch.cat([x, y])) < 2
    assert not found.exact


def test_the_undoing_network_runs_as_in_a_backward_pass():
    """A network whose value depends on grad mode is what it has to find."""

    found = check_reversibility(tiny_chain(5, network=DependsOnGradMode().double()), *latents(1, 3, 4))
    assert found.forward[0] > 1e-4 and found.inverse[0] > 1e-4


@pytest.mark.parametrize("factor", [1.001, 1.2])
def test_the_error_of_a_known_difference(factor):
    """A network that is larger by a known factor when it undoes: the error is that of a chain of the larger network."""

    class Grown(TinyNet):
        def forward(self, *args):
            return super().forward(*args) * (factor if torch.is_grad_enabled() or self.always else 1)

    networks = Grown().double(), Grown().double()
    networks[0].always, networks[1].always = False, True
    chain, larger = (tiny_chain(5, network=network) for network in networks)
    x, y = latents(1, 3, 4)
    found, start = check_reversibility(chain, x, y), torch.cat([x, y])
    with torch.no_grad():
        back, again = larger.inverse(*chain(x, y)), larger(*chain.inverse(x, y))
    assert found.forward[0] == pytest.approx(relative(torch.cat(back), start), rel=1e-9)
    assert found.inverse[0] == pytest.approx(relative(torch.cat(again), start), rel=1e-9)


def test_an_exact_chain_and_its_table():
    program = [Coupling(0, 2.0, step=0), Coupling(1, 4.0, step=1)]
    found = check_reversibility(Chain(Denoiser(TinyNet().double(), None), program), latents(1, 3, 4)[0])
    assert found.exact and found.forward == (0.0, 0.0, 0.0)
    lines = str(found).splitlines()
    assert lines[0].split() == ["steps", "forward", "inverse"] and lines[1].split() == ["0", "0.00e+00", "0.00e+00"]
    assert len(lines) == 4


def test_a_state_that_overflows_on_the_way_back():
    class Sour(TinyNet):
        def forward(self, x, t, cond=None):
            return x * (float("inf") if torch.is_grad_enabled() and t == 1 else 1)

    program = [Coupling(0, b=0.5, step=step, tag=step) for step in range(4)]
    found = check_reversibility(Chain(Denoiser(Sour().double(), None), program), latents(1, 3, 4)[0])
    assert [math.isnan(error) for error in found.forward] == [True, True, False, False, False]
    assert [math.isnan(error) for error in found.inverse] == [True, True, True, False, False]


def test_bad_latents_are_refused():
    with pytest.raises(ValueError, match="x: expected finite latents"):
        check_reversibility(tiny_chain(2), latents(1, 3, 4)[0] / 0)


def test_the_network_must_be_deterministic():
    network = TinyNet().double()
    network.add_module("drop", torch.nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"call unet.eval\(\) first"):
        check_reversibility(tiny_chain(2, network=network.train()), latents(1, 3, 4)[0])


# doodl-fast drift


def test_measure():
    cond, uncond = conditions(dtype=torch.float32)
    denoiser = Denoiser(TinyNet(), cond, uncond, 3.0)
    seen = []
    x = latents(1, 3, 4, 4, dtype=torch.float32)[0]
    steps = (5, 20, 50)
    table = drift.measure(denoiser, sd_scheduler(), x, steps, report=lambda *cell: seen.append(cell))
    assert list(table)[:4] == ["fp16", "bf16", "fp32", "fp64"]
    assert seen == [
        (name, count, error) for name, row in table.items() for count, error in zip(steps, row, strict=True)
    ]
    for count in range(3):
        bf16, fp16, fp32, fp64 = (table[name][count] for name in ("bf16", "fp16", "fp32", "fp64"))
        assert bf16 > fp16 > 100 * fp32 > 1e4 * fp64 > 0
    for row in (table["fp32"], table["fp64"]):
        assert row[0] < row[1] < row[2]  # 1/p^2 a step
    assert table["fp16"][0] < 0.1


def test_an_overflow_is_nan():
    class Exploding(TinyNet):
        def forward(self, x, t, cond=None):
            return x * 3e4

    table = drift.measure(Denoiser(Exploding(), None), sd_scheduler(), torch.ones(1, 3, 4), (5,))
    assert math.isnan(table["fp16"][0]) and drift._cell(table["fp16"][0]) == "overflow"


def test_the_command(tmp_path, capsys):
    out = tmp_path / "found"
    assert cli.main(["drift", "--steps", "4", "2", "4", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2" in printed.splitlines()[0] and "fp64" in printed
    stored = json.loads((out / drift.TABLE).read_text())
    assert stored["steps"] == [2, 4] and stored["options"]["guidance_scale"] == 7.5
    assert stored["errors"]["fp16"][1] > stored["errors"]["fp64"][1]
    with Image.open(out / drift.FIGURE) as picture:
        assert picture.format == "PNG" and len(picture.convert("L").getcolors(256) or []) > 5


@pytest.mark.parametrize(("options", "message"), [(["--steps", "0"], "--steps: expected numbers of at least 1, got 0")])
def test_bad_options(options, message, capsys):
    assert cli.main(["drift", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_name_is_refused(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert cli.main(["drift", "--out", str(file)]) == 2
    assert "--out: expected a folder, got the file" in capsys.readouterr().err and file.read_text() == ""


def test_figure_of_zeros_and_overflows(tmp_path):
    drift.draw(tmp_path / "a.png", [10, 100], {"exact": [0.0, 0.0], "fp16": [0.1, math.nan]})
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_arguments_have_defaults():
    parser = argparse.ArgumentParser()
    drift.add_arguments(parser)
    assert parser.parse_args([]).steps == list(drift.STEPS)
