"""Code like that which people have built on the reference, before and after its one changed import.

The classes that begin with "Their" are such code: EDICT layers of their own, which memcnn wraps, in a loop. They run in
our wrapper as they are. Where `docs/migration.md` shows it, they are also rewritten with our layers. The oracle is
plain autograd.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import randn, relative
from tolerances import FP64
from torch import Tensor, nn

from doodl_fast import EDICT, Denoiser, Schedule
from doodl_fast.compat import Quirks, memcnn
from doodl_fast.compat.doodl import MixingLayer, SteppingLayer, forward_step, reverse_step
from doodl_fast.compat.schedule import ReferenceScheduler

STEPS = 4
KEEPS = (True, False)


def gradients(function, inputs: list[Tensor], **options) -> tuple[Tensor, ...]:
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = function(*(leaf.clone() for leaf in leaves), **options)
    (out * randn(*out.shape, seed=7)).sum().backward()
    return (out.detach(), *(leaf.grad for leaf in leaves))


def agree(got, want, tolerance: float = 1e-11) -> None:
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < tolerance


class Theirs(nn.Module):
    """Two coupled DDIM steps in the reference's order, on any `noise(latent, t, *extra)`."""

    num_timesteps = STEPS

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.scheduler = ReferenceScheduler()
        self.scheduler.set_timesteps(STEPS)

    def forward(self, i, t, pair, *extra, reverse=False):
        step, halves = (reverse_step if reverse else forward_step), list(pair.split(1))
        first = (self.num_timesteps - int(i)) % 2 if reverse else int(i) % 2
        for target in (first, 1 - first):
            noise = self.noise(halves[1 - target], t[0], *extra)
            halves[target] = step(self.scheduler, noise, t[0].long(), halves[target])
        return i.clone(), t.clone(), torch.cat(halves), *extra

    def inverse(self, i, t, pair, *extra):
        return self.forward(i, t, pair, *extra, reverse=True)


def loop(layer, mix, pair: Tensor, *extra: Tensor) -> Tensor:
    for i, t in enumerate(getattr(layer, "_fn", layer).scheduler.timesteps):
        i, t = (torch.tensor([value], dtype=pair.dtype) for value in (i, t))
        i, t, pair, *extra = layer(i, t, pair, *extra)
        pair = mix(pair)
    return pair


def wrap(layer, keep: bool, **options):
    return memcnn.InvertibleModuleWrapper(layer, keep_input=keep, keep_input_inverse=keep, **options)


# Video: latents (2, C, F, H, W), and one text embedding for each frame


class VideoUNet(nn.Module):
    """A network that convolves in space and time. `encoder_hidden_states` has one row for each frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Conv3d(4, 6, 3, padding=1).double(), nn.Conv3d(6, 4, 3, padding=1).double()
        self.text, self.calls = nn.Linear(5, 6).double(), 0

    def forward(self, sample, timestep, encoder_hidden_states):
        self.calls += 1
        batch, frames = sample.shape[0], sample.shape[2]
        text = self.text(encoder_hidden_states.mean(1)).unflatten(0, (batch, frames)).movedim(2, 1)[..., None, None]
        return SimpleNamespace(sample=self.outside(torch.tanh(self.inside(sample) + text + timestep / 1000)))


class TheirVideoLayer(Theirs):
    def noise(self, latent, t):
        uncond = self.unet(latent, t, encoder_hidden_states=self.e_uc).sample
        cond = self.unet(latent, t, encoder_hidden_states=self.e_c).sample
        return uncond + 7.5 * (cond - uncond)


class BatchedVideoLayer(SteppingLayer):
    def predict_noise(self, latent, t):
        text = torch.cat([self.e_uc, self.e_c])
        uncond, cond = self.unet(torch.cat([latent, latent]), t, encoder_hidden_states=text).sample.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)


@pytest.mark.parametrize("keep", KEEPS)
def test_video(keep):
    unet, (e_uc, e_c) = VideoUNet(), randn(2, 3, 2, 5, seed=1)
    pair = randn(2, 4, 3, 4, 4, seed=2)
    theirs, mix = TheirVideoLayer(unet=unet, e_uc=e_uc, e_c=e_c), MixingLayer()
    want = gradients(lambda x: loop(theirs, mix, x), [pair])
    ours = {
        "theirs in our wrapper": theirs,
        "our layer": SteppingLayer(unet, e_uc, e_c, num_timesteps=STEPS),
        "our layer, batched": BatchedVideoLayer(unet, e_uc, e_c, num_timesteps=STEPS),
    }
    calls = {}
    for name, layer in ours.items():
        unet.calls = 0
        agree(gradients(lambda x, layer=layer: loop(wrap(layer, keep), wrap(mix, keep), x), [pair]), want)
        calls[name] = unet.calls
    assert calls == dict(zip(ours, (32 if keep else 48, 24, 12), strict=True))


# Super-resolution: a ControlNet, no guidance, the low-resolution image and the embedding as inputs of the layer


class ControlNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.see, self.text = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Linear(5, 6).double()

    def forward(self, latent, t, image, embedding):
        return torch.tanh(self.see(image) + self.text(embedding.mean(1))[..., None, None] + t / 1000)


class ControlledUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.inside, self.outside = nn.Conv2d(4, 6, 3, padding=1).double(), nn.Conv2d(6, 4, 3, padding=1).double()

    def forward(self, latent, t, residual):
        return self.outside(torch.tanh(self.inside(latent) + t / 1000) * residual)


class TheirControlledLayer(Theirs):
    def noise(self, latent, t, image, embedding):
        return self.unet(latent, t, self.controlnet(latent, t, image, embedding))


class ControlledLayer(SteppingLayer):
    def __init__(self, unet, controlnet, **options):
        super().__init__(unet, None, None, **options)
        self.controlnet = controlnet

    def predict_noise(self, latent, t, image, embedding):
        return self.unet(latent, t, self.controlnet(latent, t, image, embedding))


@pytest.mark.parametrize("keep", KEEPS)
def test_super_resolution(keep):
    """The further inputs get gradients too, and no weights do."""
    unet, controlnet = ControlledUNet(), ControlNet()
    inputs = [randn(2, 4, 6, 6, seed=3), randn(1, 3, 6, 6, seed=4), randn(1, 2, 5, seed=5)]
    theirs, mix = TheirControlledLayer(unet=unet, controlnet=controlnet), MixingLayer()
    want = gradients(lambda *values: loop(theirs, mix, *values), inputs)
    theirs.zero_grad()
    for layer in (theirs, ControlledLayer(unet, controlnet, num_timesteps=STEPS)):
        s = wrap(layer, keep)
        agree(gradients(lambda *values, s=s: loop(s, wrap(mix, keep), *values), inputs), want)
        *_, image, embedding = s(torch.tensor([0.0]), torch.tensor([500.0]), *inputs)
        assert torch.equal(image, inputs[1]) and torch.equal(embedding, inputs[2])
        assert all(weight.grad is None and weight.requires_grad for weight in layer.parameters())


def test_inputs_after_the_pair_that_are_no_tensors():
    class Named(SteppingLayer):
        def predict_noise(self, latent, t, scale, name):
            return latent * scale * len(name)

    layer = Named(None, None, None, num_timesteps=STEPS)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    *_, out, _, name = layer(0, 500, randn(2, 4, 3, 3), scale, "dog")
    (got,) = torch.autograd.grad(out.sum(), scale)
    assert name == "dog" and got != 0
    with pytest.raises(ValueError, match=r"predict_noise: expected a tensor of shape \(1, 4, 3, 3\), got \(1, 4, 3\)"):
        Bad(None, None, None, num_timesteps=STEPS)(0, 500, randn(2, 4, 3, 3))


class Bad(SteppingLayer):
    def predict_noise(self, latent, t):
        return latent[..., 0]


# Latent diffusion: a layer that returns only the pair, and takes its steps from a sampler by their index


def ddim_sampler() -> SimpleNamespace:
    """Returns the tables of a DDIM sampler of the latent-diffusion repository: rising timesteps with an offset of 1."""
    alphas = ReferenceScheduler().alphas_cumprod
    timesteps = torch.arange(0, 1000, 1000 // STEPS) + 1
    previous = torch.cat([alphas[:1], alphas[timesteps[:-1]]])
    return SimpleNamespace(ddim_timesteps=timesteps, ddim_alphas=alphas[timesteps], ddim_alphas_prev=previous)


class LatentDiffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inside, self.outside = nn.Conv2d(4, 6, 3, padding=1).double(), nn.Conv2d(6, 4, 3, padding=1).double()
        self.text = nn.Linear(5, 6).double()

    def apply_model(self, x, t, c):
        text = self.text(c.mean(1))[..., None, None]
        return self.outside(torch.tanh(self.inside(x) + text + t.reshape(-1, 1, 1, 1) / 1000))


class SamplerLayer(nn.Module):
    def __init__(self, model, sampler, c, uc):
        super().__init__()
        self.model, self.sampler, self.c, self.uc = model, sampler, c, uc

    def forward(self, pair, index, reverse=False):
        halves, s = list(pair.split(1)), self.sampler
        a = (s.ddim_alphas_prev[index] / s.ddim_alphas[index]) ** 0.5
        b = (1 - s.ddim_alphas_prev[index]) ** 0.5 - a * (1 - s.ddim_alphas[index]) ** 0.5
        order = [0, 1] if (len(s.ddim_timesteps) - 1 - index) % 2 == 0 else [1, 0]
        for target in order[::-1] if reverse else order:
            x, t = halves[1 - target], s.ddim_timesteps[index].reshape(1)
            uncond, cond = self.model.apply_model(x, t, self.uc), self.model.apply_model(x, t, self.c)
            noise = uncond + 3 * (cond - uncond)
            halves[target] = (halves[target] - b * noise) / a if reverse else a * halves[target] + b * noise
        return torch.cat(halves)

    def inverse(self, pair, index):
        return self.forward(pair, index, reverse=True)


@pytest.mark.parametrize("keep", KEEPS)
def test_sampler(keep):
    model, sampler = LatentDiffusion(), ddim_sampler()
    c, uc = randn(2, 1, 2, 5, seed=6)
    pair = randn(2, 4, 6, 6, seed=8)
    theirs, mix = SamplerLayer(model, sampler, c, uc), MixingLayer()

    def run(s, m, x):
        for index in reversed(range(STEPS)):
            x = m(s(x, index))
        return x

    want = gradients(lambda x: run(theirs, mix, x), [pair])
    theirs.zero_grad()
    agree(gradients(lambda x: run(wrap(theirs, keep), wrap(mix, keep), x), [pair]), want)
    assert all(weight.grad is None for weight in model.parameters())


def test_sampler_as_a_chain():
    """docs/migration.md also shows how to make a chain of the sampler's tables."""
    model, s = LatentDiffusion(), ddim_sampler()
    c, uc = randn(2, 1, 2, 5, seed=6)
    pair = randn(2, 4, 6, 6, seed=8)
    theirs, mix = SamplerLayer(model, s, c, uc), MixingLayer()

    def run(x):
        for index in reversed(range(STEPS)):
            x = mix(theirs(x, index))
        return x

    tables = (s.ddim_timesteps, s.ddim_alphas, s.ddim_alphas_prev)
    schedule = Schedule(*(tuple(table.flip(0).tolist()) for table in tables))
    chain = EDICT(Denoiser(lambda x, t, cond: model.apply_model(x, t.reshape(1), cond), c, uc, 3.0), schedule)
    agree(gradients(lambda x: torch.cat(chain(*x.split(1))), [pair]), gradients(run, [pair]))


def test_quirks_of_a_layer_of_ones_own():
    """A layer of one's own can have another scheduler, and an order that does not depend on where the loop starts."""
    quirks = Quirks(fractional_timesteps=False, order_by_index=False)
    layer = SteppingLayer(VideoUNet(), *randn(2, 3, 2, 5, seed=1), num_timesteps=STEPS, quirks=quirks)
    pair = randn(2, 4, 3, 4, 4, seed=2)
    *_, there = layer(5, 500, pair)
    *_, back = layer.inverse(17, 500, there)
    assert relative(back, pair) < FP64
