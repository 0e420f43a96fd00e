"""`EDICTScheduler`, the steps and mixings of EDICT as an object: a class of this name is in many copies of EDICT.

EDICT: Wallace, Gokul and Naik, CVPR 2023, arXiv 2211.12446. The class follows the loops that diffusers' community
pipeline and the notebooks around it write by hand. All results are differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..diffusion.schedule import Schedule, noise_levels
from ..diffusion.scheduler_check import setting
from ..solvers.edict import ddim_coefficients


def stepping_schedule(scheduler: Any, timesteps: Sequence[int], stride: float, final_alpha: float) -> Schedule:
    """Returns the noise levels of steps that each lead `stride` timesteps down, cut to a whole number.

    Args:
        scheduler: A diffusers scheduler, whose noise levels and prediction type are taken.
        timesteps: Where the steps start, in falling order.
        stride: The length of a step in timesteps.
        final_alpha: The cumulative alpha below timestep 0.
    """
    alphas = [float(alpha) for alpha in noise_levels(scheduler)]
    return Schedule(
        tuple(timesteps),
        tuple(alphas[t] for t in timesteps),
        tuple(_alpha(alphas, t - stride, final_alpha) for t in timesteps),
        str(setting(scheduler, "prediction_type", "epsilon")),
    )


def _alpha(alphas: Sequence[float], t: float, final_alpha: float) -> float:
    """Returns the cumulative alpha of a timestep, which is cut to a whole number, or the last one below 0."""
    return alphas[int(t)] if int(t) >= 0 else final_alpha


class EDICTScheduler:
    """EDICT's noise schedule with Stable Diffusion's noise levels, its steps and its mixings.

    Args:
        p: The mixing weight, in (0, 1].
        beta_1: The first beta in training; betas are linear in their square roots.
        beta_T: The last beta in training.
        num_train_timesteps: The number of timesteps in training.
        set_alpha_to_one: Whether the last step leads to a cumulative alpha of 1. If not, to that of timestep 0.

    Attributes:
        alphas_cumprod: The cumulative alphas, of shape (num_train_timesteps,), float32.
        final_alpha_cumprod: The cumulative alpha that the last step leads to.
        timesteps: The timesteps of a run in falling order, after `set_timesteps`.
        num_inference_steps: The number of steps of a run, after `set_timesteps`.

    Raises:
        ValueError: `p` is out of range.

    Example:
        >>> scheduler = EDICTScheduler(p=0.93)
        >>> scheduler.set_timesteps(50)
        >>> chain = doodl_fast.EDICT(Denoiser(unet, cond, uncond, 3.0), scheduler.schedule(), mix_weight=scheduler.p)
    """

    def __init__(
        self,
        p: float = 0.93,
        beta_1: float = 0.00085,
        beta_T: float = 0.012,
        num_train_timesteps: int = 1000,
        set_alpha_to_one: bool = False,
    ) -> None:
        if not 0 < p <= 1:
            raise ValueError(f"p: expected a number in (0, 1], got {p!r}; EDICT uses 0.93")
        self.p = p
        self.num_train_timesteps = num_train_timesteps
        betas = torch.linspace(beta_1**0.5, beta_T**0.5, num_train_timesteps, dtype=torch.float32) ** 2
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
        self.final_alpha_cumprod = torch.tensor(1.0) if set_alpha_to_one else self.alphas_cumprod[0]
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Selects the timesteps of a run, from `(n - 1) * (num_train_timesteps // n)` down to 0.

        Args:
            num_inference_steps: The number n of steps.
            device: Where `timesteps` are put.

        Raises:
            ValueError: The number is not between 1 and that of the timesteps in training.
        """
        if not 1 <= num_inference_steps <= self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps: expected an int from 1 to {self.num_train_timesteps}, "
                f"got {num_inference_steps!r}"
            )
        self.num_inference_steps = num_inference_steps
        stride = self.num_train_timesteps // num_inference_steps
        self.timesteps = (torch.arange(num_inference_steps) * stride).flip(0).to(device)

    def schedule(self) -> Schedule:
        """Returns the noise levels of the run, for `doodl_fast.EDICT` and the other solvers.

        Raises:
            ValueError: The scheduler has no timesteps yet.
        """
        stride = self._stride()
        alphas, final = self.alphas_cumprod.tolist(), float(self.final_alpha_cumprod)
        timesteps = [int(t) for t in self.timesteps]
        previous = tuple(_alpha(alphas, t - stride, final) for t in timesteps)
        return Schedule(tuple(timesteps), tuple(alphas[t] for t in timesteps), previous)

    def denoise_mixing_layer(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Returns `x' = p x + (1 - p) y` and `y' = p y + (1 - p) x'`."""
        x = ops.coupling(x, y, None, self.p, 1 - self.p, 0.0)
        return [x, ops.coupling(y, x, None, self.p, 1 - self.p, 0.0)]

    def noise_mixing_layer(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Undoes `denoise_mixing_layer`."""
        y = ops.coupling_inverse(y, x, None, self.p, 1 - self.p, 0.0)
        return [ops.coupling_inverse(x, y, None, self.p, 1 - self.p, 0.0), y]

    def denoise_step(
        self, base: Tensor, model_input: Tensor, model_output: Tensor, timestep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Does one step of DDIM towards the picture with the noise that was predicted at the other latent.

        Args:
            base: The latent that is changed, of shape (B, C, ...).
            model_input: The latent at which the network was called.
            model_output: The predicted noise, of the shape of `base`.
            timestep: The timestep, a number or a tensor of one element.

        Returns:
            `model_input` as it is, and the changed latent in the dtype of `base`.

        Raises:
            ValueError: The scheduler has no timesteps yet.
        """
        return model_input, ops.coupling(base, None, model_output, *self._coefficients(timestep))

    def noise_step(
        self, base: Tensor, model_input: Tensor, model_output: Tensor, timestep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Undoes `denoise_step`. Arguments, results and errors are as there."""
        return model_input, ops.coupling_inverse(base, None, model_output, *self._coefficients(timestep))

    def _coefficients(self, timestep: int | Tensor) -> tuple[float, float, float]:
        """Returns the coefficients (a, c, b) of the step at a timestep."""
        alphas, t = self.alphas_cumprod.tolist(), int(timestep)
        previous = _alpha(alphas, t - self._stride(), float(self.final_alpha_cumprod))
        return ddim_coefficients(alphas[t], previous, "epsilon")

    def _stride(self) -> float:
        """Returns the length of a step in timesteps."""
        if self.num_inference_steps is None:
            raise ValueError("num_inference_steps: the scheduler has no timesteps yet; call set_timesteps first")
        return self.num_train_timesteps / self.num_inference_steps
