"""Lean layers against the layers of PyTorch, diffusers and transformers that they replace, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import activations, normalization
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import activations as transformers_activations

from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, kept_by_operator

pytestmark = pytest.mark.usefixtures("lean_small_tensors")
LEVELS = [Level.ON, Level.RECOMPUTE]


def made(factory, dtype=torch.float32):
    """A layer with random weights that matter."""
    torch.manual_seed(0)
    layer = factory().to(dtype).eval()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.copy_(torch.randn_like(weight) / max(1, weight[0].numel()) ** 0.5)
    return layer


def copied(layer, level):
    return ModuleCopies(layer, lean=level).of(layer)


def inputs(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(layer, given):
    """The output, the gradients of the inputs, and the bytes that the graph keeps besides inputs and weights."""
    output = layer(*given)
    first = output[0] if isinstance(output, tuple) else output
    kept = sum(kept_by_operator(first, [*layer.parameters(), *layer.buffers(), *given]).values())
    weights = torch.randn(first.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(first.dtype)
    return first.detach(), torch.autograd.grad(first, given, weights, allow_unused=True), kept


def check(layer, given, level=Level.ON):
    """Asserts equality to the bit, and returns the bytes that are kept leanly and plainly."""
    plain, lean = copied(layer, Level.OFF), copied(layer, level)
    expected, wanted, plain_bytes = results(plain, given)
    output, gradients, lean_bytes = results(lean, given)
    assert torch.equal(output, expected)
    for got, want in zip(gradients, wanted, strict=True):
        assert (got is None) == (want is None)
        assert got is None or (torch.equal(got, want) and got.stride() == want.stride())
    with torch.no_grad():
        alone = lean(*given)
    assert torch.equal(alone[0] if isinstance(alone, tuple) else alone, expected)
    return lean_bytes, plain_bytes


CONVOLUTIONS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 8)),
    "2d without bias": (lambda: nn.Conv2d(4, 6, (1, 3), bias=False), (2, 4, 7, 8)),
    "2d with strides": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0), dilation=2), (2, 4, 9, 12)),
    "2d in groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 8)),
    "2d with a border": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 8)),
    "3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (1, 3, 4, 5, 6)),
    "1d transposed": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), (2, 4, 9)),
    "2d transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 6)),
    "3d transposed": (lambda: nn.ConvTranspose3d(3, 4, 2, stride=2), (1, 3, 3, 4, 5)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_keeps_its_weights_alone(kind, dtype):
    factory, shape = CONVOLUTIONS[kind]
    given = inputs(shape, dtype=dtype)
    lean, plain = check(nn.Sequential(nn.Upsample(scale_factor=2), made(factory, dtype)), given)
    doubled = given[0].numel() * 2 ** (given[0].ndim - 2) * dtype.itemsize
    assert lean == (doubled if "border" in kind else 0)  # Padding with a border keeps its own input.
    assert plain >= lean + doubled


def test_a_convolution_of_a_channels_last_input():
    given = [inputs((2, 8, 6, 6))[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()]
    lean, plain = check(nn.Sequential(nn.Upsample(scale_factor=2), made(lambda: nn.Conv2d(8, 8, 3, padding=1))), given)
    assert (lean, plain) == (0, 2 * 8 * 12 * 12 * 4)


@pytest.mark.parametrize("kind", ["2d", "2d with strides", "2d transposed", "1d"])
def test_first_and_second_derivatives_of_a_convolution(kind):
    factory, shape = CONVOLUTIONS[kind]
    lean = copied(made(factory, torch.float64), Level.ON)
    (x,) = inputs(shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lean, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: lean(x).square(), (x,), fast_mode=True)


LAYERS = {
    "group norm and SiLU": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), (2, 4, 5, 5), 0.52),
    "group norm and GELU": (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.GELU("tanh")), (2, 4, 5, 5), 0.52),
    "GEGLU": (lambda: activations.GEGLU(12, 10), (2, 3, 6), 0.67),
    "SwiGLU": (lambda: activations.SwiGLU(12, 10), (2, 3, 6), 0.67),
    "approximate GELU": (lambda: activations.ApproximateGELU(12, 10), (2, 3, 6), 0.52),
    "quick GELU": (
        lambda: nn.Sequential(nn.Linear(12, 10), transformers_activations.QuickGELUActivation()),
        (2, 3, 6),
        0.52,
    ),
    "new GELU": (
        lambda: nn.Sequential(nn.Linear(12, 10), transformers_activations.NewGELUActivation()),
        (2, 3, 6),
        0.52,
    ),
    "RMSNorm": (lambda: nn.Sequential(nn.Linear(12, 16), nn.RMSNorm(16)), (2, 3, 6), 0.7),
    "diffusers' RMSNorm": (lambda: nn.Sequential(nn.Linear(12, 16), normalization.RMSNorm(16, 1e-6)), (2, 3, 6), 0.52),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_other_layers_keep(kind, dtype):
    factory, shape, share = LAYERS[kind]
    lean, plain = check(nn.Sequential(nn.Upsample(scale_factor=2), made(factory, dtype)), inputs(shape, dtype=dtype))
    if "RMS" in kind and dtype == torch.float32:
        share = 1  # What a plain layer keeps is the same tensor, which it casts to float32 otherwise.
    assert lean <= share * plain


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("level", LEVELS)
def test_first_and_second_derivatives(kind, level):
    factory, shape, _ = LAYERS[kind]
    if "diffusers" in kind:
        pytest.skip("it computes in float32")
    layer = nn.Sequential(nn.Upsample(scale_factor=2), made(factory, torch.float64))
    lean, plain = copied(layer, level), copied(layer, Level.OFF)
    (x,) = inputs(shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lean, (x,), fast_mode=True)
    second = [torch.autograd.functional.hvp(lambda x, f=f: f(x).sin().sum(), x, x.detach())[1] for f in (lean, plain)]
    assert second[0].abs().max() > 1e-3
    assert torch.allclose(*second, rtol=1e-10, atol=1e-12)


def attention(**options):
    return lambda: Attention(16, heads=2, dim_head=8, **options)


def transformer_block():
    return BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, activation_fn="geglu")


class OneInput(nn.Module):
    """Calls a block with other arguments that are given once."""

    def __init__(self, block, *others, pick=0):
        super().__init__()
        self.block, self.others, self.pick = block, others, pick

    def forward(self, x):
        output = self.block(x, *self.others)
        return output[self.pick] if isinstance(output, tuple) else output


def rotary(tokens, size):
    angles = torch.rand(tokens, size, generator=torch.Generator().manual_seed(3))
    return angles.cos(), angles.sin()


def flux_block(pick):
    block = FluxTransformerBlock(16, 2, 8)
    text, time = torch.randn(1, 3, 16), torch.randn(1, 16)
    return OneInput(block, text, time, rotary(3 + 10, 8), pick=pick)


BLOCKS = {
    "self-attention": (lambda: OneInput(attention()(), None), (2, 10, 16)),
    "cross-attention to few tokens": (
        lambda: OneInput(attention(cross_attention_dim=12)(), torch.randn(2, 3, 12)),
        (2, 16, 16),
    ),
    "attention of a VAE": (
        lambda: attention(norm_num_groups=4, residual_connection=True, _from_deprecated_attn_block=True)(),
        (1, 16, 4, 4),
    ),
    "transformer block": (lambda: OneInput(transformer_block(), None, torch.randn(2, 3, 12)), (2, 16, 16)),
    "ResNet block": (
        lambda: OneInput(ResnetBlock2D(in_channels=8, out_channels=12, groups=4, temb_channels=6), torch.randn(2, 6)),
        (2, 8, 6, 6),
    ),
    "ResNet block with scale and shift": (
        lambda: OneInput(
            ResnetBlock2D(in_channels=8, groups=4, temb_channels=6, time_embedding_norm="scale_shift", up=True),
            torch.randn(2, 6),
        ),
        (2, 8, 6, 6),
    ),
    "FLUX block, text": (lambda: flux_block(0), (1, 10, 16)),
    "FLUX block, image": (lambda: flux_block(1), (1, 10, 16)),
    "FLUX single block": (
        lambda: OneInput(
            FluxSingleTransformerBlock(16, 2, 8), torch.randn(1, 3, 16), torch.randn(1, 16), rotary(13, 8), pick=1
        ),
        (1, 10, 16),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_keep_less_at_each_level(kind, dtype):
    factory, shape = BLOCKS[kind]
    layer = made(factory, dtype)
    for other in layer.modules():
        if isinstance(other, OneInput):
            other.others = tuple(o.to(dtype) if isinstance(o, torch.Tensor) else o for o in other.others)
    given = inputs(shape, dtype=dtype)
    lean, plain = check(layer, given)
    more, _ = check(layer, given, Level.RECOMPUTE)
    assert more <= lean <= plain
    assert more < plain


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", ["transformer block", "ResNet block", "FLUX single block"])
def test_blocks_in_checkpoints(kind, level):
    """A checkpoint keeps its input alone, and a lean block inside it must not keep more by the back door."""
    factory, shape = BLOCKS[kind]
    layer = made(factory)
    (x,) = inputs(shape)
    lean, plain = copied(layer, level), copied(layer, Level.OFF)
    weights = torch.randn(plain(x).shape, generator=torch.Generator().manual_seed(2))
    (expected,) = torch.autograd.grad(plain(x), x, weights)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hooked = lean(x)
    assert torch.equal(torch.autograd.grad(hooked, x, weights)[0], expected)
    assert saved
    assert torch.equal(torch.autograd.grad(checkpoint(lean, x, use_reentrant=False), x, weights)[0], expected)
    checkpoint(lean, x, use_reentrant=True).backward(weights)
    assert torch.equal(x.grad, expected)


def test_a_graph_can_be_differentiated_twice_if_it_is_retained():
    factory, shape = BLOCKS["transformer block"]
    lean = copied(made(factory), Level.RECOMPUTE)
    (x,) = inputs(shape)
    output = lean(x)
    first = torch.autograd.grad(output, x, torch.ones_like(output), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(output, x, torch.ones_like(output))[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(output, x, torch.ones_like(output))


def test_a_change_in_place_of_what_is_kept_is_an_error():
    lean = copied(made(lambda: activations.GEGLU(6, 10)), Level.RECOMPUTE)
    x = inputs((2, 3, 6))[0] * 1
    output = lean(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_change_in_place_of_a_convolutions_weight_is_an_error():
    layer = made(lambda: nn.Conv2d(4, 4, 3))
    output = copied(layer, Level.ON)(inputs((2, 4, 5, 5))[0])
    with torch.no_grad():
        layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="weight of a convolution was modified by an inplace operation"):
        output.sum().backward()


def test_a_change_in_place_of_a_norms_output_voids_its_recipe():
    """The activation then saves what it is given, as it does after any other layer."""

    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x):
            return self.act(self.norm(x).mul_(2))

    layer = made(Changed)
    check(layer, inputs((2, 4, 3, 3)))


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "autocast", "batched"])
def test_transforms_and_autocast(transform):
    """Plain layers run under them, so that they give what they give without this package."""
    layer = made(lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 1)))
    (x,) = inputs((2, 4, 5, 5))
    found = []
    for level in (Level.OFF, Level.ON):
        f = copied(layer, level)
        if transform == "grad":
            found.append(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x))
        elif transform == "jvp":
            found.append(torch.func.jvp(f, (x,), (x.detach().cos(),))[1])
        elif transform == "vmap":
            found.append(torch.vmap(lambda row, f=f: f(row[None]))(x))
        elif transform == "batched":
            rows = torch.eye(3).reshape(3, 3, 1, 1, 1).expand(3, 3, 2, 3, 3)[:, :2]
            found.append(torch.autograd.grad(f(x), x, rows, is_grads_batched=True)[0])
        else:
            with torch.autocast("cpu", torch.bfloat16):
                output = f(x)
            assert output.dtype == torch.bfloat16
            found.append(torch.autograd.grad(output.float().sin().sum(), x)[0])
    assert torch.equal(*found)
    assert found[0].abs().max() > 1e-3


@pytest.mark.parametrize("level", LEVELS)
def test_compiled_layers(level):
    layer = made(lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 2, 1)))
    (x,) = inputs((2, 4, 5, 5))
    lean = torch.compile(copied(layer, level), backend="aot_eager")
    got = torch.autograd.grad(lean(x).sin().sum(), x)[0]
    want = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_gradient_that_a_weights_own_graph_asks_for_is_given():
    """A LoRA that is added to a weight outside the network makes that weight the result of a graph."""
    layer = made(lambda: nn.Conv2d(4, 6, 3))
    update = torch.zeros_like(layer.weight).requires_grad_()
    weight = layer.weight.detach() + update
    del layer.weight
    layer.weight = weight
    (x,) = inputs((2, 4, 5, 5))
    output = copied(layer, Level.ON)(x).sin()
    expected = F.conv2d(x, weight, layer.bias.detach()).sin()
    got = torch.autograd.grad(output.sum(), (x, update))
    for a, b in zip(got, torch.autograd.grad(expected.sum(), (x, update)), strict=True):
        assert torch.equal(a, b)
