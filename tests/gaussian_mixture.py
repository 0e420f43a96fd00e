"""A diffusion model that is known in closed form: every pixel is drawn from the same mixture of Gaussians.

Adding noise to a mixture of Gaussians gives another one, so the score, and with it the network's ideal output, is an
elementary function (see Karras et al., arXiv 2206.00364, appendix B). Samplers can be compared with the exact solution
of their differential equation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MEANS = (-1.5, 0.3, 1.2)
SHARES = (0.3, 0.4, 0.3)
DEVIATION = 0.35
MEAN = -1.5 * 0.3 + 0.3 * 0.4 + 1.2 * 0.3


def scaled_linear_alphas(count: int = 1000) -> list[float]:
    """Returns Stable Diffusion's `alphas_cumprod` in float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).tolist()


def ideal_eps(x: Tensor, signal: float, noise: float) -> Tensor:
    """The expected noise given the latent `x = signal * picture + noise * eps`, of any shape."""
    variance = (signal * DEVIATION) ** 2 + noise**2
    away = x[..., None] - signal * x.new_tensor(MEANS)
    weight = torch.softmax(x.new_tensor(SHARES).log() - away**2 / (2 * variance), -1)
    return noise * (weight * away).sum(-1) / variance


def ideal_output(x: Tensor, signal: float, noise: float, prediction_type: str) -> Tensor:
    """What a perfect network of the given prediction type returns at x."""
    eps = ideal_eps(x, signal, noise)
    picture = (x - noise * eps) / signal if signal else x.new_full(x.shape, MEAN)
    return {
        "epsilon": eps,
        "sample": picture,
        "v_prediction": signal * eps - noise * picture,
        "flow": eps - picture,
    }[prediction_type]


def exact_solution(x: Tensor, start: tuple[float, float], end: tuple[float, float], steps: int = 2000) -> Tensor:
    """Where the probability flow takes x from one (signal, noise) level to another, by a Runge-Kutta method.

    It is solved for `z = x / signal` over `log(noise / signal)`: `dz/ds = eps` with `s = noise / signal`. 2000 steps of
    fourth order leave an error far below that of the samplers that are compared with it.
    """

    def slope(z: Tensor, log_s: float) -> Tensor:
        s = math.exp(log_s)
        signal = 1 / math.sqrt(1 + s * s)
        return s * ideal_eps(z * signal, signal, s * signal)

    z = x / start[0]
    place = math.log(start[1] / start[0])
    h = (math.log(end[1] / end[0]) - place) / steps
    for _ in range(steps):
        k1 = slope(z, place)
        k2 = slope(z + h / 2 * k1, place + h / 2)
        k3 = slope(z + h / 2 * k2, place + h / 2)
        k4 = slope(z + h * k3, place + h)
        z, place = z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), place + h
    return z * end[0]
