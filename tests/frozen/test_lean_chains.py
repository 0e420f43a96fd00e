"""Chains, decoders and guides with lean graphs against the same with PyTorch's own, to the bit on a CPU."""

from __future__ import annotations

import copy

import pytest
import tiny_families
import tiny_pipeline
import torch
from conftest import DEVICE, golden_unet, latents, pull, relative, sd_scheduler

from doodl_fast import EDICT, Decoder, Denoiser, Schedule
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli import doctor
from doodl_fast.diffusion.networks import without_weight_grad
from doodl_fast.frozen import Level
from doodl_fast.guidance import ClipText
from doodl_fast.solvers.sampler import Sampler

pytestmark = pytest.mark.usefixtures("lean_small_tensors")
LEAN = [True, "recompute"]
MODES = {
    "checkpoint": {"memory": "checkpoint"},
    "every 2": {"memory": 2},
    "reversible": {"memory": "reversible", "drift_tolerance": 1e-2},
    "exact reversal": {"memory": "reversible", "arithmetic": "exact"},
    "auto": {"memory": "auto", "memory_budget": "1GiB"},
    "naive": {"memory": "naive"},
}
ON_A_GPU = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""How far a gradient may be off on a GPU, where lean layers have kernels of their own for norms."""


def assert_same(got, want):
    if DEVICE.type == "cpu":
        assert torch.equal(got, want)
    else:
        assert relative(got, want) <= ON_A_GPU[want.dtype]


def chain(lean, dtype=torch.float32, steps=3, **options):
    generator = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(2, 1, 6, 16, generator=generator).to(DEVICE, dtype)
    unet = golden_unet(dtype)
    cond, uncond = (c[..., : unet.config.cross_attention_dim] for c in (cond, uncond))
    denoiser = Denoiser(unet, cond, uncond, 3.0, vjp_dtype=None, lean=lean)
    return EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), steps), **options)


def gradient(made, dtype=torch.float32):
    start = list(latents(1, 4, 8, 8, dtype=dtype, grad=True))
    outputs = made(*start)
    return [*(out.detach() for out in outputs), *pull(outputs, start)]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_bits(mode):
    expected = gradient(chain(False, **MODES[mode]))
    assert expected[2].abs().max() > 1e-2
    for lean in LEAN:
        for got, want in zip(gradient(chain(lean, **MODES[mode])), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_the_same_bits(dtype):
    """On a CPU the kernels are the same, so there is not even a difference by the network's own rounding."""
    expected = gradient(chain(False, dtype, 2, memory="checkpoint"))
    for lean in LEAN:
        for got, want in zip(gradient(chain(lean, dtype, 2, memory="checkpoint")), expected, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_has_the_same_bits_with_and_without_a_graph(dtype, memory_format):
    """Also where a lean layer rounds otherwise than PyTorch's, so exact reversal comes back to its start."""
    unet = copy.deepcopy(golden_unet(dtype)).to(memory_format=memory_format)
    cond, uncond = torch.randn(2, 1, 6, unet.config.cross_attention_dim, device=DEVICE, dtype=dtype)
    denoiser = Denoiser(unet, cond, uncond, 3.0, vjp_dtype=None)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    with denoiser.running():
        with torch.no_grad():
            value = denoiser(x, 500)
        assert torch.equal(denoiser(x.clone().requires_grad_(), 500), value)
    made = EDICT(denoiser, Schedule.from_scheduler(sd_scheduler(), 3), memory="reversible", arithmetic="exact")
    gradient(made)
    assert made.drift == 0


def test_the_smallest_plan_checkpoints_lean_blocks():
    made = chain(True, memory="auto")
    budget = made.smallest_plan(latents(1, 4, 8, 8, dtype=torch.float32)[0]).peak
    small = chain(True, memory="auto", memory_budget=budget)
    expected = gradient(chain(False, memory="checkpoint"))
    for got, want in zip(gradient(small), expected, strict=True):
        assert_same(got, want)
    assert small.plan.way.blocks


def held(made):
    """The bytes that the graph of one evaluation holds."""
    x = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)[0]
    with made.evaluator.running(), Tracker(torch.device(DEVICE).type) as tracker:
        output = made.evaluator(x, 500)
        assert output.requires_grad
        return tracker.held


def test_each_level_holds_less():
    sizes = [held(chain(lean)) for lean in (False, True, "recompute")]
    assert sizes[1] < 0.75 * sizes[0]
    assert sizes[2] < 0.9 * sizes[1]


def test_the_denoiser_knows_its_levels():
    denoiser = chain(True).denoiser
    assert denoiser.lean is Level.ON
    assert denoiser.plain().lean is Level.OFF
    assert denoiser.plain().plain() is not denoiser
    assert denoiser.for_recompute().lean is Level.RECOMPUTE
    assert denoiser.for_recompute().for_recompute() is None
    assert denoiser.for_blocks().lean is Level.ON
    assert Denoiser(lambda x, t, cond: x, None).for_recompute() is None
    with pytest.raises(ValueError, match="lean: expected True, False or"):
        Denoiser(golden_unet(), None, lean="a lot")


def test_a_decoder():
    vae = tiny_pipeline.golden_vae()
    z = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)[0]
    found = []
    for lean in (False, True, "recompute"):
        with Tracker(torch.device(DEVICE).type) as tracker:
            images = Decoder(vae, lean=lean)(z)
            size = tracker.held
        found.append((images.detach(), *torch.autograd.grad(images.sin().sum(), z), size))
    for images, grad, size in found[1:]:
        assert_same(images, found[0][0])
        assert_same(grad, found[0][1])
        assert size < 0.6 * found[0][2]
    leaner = Decoder(vae).leaner()
    images = leaner(z)
    assert_same(torch.autograd.grad(images.sin().sum(), z)[0], found[0][1])


def test_a_guide(tmp_path):
    model, processor = tiny_pipeline.clip(tmp_path)
    model.to(DEVICE)
    images = latents(1, 3, 40, 40, dtype=torch.float32, grad=True)[0]
    found = [
        torch.autograd.grad(ClipText(model, processor, "dog", lean=lean)(images), images) for lean in (False, *LEAN)
    ]
    assert found[0][0].abs().max() > 0
    for (got,) in found[1:]:
        assert torch.equal(got, found[0][0])
    with pytest.raises(ValueError, match="lean: expected"):
        ClipText(model, processor, "dog", lean=3)


@pytest.mark.parametrize("family", ["flux", "stable_diffusion_3", "pixart"])
def test_transformers(family, tmp_path):
    pipe = tiny_families.pixart() if family == "pixart" else getattr(tiny_families, family)(tmp_path)
    found = []
    for lean in (False, *LEAN):
        made = Sampler.from_pipeline(pipe, "a dog", num_inference_steps=2, memory="checkpoint", lean=lean)
        assert made.denoiser.lean == made.decode.lean == {False: 0, True: 1, "recompute": 2}[lean]
        x = made.noise(seed=1).requires_grad_()
        (x0,) = made(x)
        found.append(torch.autograd.grad((x0 * torch.linspace(-1, 1, x0.shape[-1])).sum(), x)[0])
    assert found[0].abs().max() > 1e-3
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


def test_a_network_that_cannot_be_copied_runs_as_it_is():
    unet = golden_unet()
    calls = []

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = unet
            self.inner_forward = unet.forward

        def forward(self, x, t, cond):
            calls.append(type(self.inner.conv_in))
            return self.inner(x, t, encoder_hidden_states=cond).sample

    wrapped = Wrapped()
    wrapped.forward = lambda x, t, cond: Wrapped.forward(wrapped, x, t, cond)
    cond = torch.randn(1, 6, unet.config.cross_attention_dim, device=DEVICE)
    made = EDICT(Denoiser(wrapped, cond), Schedule.from_scheduler(sd_scheduler(), 2), memory="checkpoint")
    gradient(made)
    assert set(calls) == {torch.nn.Conv2d}
    with without_weight_grad(wrapped):
        assert not unet.conv_in.weight.requires_grad


def test_doctor_reports_on_a_models_layers(capsys, tmp_path):
    pipe = tiny_families.flux(tmp_path)
    pipe.save_pretrained(tmp_path / "flux")
    parser = doctor.argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(["--model", str(tmp_path / "flux")])) == 0
    said = capsys.readouterr().out
    assert "transformer (FluxTransformer2DModel), lean=True" in said
    assert "    2 FluxAttention" in said
    with pytest.raises(ValueError, match=r"model: expected one of sd15, .* or a diffusers folder"):
        doctor.run(parser.parse_args(["--model", str(tmp_path / "nothing")]))
