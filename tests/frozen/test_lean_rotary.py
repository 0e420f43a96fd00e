"""Rotary embeddings as one op in copies of diffusers' attention processors, against the processors themselves.

The op has the bits of PyTorch's operators, so outputs and gradients must be equal bit for bit.
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from conftest import DEVICE
from diffusers.models import embeddings
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers import ace_step_transformer as ace_step
from diffusers.models.transformers import transformer_bria as bria
from diffusers.models.transformers import transformer_flux as flux
from diffusers.models.transformers import transformer_flux2 as flux2
from diffusers.models.transformers import transformer_krea2 as krea2
from diffusers.models.transformers import transformer_longcat_image as longcat
from diffusers.models.transformers import transformer_ltx as ltx
from diffusers.models.transformers import transformer_lumina2 as lumina2
from diffusers.models.transformers import transformer_ovis_image as ovis
from diffusers.models.transformers import transformer_qwenimage as qwen
from lean_cases import counting, gradient
from ops_cases import require
from torch import nn

from doodl_fast import ops
from doodl_fast.diffusion.module_copies import ModuleCopies
from doodl_fast.frozen import Level, rotary
from doodl_fast.frozen.kept import kept_by_operator

pytestmark = pytest.mark.usefixtures("lean_small_tensors", "op_for_complex_numbers")

TOKENS, HEADS, SIZE = 10, 2, 8
WIDTH = HEADS * SIZE
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


OLDER = tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42)


def tables(tokens, *batch, size=SIZE, seed=3):
    angles = 6 * torch.rand(*batch, tokens, size, generator=torch.Generator().manual_seed(seed))
    return angles.cos().to(DEVICE), angles.sin().to(DEVICE)


def double(kind):
    """An attention layer for a picture's tokens and those of a prompt."""
    layer = kind(WIDTH, heads=HEADS, dim_head=SIZE, added_kv_proj_dim=WIDTH, **context(kind))
    return Alone(layer, tables(TOKENS + 3), encoder_hidden_states=text())


def context(kind):
    return {} if kind is flux2.Flux2Attention else {"context_pre_only": False}


class Alone(nn.Module):
    """An attention layer that is called with a picture's tokens alone."""

    def __init__(self, layer, rotary_emb, twice=False, **others):
        super().__init__()
        self.layer, self.tables, self.twice, self.others = layer, rotary_emb, twice, others

    def forward(self, x):
        others = {name: value.to(x.dtype) for name, value in self.others.items()}
        if self.twice:
            others["encoder_hidden_states"] = x
        y = self.layer(x, image_rotary_emb=self.tables, **others)
        return y if isinstance(y, torch.Tensor) else torch.cat(y, 1)


def text(tokens=3):
    return torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(5)).to(DEVICE)


def factors(tokens, *batch, size=WIDTH):
    """Complex numbers for a head of all channels."""
    angles = 6 * torch.rand(*batch, tokens, size // 2, generator=torch.Generator().manual_seed(4))
    return torch.polar(torch.ones_like(angles), angles).to(DEVICE)


def lumina2_attention():
    layer = Attention(WIDTH, heads=1, kv_heads=1, dim_head=WIDTH, qk_norm="rms_norm")
    layer.set_processor(lumina2.Lumina2AttnProcessor2_0())
    return Alone(layer, factors(TOKENS, 2), twice=True)


def qwen_attention():
    layer = Attention(
        *(WIDTH,), heads=1, dim_head=WIDTH, added_kv_proj_dim=WIDTH, context_pre_only=False, qk_norm="rms_norm"
    )
    layer.set_processor(qwen.QwenDoubleStreamAttnProcessor2_0())
    return Alone(layer, (factors(TOKENS), factors(3)), encoder_hidden_states=text())


COMPLEX = {"Lumina 2": lumina2_attention, "Qwen-Image": qwen_attention}
LAYERS = {
    **COMPLEX,
    "FLUX.1, single": lambda: Alone(flux.FluxAttention(WIDTH, HEADS, SIZE, pre_only=True), tables(TOKENS)),
    "FLUX.1, double": lambda: double(flux.FluxAttention),
    "FLUX.2, single": lambda: Alone(flux2.Flux2ParallelSelfAttention(WIDTH, HEADS, SIZE), tables(TOKENS)),
    "FLUX.2, double": lambda: double(flux2.Flux2Attention),
    "Bria": lambda: double(bria.BriaAttention),
    "LongCat": lambda: double(longcat.LongCatImageAttention),
    "Ovis": lambda: double(ovis.OvisImageAttention),
    "Krea 2": lambda: Alone(krea2.Krea2Attention(WIDTH, HEADS, 1), tables(TOKENS)),
    "ACE-Step": lambda: Alone(ace_step.AceStepAttention(WIDTH, HEADS, 1, SIZE), tables(TOKENS)),
    "LTX": lambda: Alone(ltx.LTXAttention(WIDTH, HEADS, HEADS, SIZE), tables(TOKENS, 2, size=WIDTH)),
}


def made(kind, dtype=torch.float32):
    if kind == "Qwen-Image" and OLDER:
        pytest.skip("in this version of diffusers it takes its function from a table, and is left alone")
    torch.manual_seed(0)
    return LAYERS[kind]().to(DEVICE, dtype).requires_grad_(False).eval()


def drawn(dtype=torch.float32):
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return x.to(DEVICE, dtype).requires_grad_()


def copied(layer, level=Level.ON):
    copies = ModuleCopies(layer, evaluation=True, lean=level)
    return copies.of(layer)


@pytest.fixture
def op_for_complex_numbers(monkeypatch):
    monkeypatch.setattr(rotary, "LEAST", 0)


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the op and of its gradient."""
    if not rotary._pays(torch.empty(1, device=DEVICE)):
        pytest.skip("there is no kernel of the op here, so it is not used")
    rotary._complex_products_match(WIDTH, torch.get_num_threads() > 1)  # It calls the op once for all.
    return counting(monkeypatch, "rotary_embedding")


@pytest.mark.parametrize("level", [Level.ON, Level.RECOMPUTE], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_processors_call_the_op_and_keep_every_bit(kind, dtype, level, calls):
    layer, x = made(kind, dtype), drawn(dtype)
    expected = gradient(layer, x)
    assert not calls
    found = gradient(copied(layer, level), x)
    assert all(map(torch.equal, found, expected))
    if kind in COMPLEX:  # The gradient of a product with complex numbers is a rotation as well.
        of_prompt = 2 * (kind == "Qwen-Image")  # Its queries and keys are rotated apart, and need no gradient.
        assert calls[""] - of_prompt in (4, 6) and not calls["_backward"]
    else:
        assert calls["_backward"] == 2  # queries and keys
        assert calls[""] in (2, 4)  # They may be computed again for the gradient.
    with torch.no_grad():
        assert torch.equal(copied(layer, level)(x), expected[0])


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind not in ("Krea 2", "ACE-Step")])
def test_queries_and_keys_are_not_kept(kind, calls):
    """They follow from what is kept anyway. The attention layers of the other two are left alone."""
    layer, x = made(kind), drawn()
    projection = torch.numel(x)

    def kept(level):
        lean = copied(layer, level)
        tables = layer.tables if isinstance(layer.tables, tuple) else (layer.tables,)
        return sum(kept_by_operator(lean(x), exclude=(*layer.parameters(), *tables, x)).values())

    assert kept(Level.OFF) - kept(Level.ON) >= 2 * 4 * projection


@pytest.mark.parametrize("kind", COMPLEX)
def test_small_products_of_complex_numbers_are_pytorchs(kind, calls, monkeypatch):
    monkeypatch.setattr(rotary, "LEAST", 10**6)
    layer, x = made(kind), drawn()
    assert all(map(torch.equal, gradient(copied(layer), x), gradient(layer, x)))
    assert not calls
    test_queries_and_keys_are_not_kept(kind, calls)


def test_the_backward_pass_has_the_backend_of_the_forward_pass(calls, monkeypatch):
    require("native", "cpu")
    layer, x, chosen = made("FLUX.1, double").cpu(), drawn().detach().cpu().requires_grad_(), []
    layer.tables = tuple(table.cpu() for table in layer.tables)
    op = ops.rotary_embedding_backward

    def noted(*args):
        chosen.append(ops.choice())
        return op(*args)

    monkeypatch.setattr(ops, "rotary_embedding_backward", noted)
    with ops.backend("native"):
        y = copied(layer)(x)
    with ops.backend("eager"):
        torch.autograd.grad(y.sum(), x)
    assert chosen == ["native", "native"]


def test_with_the_eager_backend_operators_are_pytorchs(calls):
    layer, x = made("FLUX.1, double"), drawn()
    with ops.backend("eager"):
        assert all(map(torch.equal, gradient(copied(layer), x), gradient(layer, x)))
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["FLUX.1, double", "FLUX.2, single", "LTX", "Qwen-Image"])
def test_the_kernels_of_gpus_keep_every_bit_too(kind, dtype, calls, monkeypatch):
    require("triton")
    monkeypatch.setattr(rotary, "_pays", lambda x: True)
    layer, x = made(kind, dtype), drawn(dtype)
    expected = gradient(layer, x)
    with ops.backend("triton"):
        found = gradient(copied(layer, Level.RECOMPUTE), x)
    assert calls[""] >= 4
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["FLUX.1, single", "LTX", "Lumina 2"])
def test_second_derivatives(kind, calls):
    layer, x = made(kind), drawn()

    def second(module):
        (grad,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.testing.assert_close(second(copied(layer)), second(layer))
    assert calls[""] >= 2


def test_the_ip_adapters_processor_which_is_a_module(calls):
    layer, x = made("FLUX.1, double"), drawn()
    torch.manual_seed(4)
    processor = flux.FluxIPAdapterAttnProcessor(WIDTH, WIDTH).to(DEVICE).requires_grad_(False)
    layer.layer.set_processor(processor)
    picture = torch.randn(2, 1, 4, WIDTH).to(DEVICE)

    class WithPicture(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer

        def forward(self, x):
            inner = self.inner
            return torch.cat(
                inner.layer(x, text(), image_rotary_emb=inner.tables, ip_hidden_states=[*picture.unbind(1)]), 1
            )

    network = WithPicture()
    lean = copied(network)
    assert all(map(torch.equal, gradient(lean, x), gradient(network, x)))
    assert calls == {"": 4, "_backward": 2}  # Queries and keys are computed again for the gradient.
    assert type(layer.layer.processor) is flux.FluxIPAdapterAttnProcessor


@pytest.mark.parametrize(
    "change",
    [
        lambda x, cos, sin: (x, cos.double(), sin.double()),
        lambda x, cos, sin: (x.double(), cos, sin),
        lambda x, cos, sin: (x, cos.requires_grad_(), sin),
        lambda x, cos, sin: (x, cos[:1], sin[:1]),
        lambda x, cos, sin: (x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin),
    ],
    ids=["tables in double precision", "double precision", "tables with gradients", "one row", "strides"],
)
def test_other_arguments_are_left_to_diffusers_function(change, calls):
    x = torch.randn(2, TOKENS, HEADS, SIZE, device=DEVICE)
    x, cos, sin = change(x, *tables(TOKENS))
    ours = rotary.of_embeddings(embeddings.apply_rotary_emb)
    expected = embeddings.apply_rotary_emb(x, (cos, sin), sequence_dim=1)
    assert torch.equal(ours(x, (cos, sin), sequence_dim=1), expected)
    assert not calls


@pytest.mark.parametrize("options", [{"sequence_dim": 2}, {"use_real": False}], ids=str)
def test_other_forms_are_left_to_diffusers_function(options, calls):
    x = torch.randn(2, TOKENS, HEADS, SIZE, device=DEVICE)
    given = tables(HEADS)
    if options.get("use_real") is False:
        given = torch.polar(torch.ones(1, TOKENS, SIZE // 2), torch.rand(1, TOKENS, SIZE // 2)).to(DEVICE)
    ours = rotary.of_embeddings(embeddings.apply_rotary_emb)
    assert torch.equal(ours(x, given, **options), embeddings.apply_rotary_emb(x, given, **options))
    assert not calls


def test_halves_are_rotated_by_the_op(calls):
    x = torch.randn(2, TOKENS, HEADS, SIZE, device=DEVICE)
    options = {"use_real_unbind_dim": -2, "sequence_dim": 1}
    ours = rotary.of_embeddings(embeddings.apply_rotary_emb)
    expected = embeddings.apply_rotary_emb(x, tables(TOKENS), **options)
    assert torch.equal(ours(x, tables(TOKENS), **options), expected)
    assert calls[""] == 1


def test_small_tensors_are_left_to_pytorch(monkeypatch, calls):
    monkeypatch.setattr("doodl_fast.frozen.level.SMALL", 10**6)
    copied(made("FLUX.1, single"))(drawn())
    assert not calls


def test_compiled_copies(calls):
    """torch.compile fuses PyTorch's operators itself, so the op is not called there."""
    layer, x = made("FLUX.1, double"), drawn()
    expected = gradient(layer, x)
    compiled = torch.compile(copied(layer), backend="aot_eager")
    assert all(map(torch.equal, gradient(compiled, x), expected))
    assert not calls


def test_copies_of_copies(calls):
    """A copied network may be copied again, for instance by a second denoiser."""
    layer, x = made("FLUX.1, single"), drawn()
    lean = copied(copied(layer))
    assert all(map(torch.equal, gradient(lean, x), gradient(layer, x)))
    assert copy.copy(lean.layer.processor)._attention_backend is None
