"""Recorded calls of a network: that they are those of the network, and that recordings are made anew when they must be.

On a CPU a stand-in for CUDA graphs runs the recorded functions again (recorder_again.py).
"""

from __future__ import annotations

import copy
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, sd_scheduler, tiny_chain
from recorder_again import Again, with_recordings

from doodl_fast import EDICT, Denoiser, Schedule

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="a stand-in for CUDA graphs records on the CPU")


@pytest.fixture(autouse=True)
def recorder() -> type[Again]:
    """The stand-in, which has recorded nothing."""
    Again.made, Again.replay_seconds = 0, 0.1
    return Again


def gradients(chain: Any, grad_cond: bool = False) -> list[torch.Tensor]:
    x, y = latents(1, 3, 4, 4, grad=True)
    outputs = chain(x, y)
    inputs = [x, y, *(t for t in chain.evaluator.tensors() if t.requires_grad)]
    return [*outputs, *torch.autograd.grad(outputs[0].sum() + outputs[1].square().sum(), inputs)]


@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible", "auto"])
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_values_and_gradients_have_the_bits_of_calls(memory: Any, arithmetic: str) -> None:
    expected = gradients(tiny_chain(memory=memory, arithmetic=arithmetic))
    chain = with_recordings(tiny_chain(memory=memory, arithmetic=arithmetic))
    for _ in range(2):
        assert all(map(torch.equal, gradients(chain), expected))
    assert chain.evaluator.cuda_graphs.why_not is None
    assert Again.made == 3  # a call, and a call with its VJP, whichever number of steps and runs there are


def test_naive_backpropagation_is_never_replayed() -> None:
    expected = gradients(tiny_chain(memory="naive"))
    assert all(map(torch.equal, gradients(with_recordings(tiny_chain(memory="naive"))), expected))
    assert Again.made == 0


def test_a_gradient_of_the_condition() -> None:
    chains = [tiny_chain(), with_recordings(tiny_chain())]
    for chain in chains:
        chain.evaluator.cond.requires_grad_()
    assert all(map(torch.equal, *map(gradients, chains)))
    assert Again.made == 3


@pytest.mark.parametrize("change", ["a weight is replaced", "a weight is changed", "an attribute is changed"])
def test_changes_between_runs_are_seen(change: str) -> None:
    class Scaled(TinyNet):
        scale = 1.0

        def forward(self, *args: Any) -> torch.Tensor:
            return super().forward(*args) * self.scale

    networks = [Scaled().double(), Scaled().double()]
    chains = [tiny_chain(network=networks[0]), with_recordings(tiny_chain(network=networks[1]))]
    assert all(map(torch.equal, *map(gradients, chains)))
    for network in networks:
        if change == "a weight is replaced":
            network.inside = torch.nn.Parameter(network.inside.detach() * 2)
        elif change == "a weight is changed":
            network.inside.data.mul_(2)
        else:
            network.scale = 0.5
    assert all(map(torch.equal, *map(gradients, chains)))
    assert chains[1].evaluator.cuda_graphs.why_not is None


def test_a_network_that_changes_its_condition_in_place() -> None:
    class Changing(TinyNet):
        def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t, cond.mul_(2))

    chains = [tiny_chain(network=Changing().double()), with_recordings(tiny_chain(network=Changing().double()))]
    assert all(map(torch.equal, *map(gradients, chains)))
    assert chains[1].evaluator.cuda_graphs.why_not is None


def test_threads_do_not_disturb_each_other() -> None:
    chain = with_recordings(tiny_chain())
    expected = gradients(chain)
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("ignore")  # Where another thread is calling, the network is called.
        for found in pool.map(lambda _: gradients(chain), range(12)):
            assert all(map(torch.equal, found, expected))


def test_hooked_modules_are_called() -> None:
    network = TinyNet().double()
    seen: list[Any] = []
    network.register_forward_hook(lambda *_: seen.append(1))
    chain = with_recordings(tiny_chain(network=network))
    with pytest.warns(RuntimeWarning, match="calls are not replayed, because the network has a hook"):
        gradients(chain)
    assert len(seen) >= 8 and Again.made == 0


def test_a_network_whose_weights_are_trained_is_called() -> None:
    cond, uncond = conditions()
    chains = [
        EDICT(
            Denoiser(TinyNet().double(), cond, uncond, 3.0, trainable=True),
            Schedule.from_scheduler(sd_scheduler(), 4),
            memory="checkpoint",
        )
        for _ in range(2)
    ]
    with_recordings(chains[1])
    with pytest.warns(RuntimeWarning, match="calls are not replayed, because weights of the network are trained"):
        found = gradients(chains[1])
    assert all(map(torch.equal, found, gradients(chains[0]))) and Again.made == 0


def test_what_cannot_be_recorded_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Any, function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Again, "record", record)
    chain = with_recordings(tiny_chain())
    with pytest.warns(RuntimeWarning, match="cannot be recorded: operation not permitted when stream is capturing"):
        found = gradients(chain)
    assert all(map(torch.equal, found, gradients(tiny_chain())))


def test_automatic_recordings_are_of_known_code_that_gains() -> None:
    chain = with_recordings(tiny_chain(), "auto")
    gradients(chain)
    assert "which may do more than compute a value" in chain.evaluator.cuda_graphs.why_not and Again.made == 0


def test_a_network_that_draws_numbers_is_noticed() -> None:
    class Drifting(TinyNet):
        calls = 0

        def forward(self, *args: Any) -> torch.Tensor:
            type(self).calls += 1
            return super().forward(*args) + type(self).calls

    chain = with_recordings(tiny_chain(network=Drifting().double()))
    with pytest.warns(RuntimeWarning, match="gives other bits than the network"):
        chain(*latents(1, 3, 4, 4))


def test_copies_record_anew() -> None:
    chain = with_recordings(tiny_chain())
    gradients(chain)
    for other in (copy.deepcopy(chain.evaluator), pickle.loads(pickle.dumps(chain.evaluator))):
        assert other.cuda_graphs.mode is True and not other.cuda_graphs._streams


def test_another_mode_is_refused() -> None:
    cond, uncond = conditions()
    with pytest.raises(ValueError, match="cuda_graphs: expected \"auto\", True or False, got 'yes'"):
        tiny_chain().evaluator.__class__(TinyNet(), cond, uncond, cuda_graphs="yes")
