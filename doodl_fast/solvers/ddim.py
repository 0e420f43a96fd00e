"""DDIM: the deterministic sampler of Song, Meng and Ermon (arXiv 2010.02502) as a list of couplings."""

from __future__ import annotations

import torch
from torch import Tensor

from ..chain.memory.strategies import Memory
from ..chain.program import Coupling, Program
from ..diffusion.denoiser import Denoiser
from ..diffusion.schedule import Schedule
from .base import DiffusionChain
from .coefficients import levels, step_coefficients


def ddim_program(schedule: Schedule) -> Program:
    """The couplings of DDIM from noise to picture, one network call for each step.

    DDIM has one latent, `x' = k x + b network(x)`, while a coupling reads one latent and changes the other. So the two
    latents of the program take turns: each step reads the latent that the step before it wrote and replaces the other
    one wholly. Such a coupling has `a = 0`: it forgets its target and cannot be undone.

    Args:
        schedule: The noise levels, of any prediction type.

    Returns:
        The program. It starts from latent 0, and the latent that its last coupling changes is the picture. A step
        between equal noise levels changes nothing and is left out.
    """
    program: list[Coupling] = []
    passed = levels(schedule)
    for step, (t, start, end) in enumerate(zip(schedule.timesteps, passed, passed[1:], strict=False)):
        if start != end:
            k, b = step_coefficients(start, end, schedule.prediction_type)
            program.append(Coupling((len(program) + 1) % 2, 0.0, k, b, step, t))
    return tuple(program)


class DDIM(DiffusionChain):
    """The DDIM sampler (arXiv 2010.02502), differentiable end to end, with one network call for each step.

    A gradient costs half of EDICT's network calls, and the pictures are those of diffusers' own `DDIMScheduler`. In
    return there is no inverse: use `EDICT`, `BDIA` or `OBELM` to edit a given picture. DITTO (Novack et al., arXiv
    2401.12179) optimises the starting noise by back-propagating through DDIM. Latents are (B, C, ...) of fp16,
    bf16, fp32 or fp64; results and gradients have their dtype. Gradients are also given to the denoiser's conditions
    that require grad, never to weights.

    Args:
        denoiser: The network with its conditions.
        schedule: The noise levels. Its prediction type tells what the network returns.
        memory: What is kept for the gradient: "checkpoint", "naive" or "auto", see `Chain`. The strategies that undo
            couplings are refused.
        state_dtype: In which the latents and their cotangents are carried, see `Chain`.
        arithmetic: "float". Exact arithmetic is refused, because there is no inverse.
        memory_budget: For memory="auto", see `Chain`.

    Raises:
        TypeError: `denoiser` is no `Denoiser`, or `schedule` no `Schedule`.
        ValueError: An option is out of range, or `memory` would undo couplings.

    Example:
        >>> chain = DDIM.from_pipeline(pipe, "a dog", num_inference_steps=20)
        >>> (x0,) = chain(chain.noise(seed=0))
        >>> ImageTensor(chain.decode(x0)).save("dog.png")
    """

    num_starts = 1
    num_pictures = 1

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        memory: Memory = "checkpoint",
        state_dtype: torch.dtype | None = None,
        arithmetic: str = "float",
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(
            denoiser,
            schedule,
            ddim_program,
            memory=memory,
            state_dtype=state_dtype,
            arithmetic=arithmetic,
            memory_budget=memory_budget,
        )

    @property
    def picture_index(self) -> int:
        """Which of the two values the last coupling changes."""
        return self.program[-1].target if self.program else 0

    def __call__(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        """Samples from noise x (B, C, ...). Returns a tuple of one: the picture's latents, alike in shape and dtype."""
        ends = super().__call__(x, torch.zeros_like(x))
        return (ends[self.picture_index],)
