"""The estimate on the meta device: known sizes, what fits, and agreement with a measured run."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest
import tiny_pipeline
import torch

from doodl_fast import Decoder, cli, ops
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli.estimate import CARDS, _decoders, estimate
from doodl_fast.cli.meta_attention import fused_attention
from doodl_fast.cli.meta_ops import fused_ops
from doodl_fast.cli.published import VAE, meta_model
from doodl_fast.frozen import convolution

GIB = 2**30


@pytest.fixture(scope="module")
def sd15():
    return estimate("sd15", 512, torch.float16)


def test_stable_diffusion_15(sd15):
    """Sizes against those of the published model: 860 M and 84 M parameters."""
    assert sd15.network_weights == pytest.approx(2 * 859.5e6, rel=1e-3)
    assert sd15.vae_weights == pytest.approx(2 * 83.65e6, rel=1e-3)
    assert sd15.weights + sd15.smallest.peak <= 4 * GIB
    assert sd15.weights + sd15.naive > 140 * GIB
    assert sd15.per_step < 5 * GIB
    assert sd15.growth == 2 * 4 * 64 * 64 * 8
    assert sd15.blocks.graph < sd15.plain.graph / 4 and sd15.decoders[1] < 0.75 * sd15.decoders[0]
    assert sd15.decoders[0] < 0.4 * 2.84 * GIB  # 2.84 GiB with PyTorch's own layers


def test_what_fits_on_which_card(sd15):
    text = str(sd15)
    lines = text.splitlines()[-len(CARDS) :]
    assert [int(line.split()[0]) for line in lines] == list(CARDS) and not any("does not fit" in line for line in lines)
    plans = [sd15.plan(card * GIB) for card in CARDS]
    assert [plan.recomputed for plan in plans] == sorted((plan.recomputed for plan in plans), reverse=True)
    assert all(sd15.weights + plan.peak <= card * GIB for plan, card in zip(plans, CARDS, strict=True))
    assert sd15.plan(sd15.weights + sd15.smallest.peak - 1) is None
    assert sd15.plan(200 * GIB).recomputed == 0


def test_sdxl_fits_12_gb(capsys):
    assert cli.main(["profile", "--estimate", "sdxl", "--resolution", "1024", "--dtype", "fp16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cards = {line.split()[0]: line for line in lines if " GB  " in line}
    assert "does not fit" in cards["8"] and "sources of the first " in cards["12"]
    smallest = next(line for line in lines if line.startswith("our smallest plan"))
    assert float(smallest.split()[3]) <= 10 and smallest.split()[4] == "GiB"


def test_decoders_of_real_width_take_what_is_estimated():
    """Stable Diffusion's VAE at full width, decoding on the CPU, against the same on the meta device."""
    from diffusers import AutoencoderKL

    def unpack(self, packed):
        """On a CPU the VJP of a convolution makes a tensor of the input's size, of which it reads the shape alone."""
        return self.weight.new_empty(self.shape) if packed is None else packed

    kernels = fused_ops() if ops.matches_torch() else contextlib.nullcontext()
    with torch.device("meta"), fused_attention(), kernels, mock.patch.object(convolution._Saved, "unpack", unpack):
        estimated = _decoders(Decoder(AutoencoderKL(**VAE)), torch.empty(1, 4, 12, 12))
    torch.manual_seed(0)
    decode, z, measured, gradients = Decoder(AutoencoderKL(**VAE)), torch.randn(1, 4, 12, 12), [], []
    while decode is not None:
        leaf = z.clone().requires_grad_()
        with Tracker("cpu") as tracker:
            image = decode(leaf)
            gradients += torch.autograd.grad(image, leaf, torch.ones_like(image))
        measured += [tracker.peak] if not measured or tracker.peak < measured[-1] else []
        decode = decode.leaner()
    assert len(estimated) == len(measured) == 3
    assert estimated == pytest.approx(measured, rel=0.05)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("sd35-medium", 2.243), ("sd35-large", 8.057), ("flux1-dev", 11.90), ("pixart-sigma", 0.611),
     ("wan21-1.3b", 1.419), ("wan21-14b", 14.29), ("wan22-5b", 5.0), ("cogvideox-2b", 1.694), ("cogvideox-5b", 5.571)],
)  # fmt: skip
def test_published_models_have_the_published_number_of_parameters(name, billions):
    pipe = meta_model(name, torch.bfloat16).pipe
    count = sum(weight.numel() for weight in pipe.transformer.parameters())
    assert count == pytest.approx(billions * 1e9, rel=2e-3)


def test_a_folder_and_a_measured_run(tmp_path):
    """What the meta device tells of a pipeline is what its run takes on the CPU, but for attention, which is fused."""
    from doodl_fast import EDICT, Denoiser, Schedule

    pipe = tiny_pipeline.stable_diffusion(tmp_path / "words")
    pipe.save_pretrained(tmp_path / "sd")
    found = estimate(tmp_path / "sd", None, torch.float32, steps=4)
    cond = torch.zeros(1, 77, 16)
    schedule, plans = Schedule.from_scheduler(pipe.scheduler, 4), {}
    for lean in (True, False):
        chain = EDICT(Denoiser(pipe.unet, cond, cond, lean=lean), schedule, memory="auto")
        plans[lean] = chain.make_plan(torch.zeros(1, 4, 16, 16))
    assert found.workload.fastest(GIB).peak == pytest.approx(plans[True].peak, rel=0.15)
    assert found.naive == pytest.approx(plans[False].peak, rel=0.15)  # naive backpropagation has PyTorch's own layers
    with pytest.raises(ValueError, match=r"frames: expected None, because .* makes pictures, got \[0\]"):
        estimate(tmp_path / "sd", frames=[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--estimate", "sd3"], "model: expected one of sd15, sd21, sdxl, sd35-medium"),
        (["--estimate", "sd15", "--resolution", "513"], "height: expected a positive multiple of 8"),
        (["--steps", "0"], "--steps: expected numbers of at least 1, got 0"),
        (["--against", "naive,fast"], "--against: expected some of naive, checkpoint, reference=DIR, got 'fast'"),
    ],
)
def test_refusals(options, message, capsys):
    assert cli.main(["profile", *options]) == 2
    assert message in capsys.readouterr().err
