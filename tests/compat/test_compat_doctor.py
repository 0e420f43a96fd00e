"""`python -m doodl_fast.compat doctor` on code of the kind that it is made for."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from doodl_fast.compat.doctor import examine, main

REFERENCE = """
    import memcnn
    import torch
    from torch import nn

    torch.set_grad_enabled(False)

    class SteppingLayer(nn.Module):
        def __init__(self, unet, embedding_uc, embedding_c, scheduler=None, num_timesteps=50, guidance_scale=7.5):
            super().__init__()
            self.unet = unet

        def forward(self, i, t, latent_pair, reverse=False):
            a = self.unet(latent_pair, t[0], encoder_hidden_states=self.e_uc).sample
            b = self.unet(latent_pair, t[0], encoder_hidden_states=self.e_c).sample
            return i, t, a + b

        def inverse(self, i, t, latent_pair):
            return self.forward(i, t, latent_pair, reverse=True)

    class MixingLayer(nn.Module):
        def forward(self, x):
            return self.p * x

        def inverse(self, x):
            return x / self.p

    def gen(cond_prompt, model_guidance_type, sd_guidance_scale, num_traversal_steps):
        s = memcnn.InvertibleModuleWrapper(SteppingLayer(), keep_input=True)
        mix = memcnn.InvertibleModuleWrapper(MixingLayer())
        for i, t in enumerate(timesteps):
            i, t, latent_pair = s(i, t, latent_pair)
            latent_pair = mix(latent_pair)
        for i, t in enumerate(timesteps.flip(0)):
            i, t, latent_pair = s.inverse(i, t, latent_pair)
"""


def found(source: str) -> dict[int, list]:
    """Returns the findings by line. Lines are counted from 1, as in the text above without its empty first line."""
    lines: dict[int, list] = {}
    for finding in examine(textwrap.dedent(source).lstrip("\n")):
        lines.setdefault(finding.line, []).append(finding)
    return lines


def line_of(source: str, text: str) -> int:
    return 1 + next(n for n, line in enumerate(source.lstrip("\n").splitlines()) if text in line)


@pytest.mark.parametrize(
    ("text", "advice", "gain"),
    [
        ("import memcnn", "from doodl_fast.compat import memcnn", "no gradients of network weights"),
        ("class SteppingLayer", "compat.doodl import SteppingLayer", "guidance in one batched call"),
        ("class MixingLayer", "compat.doodl import MixingLayer", "nothing kept"),
        ("def gen", "compat.doodl import gen, and give it pipeline=", "no copy to maintain"),
        ("(SteppingLayer(), keep", "nothing, once memcnn is ours", "no activations for weight gradients"),
        ("(MixingLayer())", "nothing, once memcnn is ours", "wrong for every even number of steps"),
        ("enumerate(timesteps):", "and chain(x, y)", "no synchronisation a step"),
        ("timesteps.flip(0)", "and chain.inverse(x, y)", "no synchronisation a step"),
    ],
)
def test_changes(text, advice, gain):
    (finding,) = found(REFERENCE)[line_of(REFERENCE, text)]
    assert advice in finding.advice and gain in finding.gain


def test_every_finding_of_the_reference_is_meant():
    lines = found(REFERENCE)
    assert sum(map(len, lines.values())) == 9
    (warning,) = [f for findings in lines.values() for f in findings if not f.gain]
    assert warning.line == line_of(REFERENCE, "set_grad_enabled") and "does not switch gradients off" in warning.advice


def test_layers_with_conditions_of_their_own_override_predict_noise():
    source = """
    class Layer(nn.Module):
        def __init__(self, unet, controlnet):
            pass
        def forward(self, i, t, pair, image, embeds):
            residual = self.controlnet(pair, t, image)
            return i, t, self.unet(pair, t, residual).sample, image, embeds
        def inverse(self, i, t, pair, image, embeds):
            return i, t, pair, image, embeds
    """
    (finding,) = found(source)[1]
    assert "class Layer(SteppingLayer) with predict_noise for the network calls of line 6" in finding.advice
    assert "batched" not in finding.gain
    assert not found(source.replace("nn.Module", "SteppingLayer"))  # This is done already.


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("noise = torch.randn_like(pair)", "pass preserve_rng_state=True"),
        ("self.count = t", "give it as an input"),
        ("self.count += 1", "give it as an input"),
    ],
)
def test_layers_that_differ_from_call_to_call(line, warning):
    source = f"""
    class Layer(nn.Module):
        def forward(self, i, t, pair):
            {line}
            return i, t, self.model.apply_model(pair, t)
        def inverse(self, i, t, pair):
            return i, t, pair
    """
    (finding,) = found(source)[3]
    assert warning in finding.advice and not finding.gain


@pytest.mark.parametrize(
    ("source", "warning"),
    [
        ("from diffusers import EulerAncestralDiscreteScheduler", "step by DDIM over its noise levels"),
        ("from memcnn import AdditiveCoupling", "not AdditiveCoupling: keep memcnn for that"),
        ("import memcnn.models.affine", "not memcnn.models.affine"),
        ("optimizer = torch.optim.AdamW(unet.parameters(), lr=1)", "weight_grads=True"),
    ],
)
def test_warnings(source, warning):
    ((finding,),) = found(source).values()
    assert warning in finding.advice and not finding.gain


@pytest.mark.parametrize(
    ("source", "advice"),
    [
        ("import doodl", "install()"),
        ("from doodl import gen", "from doodl_fast.compat.doodl import gen"),
        ("from memcnn import InvertibleModuleWrapper", "compat.memcnn import InvertibleModuleWrapper"),
    ],
)
def test_imports(source, advice):
    ((finding,),) = found(source).values()
    assert advice in finding.advice and finding.gain


def test_code_that_has_nothing_to_do_with_it():
    assert not found(
        """
        from diffusers import DDIMScheduler
        for t in timesteps:
            latents = scheduler.add_noise(latents, noise, t)
            x = torch.cat([latents, x], 0)
        class Net(nn.Module):
            def forward(self, x):
                self.last = torch.randn(3)
        """
    )


def test_folders_and_notebooks(tmp_path, capsys):
    cells = [{"cell_type": "code", "source": ["!pip install x\n", "import memcnn"]}, {"cell_type": "markdown"}]
    (tmp_path / "demo.ipynb").write_text(json.dumps({"cells": cells}))
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "memcnn").mkdir()
    (tmp_path / "memcnn" / "copy.py").write_text("from memcnn import AdditiveCoupling")
    assert main(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'demo.ipynb'}:2: import memcnn\n    change: from doodl_fast.compat import memcnn\n" in out
    assert f"{tmp_path / 'broken.py'}: cannot be read as Python" in out
    assert "2 files, 1 changes, 0 warnings" in out and "copy.py" not in out


def test_nothing_to_read(tmp_path, capsys):
    assert main(str(tmp_path / "no.py")) == 2
    assert "FILE_OR_FOLDER" in capsys.readouterr().out
    assert main(str(tmp_path)) == 2
    (tmp_path / "a.py").write_text("x = 1")
    assert main(str(tmp_path / "a.py")) == 0
    assert "nothing of memcnn, DOODL or EDICT in it" in capsys.readouterr().out


def test_command(tmp_path):
    (tmp_path / "a.py").write_text("import memcnn\n")
    command = [sys.executable, "-m", "doodl_fast.compat", "doctor", str(tmp_path / "a.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a.py:1: import memcnn" in done.stdout and "1 files, 1 changes, 0 warnings" in done.stdout


@pytest.mark.parametrize(
    "line", ["from models.memcnn import InvertibleModuleWrapper", "import lib.memcnn as memcnn", "from . import memcnn"]
)
def test_a_copy_of_memcnn_elsewhere_is_recognised(line):
    (finding,) = examine(line)
    assert "from doodl_fast.compat" in finding.advice and finding.gain


EDICT_CODE = """
    from edict_functions import EDICT_editing, plot_EDICT_outputs
    from lib.edict_functions import coupled_stablediffusion

    def coupled_stablediffusion(prompt="", steps=50):
        pass

    class EDICTScheduler:
        def denoise_step(self, base, model_input, model_output, timestep): pass
        def noise_step(self, base, model_input, model_output, timestep): pass
        def denoise_mixing_layer(self, x, y): pass
        def noise_mixing_layer(self, x, y): pass

    class EDICTPipeline(DiffusionPipeline):
        pass

    pipe = DiffusionPipeline.from_pretrained("model", custom_pipeline="edict_pipeline")
    other = DiffusionPipeline.from_pretrained("model", custom_pipeline="lpw_stable_diffusion")
"""


def test_edicts_code_is_recognised():
    by_line = found(EDICT_CODE)
    advice = {line: [finding.advice for finding in findings] for line, findings in by_line.items()}
    assert advice[1] == [
        "from doodl_fast.compat.edict import EDICT_editing, and give it pipeline=; Prompt-to-Prompt is refused"
    ]
    assert "import coupled_stablediffusion" in advice[2][0] and "import coupled_stablediffusion" in advice[4][0]
    assert "edict_scheduler import EDICTScheduler" in advice[line_of(EDICT_CODE, "class EDICTScheduler")][0]
    assert "edict_pipeline import EDICTPipeline" in advice[line_of(EDICT_CODE, "class EDICTPipeline")][0]
    assert "edict_pipeline import EDICTPipeline" in advice[line_of(EDICT_CODE, 'custom_pipeline="edict')][0]
    assert line_of(EDICT_CODE, "lpw_stable") not in advice
