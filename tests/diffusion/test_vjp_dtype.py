"""The gradient through fp16 networks, and VJPs in fp32 for them, against the reference's recorded error."""

from __future__ import annotations

import pytest
import torch
from conftest import (
    DEVICE,
    Counting,
    TinyNet,
    conditions,
    golden,
    golden_denoiser,
    golden_unet,
    latents,
    pull,
    recorded_schedule,
    relative,
    tiny_chain,
)
from torch import Tensor, nn

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.solvers.edict import EDICT


def golden_gradient(denoiser: Denoiser, steps: int, memory: str | int, scale: float = 1.0) -> Tensor:
    recorded = golden("chain")
    chain = EDICT(denoiser, recorded_schedule("reference", steps), memory=memory)
    x, y = (half.float().requires_grad_() for half in recorded["pair"].half().split(1))
    ((torch.cat(chain(x, y)) * recorded["w"].half().float()).sum() * scale).backward()
    return torch.cat([x.grad, y.grad]) / scale


def wide_vjps() -> Denoiser:
    return golden_denoiser(torch.float16, vjp_dtype=torch.float32)


def default(denoiser: Denoiser) -> Denoiser:
    """The same without a word about vjp_dtype."""
    return Denoiser(denoiser.unet, denoiser.cond, denoiser.uncond, denoiser.guidance_scale)


on_cpu = pytest.mark.skipif(DEVICE.type != "cpu", reason='"auto" takes VJPs in float32 on a CPU only')


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_a_third_of_the_references_error(memory):
    truth = golden("chain")["T50/fp64_fp16weights/grad"]
    reference = relative(golden("chain")["T50/fp16/keep_input/grad"], truth)
    assert reference == pytest.approx(4.05e-3, rel=0.01)
    error = relative(golden_gradient(wide_vjps(), 50, memory), truth)
    assert error < reference / 3
    assert relative(golden_gradient(wide_vjps(), 50, memory, 1e-6), truth) == pytest.approx(error, rel=0.1)


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_the_default_on_a_cpu(dtype):
    """So the default reaches a third of the reference's error, as above."""
    own, wide = (golden_denoiser(dtype, vjp_dtype=vjp_dtype) for vjp_dtype in (None, torch.float32))
    assert default(own).vjp_dtype == "auto" and default(own).for_vjp().compute_dtype(dtype) == torch.float32
    gradients = [golden_gradient(denoiser, 10, "checkpoint") for denoiser in (default(own), wide, own)]
    assert torch.equal(gradients[0], gradients[1]) and relative(gradients[2], gradients[1]) > 1e-3


@on_cpu
def test_other_networks_have_their_own_vjps_by_default():
    cond, _ = conditions()
    for network in (TinyNet(), TinyNet().double(), TinyNet().half().to("meta"), lambda x, t, cond: x, torch.nn.ReLU()):
        assert Denoiser(network, cond).for_vjp() is None
    assert Denoiser(TinyNet().half(), cond, vjp_dtype=None).for_vjp() is None


@on_cpu
@pytest.mark.parametrize("arithmetic", ["float", "exact"])
def test_the_default_in_every_memory_mode(arithmetic):
    """Undone or stored, the gradient is the same; plain autograd has the network's own."""
    network = TinyNet().half()
    cond, uncond = conditions(dtype=torch.float16)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    found = {}
    for memory in ("checkpoint", 2, "reversible", *(["naive"] if arithmetic == "float" else [])):
        chain = EDICT(Denoiser(network, cond, uncond), tiny_chain(6).schedule, memory=memory, arithmetic=arithmetic)
        found[memory] = torch.cat(pull(chain(x, y), [x, y]))
    for memory in (2, "reversible"):
        assert relative(found[memory], found["checkpoint"]) < (1e-6 if arithmetic == "float" else 1e-30)
    if arithmetic == "float":
        assert 1e-5 < relative(found["naive"], found["checkpoint"]) < 1e-2


def test_loss_scale_with_an_fp16_network():
    truth = golden("chain")["T50/fp64_fp16weights/grad"]
    denoiser = golden_denoiser(torch.float16)
    errors = [relative(golden_gradient(denoiser, 50, "checkpoint", scale), truth) for scale in (1.0, 1e-6)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
    assert errors[0] < relative(golden("chain")["T50/fp16/keep_input/grad"], truth)


class NarrowValue(torch.autograd.Function):
    """The value of one network with the VJP of another."""

    @staticmethod
    def forward(ctx, x, t, cond, narrow, wide):
        with torch.enable_grad():
            ctx.leaf = x.detach().requires_grad_()
            ctx.out = wide(ctx.leaf, t, cond)
        return narrow(x.half(), t, cond.half()).double()

    @staticmethod
    def backward(ctx, gradient):
        return *torch.autograd.grad(ctx.out, ctx.leaf, gradient), None, None, None, None


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("memory", ["checkpoint", 2, "reversible"])
def test_it_is_the_wide_networks_vjp_at_the_narrow_ones_states(memory, guidance_scale):
    cond, uncond = (condition.half() for condition in conditions())
    x, y = latents(1, 3, 4, grad=True)
    schedule, network = tiny_chain(10).schedule, TinyNet().half()
    denoiser = Denoiser(network, cond.double(), uncond.double(), guidance_scale, vjp_dtype=torch.float64)
    got = pull(EDICT(denoiser, schedule, memory=memory)(x, y), [x, y])
    wide = TinyNet().half().double()
    both = Denoiser(lambda x, t, c: NarrowValue.apply(x, t, c, network, wide), cond, uncond, guidance_scale)
    for gradient, truth in zip(got, pull(EDICT(both, schedule, memory="naive")(x, y), [x, y]), strict=True):
        assert relative(gradient, truth) < 1e-11
    assert {p.dtype for p in network.parameters()} == {torch.float16}


@pytest.mark.parametrize(("memory", "extra"), [("checkpoint", 0), (2, 1), ("reversible", 1)])
def test_calls(memory, extra):
    network = Counting(TinyNet()).half()
    cond, uncond = conditions(dtype=torch.float16)
    chain = EDICT(Denoiser(network, cond, uncond, vjp_dtype=torch.float32), tiny_chain(4).schedule, memory=memory)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    outputs = chain(x, y)
    network.calls.clear()
    pull(outputs, [x, y])
    assert sorted(network.calls) == sorted([(2, True), *[(2, False)] * extra] * chain.num_network_calls)
    assert chain.drift is None if memory == "checkpoint" else chain.drift < 1e-12


def test_conditions_and_buffers():
    class Buffered(TinyNet):
        def __init__(self):
            super().__init__()
            self.register_buffer("gain", torch.tensor(1.5))
            self.register_buffer("count", torch.tensor(3))

        def forward(self, x, t, cond=None):
            assert x.dtype == cond.dtype == self.inside.dtype == self.gain.dtype and self.count.dtype == torch.int64
            return super().forward(x, t, cond) * self.gain

    cond, _ = conditions(dtype=torch.float32)
    cond.requires_grad_()
    network = Buffered().half()
    x, _ = latents(1, 3, 4, dtype=torch.float32)
    got = []
    for vjp_dtype in (None, torch.float32):
        chain = EDICT(Denoiser(network, cond, vjp_dtype=vjp_dtype), tiny_chain(3).schedule)
        got += torch.autograd.grad(chain(x)[0].sum(), cond)
    assert 0 < relative(got[1], got[0]) < 1e-2
    assert network.gain.dtype == torch.float16


def test_autocast_does_not_narrow_the_vjps():
    seen: list[torch.dtype] = []

    class Spy(TinyNet):
        def forward(self, x, t, cond=None):
            if torch.is_grad_enabled():
                seen.append((self.inside @ self.inside.T).dtype)
            return super().forward(x, t, cond)

    cond, uncond = conditions(dtype=torch.float32)
    chain = EDICT(Denoiser(Spy(), cond, uncond, vjp_dtype=torch.float32), tiny_chain(3).schedule)
    x, y = latents(1, 3, 4, dtype=torch.float32, grad=True)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        outputs = chain(x, y)
    pull(outputs, [x, y])
    assert seen and set(seen) == {torch.float32}


def test_block_checkpointing_in_the_network():
    """Blocks that are called again inside the VJP find the cast weights there."""
    unet = golden_unet(torch.float16)
    chain = EDICT(wide_vjps(), tiny_chain(3).schedule)
    x, y = latents(1, 4, 8, 8, dtype=torch.float32, grad=True)
    expected = pull(chain(x, y), [x, y])
    try:
        unet.train()
        unet.enable_gradient_checkpointing()
        got = pull(chain(x, y), [x, y])
    finally:
        unet.disable_gradient_checkpointing()
        unet.eval()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_shared_weights_stay_shared_and_the_network_is_untouched_after_an_error():
    seen = []

    class Shared(TinyNet):
        def __init__(self):
            super().__init__()
            self.alias = self.inside

        def forward(self, x, t, cond=None):
            assert self.alias is self.inside and self.inside.dtype == torch.float32
            seen.append({p.dtype for p in network.parameters()})
            raise KeyError("stop")

    network = Shared().half()
    before = dict(network.named_parameters(remove_duplicate=False))
    denoiser = Denoiser(network, None, vjp_dtype=torch.float32).for_vjp()

    def fail():
        with denoiser.running():
            denoiser(torch.zeros(1, 3, 4), 1)

    with pytest.raises(KeyError, match="stop"):
        fail()
    after = dict(network.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert seen == [{torch.float16}]


def test_refusals():
    with pytest.raises(ValueError, match=r'vjp_dtype: expected "auto", torch.float32, .* or None, got torch.float16'):
        Denoiser(TinyNet(), None, vjp_dtype=torch.float16)
    with pytest.raises(ValueError, match=r'vjp_dtype: expected "auto" or None for a callable without weights'):
        Denoiser(lambda x, t, cond: x, None, vjp_dtype=torch.float32)
    chain = EDICT(Denoiser(golden_unet(), None, vjp_dtype=torch.float32), tiny_chain(3).schedule, memory="naive")
    with pytest.raises(ValueError, match=r'memory: "naive" .* vjp_dtype'):
        chain(latents(1, 4, 8, 8, grad=True)[0])


class WithClosure(nn.Module):
    """A network that reaches its weights by a closure, where a copy cannot cast them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv1d(3, 3, 1, device=DEVICE)
        self.call = lambda x: torch.tanh(self.inner(x))

    def forward(self, x, t, cond=None):
        return self.call(x)


def test_weights_that_cannot_be_cast_are_said():
    chain = tiny_chain(2, network=WithClosure().half(), dtype=torch.float16)
    chain = EDICT(Denoiser(chain.denoiser.unet, None), chain.schedule)
    x, _ = latents(1, 3, 4, dtype=torch.float32, grad=True)
    loss = chain(x)[0].sum()
    with pytest.raises(RuntimeError, match=r"vjp_dtype: the copy of the network .* failed: .*; use vjp_dtype=None"):
        loss.backward()
    exact = EDICT(Denoiser(chain.denoiser.unet, None, vjp_dtype=None), chain.schedule)
    exact(x)[0].sum().backward()
    assert x.grad.norm() > 0
