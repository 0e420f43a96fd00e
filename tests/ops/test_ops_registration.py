"""The registration of the ops with PyTorch (schemas, fakes, gradients, compilation), and the choice of a backend."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import DEVICE
from ops_cases import BACKENDS, operands, require

from doodl_fast import ops
from doodl_fast.ops import coupling_op
from doodl_fast.ops.backends import native, registry
from doodl_fast.ops.signatures import LAYER_OPS

NAMES = ("coupling", "coupling_vjp", "coupling_mix", "coupling_mix_vjp", "latent_update")
MIX = ops.Mixing(True, 0.93, 0.07, 0.93, 0.07)


def arguments(name: str, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[tuple]:
    """Returns calls of a registered op that together run every branch of it."""
    calls = []
    starts = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    for guided in (False, True):
        x, y, eps = (z.to(dtype).requires_grad_(grad) for z in operands((2, 3, 4, 5), "fp64", "fp64", guided))
        g, scale = (3.0 if guided else None), torch.tensor(0.5, dtype=dtype, device=DEVICE)
        last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_(grad)
        calls += {
            "coupling": [
                (x, y, eps, 0.9, 0.2, 0.3, g),
                (last, None, eps, 1.0, 0.0, 0.3, g),
                (x, y, None, 0.9, 0.2, 0.0, None),
            ],
            "coupling_vjp": [
                (x, 0.9, 0.2, 0.3, g, scale, torch.float16, True),
                (last, 0.9, 0.2, 0.3, g, None, None, False),
            ],
            "coupling_mix": [(x, y, eps, *MIX, 0.9, 0.2, 0.3, g), (last, y, None, *MIX, 1.0, 0.0, 0.0, None)],
            "coupling_mix_vjp": [
                (x, y, *MIX, 0.9, 0.2, 0.3, g, scale, torch.float16),
                (last, y, *MIX, 0.9, 0.0, 0.3, g, None, None),
            ],
            "latent_update": [
                (x, y, x, y, y, x, y, starts, 0.5, 0.1, 0.9, False, True, 0.1),
                (x, y, x, y, y, x, None, None, 0.5, 0.1, 0.9, True, False, 0.0),
            ],
        }[name]
    return calls


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, backend):
    require(backend)
    differentiable = name in ("coupling", "coupling_mix")
    with ops.backend(backend):
        for call in arguments(name, grad=differentiable):
            torch.library.opcheck(getattr(torch.ops.doodl_fast, name).default, call)


def test_opcheck_of_the_native_kernels():
    """The native kernels write into their outputs, and their schemas say so."""
    require("native")
    x, y, eps = operands((2, 3, 4), "fp32", "fp16", True)
    outs = [torch.empty_like(x) for _ in range(4)]
    starts = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    calls = {
        "coupling": (outs[0], x, y, eps, 0.9, 0.2, 0.3, 3.0),
        "coupling_vjp": (
            outs[0],
            outs[1],
            torch.empty_like(eps),
            x,
            torch.tensor(2.0, device=DEVICE),
            0.9,
            0.2,
            0.3,
            3.0,
        ),
        "coupling_mix": (outs[0], outs[1], x, y, eps, *MIX, 0.9, 0.2, 0.3, 3.0),
        "coupling_mix_vjp": (outs[0], outs[1], torch.empty_like(eps), x, y, None, *MIX, 0.9, 0.2, 0.3, 3.0),
        "latent_update": (*outs, x, y, x, y, y, x, None, starts, 0.5, 0.1, 0.9, False, True, 0.1),
    }
    tested_elsewhere = {"lattice_coupling", "lattice_mix", *(row.name for row in LAYER_OPS)}
    assert {*calls, *tested_elsewhere} == set(native.OPS)
    for name, call in calls.items():
        op = getattr(torch.ops.doodl_fast_native, name).default
        written = [argument.name for argument in op._schema.arguments if argument.alias_info is not None]
        assert written and all(argument.alias_info.is_write for argument in op._schema.arguments if argument.alias_info)
        torch.library.opcheck(op, call, test_utils=("test_schema", "test_faketensor"))


def test_the_native_kernels_check_their_arguments():
    require("native")
    x = torch.ones(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="eps: expected 8 elements, got 4"):
        torch.ops.doodl_fast_native.coupling(x, x, None, x, 1.0, 0.0, 1.0, 2.0)
    with pytest.raises(RuntimeError, match="out: expected the target's dtype"):
        torch.ops.doodl_fast_native.coupling(x.double(), x, None, None, 1.0, 0.0, 1.0, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["coupling", "coupling_mix"])
def test_gradients(name, backend):
    """The gradients pass gradcheck in float64."""
    require(backend)
    with ops.backend(backend):
        for call in arguments(name, torch.float64, grad=True):
            tensors = tuple(z for z in call[:3] if z is not None)
            small = tuple(z.detach()[:, :1, :2, :2].requires_grad_() for z in tensors)

            def function(*inputs, call=call):
                inputs = iter(inputs)
                return getattr(torch.ops.doodl_fast, name)(
                    *(None if z is None else next(inputs) for z in call[:3]), *call[3:]
                )

            assert torch.autograd.gradcheck(function, small)


def test_a_gradient_of_mixed_dtypes_has_each_ones_own():
    x, _, eps = operands((2, 3), "fp64", "fp16", True)
    x.requires_grad_(), eps.requires_grad_()
    ops.coupling(x, None, eps, 0.9, 0.0, 0.3, 2.0).sum().backward()
    assert x.grad.dtype == torch.float64 and eps.grad.dtype == torch.float16
    assert eps.grad.shape == (4, 3)
    torch.testing.assert_close(eps.grad[:2], torch.full_like(eps.grad[:2], -0.3))


def test_vjps_are_not_silently_differentiated():
    x = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.doodl_fast.coupling_vjp(x, 0.5, 0.0, 0.0, None, None, None, False)[0].sum().backward()
    (grad,) = torch.autograd.grad(ops.coupling_vjp(x, 0.5)[0].sum(), x)  # The public function has the derivative.
    assert torch.equal(grad, torch.full_like(x, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(backend):
    require(backend)

    def step(x, y, eps):
        x = ops.coupling(x, y, eps, 0.9, 0.2, 0.3, 3.0)
        x = ops.coupling_inverse(x, y, eps, 0.8, 0.1, 0.3, 3.0)
        x, y = ops.coupling_mix(x, y, eps, MIX, 0.9, 0.2, 0.3, 3.0)
        x, y = ops.mix_inverse(x, y, MIX)
        return x.sin(), y, *ops.coupling_vjp(x, 0.9, 0.1, 0.2, 3.0, None, torch.float16, True)

    x, y, eps = operands((2, 3, 4), "fp32", "fp16", True)
    with ops.backend(backend):
        want = step(x, y, eps)
        torch.compiler.reset()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y, eps)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
        leaf = x.clone().requires_grad_()
        torch.compile(
            lambda x: ops.coupling(x, y, eps, 0.9, 0.2, 0.3, 3.0).square().sum(), fullgraph=True, backend="aot_eager"
        )(leaf).backward()
        torch.testing.assert_close(leaf.grad, 2 * 0.9 * ops.coupling(x, y, eps, 0.9, 0.2, 0.3, 3.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_ops_compile_without_a_graph_break(backend):
    require(backend)

    def step(x, y, eps, scale):
        mixed = ops.mix(x, y, MIX)
        cotangents = ops.coupling_mix_vjp(*mixed, MIX, 0.9, 0.2, 0.3, 3.0, scale, torch.float16)
        starts = (x.new_ones(len(x)), x.new_ones(len(x)))
        options = {"clip": 0.4, "momentum": 0.9, "nesterov": True, "tied": True, "sigma": 0.1}
        latents, momenta = ops.latent_update((x, y), mixed, cotangents[:2], eps, starts, **options)
        ends, _ = ops.latent_update(latents, momenta, mixed)
        return *cotangents, *latents, *momenta, ends[0].cos(), ends[1]

    x, y, eps = operands((2, 3, 4), "fp32", "fp32", False)
    scale = x.new_tensor(0.5)
    with ops.backend(backend):
        want = step(x, y, eps, scale)
        torch.compiler.reset()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, y, eps, scale)
    assert len(got) == 9 and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_fake_tensors_and_meta():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        out = ops.coupling(x, None, torch.empty(4, 3, 4, 5), 1.0, 0.0, 1.0, 3.0)
        assert out.shape == x.shape and out.stride() == x.stride()
    assert torch.ops.doodl_fast.coupling(torch.empty(2, 3, device="meta"), None, None, 0.5, 0.0, 0.0, None).is_meta


# The registry


def test_automatic_choice_falls_back(monkeypatch):
    monkeypatch.setattr(registry, "_environment", "")
    assert registry.resolve("cpu") == ("native" if ops.why_not("native", "cpu") is None else "eager")
    assert registry.resolve("mps") == "eager"
    monkeypatch.setattr(native, "why_not", lambda device_type: "gone")
    assert registry.resolve("cpu") == "eager"


def test_an_explicit_choice_that_cannot_be_had_raises(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda device_type: "not built: no compiler")
    monkeypatch.setattr(registry, "_chosen", {})
    with ops.backend("native"), pytest.raises(ops.BackendUnavailable, match=r"(?s)'native'.*no compiler.*'eager'"):
        ops.coupling(torch.ones(2, 2))
    with (
        pytest.raises(ValueError, match="backend: expected one of 'eager', 'triton', 'native', 'auto', got 'cuda'"),
        ops.backend("cuda"),
    ):
        pass


def test_choices_end_in_any_order_and_stay_in_their_thread():
    before = ops.choice()
    first, second = ops.backend("eager"), ops.backend("native")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert ops.choice() == "native"
    second.__exit__(None, None, None)
    assert ops.choice() == before
    with ops.backend("eager"), ThreadPoolExecutor(1) as threads:
        assert threads.submit(ops.choice).result() == before

        def chosen(name):
            with ops.backend(name):
                return ops.choice()

        carried = ops.choice()  # A chain keeps this at its forward run and enters it again in its backward pass.
        assert threads.submit(chosen, carried).result() == "eager"
        entered = ops.backend("native")
        threads.submit(entered.__enter__).result()
        assert ops.choice() == "eager"
        threads.submit(entered.__exit__, None, None, None).result()
    with ops.backend(before):
        assert ops.choice() == before


def test_a_gradient_is_computed_by_the_backend_of_the_forward_run(monkeypatch):
    x = torch.ones(2, 3, requires_grad=True)
    with ops.backend("eager"):
        out = ops.coupling(x, None, None, 0.5)
    seen = []
    monkeypatch.setattr(coupling_op, "select", lambda op, z: seen.append(ops.choice()) or registry.EAGER[op])
    out.sum().backward()
    assert seen == ["eager"]


def test_choices_nest_and_end():
    before = ops.choice()
    with ops.backend("eager"):
        with ops.backend("auto"):
            assert ops.choice() == "auto"
        assert ops.choice() == "eager"
    assert ops.choice() == before
    with pytest.raises(ArithmeticError), ops.backend("eager"):
        raise ArithmeticError
    assert ops.choice() == before


@pytest.mark.parametrize(
    ("value", "expected"),
    [("eager", "eager"), ("", "auto"), ("TRITON", "triton"), ("fast", "DOODL_FAST_BACKEND: expected one of")],
)
def test_environment_variable(value, expected):
    code = "from doodl_fast import ops\ntry: print(ops.choice())\nexcept ValueError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "DOODL_FAST_BACKEND": value}
    )
    assert done.stdout.startswith(expected), done.stderr


def test_a_library_without_a_newer_op_is_reported(monkeypatch):
    """As after a pull without a new build: the eager kernels compute then."""
    if native.load("cpu") is not None:
        pytest.skip("there is no library")
    monkeypatch.setattr(native, "OPS", (*native.OPS, "newer_op"))
    assert "is of another version and lacks newer_op" in native.load.__wrapped__("cpu")


def test_a_library_that_does_not_load_is_reported(monkeypatch, tmp_path):
    (tmp_path / "_native.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    reason = native.load.__wrapped__("cpu")
    assert "does not load" in reason and "_native.abi3.so: OSError" in reason
    (tmp_path / "_native.abi3.so").unlink()
    (tmp_path / "_native_build.json").write_text('{"cpu": "DOODL_FAST_NO_NATIVE is set"}')
    assert "not built: DOODL_FAST_NO_NATIVE is set" in native.load.__wrapped__("cpu")


@pytest.mark.parametrize(
    ("cards", "refused"),
    [
        ([(8, 0)], None),
        ([(8, 6)], None),
        ([(9, 0)], None),
        ([(10, 0)], None),
        ([(12, 0), (8, 9)], None),
        ([(7, 5)], r"compiled for compute capability 8\.0 and 9\.0, and cuda:0 \(card 0\) has 7\.5"),
        ([(9, 0), (7, 0)], r"cuda:1 \(card 1\) has 7\.0; hide that card"),
    ],
)
def test_native_is_chosen_only_for_cards_that_it_was_compiled_for(cards, refused, monkeypatch, tmp_path):
    (tmp_path / "_native_build.json").write_text('{"cpu": "built", "cuda": "built", "cuda architectures": "80 90"}')
    monkeypatch.setattr(native, "PACKAGE", tmp_path)
    monkeypatch.setattr(native, "load", lambda device_type: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"card {index}")
    monkeypatch.setattr(importlib.import_module("doodl_fast.ops.backends.triton"), "why_not", lambda device_type: None)
    with ops.backend(registry.AUTO):  # whatever the environment chooses
        assert registry.resolve("cuda") == ("native" if refused is None else "triton")
    with ops.backend("native"):
        if refused is None:
            assert registry.resolve("cuda") == "native"
        else:
            with pytest.raises(ops.BackendUnavailable, match=refused):
                registry.resolve("cuda")
    (tmp_path / "_native_build.json").write_text('{"cpu": "built", "cuda": "built"}')
    with ops.backend(registry.AUTO):
        assert registry.resolve("cuda") == "native"


def test_import_loads_and_compiles_nothing():
    code = (
        "import sys, doodl_fast.ops, torch\n"
        "assert 'triton' not in sys.modules and not hasattr(torch.ops.doodl_fast_native, 'coupling')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
