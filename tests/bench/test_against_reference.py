"""bench/against_reference.py on a stand-in for the reference's checkout, written here in its shape."""

from __future__ import annotations

import json
import sys
import textwrap
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "against_reference.py"
HELPERS = """
    raise SystemExit("loads models when imported")

    def get_alpha_and_beta(t, scheduler):
        alpha = scheduler.alphas_cumprod[t] if t >= 0 else scheduler.final_alpha_cumprod
        return float(alpha), 1 - float(alpha)

    def forward_step(scheduler, noise, t, sample):
        (alpha, beta), stride = get_alpha_and_beta(t, scheduler), 1000 // scheduler.num_inference_steps
        alpha_prev, beta_prev = get_alpha_and_beta(t - stride, scheduler)
        a = (alpha_prev / alpha) ** 0.5
        return a * sample + (beta_prev**0.5 - a * beta**0.5) * noise

    def reverse_step(scheduler, noise, t, sample):
        zero = forward_step(scheduler, noise, t, 0 * sample)
        return (sample - zero) / forward_step(scheduler, 0 * noise, t, 1 + 0 * sample)
"""
DOODL = """
    import memcnn_of_another_time

    class SteppingLayer(nn.Module):
        def __init__(self, unet, embedding_uc, embedding_c, scheduler=None, num_timesteps=50):
            super().__init__()
            self.unet, self.e_uc, self.e_c, self.scheduler = unet, embedding_uc, embedding_c, scheduler
            self.num_timesteps = num_timesteps
            scheduler.set_timesteps(num_timesteps)

        def forward(self, i, t, pair, reverse=False):
            halves, step = list(pair.chunk(2)), reverse_step if reverse else forward_step
            first = (self.num_timesteps - int(i)) % 2 if reverse else int(i) % 2
            for target in (first, 1 - first):
                source = halves[1 - target]
                uncond = self.unet(source, t[0], encoder_hidden_states=self.e_uc).sample
                cond = self.unet(source, t[0], encoder_hidden_states=self.e_c).sample
                halves[target] = step(self.scheduler, uncond + 7.5 * (cond - uncond), t[0].long(), halves[target])
            return i.clone(), t.clone(), torch.cat(halves)

        def inverse(self, i, t, pair):
            return self.forward(i, t, pair, reverse=True)

    class MixingLayer(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

        def forward(self, pair):
            x, y = pair.chunk(2)
            x = self.p * x + (1 - self.p) * y
            return torch.cat([x, (1 - self.p) * x + self.p * y])

        def inverse(self, pair):
            x, y = pair.chunk(2)
            y = (y - (1 - self.p) * x) / self.p
            return torch.cat([(x - (1 - self.p) * y) / self.p, y])
"""
MEMCNN = """
    import torch
    class InvertibleModuleWrapper(torch.nn.Module):  # plain autograd
        def __init__(self, fn, **options):
            super().__init__()
            self._fn = fn
        def forward(self, *values):
            return self._fn(*values)
"""


@pytest.fixture
def folder(tmp_path):
    for name, code in (("helper_functions", HELPERS), ("doodl", DOODL), ("memcnn", MEMCNN)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
    yield tmp_path
    sys.modules.pop("memcnn", None)


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPT.parent))  # where Python looks for the imports of a script
    spec = spec_from_file_location("against_reference", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def test_script(bench, folder, monkeypatch, capsys):
    monkeypatch.setitem(bench.SIZES, "tiny", ((4, 8), 1, 4, 2, 2, 8))
    results = folder / "results.json"
    options = ["--sizes=tiny", "--steps=2", "--rounds=1", "--device=cpu", "--dtype=fp64", "--threads=1"]
    monkeypatch.setattr(sys, "argv", ["", f"--reference={folder}", f"--json={results}", *options])
    bench.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 6 and len(table) == 8
    for row in rows:
        assert row["output"] < 1e-12 and row["gradient"] < 1e-12
        assert row["seconds"] > 0 and row["peak"] > 0
        assert row["ratio"] == 1 or row["implementation"] != "reference"
    by = {(row["keep_input"], row["implementation"]): row for row in rows}
    pair = 2 * 4 * 8 * 8 * 8  # bytes
    for keep in (True, False):
        assert by[keep, "reference"]["calls"] == 8
        assert by[keep, "memcnn"]["calls"] == (16 if keep else 24)
        assert by[keep, "layers"]["calls"] == 4
        assert by[keep, "reference"]["growth"] > 50 * pair  # its graphs
    # what a step holds: the sources of two couplings, and nothing where inputs are rebuilt
    assert by[True, "layers"]["growth"] == pytest.approx(pair, rel=0.01)
    assert abs(by[False, "layers"]["growth"]) < 0.05 * pair
    assert by[True, "memcnn"]["growth"] == pytest.approx(2 * pair, rel=0.01)


def test_other_folders_are_refused(bench, tmp_path):
    (tmp_path / "helper_functions.py").write_text("x = 1")
    with pytest.raises(SystemExit, match=r"helper_functions\.py does not define forward_step, get_alpha_and_beta"):
        bench.reference_layers(tmp_path, "cpu")


def test_storages_are_counted_while_they_live(bench):
    with bench.Storages() as storages:
        a = torch.zeros(1000)
        b = a.view(10, 100).t()  # the same storage
        c = a + 1
        del c
        d = a.double()
        a.untyped_storage().resize_(0)
        assert storages.living() == 8000
        del a, b, d
    assert storages.living() == 0 and storages.peak == 12000
