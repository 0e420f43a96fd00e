"""The methods of the comparison, each of which spends a budget of network calls on a batch of independent samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import doodl_fast
from doodl_fast.chain.chain import Chain
from doodl_fast.diffusion.decoder import Decoder
from doodl_fast.diffusion.schedule import Schedule

from . import tasks
from .counting import CountedGuidance, Counter, CountingDenoiser
from .guides import LikelyLosses, SampleLosses, Values
from .rates import SampleAdam, SampleMomentum
from .trace import Trace

STEPS, FEW_STEPS = 10, 4
"""How many sampling steps the chains have, and that of ReNO."""
LIKELY_WEIGHT = 0.01
"""The weight of ReNO's regulariser, that of its paper."""
STRONG = 4.0
"""The scale of classifier-free guidance of the method "guided"."""
ADAM = (0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass
class Batch:
    """The samples of one run.

    Attributes:
        pipe: The embedded pipeline.
        cases: What each sample is to show.
        seeds: The seed of each sample.
        rates: The scale or step size of each sample, (B,), on the device.
        values: The losses of pictures, one for each sample.
        counter: Counts the network's calls.
        denoiser: The network with the prompts of the samples, without classifier-free guidance.
    """

    pipe: Any
    cases: Sequence[tasks.Case]
    seeds: Sequence[int]
    rates: Tensor
    values: Values
    counter: Counter
    denoiser: CountingDenoiser
    decode: Decoder = field(init=False)

    def __post_init__(self) -> None:
        self.decode = Decoder(self.pipe.vae)

    @property
    def device(self) -> torch.device:
        return self.rates.device

    def noise(self, draw: int = 0) -> Tensor:
        """Noise (B, 4, 16, 16) on the device; a draw of 0 is the start that all methods share."""
        drawn = [tasks.noise(case, seed, draw) for case, seed in zip(self.cases, self.seeds, strict=True)]
        return torch.stack(drawn).to(self.device)

    def schedule(self, steps: int) -> Schedule:
        return Schedule.from_scheduler(self.pipe.scheduler, steps)

    def guided(self, scale: float) -> CountingDenoiser:
        """The network with classifier-free guidance."""
        own = self.denoiser
        return CountingDenoiser(self.counter, own.unet, own.cond, own.uncond, scale)


@torch.no_grad()
def unguided(batch: Batch, trace: Trace, scale: float = 1.0) -> None:
    """The picture of the start, which nothing guides to the aim."""
    denoiser = batch.denoiser if scale == 1 else batch.guided(scale)
    (latents,) = doodl_fast.DDIM(denoiser, batch.schedule(STEPS))(batch.noise())
    images = batch.decode(latents)
    trace.add(images, batch.values(images))


@torch.no_grad()
def best_of(batch: Batch, trace: Trace) -> None:
    """As many starts as the budget allows, of which the one with the lowest loss counts."""
    chain = doodl_fast.DDIM(batch.denoiser, batch.schedule(STEPS))
    draw, done = 0, False
    while not done:
        images = batch.decode(chain(batch.noise(draw))[0])
        done, draw = trace.add(images, batch.values(images)), draw + 1


@torch.no_grad()
def one_step(batch: Batch, trace: Trace) -> None:
    """One-step guidance of as many starts as the budget allows, of which the one with the lowest loss counts."""
    chain = doodl_fast.DDIM(batch.denoiser, batch.schedule(STEPS))

    def loss(images: Tensor) -> Tensor:
        # The guidance multiplies the gradient by B, as it expects a mean.
        return (batch.rates * batch.values(images)).mean()

    guided = CountedGuidance(batch.denoiser, chain.schedule, batch.decode, loss)
    plain = Chain(guided, chain.program)
    draw, done = 0, False
    while not done:
        x = batch.noise(draw)
        images = batch.decode(plain(x, torch.zeros_like(x))[chain.picture_index])
        done, draw = trace.add(images, batch.values(images)), draw + 1


def optimise(batch: Batch, trace: Trace, chain: Any, losses: SampleLosses | None = None, **options: Any) -> None:
    """Optimises noise through a whole chain until the budget is spent.

    The perturbation of the reference is left out, so that a sample does not depend on its batch.

    Args:
        batch: The samples.
        trace: Where every evaluation is noted.
        chain: The chain.
        losses: The losses; None for the task's own.
        **options: Those of `doodl_fast.optimize`.
    """
    losses = losses or SampleLosses(batch.values)

    def note(info: doodl_fast.optimization.StepInfo) -> bool:
        return trace.add(info.images[0], losses.take())

    adam = {"optimizer": lambda p: SampleAdam(p, batch.rates), "clip_grad_value": None}
    settings = {**adam, "perturbation_scale": 0.0, "progress": False, **options}
    most = int(trace.budget) + 1
    doodl_fast.optimize(chain, batch.noise(), batch.decode, losses, most, callback_on_step_end=note, **settings)


def edict(batch: Batch, trace: Trace, **options: Any) -> None:
    """DOODL: EDICT's chain, by default with Adam like the other chains."""
    optimise(batch, trace, doodl_fast.EDICT(batch.denoiser, batch.schedule(STEPS), memory="checkpoint"), **options)


def doodl(batch: Batch, trace: Trace) -> None:
    """DOODL with its own update, clipped momentum SGD. What is tuned is the step after the clip."""
    edict(
        batch,
        trace,
        optimizer=lambda p: SampleMomentum(p, batch.rates),
        grad_scale=100.0,
        clip_grad_value=1e-3,
    )


def ddim(batch: Batch, trace: Trace) -> None:
    """DITTO: DDIM's chain with checkpoints."""
    optimise(batch, trace, doodl_fast.DDIM(batch.denoiser, batch.schedule(STEPS), memory="checkpoint"))


def obelm(batch: Batch, trace: Trace) -> None:
    """O-BELM's chain, which can be undone like EDICT's and costs half of its calls."""
    optimise(batch, trace, doodl_fast.OBELM(batch.denoiser, batch.schedule(STEPS), memory="checkpoint"))


def stochastic(batch: Batch, steps: int, eta: float) -> doodl_fast.Sampler:
    """The pipeline's own sampler, whose noise follows from cases and seeds as the start does."""
    steps_of = doodl_fast.Sampler.read_scheduler(batch.pipe.scheduler, steps, eta=eta)
    chain = doodl_fast.Sampler(batch.denoiser, steps_of, memory="checkpoint")
    # Draws of other starts count upwards from 0, those of steps downwards.
    chain.step_noise = [batch.noise(-1 - number) for number in range(chain.num_draws)]
    return chain


def all_noise(batch: Batch, trace: Trace) -> None:
    """DNO: the noise of all steps of a sampler that adds noise, and that of the start."""
    variables = {"start": {}, "noise": {"optimizer": lambda p: SampleAdam(p, batch.rates)}}
    optimise(batch, trace, stochastic(batch, STEPS, 1.0), variables=variables)


def reno(batch: Batch, trace: Trace) -> None:
    """ReNO: a chain of few steps, and a regulariser that keeps the norm of the noise likely."""
    chain = doodl_fast.DDIM(batch.denoiser, batch.schedule(FEW_STEPS), memory="checkpoint")
    losses = LikelyLosses(batch.values, LIKELY_WEIGHT)
    optimise(batch, trace, chain, losses, renormalize_latents=False)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: What tables call it.
        run: Spends a trace's budget on a batch.
        scales: What is tried on the split for tuning; every method that has a scale tries equally many.
    """

    title: str
    run: Callable[[Batch, Trace], None]
    scales: tuple[float, ...] = ()


METHODS: dict[str, Method] = {
    "none": Method("none", unguided),
    "cfg": Method("classifier-free guidance of 4", lambda batch, trace: unguided(batch, trace, STRONG)),
    "best": Method("best of N", best_of),
    "onestep": Method("one-step guidance, best of N", one_step, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "doodl": Method("DOODL: EDICT, its own update", doodl, (3.0, 10.0, 30.0, 100.0, 300.0)),
    "edict": Method("DOODL: EDICT, Adam", edict, ADAM),
    "ddim": Method("DITTO: DDIM, Adam", ddim, ADAM),
    "obelm": Method("O-BELM, Adam", obelm, ADAM),
    "dno": Method("DNO: noise of all steps, Adam", all_noise, ADAM),
    "reno": Method("ReNO: 4 steps, regularised, Adam", reno, ADAM),
}
