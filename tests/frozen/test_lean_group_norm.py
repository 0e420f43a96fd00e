"""GroupNorm and SiLU in one op, in the blocks of networks, against the same networks without it.

In float32 on the CPU both have the same bits. Elsewhere the network with the op must not be further from float64 than
the one without it.
"""

from __future__ import annotations

import copy

import pytest
import tiny_pipeline
import torch
from conftest import DEVICE, golden_unet, relative
from diffusers.models.resnet import ResnetBlock2D
from lean_cases import counting, gradient
from ops_cases import require
from torch import nn

from doodl_fast import ops
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, group_norm
from doodl_fast.ops import matching
from doodl_fast.ops.backends import registry

pytestmark = pytest.mark.usefixtures("lean_small_tensors")


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the op and of its gradient."""
    if DEVICE.type != "cpu" or not ops.matches_torch():
        pytest.skip("the op has other bits than PyTorch here, so it is not used")
    return counting(monkeypatch, "group_norm_silu")


def block(**options):
    """A residual block with weights that matter."""
    torch.manual_seed(0)
    made = ResnetBlock2D(**{"in_channels": 8, "out_channels": 12, "groups": 4, "temb_channels": 6, **options}).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(torch.randn_like(weight) / max(1, weight[0].numel()) ** 0.5)
    return made


def operands(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x, temb = (torch.randn(shape, generator=generator) for shape in ((2, 8, 6, 7), (2, 6)))
    return x.to(dtype).requires_grad_(), temb.to(dtype)


def check(network, x, *args, level=Level.ON):
    """Asserts that a lean copy gives the bits of a plain one, with and without a graph."""
    want = gradient(ModuleCopies(network).of(network), x, *args)
    lean = ModuleCopies(network, lean=level).of(network)
    for got, expected in zip(gradient(lean, x, *args), want, strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        alone = lean(x, *args)
    assert torch.equal(getattr(alone, "sample", alone), want[0])
    assert want[1].abs().max() > 1e-3


@pytest.mark.parametrize("level", [Level.ON, Level.RECOMPUTE])
@pytest.mark.parametrize("options", [{}, {"up": True}, {"down": True}, {"temb_channels": None}], ids=str)
def test_a_residual_block(calls, options, level):
    made = block(**options)
    x, temb = operands()
    check(made, x, None if "temb_channels" in options else temb, level=level)
    assert calls == {"": 4, "_backward": 2}  # Two norms, with and without a graph.


def test_a_scale_and_a_shift_come_between_the_second_norm_and_silu(calls):
    check(block(time_embedding_norm="scale_shift"), *operands())
    assert calls == {"": 2, "_backward": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_contiguous_tensors_of_other_dtypes_are_left_to_torch(calls, dtype):
    check(block().to(dtype), *operands(dtype))
    assert not calls


def channels_last(x):
    return x.detach().to(memory_format=torch.channels_last).requires_grad_()


def check_rounding(made, x, temb):
    """Asserts that a lean copy is as exact as a plain one, and gives the same bits with and without a graph."""
    exact = copy.deepcopy(made).double()
    truth = gradient(exact, x.detach().double().requires_grad_(), temb.double())
    plain = gradient(ModuleCopies(made).of(made), x, temb)
    lean = ModuleCopies(made, lean=Level.ON).of(made)
    found = gradient(lean, x, temb)
    for got, other, want in zip(found, plain, truth, strict=True):
        # In half precision the op rounds once where PyTorch rounds twice; in float32 sums in another order differ.
        assert relative(got, want) <= (1.25 if x.dtype == torch.float32 else 1) * relative(other, want)
    with torch.no_grad():
        assert torch.equal(lean(x, temb), found[0])
    assert truth[1].abs().max() > 1e-3


def test_channels_last_is_left_to_torch_in_float32(calls):
    """The residual blocks behind the attention of a VAE get such tensors, and the bits must be those of PyTorch."""
    x, temb = operands()
    check(block(), channels_last(x), temb)
    assert calls["_backward"] < 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_channels_last_in_half_precision_is_as_exact_as_pytorch(calls, dtype):
    """Convolutions of small channels_last tensors may give contiguous ones, so one norm may be left to PyTorch."""
    x, temb = operands(dtype)
    check_rounding(block().to(dtype), channels_last(x), temb)
    assert calls["_backward"] >= 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tritons_kernels_are_as_exact_as_pytorch(calls, monkeypatch, dtype, layout):
    """On a GPU the op is used for every dtype and layout. Here Triton's interpreter runs its kernels."""
    require("triton")
    monkeypatch.setattr(group_norm, "_pays", lambda x: ops.has_kernel("group_norm_silu", x))
    x, temb = operands(dtype)
    with ops.backend("triton"):
        check_rounding(block().to(dtype), channels_last(x) if layout == "channels_last" else x, temb)
    assert calls == {"": 4, "_backward": 2}  # Two norms, with and without a graph. The plain copy does not use the op.


class OnCard:
    """What the choice of the op reads from a tensor, as if the tensor were on a CUDA device."""

    is_cuda, is_cpu, device = True, False, torch.device("cuda")

    def __init__(self, x):
        self.dtype, self.is_contiguous = x.dtype, x.is_contiguous


@pytest.mark.parametrize("kernels", [{}, {"group_norm_silu": "a kernel"}], ids=["eager", "triton"])
def test_on_a_gpu_the_op_is_used_wherever_it_has_a_kernel(monkeypatch, kernels):
    monkeypatch.setitem(registry._chosen, ("cuda", registry._environment), {**registry.EAGER, **kernels})
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(2, 8, 6, 7).to(dtype)
        for given in (x, x.to(memory_format=torch.channels_last)):
            assert group_norm._pays(OnCard(given)) == bool(kernels)
        assert not group_norm._pays(OnCard(x.transpose(2, 3)))  # Neither layout: it would have to be copied.


def test_a_backend_with_other_bits_is_not_used(calls):
    with ops.backend("eager"):
        check(block(), *operands())
    assert not calls


def hooked(made, name):
    getattr(made, name).register_forward_hook(lambda layer, args, output: output * 1.5)


CHANGES = {
    "a hook of a norm": (lambda made: hooked(made, "norm1"), 1),
    "a hook of SiLU": (lambda made: hooked(made, "nonlinearity"), 0),
    "another activation": (lambda made: setattr(made, "nonlinearity", nn.GELU()), 0),
    "one norm in two places": (lambda made: setattr(made, "other", nn.ModuleList([made.norm2])), 1),
    "a forward of its own": (lambda made: setattr(made, "forward", lambda x, temb: made.norm1(x).cos()), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_changed_is_left_alone(calls, change):
    made = block()
    apply, expected = CHANGES[change]
    apply(made)
    check(made, *operands())
    assert calls["_backward"] == expected


def test_a_global_hook_sees_the_norms_own_result(calls):
    seen = []

    def hook(layer, args, output):
        if isinstance(layer, nn.GroupNorm):
            seen.append(output.detach())

    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        check(block(), *operands())
    finally:
        handle.remove()
    plain, lean = seen[:2], seen[2:4]
    assert not calls and all(torch.equal(*both) for both in zip(plain, lean, strict=True))


def test_second_derivatives(calls):
    made, (x, temb) = block(), operands()
    found = []
    for level in (Level.OFF, Level.ON):
        network = ModuleCopies(made, lean=level).of(made)
        (grad,) = torch.autograd.grad(network(x, temb).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    assert calls[""] == 2
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))


def test_a_graph_is_used_again_with_the_backend_of_its_forward_run(calls):
    made, (x, temb) = block(), operands()
    vectors = torch.randn(2, 2, 12, 6, 7, generator=torch.Generator().manual_seed(3))
    found = []
    for level in (Level.OFF, Level.ON):
        output = ModuleCopies(made, lean=level).of(made)(x, temb)
        with ops.backend("eager"):
            found.append(torch.stack([torch.autograd.grad(output, x, v, retain_graph=True)[0] for v in vectors]))
    assert torch.equal(*found)
    assert calls == {"": 2, "_backward": 4}


def test_autocast_and_compile_run_as_before(calls):
    made, (x, temb) = block(), operands()
    plain, lean = (ModuleCopies(made, lean=level).of(made) for level in (Level.OFF, Level.ON))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(x, temb), lean(x, temb))
    torch.compiler.reset()
    assert torch.equal(torch.compile(lean, backend="eager", fullgraph=True)(x, temb), plain(x, temb))
    assert not calls


def test_a_unet_and_a_decoder(calls):
    unet, vae = golden_unet(), tiny_pipeline.golden_vae()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 8, 8, generator=generator).requires_grad_()
    cond = torch.randn(1, 6, unet.config.cross_attention_dim, generator=generator)
    for network, args in ((unet, (torch.tensor(500), cond)), (vae.decoder, ())):
        calls.clear()
        blocks = sum(type(layer) is ResnetBlock2D for layer in network.modules())
        check(network, x, *args)
        assert calls == {"": 2 * (2 * blocks + 1), "_backward": 2 * blocks + 1}  # Each block has two, the end one.


def test_the_comparison_with_pytorch_is_not_counted():
    matching._matches_torch.cache_clear()
    with Tracker("cpu", limit=0) as seen:
        ops.matches_torch()
    assert seen.peak == 0
