"""Copies, pickles and threads: a copied chain has a network of its own, and one chain serves many threads."""

from __future__ import annotations

import copy
import functools
import pickle
import re
import threading
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, pickled, pull, tiny_chain

from doodl_fast import backend
from doodl_fast.chain import autograd
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.ops.backends import registry
from doodl_fast.ops.backends.registry import why_not
from doodl_fast.solvers.edict import EDICT


def function_network(x, t, cond):
    return torch.sin(x) * 0.1


NETWORKS = {
    "module": lambda: TinyNet().double(),
    "forward": lambda: TinyNet().double().forward,
    "partial": lambda: functools.partial(TinyNet().double()),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "auto"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_calls_a_network_of_its_own(copied, memory, network, compiled):
    if compiled and (network != "module" or memory != "checkpoint"):
        pytest.skip("compiling is slow, and is tested once")
    cond, uncond = conditions()
    denoiser = Denoiser(NETWORKS[network](), cond, uncond, 3.0, compile=compiled)
    chain = EDICT(denoiser, tiny_chain(3).schedule, memory=memory)
    x, y = latents(1, 3, 4, grad=True)
    expected = pull(chain(x, y), [x, y])
    other = copied(chain)
    assert all(torch.equal(a, b) for a, b in zip(pull(other(x, y), [x, y]), expected, strict=True))
    originals = {weight.data_ptr() for _, weight in denoiser.weights()}
    assert not originals & {weight.data_ptr() for _, weight in other.denoiser.weights()}
    with torch.no_grad():
        for _, weight in other.denoiser.weights():
            weight.mul_(1.5)
    assert not torch.equal(pull(other(x, y), [x, y])[0], expected[0])
    assert torch.equal(pull(chain(x, y), [x, y])[0], expected[0])


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_function_is_shared_by_copies(copied):
    chain = tiny_chain(3, network=function_network)
    x, _ = latents(1, 3, 4)
    other = copied(chain)
    assert other.denoiser.unet is function_network and torch.equal(other(x)[0], chain(x)[0])


def test_a_local_function_cannot_be_pickled():
    chain = tiny_chain(3, network=lambda x, t, cond: x * 0.1)
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"test_a_local_function.*lambda"):
        pickle.dumps(chain)


# Threads


@pytest.mark.parametrize(
    ("dtype", "vjp_dtype"),
    [(torch.float64, None), (torch.float16, None), (torch.float16, "auto"), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible"])
def test_two_threads_on_one_chain(memory, dtype, vjp_dtype):
    cond, uncond = conditions(dtype=dtype)
    net = TinyNet().to(dtype)
    parameters = dict(net.named_parameters())
    chain = EDICT(Denoiser(net, cond, uncond, 3.0, vjp_dtype=vjp_dtype), tiny_chain(6).schedule, memory=memory)

    def gradient(seed: int) -> list[torch.Tensor]:
        x, y = latents(1, 3, 8, 8, dtype=torch.float32, seed=seed, grad=True)
        return list(pull(chain(x, y), [x, y]))

    expected = [gradient(seed) for seed in range(2)]
    wrong: list[object] = []

    def work(seed: int) -> None:
        torch.set_num_threads(
            1
        )  # A thread of its own has its own number of OpenMP threads, which sum in another order.
        try:
            same = [all(map(torch.equal, gradient(seed), expected[seed])) for _ in range(15)]
            wrong.extend(seed for equal in same if not equal)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is parameters[name] and p.requires_grad for name, p in net.named_parameters())


@pytest.mark.parametrize("name", ["eager", "native"])
def test_a_backward_pass_has_the_backend_of_its_forward_run(name, monkeypatch):
    if why_not(name, DEVICE.type) is not None:
        pytest.skip(why_not(name, DEVICE.type))
    chain = tiny_chain(3)
    x, _ = latents(1, 3, 4, grad=True)
    seen: list[str] = []
    original = autograd._input_gradients

    def noting(*args):
        seen.append(registry.choice())
        return original(*args)

    monkeypatch.setattr(autograd, "_input_gradients", noting)
    with backend(name):
        out = chain(x)[0].sum()
    before = registry.choice()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    assert seen == [name] and registry.choice() == before and x.grad is not None


def test_every_row_of_the_page_on_autograd_names_a_test():
    root = Path(__file__).resolve().parents[2]
    text = (root / "docs/autograd.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20 and all("::test_" in row or row.endswith("| the same |") for row in rows)
    file = ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?::(test_\w+)`", text):
        file = path or file
        assert f"def {name}(" in (root / file).read_text(), (file, name)
