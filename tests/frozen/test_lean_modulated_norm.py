"""LayerNorm with its modulation and RMSNorm as one op, in diffusers' layers, against the same layers without it.

In float32 on the CPU adaptive norms have the same bits. Elsewhere the layers with the op must be as close to float64 as
those without it.
"""

from __future__ import annotations

import copy

import lean_cases
import pytest
import torch
from conftest import DEVICE, relative
from diffusers.models import normalization
from lean_cases import counting, gradient
from ops_cases import require
from torch import nn

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, modulated_norm

pytestmark = pytest.mark.usefixtures("lean_small_tensors")

WIDTH = 16
ADAPTIVE = {
    "zero": lambda: normalization.AdaLayerNormZero(WIDTH),
    "single": lambda: normalization.AdaLayerNormZeroSingle(WIDTH),
    "continuous": lambda: normalization.AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False, eps=1e-6),
    "affine": lambda: normalization.AdaLayerNormContinuous(WIDTH, WIDTH),
}
TWICE = {"twice": lambda: normalization.SD35AdaLayerNormZeroX(WIDTH)}
RMS = {
    "torch": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
    "diffusers": lambda: normalization.RMSNorm(WIDTH, 1e-6),
    "bias": lambda: normalization.RMSNorm(WIDTH, 1e-6, bias=True),
    "no weight": lambda: normalization.RMSNorm(WIDTH, 1e-6, elementwise_affine=False),
}


class Network(nn.Module):
    """A layer, and something after it that needs all of its results."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, emb=None):
        results = self.layer(x) if emb is None else self.layer(x, emb=emb) if self.by_name() else self.layer(x, emb)
        if isinstance(results, torch.Tensor):
            return results
        x, *rest = results
        return x + sum(z[:, None] if z.ndim == 2 else z.sin() for z in rest)

    def by_name(self):
        return not isinstance(self.layer, normalization.AdaLayerNormContinuous)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the op and of its gradient."""
    if DEVICE.type != "cpu" or not ops.matches_torch("modulated_norm"):
        pytest.skip("the op has other bits than PyTorch here, so it is not used")
    return counting(monkeypatch, "modulated_norm")


@pytest.fixture
def on_a_gpu(monkeypatch, calls):
    """Has the op used as on a GPU, by Triton's kernels in its interpreter."""
    require("triton")
    monkeypatch.setattr(modulated_norm, "_pays", lambda x, same_bits: ops.has_kernel("modulated_norm", x))
    with ops.backend("triton"):
        yield calls


def made(make):
    torch.manual_seed(0)
    network = Network(make()).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn_like(weight) / max(1, weight[0].numel()) ** 0.5)
    return network


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, emb = (torch.randn(shape, generator=generator) for shape in ((2, 5, WIDTH), (2, WIDTH)))
    return (x + 0.5).to(dtype).requires_grad_(), emb.to(dtype)


def check(network, x, *args, level=Level.ON):
    lean_cases.check(network, x, level, args, least=1e-3)


@pytest.mark.parametrize("level", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_an_adaptive_norm_has_the_bits_of_pytorch(calls, kind, level):
    check(made(ADAPTIVE[kind]), *operands(), level=level)
    assert calls == {"": 2, "_backward": 1}  # With a graph, and without one.


@pytest.mark.parametrize("kind", [*TWICE, *RMS])
def test_what_would_have_other_bits_is_left_to_pytorch(calls, kind):
    x, emb = operands()
    check(made({**TWICE, **RMS}[kind]), x, *[emb] * (kind in TWICE))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_left_to_pytorch_on_a_cpu(calls, dtype):
    check(made(ADAPTIVE["zero"]).to(dtype), *operands(dtype))
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [*ADAPTIVE, *TWICE, *RMS])
def test_tritons_kernels_are_as_exact_as_pytorch(on_a_gpu, kind, dtype):
    network = made({**ADAPTIVE, **TWICE, **RMS}[kind]).to(dtype)
    x, emb = operands(dtype)
    args = [] if kind in RMS else [emb]
    # The vectors come from the embedding in the network's dtype: those are what float64 starts from.
    exact = copy.deepcopy(network).double()
    if kind not in RMS:
        vectors = network.layer.linear(network.layer.silu(emb)).double()
        exact.layer.linear.forward = lambda _: vectors
    truth = gradient(exact, x.detach().double().requires_grad_(), *(z.double() for z in args))
    plain = gradient(ModuleCopies(network).of(network), x, *args)
    lean = ModuleCopies(network, lean=Level.ON).of(network)
    found = gradient(lean, x, *args)
    for got, other, want in zip(found, plain, truth, strict=True):
        # In half precision the op rounds once where PyTorch rounds up to three times; in float32 sums differ in order.
        assert relative(got, want) <= (2 if dtype == torch.float32 else 1.05) * relative(other, want)
    with torch.no_grad():
        assert torch.equal(lean(x, *args), found[0])
    times = 2 if kind in TWICE else 1
    assert on_a_gpu == {"": 2 * times, "_backward": times}


@pytest.mark.parametrize("level", [Level.ON, Level.RECOMPUTE])
def test_what_a_graph_keeps_has_the_same_bits(on_a_gpu, level):
    """With lean="recompute" an activation after the norm saves what the norm saves, and calls the op again for it."""
    network = nn.Sequential(nn.RMSNorm(WIDTH, eps=1e-6), nn.SiLU()).eval().requires_grad_(False)
    x, _ = operands()
    lean = ModuleCopies(network, lean=level).of(network)
    normalised = ops.modulated_norm(x.detach(), network[0].weight, None, None, None, 1e-6, False)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    of_norm = torch.ops.aten.silu_backward(grad, normalised[0])
    want = ops.modulated_norm_backward(of_norm, x.detach(), *normalised[1:], network[0].weight, None, False)
    assert torch.equal(torch.autograd.grad(lean(x), x, grad)[0], want)


CHANGES = {
    "a hook of the norm": lambda layer: layer.norm.register_forward_hook(lambda norm, args, output: output * 1.5),
    "another norm": lambda layer: setattr(layer, "norm", nn.RMSNorm(WIDTH)),
    "a forward of the norm": lambda layer: setattr(layer.norm, "forward", torch.sin),
    "a forward of the layer": lambda layer: setattr(layer, "forward", lambda x, emb: layer.norm(x).cos()),
    "a hook of the layer": lambda layer: layer.register_forward_hook(
        lambda layer, args, output: (output[0] * 2, *output[1:])
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_left_alone(calls, change):
    network = made(ADAPTIVE["zero"]).requires_grad_(False)
    CHANGES[change](network.layer)
    check(network, *operands())
    assert not calls


@pytest.mark.parametrize("second", [False, True], ids=["first derivative", "second derivative"])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_an_embedding_that_wants_a_gradient_gets_it(calls, kind, second):
    """Trained embeddings must not change what is computed: a run computes some calls without a graph."""
    network, (x, emb) = made(ADAPTIVE[kind]).requires_grad_(False), operands()
    emb.requires_grad_()
    found = []
    for level in (Level.OFF, Level.ON):
        output = ModuleCopies(network, lean=level).of(network)(x, emb)
        grads = torch.autograd.grad(output.square().sum(), (x, emb), create_graph=second)
        found.append(torch.autograd.grad(sum(z.square().sum() for z in grads), (x, emb)) if second else grads)
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
        assert second or torch.equal(ours, theirs)
    assert calls[""] == 2  # The gradient of the scale takes the norm again.


def test_second_derivatives(calls):
    network, (x, emb) = made(ADAPTIVE["affine"]), operands()
    found = []
    for level in (Level.OFF, Level.ON):
        lean = ModuleCopies(network, lean=level).of(network)
        (grad,) = torch.autograd.grad(lean(x, emb).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert calls[""] == 1
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))


def test_autocast_and_compile_run_as_before(calls):
    network, (x, emb) = made(ADAPTIVE["zero"]), operands()
    plain, lean = (ModuleCopies(network, lean=level).of(network) for level in (Level.OFF, Level.ON))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x, emb), lean(x, emb))
    torch.compiler.reset()
    assert torch.equal(torch.compile(lean, backend="eager", fullgraph=True)(x, emb), plain(x, emb))
    assert not calls
