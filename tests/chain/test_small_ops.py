"""How many small operations the engine makes for each evaluation of the network, each of which is a launch on a GPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, tiny_chain
from torch.utils._python_dispatch import TorchDispatchMode

from doodl_fast import ops
from doodl_fast.chain.arithmetic import Group, network_power
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT

VIEWS = ("detach", "view", "permute", "expand", "squeeze", "slice", "select", "transpose", "_unsafe_view")


class Operations(TorchDispatchMode):
    """Counts operations by name, but for those that only look at a tensor in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def for_each_evaluation(dtype: torch.dtype) -> Counter[str]:
    """The operations that one more step adds to a backward pass, for each of its two evaluations, times two."""
    found = []
    for steps in (3, 4):
        cond, uncond = conditions(dtype=dtype)
        denoiser = Denoiser(TinyNet().to(dtype).requires_grad_(False), cond, uncond, 3.0, vjp_dtype=None)
        chain = EDICT(denoiser, tiny_chain(steps).schedule)
        x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
        loss = torch.stack(chain(x, y)).sum()
        with Operations() as operations:
            loss.backward()
        found.append(operations.found)
    return found[1] - found[0]


def test_scaling_the_cotangents_of_fp16_networks_takes_few_operations() -> None:
    """A norm of both cotangents, their weighted sum, the mask of its exponent, two limits and the reciprocal."""
    if ops.resolve(DEVICE.type) == "eager":
        pytest.skip("eager couplings are made of more operations for fp16 than for fp32")
    half, single = for_each_evaluation(torch.float16), for_each_evaluation(torch.float32)
    assert single.total() > 20
    assert (half - single).total() - (single - half).total() <= 2 * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mixes", [True, False])
def test_power_is_just_below_a_bound(dtype: torch.dtype, mixes: bool) -> None:
    coupling = Coupling(0, 0.9, 0.0, 0.25, 0, 500)
    mixing = (Coupling(0, 0.93, 0.07, 0.0, 0, None), Coupling(1, 0.93, 0.07, 0.0, 0, None)) if mixes else None
    group = Group(coupling, mixing, 3 if mixes else 1)
    first, second = group.weights()
    for size in (1e-30, 1e-3, 1.0, 1e30):
        cotangents = [torch.tensor([[-3.0, 1.0]], dtype=dtype) * size, torch.tensor([[0.5, 2.0]], dtype=dtype) * size]
        bound = 0.25 * size * (abs(first) * 3.0 + abs(second) * 2.0)
        power = network_power(group, cotangents).item()
        assert power <= bound * (1 + 1e-6) and bound < 2 * power * (1 + 1e-6)
        assert torch.tensor(power).frexp().mantissa.item() == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_what_has_no_magnitude(dtype: torch.dtype) -> None:
    """It and its reciprocal are finite, so that zero stays zero, and what is not finite stays that."""
    group = Group(Coupling(0, 0.9, 0.0, 0.25, 0, 500), None, 1)
    for value in (0.0, float("inf"), float("nan")):
        power = network_power(group, [torch.full((1, 2), value, dtype=dtype)] * 2)
        assert 0 < power < torch.inf and 0 < power.reciprocal() < torch.inf
    assert network_power(group, [torch.empty(0, 2, dtype=dtype)] * 2) == 1


def test_an_evaluation_looks_at_no_more_weights_than_it_must() -> None:
    """The network's dtype is asked for at every evaluation, and a network has hundreds of weights."""
    seen: list[str] = []

    class Watched(dict[str, Any]):
        def items(self) -> Any:
            for name, weight in super().items():
                seen.append(name)
                yield name, weight

    net = TinyNet()
    net.__dict__["_parameters"] = Watched(net._parameters)
    cond, uncond = conditions(dtype=torch.float32)
    Denoiser(net, cond, uncond, 3.0).raw(latents(1, 3, 4, dtype=torch.float32)[0], 500)
    assert seen == ["inside"]


def test_one_concatenation_for_each_evaluation() -> None:
    """That of the latents with themselves: the conditions are joined once a pass."""
    assert for_each_evaluation(torch.float32)["cat"] == 2
