"""Networks that change their arguments in place: the chain's state and the caller's tensors stay as they are."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyNet, conditions, latents, pull, tiny_chain
from torch import Tensor

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT


class InPlace(TinyNet):
    """Computes what `OutOfPlace` does, and spoils its arguments."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, shift: Tensor | None = None) -> Tensor:
        x *= 0.5
        cond += 1
        return super().forward(x, t, cond, shift)


class OutOfPlace(TinyNet):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor, shift: Tensor | None = None) -> Tensor:
        return super().forward(x * 0.5, t, cond + 1, shift)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "naive", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_every_memory_mode(memory: str | int, guidance_scale: float, dtype: torch.dtype) -> None:
    cond, uncond = conditions(dtype=dtype)
    cond.requires_grad_()
    before, schedule = cond.detach().clone(), tiny_chain(4).schedule
    x, y = latents(1, 3, 4, dtype=dtype, grad=True)
    found = []
    for network in (InPlace().to(dtype), OutOfPlace().to(dtype)):
        chain = EDICT(Denoiser(network, cond, uncond, guidance_scale), schedule, memory=memory)
        outputs = chain(x, y)
        with torch.no_grad():
            assert all(map(torch.equal, chain(x, y), chain(x, y)))
            plain = chain(x, y)
        found.append([*outputs, *plain, *chain.inverse(x.detach(), y.detach()), *pull(outputs, [x, y, cond])])
    assert all(map(torch.equal, *found)) and torch.equal(cond, before)


def test_extra_arguments_are_copies_too() -> None:
    def network(x: Tensor, t: Tensor, cond: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        shift += 1
        scale *= 2
        return x * shift.reshape(-1, 1, 1) * scale

    cond, _ = conditions()
    shift, scale = torch.ones(1, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    x, _ = latents(1, 3, 4)
    denoiser = Denoiser(network, cond, shift=shift, scale=scale)
    assert torch.equal(denoiser(x, 3), denoiser(x, 3)) and shift.item() == 1 and scale.item() == 0.1


def test_a_timestep_that_is_changed_is_refused() -> None:
    def network(x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        t += 1
        return x

    denoiser = Denoiser(network, None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="unet: expected it to leave its timestep as it is"):
            denoiser(torch.zeros(1, 3), 500)
    seen: list[float] = []
    denoiser = Denoiser(lambda x, t, cond: seen.append(t.item()) or x, None)
    denoiser(torch.zeros(1, 3), 500)
    assert seen == [500]
