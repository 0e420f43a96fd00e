"""Regularisers that keep optimised noise close to Gaussian noise.

Each is a loss that names `start`, so `optimize` hands it the starting latents and differentiates it with respect to
them. A weight behind it says how much it counts: ``optimize(..., loss=[guide, (NoiseNorm(), 0.01)])``. They ignore the
images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arguments import check_count


def check_noise(noise: Any, name: str = "start") -> Tensor:
    """Returns noise (B, C, ...), in float32 at least.

    Raises:
        TypeError: It is no floating tensor.
        ValueError: It has fewer than two dimensions or no entries.
    """
    if not isinstance(noise, Tensor) or not noise.is_floating_point():
        got = noise.dtype if isinstance(noise, Tensor) else type(noise).__name__
        raise TypeError(f"{name}: expected a floating tensor (B, C, ...), got {got}")
    if noise.ndim < 2 or noise.numel() == 0:
        raise ValueError(f"{name}: expected noise of shape (B, C, ...), got shape {tuple(noise.shape)}")
    return noise.to(torch.promote_types(noise.dtype, torch.float32))


def chi_log_density(noise: Tensor) -> Tensor:
    """Computes the log density of the norm of Gaussian noise, which is chi distributed.

    Args:
        noise: A floating tensor (B, C, ...) of D entries for each sample.

    Returns:
        A tensor (B,), `(D - 1) log r - r^2 / 2 - (D / 2 - 1) log 2 - log Gamma(D / 2)` of the norms r. It is largest
        where r^2 is D - 1.
    """
    flat = check_noise(noise, "noise").flatten(1)
    size = flat.shape[1]
    squared = flat.square().sum(1)
    constant = (size / 2 - 1) * math.log(2) + math.lgamma(size / 2)
    return (size - 1) / 2 * squared.log() - squared / 2 - constant


class NoiseNorm:
    """Minus the log density of the norm of the starting latents, as a mean over samples.

    This is the regulariser of ReNO (Eyring et al., arXiv 2406.04312). It is meant for ``renormalize_latents=False``:
    with renormalisation, the norm cannot change.

    Example:
        >>> optimize(chain, noise, chain.decode, [guide, (NoiseNorm(), 0.01)], renormalize_latents=False)
    """

    def __call__(self, images: Any, *, start: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of starting latents (B, C, ...)."""
        return -chi_log_density(check_noise(start)).mean()


def noise_log_probability(noise: Tensor, subset: int = 4) -> Tensor:
    """Bounds the probability that Gaussian noise has a mean and a covariance as unusual as the given noise has.

    The entries of a sample are cut into m vectors of k entries. For Gaussian noise the mean of the vectors has at least
    the norm M with a probability of at most `2 exp(-m M^2 / (2 k))`, and their second moments differ from the identity
    by at least M, in the spectral norm, with at most `2 exp(-m max(sqrt(1 + M) - 1 - sqrt(k / m), 0)^2 / 2)`. A bound
    above 1 counts as 1. See Direct Noise Optimization (Tang et al., arXiv 2405.18881).

    Args:
        noise: A floating tensor (B, C, ...). Entries that do not fill a last vector are left out.
        subset: The length k of the vectors.

    Returns:
        A tensor (B,): the log of the product of both bounds, at most 0.

    Raises:
        ValueError: `subset` is no int of at least 1, or larger than a sample.
    """
    flat = check_noise(noise, "noise").flatten(1)
    check_count(subset, "subset", 1)
    count = flat.shape[1] // subset
    if not count:
        raise ValueError(f"subset: expected at most {flat.shape[1]}, the entries of one sample, got {subset}")
    vectors = flat[:, : count * subset].reshape(len(flat), count, subset)
    mean_bound = -count * vectors.mean(1).square().sum(1) / (2 * subset)
    moments = vectors.mT @ vectors / count - torch.eye(subset, dtype=flat.dtype, device=flat.device)
    # The spectral norm of a symmetric matrix is its largest eigenvalue in magnitude.
    distance = torch.linalg.eigvalsh(moments).abs().amax(1)
    excess = ((1 + distance).sqrt() - 1 - math.sqrt(subset / count)).clamp(min=0)
    return _sum_of_bounds(mean_bound, -count * excess.square() / 2)


def _sum_of_bounds(*exponents: Tensor) -> Tensor:
    """Adds up `log min(1, 2 exp(e))` of exponents (B,)."""
    return torch.stack([(exponent + math.log(2)).clamp(max=0) for exponent in exponents]).sum(0)


class NoiseProbability:
    """Minus the log probability of the statistics of the starting latents, as a mean over samples.

    This is the regulariser of Direct Noise Optimization (Tang et al., arXiv 2405.18881): the bounds of
    `noise_log_probability` for the entries in their order and in random orders. The random orders follow from a seed,
    so that the loss is a function. It is 0, with no gradient, for noise that looks Gaussian.

    Args:
        subset: The length of the vectors that the noise is cut into.
        shuffles: How many random orders of the entries are looked at beside their own.
        seed: The seed of these orders.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, subset: int = 4, shuffles: int = 16, seed: int = 0) -> None:
        self.subset = check_count(subset, "subset", 1)
        self.shuffles = check_count(shuffles, "shuffles", 0)
        self.seed = check_count(seed, "seed", 0)

    def __call__(self, images: Any, *, start: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of starting latents (B, C, ...)."""
        flat = check_noise(start).flatten(1)
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(flat.shape[1], generator=generator).to(flat.device) for _ in range(self.shuffles)]
        own = noise_log_probability(flat, self.subset).mean()
        if not orders:
            return -own
        shuffled = torch.stack([noise_log_probability(flat[:, order], self.subset).mean() for order in orders])
        return -(own + shuffled.mean())


def white_projection(noise: Tensor, rings: int = 8) -> Tensor:
    """Returns the noise with a flat power spectrum that is nearest to given noise.

    The spatial frequencies are sorted into rings by their distance from zero. In each sample, the Fourier coefficients
    of a ring, over all channels, are multiplied by one number, so that their mean power is 1, which is that of white
    noise of deviation 1. This is the projection onto the set of latents with that power. Rings of l2 norms are a
    simpler set than that of Hwang and Sung (arXiv 2602.08646), which also bounds l1 norms of blocks.

    Args:
        noise: A floating tensor (B, C, H, W).
        rings: How many rings there are.

    Returns:
        A tensor of the same shape, in float32 at least.

    Raises:
        ValueError: `noise` has another number of dimensions, or `rings` is no int of at least 1.
    """
    noise = check_noise(noise, "noise")
    if noise.ndim != 4:
        raise ValueError(f"noise: expected shape (B, C, H, W), got {tuple(noise.shape)}")
    height, width = noise.shape[-2:]
    spectrum = torch.fft.fft2(noise, norm="ortho")
    number = _ring_of(height, width, check_count(rings, "rings", 1), noise.device)
    power = spectrum.real.square() + spectrum.imag.square()
    mean = power.new_zeros(len(noise), rings).index_add(1, number, power.sum(1).flatten(1))
    counts = torch.bincount(number, minlength=rings).clamp(min=1) * noise.shape[1]
    scale = (mean / counts).clamp(min=torch.finfo(noise.dtype).tiny).rsqrt()
    factors = scale[:, number].reshape(len(noise), 1, height, width)
    return torch.fft.ifft2(spectrum * factors, norm="ortho").real


def _ring_of(height: int, width: int, rings: int, device: torch.device) -> Tensor:
    """The number of the ring of each Fourier coefficient, (height * width,)."""
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    distance = torch.hypot(rows[:, None], columns[None, :]).flatten()
    return (distance * rings / math.sqrt(0.5)).long().clamp(max=rings - 1).to(device)


class Whiteness:
    """Half the squared distance of the starting latents to noise of a flat power spectrum, as a mean over entries.

    Args:
        rings: See `white_projection`.

    Raises:
        ValueError: `rings` is no int of at least 1.
    """

    def __init__(self, rings: int = 8) -> None:
        self.rings = check_count(rings, "rings", 1)

    def __call__(self, images: Any, *, start: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of starting latents (B, C, H, W)."""
        noise = check_noise(start)
        return (noise - white_projection(noise, self.rings)).square().mean() / 2


class StartDistance:
    """The Kullback-Leibler divergence between unit Gaussians around the starting latents and around given ones.

    It is half their squared distance, summed over the entries of a sample, as a mean over samples.

    Args:
        reference: The latents to stay close to, (B, C, ...) or (1, C, ...), most often those that a run starts from.

    Raises:
        TypeError: `reference` is no floating tensor.
        ValueError: It has no shape (B, C, ...).
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = check_noise(reference, "reference").detach()

    def __call__(self, images: Any, *, start: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of starting latents (B, C, ...)."""
        noise = check_noise(start)
        reference = self.reference.to(noise)
        if reference.shape[1:] != noise.shape[1:] or len(reference) not in (1, len(noise)):
            raise ValueError(
                f"reference: expected the shape of the starting latents, {tuple(noise.shape)}, or one sample of it, "
                f"got {tuple(reference.shape)}"
            )
        return (noise - reference).square().flatten(1).sum(1).mean() / 2


class AllNoise:
    """A regulariser of the noise of all steps as well as of the starting latents, for chains that add noise.

    Its value is the sum of the regulariser's values, so that a step counts as much as the start.

    Args:
        regulariser: A loss that names `start`, such as `NoiseNorm`; or a list of them, the first of which is for the
            starting latents and the others for the steps, for `StartDistance` with a reference for each.

    Raises:
        TypeError: `regulariser` is neither.

    Example:
        >>> losses = [guide, (AllNoise(NoiseNorm()), 0.01)]
        >>> optimize(chain, noise, chain.decode, losses, variables=["start", "noise"], renormalize_latents=False)
    """

    def __init__(self, regulariser: Any) -> None:
        listed = list(regulariser) if isinstance(regulariser, (list, tuple)) else [regulariser]
        if not listed or not all(callable(one) for one in listed):
            raise TypeError(f"regulariser: expected a loss that names start, or a list of them, got {regulariser!r}")
        for number, one in enumerate(listed):
            setattr(self, f"regulariser_{number}", one)
        self.count = len(listed) if isinstance(regulariser, (list, tuple)) else 0

    def __call__(self, images: Any, *, start: Tensor, noise: Sequence[Tensor]) -> Tensor:
        """Computes the loss, a 0-dim tensor, of starting latents (B, C, ...) and of the noise of each step.

        Raises:
            ValueError: There is not one regulariser for each of them.
        """
        tensors = [start, *noise]
        if self.count not in (0, len(tensors)):
            raise ValueError(
                f"regulariser: expected one, or {len(tensors)}, for the start and each of the steps that add noise, "
                f"got {self.count}"
            )
        total: Tensor | None = None
        for number, tensor in enumerate(tensors):
            value: Tensor = getattr(self, f"regulariser_{number if self.count else 0}")(images, start=tensor)
            total = value if total is None else total + value
        assert total is not None
        return total
