"""PyTorch's transforms of a chain: right wherever plain PyTorch is with memory="naive", refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, latents, relative, sd_scheduler, tiny_chain
from tolerances import FP64
from torch import Tensor
from torch.autograd import forward_ad, functional

from doodl_fast import backend
from doodl_fast.chain.chain import Chain
from doodl_fast.chain.evaluator import Evaluator
from doodl_fast.chain.program import Coupling
from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.ops.backends.registry import why_not
from doodl_fast.solvers.edict import EDICT

GUIDED = ["checkpoint", 2, "reversible", "auto"]
FUNC = r'expected ordinary tensors, got those of torch\.func .*use memory="naive"'
VMAP = r'expected ordinary tensors, got those of torch\.vmap .*use memory="naive"'
FORWARD = r'expected ordinary tensors, got those of forward-mode AD .*use memory="naive"'
SECOND = 'cannot be differentiated again: .*use memory="naive" for second derivatives'


def plain(chain: Chain, x: Tensor) -> Tensor:
    """The chain's result as a user would write it: the couplings in plain torch, conditions and guidance included."""
    denoiser = chain.denoiser
    net, cond, uncond, g = denoiser.unet, denoiser.cond, denoiser.uncond, denoiser.guidance_scale
    pair = [x, x]
    for coupling in chain.program:
        value = 0.0
        if coupling.b:
            t, source = torch.tensor(coupling.tag), pair[coupling.source]
            a, b = net(source, t, uncond.expand(x.shape[0], -1, -1)), net(source, t, cond.expand(x.shape[0], -1, -1))
            value = a + g * (b - a)
        pair[coupling.target] = (
            coupling.a * pair[coupling.target] + coupling.c * pair[coupling.source] + coupling.b * value
        )
    return torch.cat(pair)


def loss(run, x: Tensor) -> Tensor:
    return run(x).pow(3).sum()


def dual(run, x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(run(forward_ad.make_dual(x, v))).tangent


def batched_gradients(run, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = run(x)
    many = torch.stack([torch.cat([v, v]), torch.cat([v, -v])])
    return torch.autograd.grad(out, x, many, is_grads_batched=True)[0]


def twice(run, x: Tensor, v: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(run, x), x, create_graph=True)
    return torch.autograd.grad(g.sum(), x, allow_unused=True)[0]


TRANSFORMS = {
    "func.jvp": (lambda run, x, v: torch.func.jvp(run, (x,), (v,))[1], FORWARD),
    "jacfwd": (lambda run, x, v: torch.func.jacfwd(run)(x), r"expected ordinary tensors, got those of"),
    "make_dual": (dual, FORWARD),
    "vmap": (lambda run, x, v: torch.vmap(run)(torch.stack([x, v])), VMAP),
    "func.grad": (lambda run, x, v: torch.func.grad(lambda z: loss(run, z))(x), FUNC),
    "func.vjp": (lambda run, x, v: torch.func.vjp(run, x)[1](torch.cat([v, v]))[0], FUNC),
    "jacrev": (lambda run, x, v: torch.func.jacrev(run)(x), FUNC),
    "is_grads_batched": (batched_gradients, VMAP),
    "functional.jacobian vectorized": (lambda run, x, v: functional.jacobian(run, x, vectorize=True), VMAP),
    "functional.jacobian": (lambda run, x, v: functional.jacobian(run, x), None),
    "functional.vjp": (lambda run, x, v: functional.vjp(run, x, torch.cat([v, v]))[1], None),
    "functional.jvp": (lambda run, x, v: functional.jvp(run, x, v)[1], SECOND),
    "functional.hvp": (lambda run, x, v: functional.hvp(lambda z: loss(run, z), x, v)[1], SECOND),
    "functional.vhp": (lambda run, x, v: functional.vhp(lambda z: loss(run, z), x, v)[1], SECOND),
    "functional.hessian": (lambda run, x, v: functional.hessian(lambda z: loss(run, z), x), SECOND),
    "grad of grad": (twice, SECOND),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("ops_backend", ["eager", "native"])
@pytest.mark.parametrize("memory", [*GUIDED, "naive"])
def test_transforms_are_right_or_refused(name, memory, ops_backend):
    if why_not(ops_backend, DEVICE.type) is not None:
        pytest.skip(why_not(ops_backend, DEVICE.type))
    transform, message = TRANSFORMS[name]
    chain = tiny_chain(3, memory)
    x, v = latents(1, 3, 2)

    def run(z: Tensor) -> Tensor:
        return torch.cat(chain(z))

    expected = transform(lambda z: plain(chain, z), x, v)
    assert expected.norm() > 0
    with backend(ops_backend):
        if message is None or memory == "naive":
            assert relative(transform(run, x, v), expected) < 1e-11
        else:
            with pytest.raises(RuntimeError, match=message):
                transform(run, x, v)
    assert all(p.requires_grad for p in chain.denoiser.unet.parameters())


@pytest.mark.parametrize("arithmetic", ["exact", "exact64"])
@pytest.mark.parametrize("name", [name for name, (_, message) in TRANSFORMS.items() if message])
def test_transforms_are_refused_in_exact_arithmetic(name, arithmetic):
    transform, _ = TRANSFORMS[name]
    chain = tiny_chain(2, arithmetic=arithmetic)
    with pytest.raises(RuntimeError, match='use memory="naive"'):
        transform(lambda z: torch.cat(chain(z)), *latents(1, 3, 2))


@pytest.mark.parametrize("memory", [*GUIDED, "naive"])
def test_a_transform_of_the_conditions(memory):
    """The latents are ordinary tensors here, and what the transform reaches is a condition."""
    cond, uncond = conditions()
    x, _ = latents(1, 3, 2)

    def run(c: Tensor) -> Tensor:
        return EDICT(Denoiser(net, c, uncond, 2.0), schedule, memory=memory)(x)[0].square().sum()

    net, schedule = TinyNet().double(), Schedule.from_scheduler(sd_scheduler(), 3)
    if memory != "naive":
        with pytest.raises(RuntimeError, match=FUNC):
            torch.func.grad(run)(cond)
        return
    leaf = cond.clone().requires_grad_()
    assert relative(torch.func.grad(run)(cond), torch.autograd.grad(run(leaf), leaf)[0]) < FP64


class Closure(Evaluator):
    """Depends on a tensor that the chain does not know of."""

    def __init__(self, scale: Tensor) -> None:
        self.scale = scale

    def __call__(self, x, t, tensors=None, latents_dtype=None):
        return torch.tanh(x * self.scale)


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_a_transform_of_what_the_network_closes_over(memory):
    x, _ = latents(1, 3, 2)

    def run(scale: Tensor) -> Tensor:
        return Chain(Closure(scale), [Coupling(0, b=0.5, tag=1)], memory)(x)[0].sum()

    with pytest.raises(RuntimeError, match=r"the network's output: expected ordinary tensors, got those of forward"):
        torch.func.jvp(run, (x.new_ones(()),), (x.new_ones(()),))


@pytest.mark.parametrize("through", ["latents", "condition", "cotangent"])
@pytest.mark.parametrize("memory", GUIDED)
def test_second_derivatives_are_refused_whatever_they_are_taken_of(memory, through):
    cond, uncond = conditions()
    cond.requires_grad_(through == "condition")
    chain = EDICT(Denoiser(TinyNet().double(), cond, uncond, 2.0), tiny_chain(3).schedule, memory=memory)
    x, y = latents(1, 3, 2, grad=True)
    outputs = chain(x, y)
    cotangents = [torch.ones_like(out).requires_grad_(through == "cotangent") for out in outputs]
    grads = torch.autograd.grad(outputs, [x, y], cotangents, create_graph=True)
    of = {"latents": y, "condition": cond, "cotangent": cotangents[1]}[through]
    for gradient in grads:
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(gradient.sum(), of, allow_unused=True, retain_graph=True)
    (other,) = torch.autograd.grad((grads[0].detach() * x).sum(), x)  # It does not depend on the gradient's own graph.
    assert torch.equal(other, grads[0])
