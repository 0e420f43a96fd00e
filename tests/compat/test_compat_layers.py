"""The reference's layers in `compat`, alone and wrapped, against its recorded results (tests/golden/README.md).

Tolerances are relative in the 2-norm: 1e-12 in fp64, 2e-5 in fp32, which holds the reference's own rounding. Where
states are rebuilt they are carried in fp64, as undoing the mixing multiplies rounding by 1/p^2 a step.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import DEVICE, DTYPES, Counting, TinyNet, conditions, golden, golden_unet, relative, sd_scheduler
from tolerances import FP64, FP64_UNDONE
from torch import Tensor

from doodl_fast.compat import Quirks, memcnn
from doodl_fast.compat.doodl import MixingLayer, SteppingLayer
from doodl_fast.diffusion.schedule import Schedule
from doodl_fast.solvers.edict import EDICT

TOLERANCE = {"fp64": 1e-12, "fp32": 2e-5, "fp16": 1.2e-2}


def recorded_layer(dtype: torch.dtype, steps: int, **options) -> SteppingLayer:
    models = golden("models")
    cond, uncond = models["embedding_conditional"].to(dtype), models["embedding_unconditional"].to(dtype)
    return SteppingLayer(golden_unet(dtype), uncond, cond, num_timesteps=steps, **options)


def tiny_layer(steps: int = 4, network=None, **options) -> SteppingLayer:
    cond, uncond = conditions()
    network = TinyNet().double() if network is None else network
    return SteppingLayer(network, uncond, cond, num_timesteps=steps, guidance_scale=3.0, **options)


def wrapped(*layers, keep: bool = True, **options):
    return [
        memcnn.InvertibleModuleWrapper(layer, keep_input=keep, keep_input_inverse=keep, **options) for layer in layers
    ]


def loop(s, mix, pair: Tensor, timesteps=None) -> Tensor:
    """Runs the loop of the reference, in which index and timestep are tensors of one element in the latents' dtype."""
    fn = getattr(s, "_fn", s)
    for i, t in enumerate(fn.scheduler.timesteps if timesteps is None else timesteps):
        i = torch.tensor([i], dtype=pair.dtype, device=pair.device)
        t = torch.tensor([t], dtype=pair.dtype, device=pair.device)
        i, t, pair = s(i, t, pair)
        pair = mix(pair)
    return pair


def inversion_loop(s, mix, pair: Tensor) -> Tensor:
    for i, t in enumerate(getattr(s, "_fn", s).scheduler.timesteps.flip(0)):
        pair = mix.inverse(pair)
        *_, pair = s.inverse(torch.tensor([i]), t.reshape(1), pair)
    return pair


def gradient(s, mix, start: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    start = start.clone().requires_grad_()
    out = loop(s, mix, start.clone())
    (out * weight).sum().backward()
    return out.detach(), start.grad


# What was recorded

STEPPING = sorted({key.rsplit("/", 1)[0] for key in golden("stepping") if key.startswith("T")})


@pytest.mark.parametrize("case", STEPPING)
def test_stepping(case):
    steps, scale, kind, index, dtype = case.split("/")
    steps, k = int(steps.removeprefix("T")), int(index.removeprefix("i"))
    scale = float(scale.removeprefix("gs"))
    layer = recorded_layer(DTYPES[dtype], steps, guidance_scale=scale, single_variable=kind == "single")
    recorded = golden("stepping")
    t, n = layer.scheduler.timesteps[k].reshape(1), len(layer.scheduler.timesteps)
    pair = recorded["pair"].to(DTYPES[dtype])
    calls = {
        "forward": lambda: layer(torch.tensor([k]), t, pair),
        "inverse_loop_index": lambda: layer.inverse(torch.tensor([n - 1 - k]), t, pair),
        "inverse_same_index": lambda: layer.inverse(torch.tensor([k]), t, pair),
    }
    for name, call in calls.items():
        if f"{case}/{name}" in recorded:
            with torch.no_grad():
                *_, got = call()
            assert got.dtype == DTYPES[dtype]
            assert relative(got, recorded[f"{case}/{name}"]) < TOLERANCE[dtype], name


def test_stepping_cases_are_there():
    assert len(STEPPING) == 44 and {case.split("/")[0] for case in STEPPING} == {"T10", "T30"}


@pytest.mark.parametrize("wrapper", [None, True, False])
@pytest.mark.parametrize("p", [0.93, 0.7, 1.0])
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "fp16"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_mixing(kind, dtype, p, wrapper):
    recorded = {k.split("/", 2)[2]: v for k, v in golden("mixing").items() if k.startswith(f"{kind}/{dtype}/")}
    mix = MixingLayer(p)
    if wrapper is not None:
        (mix,) = wrapped(mix, keep=wrapper)
    tolerance = 2e-3 if dtype == "fp16" else TOLERANCE[dtype]
    for call, name in ((mix, "forward"), (mix.inverse, "inverse")):
        x = recorded["x"].clone().requires_grad_()
        out = call(x)
        (got,) = torch.autograd.grad((out * recorded["w"]).sum(), x)
        assert out.dtype == got.dtype == DTYPES[dtype]
        if dtype == "fp16":  # Every term is rounded, as in the recording.
            assert torch.equal(out, recorded[f"p{p}/{name}"]) or name == "inverse"
        assert relative(out, recorded[f"p{p}/{name}"]) < tolerance
        assert relative(got, recorded[f"p{p}/{name}_vjp"]) < tolerance


@pytest.mark.parametrize(
    ("steps", "dtype", "keep"),
    [
        (10, "fp64", True),
        (10, "fp64", False),
        (10, "fp32", True),
        (10, "fp32", False),
        (30, "fp64", False),
        (50, "fp32", False),
    ],
)
def test_whole_chain(steps, dtype, keep):
    """When the reference rebuilds its inputs, its gradients are off by 18%, 3% and 3% at T = 10, 30 and 50."""
    recorded, name = golden("chain"), f"T{steps}/{dtype}"
    s, mix = wrapped(recorded_layer(DTYPES[dtype], steps), MixingLayer(), keep=keep)
    pair, weight = recorded["pair"].to(DTYPES[dtype]), recorded["w"].to(DTYPES[dtype])
    out, grad = gradient(s, mix, pair, weight)
    assert relative(out, recorded[f"{name}/out"]) < TOLERANCE[dtype]
    assert relative(grad, recorded[f"{name}/keep_input/grad"]) < TOLERANCE[dtype]
    with torch.no_grad():
        back = inversion_loop(s, mix, recorded[f"{name}/out"])
    # The reference's own inversion is off by 4.8% at T = 30, and so is this one.
    assert relative(back, recorded[f"{name}/inverted"]) < (1e-11 if dtype == "fp64" else 5e-4)


@pytest.mark.parametrize("keep", [True, False])
def test_whole_chain_with_diffusers_scheduler(keep):
    s, mix = wrapped(recorded_layer(torch.float64, 10, scheduler=sd_scheduler()), MixingLayer(), keep=keep)
    recorded, name = golden("chain"), "diffusers_scheduler/T10/fp64"
    out, grad = gradient(s, mix, recorded["pair"], recorded["w"])
    assert relative(out, recorded[f"{name}/out"]) < FP64
    assert relative(grad, recorded[f"{name}/keep_input/grad"]) < FP64


@pytest.mark.parametrize("keep", [True, False])
def test_fp16_is_no_worse_than_the_reference(keep):
    recorded = golden("chain")
    s, mix = wrapped(recorded_layer(torch.float16, 10), MixingLayer(), keep=keep)
    out, grad = gradient(s, mix, recorded["pair"].half(), recorded["w"].half())
    for got, name, theirs in ((out, "out", "out"), (grad, "grad", "keep_input/grad")):
        truth = recorded[f"T10/fp64_fp16weights/{name}"]
        assert relative(got, truth) < 1.05 * relative(recorded[f"T10/fp16/{theirs}"], truth)


# What it costs


@pytest.mark.parametrize("keep", [True, False])
def test_network_calls(keep):
    """A step makes two batched calls forwards and two with a graph backwards, and none at t = 0.

    The reference makes 8 or 12.
    """
    network = Counting(TinyNet().double())
    s, mix = wrapped(tiny_layer(5, network), MixingLayer(), keep=keep)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    _, grad = gradient(s, mix, pair, torch.ones_like(pair))
    assert network.calls == [(2, False)] * 8 + [(2, True)] * 8
    assert grad.abs().min() > 0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in network.parameters())


def test_coefficients_are_read_once(monkeypatch):
    """A second loop asks the scheduler only for its timesteps. Other timesteps have other coefficients."""
    layer, mix = tiny_layer(4), MixingLayer()
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    first = loop(layer, mix, pair)
    alphas = layer.scheduler.alphas_cumprod
    monkeypatch.delattr(layer.scheduler, "alphas_cumprod")
    assert torch.equal(loop(layer, mix, pair), first)
    layer.scheduler.alphas_cumprod = alphas
    *_, of_four = layer(0, 500, pair)
    layer.scheduler.set_timesteps(8)
    *_, of_eight = layer(0, 500, pair)
    assert not torch.equal(of_four, of_eight)


def test_one_call_without_guidance():
    network = Counting(TinyNet().double())
    cond, _ = conditions()
    layer = SteppingLayer(network, None, cond, num_timesteps=4)
    layer(0, 500, torch.zeros(2, 3, 4, 4, dtype=torch.float64, device=DEVICE))
    assert network.calls == [(1, False)] * 2


def test_memory_is_one_state_where_inputs_are_rebuilt():
    """Only the last call holds latents between forward and backward. If inputs are kept, each of the 6 steps does.

    The seventh step, at t = 0, changes nothing.
    """
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for keep, expected in ((False, 1), (True, 6)):
        s, mix = wrapped(tiny_layer(6), MixingLayer(), keep=keep)
        out = loop(s, mix, pair.clone())
        node, held = out.grad_fn, 0
        while node is not None and hasattr(node, "call"):
            call = node.call
            sources = call.kept[1] if call.kept is not None else []
            pairs = [slot.value for slot in call.slots if isinstance(slot.value, Tensor) and slot.value.ndim > 1]
            held += bool(sources) + len(pairs)
            node = next(n for n, _ in node.next_functions if n is not None)
        assert held == expected
        out.sum().backward()


# Gradients


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("steps", [3, 4])
def test_it_is_the_chain(steps, keep):
    """Without quirks, the loop of layers has the outputs of `EDICT` and its gradients of latents and embeddings."""
    cond, uncond = (c.requires_grad_() for c in conditions())
    network, schedule = TinyNet().double(), Schedule.from_scheduler(sd_scheduler(), steps)
    layer = SteppingLayer(network, uncond, cond, sd_scheduler(), steps, 3.0, quirks=Quirks.none())
    s, mix = wrapped(layer, MixingLayer(quirks=Quirks.none()), keep=keep)
    chain = EDICT(layer._denoiser(), schedule)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    outs = [loop(s, mix, pair.clone()), torch.cat(chain(*pair.split(1)))]
    grads = [torch.autograd.grad((out**3).sum(), [pair, cond, uncond]) for out in outs]
    assert relative(*outs) < FP64
    for got, want in zip(*grads, strict=True):
        assert relative(got, want) < FP64


@pytest.mark.parametrize("keep", [True, False])
def test_backward_through_inversion(keep):
    """Wrapped inverses can be differentiated too, and undo the loop when its indices are turned around."""
    s, mix = wrapped(tiny_layer(5), MixingLayer(), keep=keep)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    back = inversion_loop(s, mix, loop(s, mix, pair.clone()))
    assert relative(back, pair) < FP64
    (grad,) = torch.autograd.grad((back * pair.detach()).sum(), pair)
    assert relative(grad, pair) < 1e-11


@pytest.mark.parametrize("keep", [True, False])
def test_single_variable(keep):
    """The step is plain DDIM, differentiated by plain autograd here."""
    layer = tiny_layer(5, single_variable=True)
    (s,) = wrapped(layer, keep=keep)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn_like(pair)
    *_, out = s(torch.tensor([1.0]), torch.tensor([600.0]), pair)
    assert torch.equal(out[0], out[1])
    (got,) = torch.autograd.grad((out * weight).sum(), pair)
    denoiser, t = layer._denoiser(), torch.tensor(600)
    alpha, alpha_prev = (layer.scheduler.alphas_cumprod[n] for n in (600, 400))
    x = pair[:1]
    noise = denoiser(x, t)
    x = (alpha_prev / alpha) ** 0.5 * (x - (1 - alpha) ** 0.5 * noise) + (1 - alpha_prev) ** 0.5 * noise
    (want,) = torch.autograd.grad((torch.cat([x, x]) * weight).sum(), pair)
    assert relative(out, torch.cat([x, x])) < FP64
    assert relative(got, want) < FP64


@pytest.mark.parametrize("keep", [True, False])
def test_batches_are_pairs_of_batches(keep):
    s, mix = wrapped(tiny_layer(3), MixingLayer(), keep=keep)
    pair = torch.randn(4, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    out, grad = gradient(s, mix, pair, torch.ones_like(pair))
    for row in range(2):
        one, its = gradient(s, mix, pair[row::2], torch.ones_like(pair[row::2]))
        assert relative(out[row::2], one) < FP64
        assert relative(grad[row::2], its) < FP64


def test_clip_cond_fn_steers():
    """`sqrt(1 - alpha)` times its result is subtracted from the noise at every network call."""
    seen = []

    def cond_fn(latent, t, scheduler):
        seen.append((t.tolist(), latent.dtype, scheduler))
        return 0.5 * latent

    layer = tiny_layer(4)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    *_, plain = layer(0, 500, pair)
    layer.clip_cond_fn = cond_fn
    *_, steered = layer(0, 500, pair)
    assert seen == [([500], torch.float64, layer.scheduler)] * 2
    alpha, alpha_prev = (float(layer.scheduler.alphas_cumprod[n]) for n in (500, 250))
    a = (alpha_prev / alpha) ** 0.5
    b = (1 - alpha_prev) ** 0.5 - a * (1 - alpha) ** 0.5
    expected = plain[0] - b * (1 - alpha) ** 0.5 * 0.5 * pair[1]
    assert relative(steered[0], expected) < FP64


@pytest.mark.parametrize("keep", [True, False])
def test_a_loss_that_is_not_finite_passes_through(keep):
    """A layer raises an error only if finite numbers become NaN or Inf in it, and not if the loss is NaN."""
    (s,) = wrapped(tiny_layer(4), keep=keep)
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    *_, out = s(0, 500, pair)
    (grad,) = torch.autograd.grad((out * torch.nan).sum(), pair)
    assert grad.isnan().all()


@pytest.mark.parametrize("keep", [True, False])
def test_backward_runs_under_the_autocast_of_the_call(keep):
    seen = []

    class Watching(TinyNet):
        def forward(self, x, t, cond=None):
            out = super().forward(x, t, cond)
            seen.append((out.dtype, torch.is_autocast_enabled("cpu")))
            return out

    cond, uncond = (c.float() for c in conditions())
    layer = SteppingLayer(Watching(), uncond, cond, num_timesteps=4)
    (s,) = wrapped(layer, keep=keep)
    pair = torch.randn(2, 3, 4, 4, requires_grad=True, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        *_, out = s(0, 500, pair.clone())
    out.sum().backward()
    assert out.dtype == pair.grad.dtype == torch.float32
    if DEVICE.type == "cpu":
        assert seen == [seen[0]] * 4 and seen[0][1]


# Quirks


def test_inverse_order_by_count():
    """31 timesteps are counted as 30, so the inversion loop runs in the wrong order, unless the quirk is off."""
    errors = []
    for quirks in (Quirks(), Quirks(inverse_order_by_count=False)):
        s, mix = tiny_layer(30, quirks=quirks), MixingLayer()
        pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE, generator=torch.Generator(DEVICE))
        errors.append(relative(inversion_loop(s, mix, loop(s, mix, pair)), pair))
    assert errors[0] > 1e-4 and errors[1] < FP64_UNDONE


def test_order_by_index():
    """A loop that starts at an odd place restarts its index at 0. Without the quirk the timestep decides the order."""
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    for quirks, same in ((Quirks(), False), (Quirks(order_by_index=False), True)):
        layer = tiny_layer(4, quirks=quirks)
        t = int(layer.scheduler.timesteps[1])
        (*_, restarted), (*_, counted) = layer(0, t, pair), layer(1, t, pair)
        assert torch.equal(restarted, counted) is same
        *_, back = layer.inverse(2, t, counted)
        assert relative(back, pair) < FP64


def test_v_prediction_on_request():
    pair = torch.randn(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    quirks = dataclasses.replace(Quirks.none(), ignored_prediction_type=False)
    layer = tiny_layer(4, scheduler=sd_scheduler(prediction_type="v_prediction"), quirks=quirks)
    chain = EDICT(layer._denoiser(), Schedule.from_scheduler(layer.scheduler, 4))
    got = loop(layer, MixingLayer(), pair)
    assert relative(got, torch.cat(chain(*pair.split(1)))) < FP64


# Errors


def test_errors():
    layer, pair = tiny_layer(4), torch.zeros(2, 3, 4, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match=r"latent_pair: expected shape \(2, C, ...\), or \(2B, C, ...\), got \(3, 4\)"):
        layer(0, 500, torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"latent_pair: expected a floating tensor .* got torch.int64"):
        layer(0, 500, pair.long())
    with pytest.raises(TypeError, match=r"input_x: expected a floating tensor of two latents, \[x; y\], got list"):
        MixingLayer()([pair])
    with pytest.raises(ValueError, match=r"mix_weight: expected a number in \(0, 1\], got 0"):
        MixingLayer(0)
    with pytest.raises(ValueError, match="timestep: expected at most 750"):
        layer(0, 751, pair)
    with pytest.raises(ValueError, match=r"i, t: expected one index and one timestep, got shapes \[\(2,\), \(1,\)\]"):
        layer(torch.zeros(2), torch.zeros(1), pair)
    with pytest.raises(TypeError, match="latent_pair: 1 more inputs came after it, and predict_noise takes none"):
        layer(0, 500, pair, pair)
    with pytest.raises(FloatingPointError, match="NaN or Inf first appeared"):
        layer(0, 500, pair * torch.inf)
