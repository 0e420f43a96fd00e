"""How often a step of an optimisation reads numbers on the host, for which a GPU makes it wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import golden_denoiser, latents, sd_scheduler, tiny_chain
from test_optimize import optimize, problem
from tiny_pipeline import golden_vae
from torch import Tensor, nn

import doodl_fast
from doodl_fast import EDICT, Decoder, Schedule
from doodl_fast.guidance import Depth, Segmentation

HALF = torch.float16


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the methods that read a tensor's numbers on the host, one for each call."""
    names: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, original: Any = original, name: str = name) -> Any:
            names.append(name)
            return original(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    return names


@pytest.mark.parametrize("memory", ["checkpoint", "reversible", "auto", 2])
def test_a_step_reads_the_host_three_times(reads: list[str], memory: Any) -> None:
    """With a decoder in float16, which is checked for overflow: losses, the chain's gradient and the whole gradient."""
    schedule = Schedule.from_scheduler(sd_scheduler(), 3)
    chain = EDICT(golden_denoiser(HALF), schedule, memory=memory, drift_tolerance=1.0)
    start, decode = latents(1, 4, 8, 8, dtype=HALF)[0], Decoder(golden_vae(HALF))

    def count(steps: int) -> int:
        reads.clear()
        doodl_fast.optimize(chain, start, decode, lambda images: images.square().mean(), steps, progress=False)
        return len(reads)

    count(1)  # Plans of memory are made once.
    assert count(5) - count(4) == 3
    assert reads


@pytest.mark.parametrize("kind", ["segmentation", "depth"])
def test_guides_that_look_at_pixels_read_nothing_by_themselves(reads: list[str], kind: str) -> None:
    """Their check that some pixels count is done with what the step reads anyway."""
    region = torch.zeros(8, 8)
    region[:, :4] = 1
    network = nn.Conv2d(3, 3, 1).eval()
    if kind == "segmentation":
        guide: Any = Segmentation(network, 1, region=region)
    else:
        guide = Depth(lambda x: network(x.float())[:, 0], torch.rand(8, 8), region=region, relative=False)
    chain = tiny_chain(3, guidance_scale=1.0)

    def count(loss: Any, steps: int) -> int:
        reads.clear()
        doodl_fast.optimize(chain, latents(1, 3, 8, 8)[0], lambda z: z, loss, steps, progress=False)
        return len(reads)

    plain = count(torch.sum, 5) - count(torch.sum, 4)
    assert count(guide, 5) - count(guide, 4) == plain > 0


def overflowing(images: Tensor) -> Tensor:
    """A loss that says what is wrong with pictures that are not finite in words of its own."""
    if not bool(torch.isfinite(images).all()):
        raise RuntimeError("these pictures are strange")
    return images.square().mean()


@pytest.mark.parametrize("loss", [overflowing, lambda images: images.square().mean()])
def test_the_first_thing_that_is_not_finite_is_named(loss: Any) -> None:
    """A network, whose values the decoder and the loss get before anything is read."""
    chain = tiny_chain(3, network=lambda x, t, cond: x / 0, guidance_scale=1.0)
    with pytest.raises(FloatingPointError, match="forward: NaN or Inf first appeared at step 0"):
        doodl_fast.optimize(chain, latents(1, 3, 4)[0], None, loss, 2, progress=False)


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_that_is_not_finite_is_named_and_not_stored(folder: bool, steps: int, tmp_path: Any) -> None:
    """The update is what is named, and not the latents of the next step."""
    chosen = {"folder": tmp_path} if folder else {}
    options = {"grad_scale": 3e38, "clip_grad_value": None, "num_optimization_steps": steps, **chosen}
    with pytest.raises(FloatingPointError, match="grad_scale: the updated latents hold NaN or Inf"):
        optimize(**{**problem(), "renormalize_latents": False, **options})
    assert not (tmp_path / "state.json").exists()
