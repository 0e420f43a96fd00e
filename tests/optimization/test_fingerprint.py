"""A run is resumed with the chain, the network, the prompt, the decoder and the guide that it began with."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyNet, conditions, latents, sd_scheduler
from test_low_memory import guide  # noqa: F401
from tiny_pipeline import golden_vae, golden_vae_copy
from torch import Tensor, nn

import doodl_fast
from doodl_fast.diffusion.pipeline import Decoder
from doodl_fast.guidance import Symmetry
from doodl_fast.optimization.fingerprint import differing, fingerprint


def chain(
    cond_seed: int = 1,
    scale: float = 3.0,
    steps: int = 3,
    mix_weight: float = 0.93,
    seed: int = 0,
    noise: float = 0.0,
    **options: Any,
) -> doodl_fast.EDICT:
    cond, uncond = conditions(dtype=torch.float32, seed=cond_seed)
    denoiser = doodl_fast.Denoiser(TinyNet(seed=seed), cond + noise * torch.randn_like(cond), uncond, scale)
    schedule = doodl_fast.Schedule.from_scheduler(sd_scheduler(), steps)
    return doodl_fast.EDICT(denoiser, schedule, mix_weight, **options)


class Decode:
    def __init__(self, gain: float = 1.0) -> None:
        self.gain, self.calls = torch.tensor(gain), 0
        self._cache: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        self._cache = z.detach()
        return self.gain.to(z) * z


class Loss(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, generator=torch.Generator().manual_seed(seed)), False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.mean((0, 2, 3)) * self.weight.to(images)).square().sum()


def run(folder: Path, resume: bool = True, steps: int = 2, **changes: Any) -> doodl_fast.Result:
    functions = {"chain": chain(), "decode": Decode(), "loss": Loss(), **changes}
    start = latents(1, 3, 4, 4, dtype=torch.float32)[0]
    return doodl_fast.optimize(
        functions["chain"],
        start,
        functions["decode"],
        functions["loss"],
        steps,
        progress=False,
        folder=folder,
        resume=resume,
    )


def with_one_weight_changed() -> doodl_fast.EDICT:
    made = chain()
    with torch.no_grad():
        made.denoiser.unet.outside[1, 2] *= 1.0001  # type: ignore[union-attr]
    return made


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"chain": chain(cond_seed=5)}, r"conditions of the network \(its prompt"),
        ({"chain": chain(scale=3.5)}, r"chain \(its schedule, mixing weight, guidance scale or arithmetic\)"),
        ({"chain": chain(steps=4)}, r"chain \("),
        ({"chain": chain(mix_weight=0.9)}, r"chain \("),
        ({"chain": chain(arithmetic="exact")}, r"chain \("),
        ({"chain": chain(seed=3)}, "weights of the network"),
        ({"chain": with_one_weight_changed()}, "weights of the network"),
        ({"chain": lambda x, y: (x, y)}, r"chain \("),
        ({"decode": Decode(1.2)}, "decoder"),
        ({"decode": lambda z: z}, "decoder"),
        ({"loss": Loss(1)}, "loss"),
        ({"loss": Loss(0).double()}, "loss"),
        ({"loss": Symmetry()}, "loss"),
    ],
)
def test_another_function_is_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    run(tmp_path, resume=False)
    with pytest.raises(ValueError, match=f"resume: the run in .* differs in its {what}"):
        run(tmp_path, **changes)
    assert len(run(tmp_path, steps=3).losses) == 3


def test_what_does_not_change_the_result_is_not_compared(tmp_path: Path) -> None:
    """Memory strategies, counters and caches, and prompts that another machine encodes with other rounding errors."""
    decode = Decode()
    run(tmp_path, resume=False, decode=decode)
    assert decode.calls > 0
    run(tmp_path, decode=decode, steps=3)
    run(tmp_path, chain=chain(memory="reversible"), steps=4)
    run(tmp_path, chain=chain(noise=1e-3), steps=5)


def test_guides_and_decoders_of_this_library(guide: Any, tmp_path: Path) -> None:  # noqa: F811
    def of(decode: Any = None, loss: Any = None) -> Any:
        return fingerprint(torch.sin, decode or Decoder(golden_vae()), loss or guide)

    ours = of()
    assert differing(ours, of()) is None
    assert differing(ours, of(Decoder(golden_vae()).leaner())) is None
    assert differing(ours, of(loss=guide.leaner())) is None
    vae = golden_vae_copy(torch.float32)
    assert differing(ours, of(Decoder(vae))) is None
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert differing(ours, of(Decoder(vae))) == "decoder"
    other = type(guide).__new__(type(guide))
    other.__dict__ = {**guide.__dict__, "prompt": "a cat"}
    assert "loss" in str(differing(ours, of(loss=other)))
    directions = [of(loss=Symmetry(direction)) for direction in ("horizontal", "vertical")]
    assert "loss" in str(differing(*directions))


def test_plain_functions_partials_and_methods() -> None:
    def of(loss: Any) -> Any:
        return fingerprint(torch.sin, torch.cos, loss)

    def scaled(images: Tensor, factor: Tensor) -> Tensor:
        return factor * images.mean()

    one, two = (functools.partial(scaled, factor=torch.tensor(value)) for value in (1.0, 2.0))
    assert differing(of(one), of(one)) is None and differing(of(one), of(two)) is not None
    assert differing(of(Decode(1.0).__call__), of(Decode(2.0).__call__)) is not None
    assert differing(of(scaled), of(torch.mean)) is not None
    assert differing(of(scaled), {"chain": {}}) is not None


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
)
def test_every_dtype_of_weights_counts(dtype: torch.dtype) -> None:
    def of(value: int) -> Any:
        module = nn.Module()
        module.register_buffer("values", torch.tensor([0, 1, value]).to(dtype))
        return fingerprint(torch.sin, torch.cos, module)

    assert differing(of(0), of(0)) is None and differing(of(0), of(1)) is not None


def test_weights_without_values_are_told_by_their_shapes() -> None:
    def of(size: int) -> Any:
        return fingerprint(torch.sin, torch.cos, nn.Linear(size, 1, device="meta"))

    assert differing(of(2), of(2)) is None and differing(of(2), of(3)) is not None
