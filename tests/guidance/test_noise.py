"""Regularisers of noise, against closed forms, scipy, and the statistics of Gaussian noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import doodl_fast
from doodl_fast.guidance import NoiseNorm, NoiseProbability, StartDistance, Whiteness, white_projection
from doodl_fast.guidance.noise import chi_log_density, noise_log_probability


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def colored(seed: int = 0) -> Tensor:
    """Noise whose mean, deviation and neighbours' correlation are not those of white noise."""
    noise = gaussian(2, 3, 6, 6, seed=seed)
    return 1.3 * noise + 0.7 * noise.roll(1, -1) + 0.4


REGULARISERS = [NoiseNorm(), NoiseProbability(4, 2), Whiteness(4), StartDistance(gaussian(2, 3, 6, 6, seed=9))]


@pytest.mark.parametrize("loss", REGULARISERS, ids=lambda loss: type(loss).__name__)
def test_the_gradient_is_that_of_finite_differences(loss: Any) -> None:
    start = colored().requires_grad_()
    value = loss(None, start=start)
    (grad,) = torch.autograd.grad(value, start)
    assert value.ndim == 0 and float(grad.norm()) > 1e-3
    assert torch.autograd.gradcheck(lambda z: loss(None, start=z), (start,), fast_mode=True)


def test_the_norm_has_the_chi_density() -> None:
    stats = pytest.importorskip("scipy.stats")
    noise = gaussian(3, 4, 5, 5) * torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    expected = stats.chi.logpdf(noise.flatten(1).norm(dim=1).numpy(), 100)
    assert np.allclose(chi_log_density(noise).numpy(), expected, rtol=1e-12)


def test_the_density_of_the_norm_integrates_to_one() -> None:
    radius = torch.linspace(1e-3, 9, 20001, dtype=torch.float64)
    noise = torch.zeros(len(radius), 3, dtype=torch.float64)
    noise[:, 0] = radius
    density = chi_log_density(noise).exp()
    assert float(torch.trapezoid(density, radius)) == pytest.approx(1, abs=1e-6)


def test_the_bounds_of_the_statistics_are_dnos() -> None:
    noise, k = colored()[:1], 4
    vectors = noise.numpy().reshape(-1, k)
    m = len(vectors)
    mean = 2 * math.exp(-m * np.linalg.norm(vectors.mean(0)) ** 2 / (2 * k))
    distance = np.linalg.norm(vectors.T @ vectors / m - np.eye(k), 2)
    second = 2 * math.exp(-m * max(math.sqrt(1 + distance) - 1 - math.sqrt(k / m), 0) ** 2 / 2)
    expected = math.log(min(mean, 1)) + math.log(min(second, 1))
    assert expected < -0.1
    assert float(noise_log_probability(noise, k)) == pytest.approx(expected, rel=1e-10)


def test_the_bounds_hold_for_gaussian_noise() -> None:
    """Unusual statistics are rare among Gaussian samples, and a shift of the mean is found."""
    log = noise_log_probability(gaussian(4000, 4, 8, 8), 4)
    assert float((log < math.log(0.01)).double().mean()) <= 0.02
    assert float(noise_log_probability(gaussian(1, 4, 8, 8) + 0.5, 4)) < math.log(0.01)


def test_the_projection_is_white_and_real_and_a_projection() -> None:
    noise = colored()
    projected = white_projection(noise, 4)
    assert torch.allclose(white_projection(projected, 4), projected, atol=1e-12)
    assert projected.square().sum((1, 2, 3)).tolist() == pytest.approx([108, 108], rel=1e-12)  # Parseval
    assert float((projected - noise).norm()) > 1
    single = white_projection(noise, 1)  # With one ring it is the projection onto a sphere.
    radius = noise.flatten(1).norm(dim=1).reshape(2, 1, 1, 1)
    assert torch.allclose(single, noise / radius * math.sqrt(108), atol=1e-12)


def test_nothing_white_is_nearer_than_the_projection() -> None:
    noise = colored()
    nearest = float((white_projection(noise, 4) - noise).norm())
    others = [
        float((white_projection(gaussian(2, 3, 6, 6, seed=seed) + noise, 4) - noise).norm()) for seed in range(20)
    ]
    assert nearest < min(others)


def test_the_divergence_is_torchs_own() -> None:
    start, reference = gaussian(2, 3, 4), gaussian(2, 3, 4, seed=1)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(start, 1.0), normal(reference, 1.0)).sum((1, 2)).mean()
    assert torch.allclose(StartDistance(reference)(None, start=start), expected, rtol=1e-12)


def test_optimize_pulls_the_norm_to_its_mode() -> None:
    start = 2 * gaussian(1, 4, 4, 4)
    result = doodl_fast.optimize(
        lambda x, y: (x, y),
        start,
        None,
        [(lambda latents: 0 * latents.sum(), 1.0), (NoiseNorm(), 1.0)],
        60,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.1),
        clip_grad_value=None,
        renormalize_latents=False,
        perturbation_scale=0.0,
        progress=False,
    )
    squared = float(result.latents[0].square().sum())
    assert float(start.square().sum()) > 150 and squared == pytest.approx(63, rel=0.05)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: NoiseNorm()(None, start=torch.ones(2, 3, dtype=torch.long)), TypeError, "start: expected a floating"),
        (lambda: NoiseNorm()(None, start=torch.ones(3)), ValueError, "start: expected noise of shape"),
        (lambda: NoiseProbability(0), ValueError, "subset: expected an int of at least 1, got 0"),
        (lambda: noise_log_probability(torch.ones(1, 3), 4), ValueError, "subset: expected at most 3"),
        (lambda: Whiteness(0), ValueError, "rings: expected an int of at least 1"),
        (lambda: white_projection(torch.ones(1, 3)), ValueError, r"noise: expected shape \(B, C, H, W\)"),
        (
            lambda: StartDistance(torch.ones(1, 3))(None, start=torch.ones(1, 4)),
            ValueError,
            "reference: expected the shape of the starting latents",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()
