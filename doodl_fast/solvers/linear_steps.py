"""A sampler's linear steps as a program of couplings on as many latents as its history needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..chain.program import Coupling, Program
from ..diffusion.tracing import LinearStep, Term


@dataclass(frozen=True)
class SlotProgram:
    """A program and the latents that it works on.

    Attributes:
        program: The couplings.
        slots: How many latents there are. All but the first and those of the noise are zero at the start.
        noise_slots: Which latents hold the noise that the steps add, in the order in which it is drawn.
        result: Which latent is the picture at the end.
    """

    program: Program
    slots: int
    noise_slots: tuple[int, ...]
    result: int


def linear_program(steps: Sequence[LinearStep], initial_scale: float = 1.0) -> SlotProgram:
    """Turns linear steps into couplings.

    The latents are held as the network is given them, so that a scheduler that scales the network's input costs
    nothing. Each step writes the next latents into a free slot; an output of the network that later steps read again
    has a slot of its own, and a slot is free again once nothing reads it any more.

    Args:
        steps: The steps, in order (see `doodl_fast.diffusion.tracing`).
        initial_scale: What the chain's starting latents are multiplied by before the first step, the scheduler's
            `init_noise_sigma` for instance.
    """
    draws = sorted({term.number for step in steps for term in step.result if term.kind == "noise"})
    last_read = {term: k for k, step in enumerate(steps) for term in step.result}
    scales = [*(step.input_scale for step in steps), 1.0]
    slots = _Slots(reserved=1 + len(draws))
    noise = {index: 1 + place for place, index in enumerate(draws)}
    place: dict[Term, int] = {Term("latents", 0): 0, **{Term("noise", i): slot for i, slot in noise.items()}}
    program: list[Coupling] = []
    if initial_scale * scales[0] != 1:
        scaled = slots.take()
        program.append(Coupling(scaled, 0.0, initial_scale * scales[0], 0.0, 0, None, source=0))
        place[Term("latents", 0)] = scaled
    for k, step in enumerate(steps):
        latents, output = Term("latents", k), Term("output", k)
        source, result = place[latents], dict(step.result)
        after = slots.take()
        own, share = result.pop(latents, 0.0) / scales[k] * scales[k + 1], result.pop(output, 0.0) * scales[k + 1]
        if last_read.get(output, k) > k:
            place[output] = slots.take()
            program.append(Coupling(place[output], 0.0, 0.0, 1.0, k, step.timestep, source=source))
            program.append(Coupling(after, 0.0, own, 0.0, k, None, source=source))
            program.append(Coupling(after, 1.0, share, 0.0, k, None, source=place[output]))
        else:
            program.append(Coupling(after, 0.0, own, share, k, step.timestep, source=source))
        for term, coefficient in result.items():
            scale = scales[k + 1] / (scales[term.number] if term.kind == "latents" else 1.0)
            program.append(Coupling(after, 1.0, coefficient * scale, 0.0, k, None, source=place[term]))
        place[Term("latents", k + 1)] = after
        for term in [term for term in place if term.kind != "noise" and term.number <= k]:
            if last_read.get(term, -1) <= k:
                slots.give_back(place.pop(term))
    return SlotProgram(tuple(program), slots.count, tuple(noise.values()), place[Term("latents", len(steps))])


class _Slots:
    """Numbers of latents, of which the lowest free one is taken first."""

    def __init__(self, reserved: int) -> None:
        self.count = reserved
        self._reserved = reserved
        self._free: list[int] = []

    def take(self) -> int:
        if self._free:
            return self._free.pop()
        self.count += 1
        return self.count - 1

    def give_back(self, slot: int) -> None:
        """The starting latents and the noise are the caller's, so their slots are not written again."""
        if slot >= self._reserved:
            self._free.append(slot)
