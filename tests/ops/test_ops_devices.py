"""Mixed devices are refused by name, kernels run on the tensors' GPU, a clip beyond fp32 means the same everywhere."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from ops_cases import BACKENDS, require

from doodl_fast import ops
from doodl_fast.ops.backends import triton_launch

X, META = torch.ones(2, 3), torch.ones(2, 3, device="meta")
N, META_N = X.int(), META.int()
BUFFER, FAULTS = torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
MIX, LATTICE_MIX = ops.Mixing(True, 0.9, 0.1, 0.9, 0.1), ops.LatticeMixing(True)
SCALE = torch.ones((), device="meta")
F16 = torch.float16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.coupling(META, X, X, b=1.0), "source: expected target's device meta, got cpu"),
        (lambda: ops.coupling(X, META, X, c=1.0, b=1.0), "source: expected target's device cpu, got meta"),
        (lambda: ops.coupling(X, None, META, b=1.0), "eps: expected the target's device cpu, got meta"),
        (lambda: ops.coupling(X, None, None, out=META), "out: expected target's device cpu, got meta"),
        (lambda: ops.coupling_inverse(X, None, META, b=1.0), "eps: expected the target's device"),
        (lambda: ops.coupling_vjp(X, scale=SCALE, eps_dtype=F16), "scale: expected a 0-dim tensor on cpu"),
        (lambda: ops.coupling_mix(X, META, X, MIX), "source: expected target's device"),
        (lambda: ops.coupling_mix(X, X, META, MIX, b=1.0), "eps: expected the target's device"),
        (lambda: ops.mix(X, META, MIX), "source: expected target's device"),
        (lambda: ops.mix_inverse(X, META, MIX), "source: expected target's device"),
        (lambda: ops.coupling_mix_vjp(X, META, MIX), "grad_source: expected grad_target's device"),
        (lambda: ops.latent_update((X, META), (X, X), (X, X)), "y: expected x's device"),
        (lambda: ops.latent_update((X, X), (X, X), (X, X), META), "noise: expected x's device"),
        (
            lambda: ops.latent_update((X, X), (X, X), (X, X), None, [X[:, 0], META[:, 0]]),
            "start_norms: .* on the latents' device cpu; got meta",
        ),
        (lambda: ops.lattice_coupling(N, META_N, X, FAULTS), "source: expected target's device"),
        (lambda: ops.lattice_coupling(N, N, META, FAULTS), "eps: expected the target's device"),
        (lambda: ops.lattice_coupling(N, N, X, FAULTS.to("meta")), "faults: expected the target's device"),
        (
            lambda: ops.lattice_mix(N, N, BUFFER, BUFFER.to("meta"), X, FAULTS, 0, LATTICE_MIX),
            "source_buffer: expected the target's device",
        ),
    ],
)
def test_mixed_devices_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_clip_above_the_range_of_fp32_clips_nothing(name):
    require(name)
    x = torch.tensor([[1.0, 3e38, -2.0]], device=DEVICE)
    with ops.backend(name):
        got, want = (ops.latent_update((x, x), (x, x), (x, x), clip=clip) for clip in (1e300, None))
    assert all(torch.equal(g, w) for pair in zip(got, want, strict=True) for g, w in zip(*pair, strict=True))


@pytest.mark.parametrize("clip", [-1.0, float("nan")])
def test_a_clip_that_bounds_nothing_is_refused(clip):
    with pytest.raises(ValueError, match="clip: expected None or a number that is not negative, got"):
        ops.latent_update((X, X), (X, X), (X, X), clip=clip)


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [1])])
def test_triton_launches_on_the_tensors_own_gpu(monkeypatch, current, entered):
    """Another GPU than the current one is made current for the launch alone, and the current one is not entered."""
    inside, seen = [], []

    @contextlib.contextmanager
    def device(index):
        inside.append(index)
        yield
        inside.pop()

    def kernel(*arguments, **constants):
        seen.append((arguments, list(inside)))

    monkeypatch.setattr(triton_launch, "_kernel", lambda name: {(1,): kernel})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    on_gpu = SimpleNamespace(is_cpu=False, get_device=lambda: 1)
    triton_launch.launch("a_kernel", (1,), on_gpu, 5)
    assert seen == [((5,), entered)] and inside == []
