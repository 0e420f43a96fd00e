"""Networks that change their arguments in place: the chain's state and the caller's tensors stay as they are."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, pull, tiny_chain
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


class Recording(TinyNet):
    """Notes the conditions and the shift that it gets, and changes them in place at some of its calls."""

    def __init__(self, spoils: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.spoils, self.log = spoils, list[tuple[Tensor, Tensor, bool]]()

    def forward(self, x: Tensor, t: Tensor, cond: Tensor, options: dict[str, Tensor]) -> Tensor:
        shift = options.pop("shift")
        self.log.append((cond, shift, torch.is_grad_enabled()))
        value = super().forward(x, t, cond.clone(), shift.clone())
        if len(self.log) in self.spoils:
            cond += 1
            shift *= 2
        return value


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "naive"])
def test_conditions_are_joined_once_a_run(memory: str) -> None:
    """Unless a graph leads back to them."""
    net = Recording().double().requires_grad_(False)
    for wanted in (False, True):
        net.log.clear()
        cond, uncond = conditions()
        shift = torch.full((1,), 0.1, dtype=torch.float64, device=DEVICE)
        cond.requires_grad_(wanted)
        denoiser = Denoiser(net, cond, uncond, 3.0, options={"shift": shift})
        chain = EDICT(denoiser, tiny_chain(3).schedule, memory=memory)
        x, y = latents(2, 3, 4, grad=True)
        pull(chain(x, y), [x, y])
        for graph in (False, True):
            calls = [(c, s) for c, s, recorded in net.log if recorded is graph]
            once = not (wanted and graph)
            assert len({id(c) for c, _ in calls}) == (min(1, len(calls)) if once else len(calls))
            assert len({id(s) for _, s in calls}) == (min(1, len(calls)) if once else len(calls))


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "naive"])
@pytest.mark.parametrize("spoils", [(1,), (3, 4), (2, 5, 9)])
def test_conditions_that_were_changed_are_made_anew(spoils: tuple[int, ...], memory: str) -> None:
    cond, uncond = conditions()
    x, y = latents(2, 3, 4, grad=True)
    found = []
    for net in (Recording().double(), Recording(spoils).double()):
        options = {"shift": torch.full((1,), 0.1, dtype=torch.float64, device=DEVICE)}
        chain = EDICT(Denoiser(net, cond, uncond, 3.0, options=options), tiny_chain(3).schedule, memory=memory)
        outputs = chain(x, y)
        found.append([*outputs, *pull(outputs, [x, y])])
        assert options["shift"].item() == 0.1
    assert all(map(torch.equal, *found))


def test_conditions_that_the_caller_changed_are_seen() -> None:
    cond, uncond = conditions()
    denoiser = Denoiser(TinyNet().double(), cond, uncond, 3.0)
    x, _ = latents(1, 3, 4)
    with denoiser.running():
        first = denoiser(x, 500)
        cond.mul_(2)
        second = denoiser(x, 500)
    assert torch.equal(second, Denoiser(denoiser.unet, cond, uncond, 3.0)(x, 500)) and not torch.equal(first, second)


def test_extra_arguments_are_copies_too() -> None:
    def network(x: Tensor, t: Tensor, cond: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        shift += 1
        scale *= 2
        return x * shift.reshape(-1, 1, 1) * scale

    cond, _ = conditions()
    shift = torch.ones(1, dtype=torch.float64, device=DEVICE)
    scale = torch.tensor(0.1, dtype=torch.float64, device=DEVICE)
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
