"""eps(x, t): calling conventions, guidance, conditions, dtypes, frozen weights."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE, TinyNet, conditions, golden, golden_unet, latents, relative
from torch import nn

from doodl_fast.diffusion.denoiser import Denoiser
from doodl_fast.diffusion.guided import Guided


class Recorder:
    """A callable that remembers how it was called."""

    def __init__(self, wrap=lambda eps: eps):
        self.calls, self.wrap = [], wrap

    def __call__(self, x, t, cond=None, **kwargs):
        self.calls.append(SimpleNamespace(x=x, t=t, cond=cond, kwargs=kwargs))
        return self.wrap(x * 2)


def test_recorded_unet_output():
    models = golden("models")
    denoiser = Denoiser(golden_unet(), models["embedding_conditional"])
    assert relative(denoiser(models["check/unet_in"], 500), models["check/unet_out_t500"]) < 1e-6


@pytest.mark.parametrize("batch", [1, 3])
def test_guidance_is_one_batched_call(batch):
    x, _ = latents(batch, 3, 4, 4)
    cond, uncond = conditions()
    seen = []

    def network(x, t, cond):
        seen.append((x.shape[0], cond[:, 0, 0].tolist()))
        return x * cond[:, 0, 0].reshape(-1, 1, 1, 1)

    eps = Denoiser(network, cond, uncond, 7.5)(x, 3)
    u, c = uncond[0, 0, 0], cond[0, 0, 0]
    assert seen == [(2 * batch, [u.item()] * batch + [c.item()] * batch)]
    torch.testing.assert_close(eps, x * (u + 7.5 * (c - u)))


@pytest.mark.parametrize(("guidance", "with_uncond"), [(1.0, True), (1, True), (7.5, False)])
def test_without_guidance_one_unbatched_call(guidance, with_uncond):
    x, _ = latents(2, 3, 4)
    cond, uncond = conditions()
    network = Recorder()
    denoiser = Denoiser(network, cond, uncond if with_uncond else None, guidance)
    assert torch.equal(denoiser(x, 3), 2 * x)
    assert [call.x.shape[0] for call in network.calls] == [2]
    assert torch.equal(network.calls[0].cond, cond.expand(2, -1, -1))
    assert len(denoiser.tensors()) == 1


def test_each_sample_may_have_its_own_condition():
    x, _ = latents(3, 3, 4)
    cond, uncond = conditions(batch=3)
    both, net = Denoiser(TinyNet().double(), cond, uncond[:1], 4.0), TinyNet().double()
    for i in range(3):
        alone = Denoiser(net, cond[i : i + 1], uncond[:1], 4.0)(x[i : i + 1], 7)
        torch.testing.assert_close(both(x, 7)[i : i + 1], alone)


def test_timestep_is_a_whole_number_on_the_device():
    network = Recorder()
    denoiser = Denoiser(network, None)
    x, _ = latents(1, 2, 2)
    for t in (0, 999, 5000):
        denoiser(x, t)
    times = [call.t for call in network.calls]
    assert [t.item() for t in times] == [0, 999, 5000]
    assert all(t.ndim == 0 and t.dtype == torch.int64 and t.device == x.device for t in times)
    denoiser(x, 5000)  # a table: no tensor is made for a call
    assert network.calls[-1].t.data_ptr() == times[-1].data_ptr()


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: (e, 1), lambda e: [e], lambda e: SimpleNamespace(sample=e)])
def test_ways_to_answer(wrap):
    x, _ = latents(1, 2, 2)
    assert torch.equal(Denoiser(Recorder(wrap), None)(x, 1), 2 * x)


def test_diffusers_style_is_called_by_name():
    cond, _ = conditions()
    x, _ = latents(1, 3, 4)

    class Transformer(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states=None, timestep=None, extra=None, return_dict=True):
            assert return_dict is False and timestep.item() == 9 and extra == "kept"
            return (hidden_states * encoder_hidden_states.mean(),)

    torch.testing.assert_close(Denoiser(Transformer(), cond, extra="kept")(x, 9), x * cond.mean())

    def plain(sample, time, encoder_hidden_states):
        assert time.item() == 9
        return sample * encoder_hidden_states.mean()

    torch.testing.assert_close(Denoiser(plain, cond)(x, 9), x * cond.mean())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda unet: torch.compile(unet, backend="eager"),
        lambda unet: unet.forward,
        lambda unet: functools.partial(unet, cross_attention_kwargs=None),
    ],
    ids=["compiled", "method", "partial"],
)
def test_wrapped_unets_are_seen_through(wrap):
    unet = golden_unet()
    denoiser = Denoiser(wrap(unet), golden("models")["embedding_conditional"])
    assert denoiser.compute_dtype(torch.float16) == torch.float32
    seen = []
    handle = unet.conv_in.register_forward_hook(lambda module, args, out: seen.append(module.weight.requires_grad))
    with denoiser.running():
        denoiser(golden("models")["check/unet_in"], 500)
    handle.remove()
    assert seen == [False] and all(p.requires_grad for p in unet.parameters())
    assert denoiser._call(
        golden("models")["check/unet_in"], torch.tensor(500), golden("models")["embedding_conditional"], {}
    )[0].shape == (1, 4, 16, 16)


KWARG_CASES = {  # leading size -> rows seen by the network under guidance, for B = 3 (sizes below are 10 * row)
    1: [0] * 6,
    3: [0, 10, 20, 0, 10, 20],
    6: [0, 10, 20, 30, 40, 50],
    2: [0, 0, 0, 10, 10, 10],
}


@pytest.mark.parametrize("size", KWARG_CASES)
def test_extra_conditions_under_guidance(size):
    cond, uncond = conditions()
    x, _ = latents(3, 2, 4)
    network = Recorder()
    extra = torch.arange(size).double()[:, None] * 10
    Denoiser(network, cond, uncond, 2.0, nested={"deep": [extra, (extra, "text")]}, scale=0.5)(x, 1)
    kwargs = network.calls[0].kwargs
    assert kwargs["nested"]["deep"][0][:, 0].tolist() == KWARG_CASES[size]
    assert kwargs["nested"]["deep"][1][0][:, 0].tolist() == KWARG_CASES[size]
    assert kwargs["nested"]["deep"][1][1] == "text" and kwargs["scale"] == 0.5


@pytest.mark.parametrize(("size", "rows"), [(1, [0, 0, 0]), (3, [0, 10, 20]), (6, [30, 40, 50]), (2, [10, 10, 10])])
def test_extra_conditions_without_guidance(size, rows):
    """guidance_scale = 1 takes the same arguments as any other: of [uncond; cond] the conditional half."""
    cond, uncond = conditions()
    x, _ = latents(3, 2, 4)
    network = Recorder()
    Denoiser(network, cond, uncond, 1.0, extra=torch.arange(size).double()[:, None] * 10)(x, 1)
    assert network.calls[0].kwargs["extra"][:, 0].tolist() == rows


@pytest.mark.parametrize("guidance_scale", [2.0, 1.0])
def test_two_rows_for_a_batch_of_two_are_ambiguous(guidance_scale):
    cond, uncond = conditions()
    x, _ = latents(2, 2, 4)
    rows = torch.tensor([0.0, 1.0])
    with pytest.raises(
        ValueError, match=r"extra: a leading dimension of 2 can be read in two ways .*Guided\(rows\[:1\]"
    ):
        Denoiser(Recorder(), cond, uncond, guidance_scale, extra=rows)(x, 1)
    for pair, expected in ((Guided(rows, rows), [0, 1, 0, 1]), (Guided(rows[:1], rows[1:]), [0, 0, 1, 1])):
        network = Recorder()
        Denoiser(network, cond, uncond, guidance_scale, extra=pair)(x, 1)
        assert network.calls[0].kwargs["extra"].tolist() == (expected if guidance_scale > 1 else expected[2:])
    network = Recorder()
    Denoiser(network, cond, extra=rows)(x, 1)
    assert network.calls[0].kwargs["extra"].tolist() == [0, 1]


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, -1.0])
def test_a_scale_below_one_means_the_prompt_alone(guidance_scale):
    x, _ = latents(1, 3, 4)
    cond, uncond = conditions()
    with pytest.warns(
        RuntimeWarning, match=r"guidance_scale: .* is treated as 1, .* Denoiser\(unet, uncond\)"
    ) as caught:
        denoiser = Denoiser(TinyNet().double(), cond, uncond, guidance_scale)
    assert len(caught) == 1 and not denoiser.guided
    alone = Denoiser(TinyNet().double(), cond)(x, 3)
    assert torch.equal(denoiser(x, 3), alone)
    assert not torch.equal(denoiser(x, 3), Denoiser(TinyNet().double(), cond * 2)(x, 3))


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, -1.0])
def test_the_formula_below_one_is_asked_for(guidance_scale, recwarn):
    x, _ = latents(1, 3, 4)
    cond, uncond = conditions()
    both = [Denoiser(TinyNet().double(), condition)(x, 3) for condition in (uncond, cond)]
    combined = Denoiser(TinyNet().double(), cond, uncond, guidance_scale, guide_below_one=True)
    torch.testing.assert_close(combined(x, 3), both[0] + guidance_scale * (both[1] - both[0]))
    assert combined.guided and not recwarn.list


def test_dtypes():
    cond, uncond = conditions(dtype=torch.float32)
    network = Recorder()
    denoiser = Denoiser(network, cond, uncond, 2.0, a=torch.ones(1), b=torch.tensor([3]), c=torch.tensor(0.5))
    x, _ = latents(1, 2, 4)
    eps = denoiser(x, 1, None, torch.float16)
    call = network.calls[0]
    assert eps.dtype == torch.float64
    assert {call.x.dtype, call.cond.dtype, call.kwargs["a"].dtype, call.kwargs["c"].dtype} == {torch.float16}
    assert call.kwargs["b"].dtype == torch.int64
    module = Denoiser(TinyNet().bfloat16(), cond)
    assert module.compute_dtype(torch.float64) == torch.bfloat16
    assert module(x[:, :1].expand(1, 3, 4), 1).dtype == torch.float64
    assert Denoiser(nn.Identity(), None).compute_dtype(torch.float16) == torch.float16


def test_guidance_is_combined_in_full_precision():
    """eps_u + g (eps_c - eps_u) from fp16 answers, without rounding to fp16 on the way."""

    def network(x, t, cond):
        return cond[:, :1, 0].to(torch.float16).expand(-1, x.shape[1])

    cond, uncond = torch.full((1, 1, 1), 1.001, dtype=torch.float16), torch.ones(1, 1, 1, dtype=torch.float16)
    eps = Denoiser(network, cond, uncond, 7.3)(torch.zeros(1, 2, dtype=torch.float64), 1, None, torch.float16)
    torch.testing.assert_close(eps, (1 + 7.3 * (cond.double() - 1)).reshape(1, 1).expand(1, 2), rtol=1e-14, atol=0)


def test_tensors_and_their_replacements():
    cond, uncond = conditions()
    shift = torch.ones(1, dtype=torch.float64, device=DEVICE)
    denoiser = Denoiser(TinyNet().double(), cond, uncond, 3.0, shift=shift)
    x, _ = latents(1, 3, 4)
    given = denoiser.tensors()
    assert {id(t) for t in given} == {id(cond), id(uncond), id(shift)}
    other = Denoiser(TinyNet().double(), cond * 2, uncond * 3, 3.0, shift=shift * 4)
    scaled = [t * {id(cond): 2, id(uncond): 3, id(shift): 4}[id(t)] for t in given]
    assert torch.equal(denoiser(x, 5, scaled), other(x, 5))
    assert not torch.equal(denoiser(x, 5), other(x, 5))


def test_weights_are_frozen_in_the_call_and_nowhere_else():
    seen = []

    class Seeing(TinyNet):
        def forward(self, x, t, cond=None):
            seen.append([p.requires_grad for p in self.parameters()])
            if len(seen) == 2:
                raise KeyError
            return super().forward(x, t, cond)

    net = Seeing()
    net.outside.requires_grad_(False)
    parameters = dict(net.named_parameters())
    denoiser = Denoiser(net, None)
    x, _ = latents(1, 3, 4, dtype=torch.float32, grad=True)

    def fail() -> None:
        with denoiser.running():
            eps = denoiser(x, 1)
            assert [p.requires_grad for p in net.parameters()] == [True, False, True]
            eps.sum().backward()
            denoiser(x, 1)

    with pytest.raises(KeyError):
        fail()
    assert seen == [[False] * 3] * 2 and x.grad is not None
    assert [p.requires_grad for p in net.parameters()] == [True, False, True]
    assert all(p is parameters[name] and p.grad is None for name, p in net.named_parameters())


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.1),
        nn.Dropout2d(0.5),
        nn.AlphaDropout(0.1),
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.RReLU(),
    ],
    ids=lambda m: type(m).__name__,
)
def test_stochastic_and_stateful_networks_are_refused(module):
    net = TinyNet()
    net.add_module("culprit", nn.Sequential(module))
    denoiser = Denoiser(net, None)
    name = type(module).__name__
    with pytest.raises(ValueError, match=rf"unet: {name} 'culprit\.0' is in training mode .* call unet.eval\(\) first"):
        denoiser.running().__enter__()
    assert all(p.requires_grad for p in net.parameters())
    net.eval()
    with denoiser.running():
        pass


def test_spectral_norm_that_still_iterates_is_refused():
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"unet: _SpectralNorm 'parametrizations.weight.0' is in training mode"):
        Denoiser(net, None).running().__enter__()
    with Denoiser(net.eval(), None).running():
        pass


def test_harmless_training_mode_is_accepted():
    net = nn.Sequential(nn.Dropout(0.0), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)).train()
    with Denoiser(net, None).running():
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"unet": 3, "cond": None}, TypeError, "unet: expected a module or a callable"),
        ({"cond": "a dog"}, TypeError, "cond: expected a tensor or None, got str"),
        ({"cond": None, "uncond": [1]}, TypeError, "uncond: expected a tensor or None, got list"),
        ({"cond": torch.tensor(1.0)}, ValueError, "cond: expected a leading batch dimension"),
        ({"cond": None, "uncond": torch.ones(1, 2)}, ValueError, "cond: expected a tensor because uncond is given"),
        ({"cond": torch.ones(1, 2), "uncond": torch.ones(1, 3)}, ValueError, r"uncond: expected cond's shape \(1, 2\)"),
        (
            {"cond": None, "guidance_scale": float("inf")},
            ValueError,
            "guidance_scale: expected a finite number, got inf",
        ),
        ({"cond": None, "guidance_scale": "7"}, ValueError, "guidance_scale: expected a finite number, got '7'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Denoiser(**{"unet": Recorder(), **arguments})


@pytest.mark.parametrize(
    ("network", "arguments", "error", "message"),
    [
        (
            lambda x, t, c: x[:, :1],
            {},
            ValueError,
            r"unet: expected an output of its input's shape \(2, 3, 4\), got \(2, 1",
        ),
        (lambda x, t, c: None, {}, TypeError, "unet: expected it to return a floating tensor.* got NoneType"),
        (lambda x, t, c: x.long(), {}, TypeError, "unet: expected it to return a floating tensor.* got torch.int64"),
        (Recorder(), {"cond": torch.ones(3, 1)}, ValueError, r"cond: expected a leading dimension of 1 or 2 .* got 3"),
        (
            Recorder(),
            {"cond": torch.ones(1, 1), "uncond": torch.ones(1, 1), "added": {"ids": torch.ones(5)}},
            ValueError,
            r"^added\['ids'\]: expected a leading dimension of 1, 2 \(used for both halves\), 4 .* got 5",
        ),
        (Recorder(), {"extra": torch.ones(4)}, ValueError, "extra: expected a leading dimension of 1 or 2 .* got 4"),
    ],
)
def test_bad_calls(network, arguments, error, message):
    x, _ = latents(2, 3, 4)
    with pytest.raises(error, match=message):
        Denoiser(network, **{"cond": None, **arguments})(x, 1)


def test_repr_and_read_only():
    cond, uncond = conditions()
    denoiser = Denoiser(TinyNet(), cond, uncond, 7.5)
    assert repr(denoiser) == "Denoiser(TinyNet, guidance_scale=7.5)"
    with pytest.raises(AttributeError):
        denoiser.guidance_scale = 3.0


@pytest.mark.parametrize(
    ("t", "expected"),
    [
        (957, torch.tensor(957)),
        (957.0, torch.tensor(957)),
        (957.4, torch.tensor(957.4)),
        (torch.tensor(957.4), torch.tensor(957.4)),
        (torch.tensor(957.4, dtype=torch.float64), torch.tensor(957.4)),
        (torch.tensor([957]), torch.tensor(957)),
        (1200, torch.tensor(1200)),
    ],
)
def test_timesteps_reach_the_network_uncut(t, expected):
    seen = []
    denoiser = Denoiser(lambda x, t, cond: seen.append(t) or x, None)
    for _ in range(2):
        denoiser(torch.zeros(1, 3), t)
    for got in seen:
        assert got.dtype == expected.dtype and got.shape == () and torch.equal(got, expected)


def test_one_timestep_for_the_whole_batch():
    with pytest.raises(ValueError, match=r"t: expected one timestep for the whole batch, got a tensor of shape \(2,\)"):
        Denoiser(lambda x, t, cond: x, None)(torch.zeros(2, 3), torch.tensor([1, 2]))
