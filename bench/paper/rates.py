"""Optimizers with a step size for each sample of a batch, so that one batch tries several sizes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class _Rated(torch.optim.Optimizer):
    """The base: `rates` (B,) are the step sizes of the samples."""

    def __init__(self, params: Iterable[Any], rates: Tensor, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.rates = rates

    def _parameters(self) -> Iterable[tuple[Tensor, Tensor, dict[str, Any], Tensor]]:
        """Each parameter with its gradient, its state and the step sizes in its shape."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    yield p, p.grad, self.state[p], self.rates.to(p).view(-1, *[1] * (p.ndim - 1))


class SampleAdam(_Rated):
    """Adam (arXiv 1412.6980) with a step size for each sample: that of torch.optim.Adam where they are equal."""

    def __init__(self, params: Iterable[Any], rates: Tensor, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        super().__init__(params, rates, {"betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step."""
        for p, gradient, state, rates in self._parameters():
            (first, second), eps = self.defaults["betas"], self.defaults["eps"]
            count = state["count"] = state.get("count", 0) + 1
            mean = state.setdefault("mean", torch.zeros_like(p)).mul_(first).add_(gradient, alpha=1 - first)
            square = state.setdefault("square", torch.zeros_like(p)).mul_(second)
            square.addcmul_(gradient, gradient, value=1 - second)
            size = (square / (1 - second**count)).sqrt_().add_(eps)
            p.sub_(rates * (mean / (1 - first**count)) / size)


class SampleMomentum(_Rated):
    """Momentum SGD with a step size for each sample: that of torch.optim.SGD where they are equal."""

    def __init__(self, params: Iterable[Any], rates: Tensor, momentum: float = 0.9) -> None:
        super().__init__(params, rates, {"momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step."""
        for p, gradient, state, rates in self._parameters():
            velocity = state.setdefault("velocity", torch.zeros_like(p)).mul_(self.defaults["momentum"]).add_(gradient)
            p.sub_(rates * velocity)
