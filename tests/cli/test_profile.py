"""`profile` in Python and as a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_pipeline
import torch
from conftest import DEVICE, TinyNet, conditions, latents, tiny_chain
from PIL import Image

import doodl_fast
from doodl_fast import cli
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT

needs_checkout = pytest.mark.skipif(
    not (Path(doodl_fast.__file__).resolve().parents[1] / "bench").is_dir(),
    reason="the package that is tested was installed, and bench/ with what profiles the reference is not a part of it",
)


def profiled(chain, x):
    with doodl_fast.profile(chain) as report:
        outputs = chain(x)
        (gradient,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), x)
        del outputs
    return report, gradient


@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "naive", "auto"])
def test_a_report_and_an_untouched_gradient(memory, tmp_path):
    chain = tiny_chain(5, memory)
    evaluator = chain.evaluator
    x = latents(1, 3, 16, 16, grad=True)[0]
    expected = torch.autograd.grad(sum(out.square().sum() for out in chain(x)), x)[0]
    report, gradient = profiled(chain, x)
    assert torch.equal(gradient, expected) and chain.evaluator is evaluator
    graphs = [e.graph for e in report.evaluations]
    assert graphs == ([True] * 8 if memory in ("naive", "auto") else [False] * 8 + [True] * 8)
    size = x.numel() * x.element_size()
    assert report.peak > 5 * size and report.held == size  # the gradient
    assert report.peak == max(held for _, held in report.timeline)
    growing = {"checkpoint": size, "naive": 3 * size, "auto": 3 * size}.get(memory, 0)
    assert report.growth >= growing and (growing or report.growth < 2 * size)
    report.save(tmp_path / "deep")
    width, height = Image.open(tmp_path / "deep" / "timeline.png").size
    assert width == 800 and height in (229, 230)  # Versions of matplotlib round differently.
    stored = json.loads((tmp_path / "deep" / "profile.json").read_text())
    assert stored["peak"] == report.peak and len(stored["evaluations"]) == len(graphs)
    assert f"{len(graphs)}, {sum(graphs)} of them with a graph" in str(report)


def test_growth_is_zero_in_exact_reversal():
    report, _ = profiled(tiny_chain(12, "reversible", arithmetic="exact"), latents(1, 3, 4, grad=True)[0])
    assert abs(report.growth) < 8 and report.device == str(torch.empty(0, device=DEVICE).device)


def test_wide_vjps_and_evaluators_without_raw():
    cond, uncond = conditions(dtype=torch.float16)
    denoiser = Denoiser(TinyNet().half(), cond, uncond, vjp_dtype=torch.float32)
    x = latents(1, 3, 4, dtype=torch.float32, grad=True)[0]
    report, _ = profiled(EDICT(denoiser, tiny_chain(3).schedule, memory="reversible"), x)
    assert len(report.evaluations) == 3 * 4

    class Plain(Denoiser):
        def __call__(self, *args):
            return super().__call__(*args) * 2

    plain = Plain(TinyNet(), *conditions(dtype=torch.float32))
    chain = EDICT(plain, tiny_chain(3).schedule)
    expected = torch.autograd.grad(chain(x)[0].sum(), x)[0]
    with doodl_fast.profile(chain) as report:
        got = torch.autograd.grad(chain(x)[0].sum(), x)[0]
    assert torch.equal(got, expected) and len(report.evaluations) == 8


def test_what_is_no_chain():
    with pytest.raises(TypeError, match="chain: expected a Chain such as EDICT, got int"), doodl_fast.profile(3):
        pass


def test_a_long_timeline_is_thinned_and_keeps_its_peak():
    from doodl_fast.chain.memory.profiling import POINTS, thinned

    timeline = [(float(i), i % 7919) for i in range(50_000)]
    thin = thinned(timeline)
    assert len(thin) <= POINTS and max(held for _, held in thin) == max(held for _, held in timeline)


LAYERS = """
raise ImportError("importing it is not what is meant")

class SteppingLayer(nn.Module):
    def __init__(self, unet, embedding_uc, embedding_c, scheduler, num_timesteps, guidance_scale):
        super().__init__()
        self.unet, self.cond = unet, embedding_c
        scheduler.set_timesteps(num_timesteps)

    def forward(self, i, t, pair):
        return i, t, forward_step(pair, self.unet(pair, t[0], encoder_hidden_states=self.cond.expand(2, -1, -1)).sample)

class MixingLayer(nn.Module):
    def __init__(self, p):
        super().__init__()

    def forward(self, pair):
        return pair * 1
"""
HELPERS = """
def forward_step(pair, out):
    return pair + 0.01 * out

def get_alpha_and_beta():
    pass

reverse_step = no_such_name

def reverse_step():
    pass
"""
WRAPPER = """
from torch import nn

class InvertibleModuleWrapper(nn.Module):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer = layer

    def forward(self, *args):
        return self.layer(*args)
"""


@needs_checkout
def test_the_command(tmp_path, capsys, monkeypatch):
    tiny_pipeline.stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "sd")
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "doodl.py").write_text(LAYERS)
    (checkout / "helper_functions.py").write_text(HELPERS)
    (tmp_path / "memcnn.py").write_text(WRAPPER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "memcnn", raising=False)
    line = ["profile", "--model", str(tmp_path / "sd"), "--steps", "2", "4", "--device", "cpu"]
    line += ["--against", f"naive, checkpoint,reference={checkout}", "--out", str(tmp_path / "out")]
    assert cli.main([*line, "--resolution", "64"]) == 0
    said = capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "profile.json").read_text())
    names = ["naive", "checkpoint", f"reference={checkout}", "sources", "exact reversal", "auto", "auto, smallest"]
    assert list(stored["growth"]) == list(stored["timelines"]) == names
    peaks = {name: [row["peak"] for row in stored["rows"] if row["name"] == name] for name in names}
    assert peaks["naive"][1] > 1.5 * peaks["naive"][0]
    assert peaks["auto, smallest"][1] < peaks["sources"][1] < peaks["checkpoint"][1] < peaks["naive"][1]
    assert stored["growth"]["exact reversal"] == 0 and stored["growth"]["naive"] > 10**5
    assert "holds 0 B more for each step" in said and "peak RSS" in said
    assert all(row["seconds"] > 0 and row["peak"] >= row["held"] > 0 for row in stored["rows"])
    for name in ("profile.png", "timelines.png"):
        assert Image.open(tmp_path / "out" / name).size[0] > 500


@needs_checkout
def test_a_reference_that_cannot_be_had(tmp_path, monkeypatch):
    from doodl_fast.cli.baselines import Setting, make

    setting = Setting(tiny_chain(2).denoiser, None, 0.93, torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"--against: expected a checkout of DOODL with helper_functions.py in it"):
        make(f"reference={tmp_path}", setting, 2)
    (tmp_path / "helper_functions.py").write_text(HELPERS)
    (tmp_path / "doodl.py").write_text("class SteppingLayer: pass")
    with pytest.raises(ValueError, match=r"--against: expected MixingLayer in .*doodl.py"):
        make(f"reference={tmp_path}", setting, 2)
    (tmp_path / "doodl.py").write_text(LAYERS)
    monkeypatch.setitem(sys.modules, "memcnn", None)
    with pytest.raises(ValueError, match=r"--against: the reference needs memcnn .*install it with pip"):
        make(f"reference={tmp_path}", setting, 2)
    setting = Setting(setting.denoiser, None, 0.93, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"--against: the reference takes one image, got a batch of 2"):
        make(f"reference={tmp_path}", setting, 2)


def test_a_profile_inside_a_tracker():
    with Tracker(DEVICE.type) as tracker:
        report, _ = profiled(tiny_chain(3), latents(1, 3, 4, grad=True)[0])
    assert tracker.peak >= report.peak > 0
