"""Versions of decoders and guides that need less memory give the same gradient, also with memory="auto"."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, golden_denoiser, latents, relative, sd_scheduler
from tiny_pipeline import clip, golden_vae, golden_vae_copy
from tolerances import FP32
from torch import Tensor

from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.diffusion.pipeline import Decoder
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.guidance import ClipText
from doodl_fast.optimization import low_memory
from doodl_fast.optimization.loop import optimize
from doodl_fast.solvers.edict import EDICT

ON_CPU = pytest.mark.skipif(
    DEVICE.type != "cpu", reason="the workspaces of a GPU's libraries are larger than these latents and pictures"
)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    model, processor = clip(tmp_path_factory.mktemp("clip"))
    return ClipText(model.to(DEVICE), processor, "a dog", num_cutouts=8)


def pulled(function, x: Tensor) -> tuple[Tensor, int]:
    """Gradient of the squares of function(x), and the peak of taking it."""
    torch.manual_seed(3)
    leaf = x.detach().clone().requires_grad_()
    with Tracker(DEVICE.type) as tracker:
        (gradient,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
    return gradient, tracker.peak


@pytest.mark.parametrize("training", [False, True])
def test_decoders(training):
    vae = golden_vae_copy(torch.float32)
    decode = Decoder(vae)
    x = latents(3, 4, 16, 16, dtype=torch.float32)[0]
    expected, most = pulled(decode, x)
    vae.train(training)
    before = {name: (p.requires_grad, p.grad) for name, p in vae.named_parameters()}
    peaks = [most]
    while (decode := decode.leaner()) is not None:
        gradient, peak = pulled(decode, x)
        assert relative(gradient, expected) < FP32
        assert relative(decode(x), Decoder(vae)(x)) < 1e-6
        peaks.append(peak)
    assert len(peaks) == 4 and peaks[3] <= peaks[2] < peaks[1] < 0.9 * peaks[0]
    assert vae.training == training and {m.training for m in vae.modules()} == {training}
    assert {name: (p.requires_grad, p.grad) for name, p in vae.named_parameters()} == before


def test_guides(guide):
    images = latents(2, 3, 48, 48, dtype=torch.float32)[0]
    expected, most = pulled(guide, images)
    peaks, leaner = [most], guide
    while (leaner := leaner.leaner()) is not None:
        gradient, peak = pulled(leaner, images)
        assert relative(gradient, expected) < FP32
        peaks.append(peak)
    assert len(peaks) == 3 and peaks[2] <= peaks[1] < peaks[0]
    whole = ClipText.__new__(ClipText)
    whole.num_cutouts, whole._chunk = 0, None
    assert whole.leaner() is None


def test_the_decoder_goes_first(guide):
    pair, seen = (Decoder(golden_vae()), guide), []
    while pair is not None:
        seen.append((pair[0]._checkpoints, pair[0]._singly, pair[0]._layers, pair[1]._chunk))
        pair = low_memory.next_smaller(*pair)
    steps = [(0, 0, 0, None), (1, 0, 0, None), (1, 1, 0, None), (1, 1, 1, None), (1, 1, 1, 2), (1, 1, 1, 1)]
    assert seen == steps
    assert low_memory.next_smaller(torch.sin, torch.mean) is None


def chain(memory="auto", budget=None, steps=2) -> EDICT:
    schedule = Schedule.from_scheduler(sd_scheduler(), steps)
    return EDICT(golden_denoiser(torch.float32), schedule, memory=memory, memory_budget=budget)


def run(made: EDICT, decode, loss, steps=2, **options):
    torch.manual_seed(0)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    return optimize(made, x, decode, loss, steps, progress=False, grad_scale=1e3, **options)


@ON_CPU
def test_an_optimisation_keeps_to_its_budget(guide):
    """Every budget gives the same losses, also where the plain decoder does not fit beside a stored graph."""
    decode = Decoder(golden_vae())
    expected = run(chain("checkpoint"), decode, guide)
    x = latents(1, 4, 16, 16, dtype=torch.float32)[0]
    plain = low_memory.peak_bytes(decode, guide, x, None)
    everything = chain()
    everything.make_plan(x, plain)
    for budget in (None, everything.plan.peak, plain + 10**6, plain * 9 // 10):
        made, peaks = chain(budget=budget), []

        def note(info, peaks=peaks):
            peaks.append(tracker.peak)
            tracker.reset_peak()

        with Tracker(DEVICE.type) as tracker:
            got = run(made, decode, guide, callback_on_step_end=note)
        torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=0)
        assert relative(got.latents[0], expected.latents[0]) < FP32
        if budget is not None:
            assert peaks[0] < 1.15 * budget and made.plan.peak <= budget  # with the measurements beforehand
        assert made.plan.peak == pytest.approx(peaks[1], rel=0.15)


@ON_CPU
def test_a_budget_that_cannot_hold_the_decoder(guide):
    with pytest.raises(ValueError, match=r"memory_budget: expected at least \d+ bytes .* smallest possible") as said:
        run(chain(budget="1MB"), Decoder(golden_vae()), guide)
    needed = int(str(said.value).split("at least ")[1].split()[0])
    assert run(chain(budget=needed), Decoder(golden_vae()), guide, 1).losses


@pytest.mark.parametrize("where", ["decode", "loss"])
def test_out_of_memory_beside_the_chain(where, guide):
    """The losses are the same, with the same random cutouts, after decoder or loss is replaced."""
    decode = Decoder(golden_vae())
    expected = run(chain("checkpoint"), decode, guide)

    class Hungry:
        def __init__(self, function, level=0):
            self.function, self.level, self.calls = function, level, 0

        def __call__(self, z):
            self.calls += 1
            result = self.function(z)
            if self.level < 1 and self.calls > 3 and torch.is_grad_enabled():  # after the probe and one image pair
                raise torch.OutOfMemoryError("CUDA out of memory")
            return result

        def leaner(self):
            return Hungry(self.function, self.level + 1) if self.level < 1 else None

    hungry = {"decode": (Hungry(decode), guide), "loss": (decode, Hungry(guide))}[where]
    got = run(chain(), *hungry)
    torch.testing.assert_close(got.losses, expected.losses, rtol=1e-5, atol=0)
    with pytest.raises(torch.OutOfMemoryError):
        run(chain("checkpoint"), *hungry)


def test_out_of_memory_that_only_the_chain_can_end():
    class Hungry:
        times = 0

        def __call__(self, images):
            if torch.is_grad_enabled() and self.times:
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images.square().mean()

    loss, made = Hungry(), chain()
    decode = torch.sin
    expected = run(made, decode, loss, 1)
    before = made.plan
    hungry = Hungry()
    hungry_chain = chain()
    callback_steps = []

    def callback(info):
        callback_steps.append(info.step)
        hungry.times = 1

    with pytest.warns(RuntimeWarning, match="memory: ran out of it with graphs of all"):
        got = run(hungry_chain, decode, hungry, 2, callback_on_step_end=callback)
    assert 0 < hungry_chain.plan.recomputed < before.evaluations and hungry_chain.plan.peak < before.peak
    assert before.recomputed == 0 and callback_steps == [0, 1]
    assert got.losses[0] == expected.losses[0]
