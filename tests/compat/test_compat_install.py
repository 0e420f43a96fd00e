"""`compat.install` on a module written in the reference's shape: one that imports `memcnn` and defines two layers."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import relative
from tolerances import FP64

from doodl_fast.compat import Quirks, doodl, install, memcnn, uninstall
from doodl_fast.compat.schedule import ReferenceScheduler

MEMCNN = """
    class InvertibleModuleWrapper:  # This runs a module as it is.
        def __init__(self, fn, keep_input=False, keep_input_inverse=False, num_bwd_passes=1):
            self._fn = fn
        def __call__(self, *values):
            return self._fn(*values)
"""
CODE = """
    import memcnn
    import torch
    from torch import nn

    from doodl_fast.compat.schedule import ReferenceScheduler

    class UNet(nn.Module):
        calls = 0
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inside, self.text = nn.Conv2d(4, 6, 3, padding=1).double(), nn.Linear(5, 6).double()
            self.outside = nn.Conv2d(6, 4, 3, padding=1).double()
        def forward(self, sample, timestep, encoder_hidden_states):
            type(self).calls += 1
            text = self.text(encoder_hidden_states).mean(1)[:, :, None, None]
            noise = self.outside(torch.tanh(self.inside(sample) + text + timestep / 1000))
            return type("Output", (), {"sample": noise})

    unet = UNet()
    e_uc, e_c = torch.randn(2, 1, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    class SteppingLayer(nn.Module):
        def __init__(self, unet, embedding_uc, embedding_c, scheduler=None, num_timesteps=50, guidance_scale=7.5,
                     clip_cond_fn=None, single_variable=False):
            super().__init__()
            self.unet, self.e_uc, self.e_c = unet, embedding_uc, embedding_c
            self.num_timesteps, self.guidance_scale = num_timesteps, guidance_scale
            self.scheduler = ReferenceScheduler()
            self.scheduler.set_timesteps(num_timesteps)

        def forward(self, i, t, latent_pair, reverse=False):
            halves, alphas = list(latent_pair.chunk(2)), self.scheduler.alphas_cumprod
            stride = 1000 // self.num_timesteps
            alpha, before = alphas[t.long()], alphas[(t.long() - stride).clamp_min(0)]
            a = (before / alpha) ** 0.5
            b = (1 - before) ** 0.5 - a * (1 - alpha) ** 0.5
            first = (self.num_timesteps - int(i)) % 2 if reverse else int(i) % 2
            for target in (first, 1 - first):
                source = halves[1 - target]
                uncond = self.unet(source, t[0], encoder_hidden_states=self.e_uc).sample
                cond = self.unet(source, t[0], encoder_hidden_states=self.e_c).sample
                noise = uncond + self.guidance_scale * (cond - uncond)
                halves[target] = (halves[target] - b * noise) / a if reverse else a * halves[target] + b * noise
            return i.clone(), t.clone(), torch.cat(halves)

        def inverse(self, i, t, latent_pair):
            return self.forward(i, t, latent_pair, reverse=True)

    class MixingLayer(nn.Module):
        def __init__(self, mix_weight=0.93):
            super().__init__()
            self.p = mix_weight
        def forward(self, input_x):
            x, y = input_x.chunk(2)
            x = self.p * x + (1 - self.p) * y
            return torch.cat([x, self.p * y + (1 - self.p) * x])
        def inverse(self, input_x):
            x, y = input_x.chunk(2)
            y = (y - (1 - self.p) * x) / self.p
            return torch.cat([(x - (1 - self.p) * y) / self.p, y])

    def gen(start, steps=4):
        UNet.calls = 0
        s = memcnn.InvertibleModuleWrapper(SteppingLayer(unet, e_uc, e_c, num_timesteps=steps), keep_input=True)
        mix = memcnn.InvertibleModuleWrapper(MixingLayer(), keep_input=True)
        leaf = start.clone().requires_grad_()
        pair = leaf.clone()
        for i, t in enumerate(s._fn.scheduler.timesteps):
            i, t = torch.tensor([i], dtype=pair.dtype), torch.tensor([t], dtype=pair.dtype)
            i, t, pair = s(i, t, pair)
            pair = mix(pair)
        pair.pow(2).sum().backward()
        return pair.detach(), leaf.grad, UNet.calls
"""


@pytest.fixture
def existing(tmp_path, monkeypatch):
    """Makes `doodl` and `memcnn` importable, and undoes whatever a test installs."""
    (tmp_path / "memcnn.py").write_text(textwrap.dedent(MEMCNN))
    (tmp_path / "doodl.py").write_text(textwrap.dedent(CODE))
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("doodl", "memcnn"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tmp_path
    uninstall()
    for name in ("doodl", "memcnn"):
        sys.modules.pop(name, None)


def fresh():
    for name in ("doodl", "memcnn"):
        sys.modules.pop(name, None)
    return importlib.import_module("doodl")


START = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_same_results_with_fewer_calls(existing):
    out, grad, calls = fresh().gen(START)
    assert calls == 16  # Its replacement of memcnn is plain autograd.
    sys.modules.pop("doodl")
    install()
    theirs = importlib.import_module("doodl")
    assert theirs.memcnn is memcnn and importlib.import_module("memcnn") is memcnn
    assert theirs.SteppingLayer is doodl.SteppingLayer and theirs.MixingLayer is doodl.MixingLayer
    our_out, our_grad, our_calls = theirs.gen(START)
    assert relative(our_out, out) < FP64 and relative(our_grad, grad) < FP64
    assert our_calls == 12
    assert not any(weight.requires_grad or weight.grad is not None for weight in theirs.unet.parameters())


def test_memcnn_alone(existing):
    out, grad, _ = fresh().gen(START)
    uninstall()
    sys.modules.pop("doodl")
    install(layers=False)
    theirs = importlib.import_module("doodl")
    assert theirs.memcnn is memcnn and theirs.SteppingLayer.__module__ == "doodl"
    our_out, our_grad, our_calls = theirs.gen(START)
    assert relative(our_out, out) < FP64 and relative(our_grad, grad) < FP64
    assert our_calls == 32
    assert all(weight.requires_grad and weight.grad is None for weight in theirs.unet.parameters())


def test_uninstall_takes_everything_back(existing):
    theirs = fresh()
    before, their_memcnn, finders = dict(vars(theirs)), sys.modules["memcnn"], list(sys.meta_path)
    frozen = theirs.unet.inside.bias.requires_grad_(False)
    install()  # It also works after the import.
    assert theirs.SteppingLayer is doodl.SteppingLayer and theirs.memcnn is memcnn
    install("doodl", layers=False)  # This replaces the first.
    assert theirs.SteppingLayer is before["SteppingLayer"] and theirs.memcnn is memcnn
    uninstall()
    uninstall()
    assert vars(theirs) == before and sys.modules["memcnn"] is their_memcnn and sys.meta_path == finders
    assert theirs.unet.text.bias.requires_grad and not frozen.requires_grad


ORDERS = {
    "install first": ["install", "uninstall", "install", "install", "uninstall", "uninstall", "install"],
    "uninstall first": ["uninstall", "uninstall", "install", "uninstall", "install", "install", "uninstall"],
}


@pytest.mark.parametrize("before", ["", "import doodl_fast.compat.installer", "from doodl_fast.compat import install"])
@pytest.mark.parametrize("order", ORDERS)
def test_install_and_uninstall_in_any_order(before, order):
    """In a fresh process, both names stay functions, and each call decides what `import memcnn` gives."""
    code = ["import sys", before, "import doodl_fast.compat as compat"]
    for name in ORDERS[order]:
        code += [f"compat.{name}()", f"assert ('memcnn' in sys.modules) is {name == 'install'}"]
    code += [
        "from doodl_fast.compat import install, uninstall",
        "assert install is compat.install and uninstall is compat.uninstall",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)


def test_uninstall_before_the_import(existing):
    install()
    uninstall()
    assert "memcnn" not in sys.modules
    theirs = importlib.import_module("doodl")
    assert theirs.SteppingLayer.__module__ == "doodl" and theirs.memcnn.__file__.startswith(str(existing))


def test_names_imported_from_memcnn_and_other_module_names(existing):
    code = (existing / "doodl.py").read_text()
    code = code.replace("import memcnn", "from memcnn import InvertibleModuleWrapper").replace("memcnn.Inv", "Inv")
    (existing / "video_doodl.py").write_text(code)
    theirs = importlib.import_module("video_doodl")
    install("video_doodl")
    try:
        assert theirs.InvertibleModuleWrapper is memcnn.InvertibleModuleWrapper
        assert theirs.SteppingLayer is doodl.SteppingLayer
        assert theirs.gen(START)[2] == 12
        assert fresh().SteppingLayer.__module__ == "doodl"
    finally:
        del sys.modules["video_doodl"]


def test_quirks_reach_the_layers(existing):
    install(quirks=Quirks.none())
    theirs = importlib.import_module("doodl")
    layer = theirs.SteppingLayer(theirs.unet, theirs.e_uc, theirs.e_c, num_timesteps=30)
    assert layer.quirks == theirs.MixingLayer().quirks == Quirks.none()
    assert len(layer.scheduler.timesteps) == 30 and isinstance(layer.scheduler, ReferenceScheduler)
    assert theirs.gen(START)[2] == 12  # A subclass is not wrapped like a module that defines no operation.


def test_a_layer_that_takes_more_is_left_as_it_is(existing):
    code = (existing / "doodl.py").read_text()
    (existing / "doodl.py").write_text(code.replace("single_variable=False):", "single_variable=False, image=None):"))
    install()
    with pytest.warns(UserWarning, match=r"doodl.SteppingLayer.__init__ takes 'image'.*override predict_noise"):
        theirs = importlib.import_module("doodl")
    assert theirs.SteppingLayer.__module__ == "doodl" and theirs.MixingLayer is doodl.MixingLayer
    assert theirs.gen(START)[2] == 32


def test_importing_costs_nothing_beyond_torch():
    code = """
import sys, torch
from doodl_fast.compat import doodl, install, memcnn, uninstall
assert torch.is_grad_enabled()
assert not {"diffusers", "transformers", "matplotlib", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors(existing):
    with pytest.raises(ValueError, match=r"module: expected the name of a module, such as 'doodl', got 'a/doodl\.py'"):
        install("a/doodl.py")
