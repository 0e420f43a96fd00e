"""What a chain says of a network that changes between its two evaluations, and of what it gives no gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DEVICE,
    DependsOnGradMode,
    TinyNet,
    conditions,
    golden_denoiser,
    golden_unet,
    latents,
    pull,
    relative,
    sd_scheduler,
    tiny_chain,
)
from torch import Tensor, nn

from doodl_fast.chain.chain import Chain
from doodl_fast.chain.checks import cotangent_rounding
from doodl_fast.chain.program import Coupling
from doodl_fast.chain.repeatability import Fingerprints
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

KEEPING = ["checkpoint", "auto"]
TWICE = ["checkpoint", 2, "reversible"]


def gradients(chain: Chain, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    x, y = latents(1, 3, 4, 4, dtype=dtype, grad=True)
    return pull(chain(x, y), [x, y])


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch.compile's
        yield


# A network that is not a function


class Dropping(TinyNet):
    """Functional dropout, which no module's mode tells of."""

    def forward(self, *args: Tensor) -> Tensor:
        return F.dropout(super().forward(*args), 0.2)


class Noisy(TinyNet):
    """Adds noise of a relative size to its output, other noise at every call."""

    amount = 0.0

    def forward(self, *args: Tensor) -> Tensor:
        out = super().forward(*args)
        noise = torch.randn_like(out)
        return out + self.amount * noise * out.norm() / noise.norm()


@pytest.mark.parametrize("memory", TWICE)
def test_a_network_with_functional_dropout_is_named_once(memory):
    chain = tiny_chain(5, memory, network=Dropping().double())
    with pytest.warns(RuntimeWarning, match=r"nondeterministic kernels .* dropout or other noise") as seen:
        [gradients(chain) for _ in range(3)]
    assert len(seen) == 1
    assert (chain.mismatch if memory == "checkpoint" else chain.drift) > 0.1


@pytest.mark.parametrize("amount", [1e-6, 1e-3, 0.1])
def test_the_mismatch_is_the_relative_difference(amount):
    network = Noisy().double()
    chain = tiny_chain(20, network=network)
    assert chain.mismatch is None
    network.amount = amount
    with pytest.warns(RuntimeWarning, match="mismatch: the network's values in the backward pass differ"):
        gradients(chain)
    assert 0.4 < chain.mismatch / (amount * 2**0.5) < 2.5  # The two noises are independent.
    network.amount = 0.0
    gradients(chain)
    assert chain.mismatch == 0


def test_a_tolerance_of_the_users_own(silent):
    network = Noisy().double()
    network.amount = 1e-3
    gradients(tiny_chain(5, network=network, drift_tolerance=0.1))


@pytest.mark.parametrize("memory", TWICE)
def test_a_network_with_other_values_in_the_backward_pass(memory):
    """As cudnn.benchmark may pick another kernel; without a graph and with one, which is all that can be seen here."""

    chain = tiny_chain(5, memory, network=DependsOnGradMode().double())
    with pytest.warns(RuntimeWarning, match=r"(mismatch|drift): .* kernels that depend on grad mode"):
        gradients(chain)


@pytest.mark.parametrize("arithmetic", ["float", "exact"])
@pytest.mark.parametrize("name", ["fp64", "fp32", "fp16", "bf16"])
def test_networks_of_every_dtype_are_functions(name, arithmetic, silent):
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[name]
    chain = tiny_chain(5, network=TinyNet().to(dtype), dtype=dtype, arithmetic=arithmetic)
    gradients(chain, torch.float32)
    assert chain.mismatch == 0


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float64])
def test_networks_of_another_dtype_than_the_state(state_dtype, silent):
    for dtype in (torch.float16, torch.float64):
        chain = tiny_chain(4, network=TinyNet().to(dtype), dtype=dtype, state_dtype=state_dtype)
        gradients(chain, torch.float32)
        assert chain.mismatch == 0


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_vjps_in_another_dtype_differ_by_rounding(name, silent):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    cond, uncond = conditions(dtype=dtype)
    denoiser = Denoiser(TinyNet().to(dtype), cond, uncond, 3.0, vjp_dtype=torch.float32)
    chain = EDICT(denoiser, tiny_chain(5).schedule)
    gradients(chain, torch.float32)
    assert 0 < chain.mismatch < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_no_mismatch(dtype, silent):
    chain = tiny_chain(5, network=TinyNet(), dtype=torch.float32)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    with torch.autocast(DEVICE.type, dtype=dtype):
        outputs = chain(x, y)
    pull(outputs, [x, y])
    assert chain.mismatch == 0


def test_a_compiled_network_is_no_mismatch(silent):
    cond, uncond = conditions(dtype=torch.float32)
    chain = EDICT(Denoiser(TinyNet(), cond, uncond, 3.0, compile=True), tiny_chain(4).schedule)
    x, y = latents(1, 3, 8, dtype=torch.float32, grad=True)
    pull(chain(x, y), [x, y])
    assert chain.mismatch < 1e-6


def test_checkpointed_blocks_are_no_mismatch(silent):
    chain = EDICT(golden_denoiser(torch.float64), Schedule.from_scheduler(sd_scheduler(), 3))
    unet = golden_unet(torch.float64)
    x, y = latents(1, 4, 8, 8, grad=True)
    try:
        unet.train()
        unet.enable_gradient_checkpointing()
        pull(chain(x, y), [x, y])
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert chain.mismatch < 1e-12


def test_kept_graphs_are_not_compared(silent):
    chain = tiny_chain(4, "auto")
    gradients(chain)
    assert chain.mismatch is None  # All graphs fit, so nothing is evaluated twice.


def test_a_mismatch_is_the_distance_whatever_its_direction():
    """A change that leaves every norm as it is: the elements are shuffled."""
    generator = torch.Generator().manual_seed(0)
    numbers, pairs = Fingerprints(torch.float64), []
    assert numbers.mismatch() is None
    for _ in range(20):
        value = 3 + torch.randn(4, 50, generator=generator)  # A common part must not spoil the estimate.
        pairs.append((value.flip(-1), value))
        numbers.compare(numbers.of(value), value)
    assert numbers.mismatch() == 0
    numbers = Fingerprints(torch.float64)
    for shuffled, value in pairs:
        numbers.compare(numbers.of(value), shuffled)
    truth = relative(*(torch.cat(z) for z in zip(*pairs, strict=True)))
    assert numbers.mismatch().item() == pytest.approx(truth, rel=0.3)


# Weights that change between the passes


def changed_in_place(net):
    with torch.no_grad():
        net.outside.mul_(1.1)


def loaded(net):
    net.load_state_dict({name: tensor * 1.1 for name, tensor in net.state_dict().items()})


def stepped(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def replaced(net):
    net.inside = nn.Parameter(net.inside.detach() * 1.1)


def buffer_changed(net):
    net.offset.add_(1)


class Shifted(TinyNet):
    """Depends on a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.zeros((), device=DEVICE))

    def forward(self, *args):
        return super().forward(*args) + self.offset.to(args[0].dtype)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_in_place, r"weights: 'outside' was changed in place \(it had version \d+, now \d+\)"),
        (loaded, r"weights: 'inside' was changed in place"),
        (stepped, r"weights: 'inside' was changed in place"),
        (replaced, r"weights: 'inside' was replaced by another tensor"),
        (buffer_changed, r"weights: 'offset' was changed in place"),
    ],
)
@pytest.mark.parametrize("memory", [*TWICE, "auto"])
def test_weights_changed_between_the_passes_are_refused(memory, change, message):
    net = Shifted().double()
    chain = tiny_chain(4, memory, network=net)
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    change(net)
    with pytest.raises(RuntimeError, match=message + r".* run the chain again after changing its network"):
        pull(outputs, [x, y])
    gradients(chain)  # With a forward run of the changed network all is well.


@pytest.mark.parametrize("memory", [*TWICE, "auto"])
def test_what_changes_no_weight_is_no_change(memory, silent):
    net = Shifted().double()
    chain = tiny_chain(4, memory, network=net)
    x, y = latents(1, 3, 4, grad=True)
    outputs = chain(x, y)
    net.to(DEVICE).eval()
    net.requires_grad_(False)
    net(x.detach(), torch.tensor(3), chain.denoiser.cond)
    pull(outputs, [x, y])


@torch.inference_mode()
def test_weights_made_in_inference_mode_have_no_versions():
    net = TinyNet().double()
    with torch.inference_mode(False):
        gradients(tiny_chain(3, network=lambda x, t, c: x * 0.1))
    assert net.inside.is_inference()
    tiny_chain(3, network=net)(latents(1, 3, 4)[0])


# Weights that require grad


@pytest.mark.parametrize("memory", [*TWICE, "auto", "naive"])
@pytest.mark.parametrize("latents_too", [True, False])
def test_a_subset_of_weights_that_requires_grad_is_named_once(memory, latents_too):
    net = TinyNet().double()
    net.requires_grad_(False)
    net.lora_a, net.lora_b = (nn.Parameter(torch.ones((), device=DEVICE)) for _ in range(2))
    chain = tiny_chain(3, memory, network=net)
    x, _ = latents(1, 3, 4, grad=latents_too)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        chain(x)  # Nobody wants a gradient here.
    message = r"weights: 2 of the network's require grad \('lora_a', 'lora_b'\), .* so these weights get none"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        outs = [chain(x)[0] for _ in range(2)]
    assert len(seen) == 1
    if latents_too:
        outs[0].sum().backward()
        assert x.grad is not None and net.lora_a.grad is None


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_module_as_it_is_made_says_nothing(requires_grad, silent):
    net = TinyNet().double().requires_grad_(requires_grad)
    gradients(tiny_chain(3, network=net))


# Cotangents in fp16


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e-11, r"cotangents: those of the float16 latents are all zero, .* Pass float32 latents, x.float\(\)"),
        (3e-8, r"cotangents: those of the float16 latents have lost about 0\.\d+ of themselves"),
        (1e7, r"cotangents: those of the float16 latents are not finite"),
    ],
)
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_fp16_cotangents_that_are_lost_are_said_once(memory, scale, message):
    chain = tiny_chain(4, memory, dtype=torch.float16)
    x = latents(1, 3, 4, 4, dtype=torch.float16, grad=True)[0]
    with pytest.warns(RuntimeWarning, match=message) as seen:
        [torch.autograd.grad(chain(x)[0].float().square().sum() * scale, x) for _ in range(2)]
    assert len(seen) == 1


def test_fp16_cotangents_in_range_and_float32_latents_are_fine(silent):
    for dtype, scale in ((torch.float16, 1.0), (torch.float32, 1e-8), (torch.bfloat16, 1e-8)):
        chain = tiny_chain(4, dtype=torch.float16)
        x = latents(1, 3, 4, 4, dtype=dtype, grad=True)[0]
        torch.autograd.grad(chain(x)[0].float().square().sum() * scale, x)


@pytest.mark.parametrize("scale", [3e-4, 3e-6, 3e-7])
def test_the_error_of_fp16_cotangents(scale):
    truth = torch.randn(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    lost = relative(truth.half().double(), truth)
    found = cotangent_rounding([truth.half()]).item()
    assert found <= 1.2 * lost and (scale > 1e-4 or found > 0.8 * lost)


# Latents that the network cannot take


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, device=DEVICE)

    def forward(self, x, t, cond=None):
        return self.conv(x)


@pytest.mark.parametrize("memory", [*TWICE, "auto", "naive"])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8, 8), (2, 4), (1, 3, 8, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_latents_of_another_shape_than_the_networks(memory, shape, grad):
    chain = Chain(Denoiser(Convolution(), None), [Coupling(0, b=0.5, tag=1), Coupling(1, b=0.5, tag=1)], memory)
    x, y = latents(*shape, dtype=torch.float32, grad=grad)
    wanted = rf"x: expected latents of a shape that the network takes, got \({', '.join(map(str, shape))}\); "
    with pytest.raises(ValueError, match=wanted + r"Denoiser\(Convolution, guidance_scale=1\) says: .*(size|channels)"):
        chain(x, y)


@pytest.mark.parametrize("error", [RuntimeError("no device left"), torch.OutOfMemoryError("size"), KeyError("shape")])
def test_other_errors_of_a_network_pass_through(error):
    def network(x, t, cond):
        raise error

    with pytest.raises(type(error)) as caught:
        tiny_chain(2, network=network)(latents(1, 3, 4)[0])
    assert caught.value is error
