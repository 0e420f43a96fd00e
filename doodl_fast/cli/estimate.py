"""Estimates the memory of a gradient with networks on PyTorch's meta device, which hold no memory.

The memory tracker sees the results of every operator on the meta device too. So it gives the sizes of one evaluation,
one graph and one VJP, with fused attention (Dao et al., arXiv 2205.14135) and fused norms and gates as on a GPU. Not
included are the scratch memory of operators, the CUDA context (some hundred MB), fragmentation, text encoders and
guides.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.memory.plan import Plan, Sizes, Workload, format_bytes
from ..chain.memory.tracker import Tracker
from ..chain.ways import KEPT, WHOLE
from ..diffusion.calling import module_of
from ..diffusion.decoder import Decoder
from ..diffusion.families import Request
from ..diffusion.latent_space import LatentSpace
from ..diffusion.schedule import Schedule
from ..diffusion.video import VideoDecoder, VideoSpace
from ..solvers.edict import EDICT
from .meta_attention import fused_attention
from .meta_ops import fused_ops
from .published import meta_model

CARDS = (6, 8, 12, 16, 24, 40, 80)
"""Memory of common GPUs in GiB, which are sold as GB."""
CARD_MARGIN = 0.08
"""The share of a GPU's memory that is left for the CUDA context and fragmentation."""


@dataclass(frozen=True)
class Estimate:
    """The memory of one gradient through EDICT and the decoder, for one picture or video and without a loss.

    Attributes:
        network_weights: Bytes of the weights of the network that predicts noise or velocity.
        vae_weights: Bytes of the VAE's weights and, where there is one, of the vocoder's.
        plain: The sizes of one evaluation of the network.
        recompute: The same where results of matrix products are computed again; None if that makes no difference.
        blocks: The same with checkpointed blocks; None if it has none.
        decoders: Bytes that decoding takes at most, plainly and in each version that needs less.
        workload: What the planner needs to know of the chain.
        naive: The peak in bytes of plain backpropagation through the chain, without weights.
        per_step: The peak in bytes of `torch.utils.checkpoint` around every EDICT step, without weights.
        subject: What the gradient is of, in words.
    """

    network_weights: int
    vae_weights: int
    plain: Sizes
    recompute: Sizes | None
    blocks: Sizes | None
    decoders: tuple[int, ...]
    workload: Workload
    naive: int
    per_step: int
    subject: str = "one picture"

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.network_weights + self.vae_weights

    @property
    def growth(self) -> int:
        """Bytes that each step adds if the sources of its two evaluations are stored, and not their graphs."""
        return 2 * self.workload.source

    def plan(self, card: int) -> Plan | None:
        """The fastest plan that fits into so many bytes, weights included, or None."""
        plans = [self.workload.fastest(card - self.weights, reserve) for reserve in self.decoders]
        return min((p for p in plans if p is not None), key=lambda p: p.recomputed, default=None)

    @property
    def smallest(self) -> Plan:
        """The plan of the lowest peak."""
        plan = self.workload.smallest(min(self.decoders))
        assert plan is not None
        return plan

    def __str__(self) -> str:
        ways = [("", self.plain), ("without matrix products ", self.recompute), ("checkpointed ", self.blocks)]
        lines = [
            ("weights: network, VAE", f"{format_bytes(self.network_weights)}, {format_bytes(self.vae_weights)}"),
            ("graph of an evaluation", ", ".join(f"{way}{format_bytes(s.graph)}" for way, s in ways if s)),
            ("decoding", ", computing more again ".join(format_bytes(size) for size in self.decoders)),
            ("held for each step", f"{format_bytes(self.growth)} (stored sources), 0 (exact reversal), "
             f"{format_bytes(2 * self.plain.graph)} (whole graphs)"),
            ("naive backpropagation", f"{format_bytes(self.weights + self.naive)} with weights"),
            ("checkpointed steps", f"{format_bytes(self.weights + self.per_step)} with weights "
             f"(torch.utils.checkpoint; computes {2 * self.workload.steps} evaluations again)"),
            ("our smallest plan", f"{format_bytes(self.weights + self.smallest.peak)} with weights"),
        ]  # fmt: skip
        table = "\n".join(f"{name:<24} {value}" for name, value in lines)
        head = "card   with weights  what is kept; what is computed again"
        return "\n".join([table, "", head, *(self._card(card) for card in CARDS)])

    def _card(self, card: int) -> str:
        """The line of the table for a GPU of so many GiB."""
        room = int(card * 2**30 * (1 - CARD_MARGIN))
        plan = self.plan(room)
        if plan is None:
            return f"{card:>2} GB  {'':>12}  does not fit"
        way = "" if plan.way == WHOLE else f"; kept inside the network: {plan.way.inside}"
        fits = [
            name
            for name, peak in (("naive backpropagation", self.naive), ("checkpointed steps", self.per_step))
            if self.weights + peak <= room
        ]
        also = f"; {' and '.join(fits)} would fit too" if fits else ""
        peak = format_bytes(self.weights + plan.peak)
        return f"{card:>2} GB  {peak:>12}  {plan.kept}{way}; {plan.again} again{also}"


def estimate(
    model: str | Path,
    resolution: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    steps: int = 50,
    *,
    frames: Sequence[int] | None = None,
    **call: Any,
) -> Estimate:
    """Estimates the memory of a gradient.

    Args:
        model: The name of a published model (see `published.PUBLISHED`), or a diffusers folder, of which only the
            configs are read.
        resolution: Side of a square picture in pixels. None is the model's own size.
        dtype: Of the networks. With float16, a VAE with force_upcast is in float32 if its pipeline upcasts it.
        steps: The number of diffusion steps.
        frames: Which frames of a video are decoded for the loss. None is all.
        **call: Arguments of `from_pipeline` that differ from the usual ones: height, width, num_frames, guidance_scale.

    Raises:
        ValueError: An argument cannot work; the error names it.

    Example:
        >>> print(estimate("flux1-dev", dtype=torch.bfloat16))
    """
    if resolution is not None:
        if resolution < 1:
            raise ValueError(f"resolution: expected a positive number of pixels, got {resolution}")
        call |= {"height": resolution, "width": resolution}
    with warnings.catch_warnings(), fused_attention(), fused_ops():
        warnings.simplefilter("ignore")  # Nothing is run that a warning could be about.
        found = meta_model(model, dtype)
        request = _request(steps, {**found.call, **call})
        schedule = Schedule.from_scheduler(
            found.pipe.scheduler, steps, **found.family.set_timesteps(found.pipe, request)
        )
        with torch.device("meta"):
            parts = found.family.parts(found.pipe, replace(request, timesteps=schedule.timesteps))
        decode: Any = parts.decoder
        if frames is not None:
            if not isinstance(decode, VideoDecoder):
                raise ValueError(f"frames: expected None, because {model} makes pictures, got {frames}")
            decode = decode.pictures(frames)
        lean, usual = (
            EDICT(denoiser, schedule, memory="auto") for denoiser in (parts.denoiser, parts.denoiser.plain())
        )
        return _measure(lean, usual, parts.space, decode)


def _request(steps: int, call: dict[str, Any]) -> Request:
    """What a family is given for a call of `from_pipeline`."""
    own = {name: call.pop(name) for name in ("height", "width", "guidance_scale") if call.get(name) is not None}
    return Request(num_inference_steps=steps, options=call, **own)


def _measure(chain: EDICT, other: EDICT, space: LatentSpace, decode: Decoder) -> Estimate:
    """The estimate for a chain on the meta device, beside the same chain with PyTorch's own layers."""
    x = space.noise(batch=1, device="meta")
    assert chain.planner is not None and other.planner is not None
    case, steps = chain.planner.case(x), len(chain.schedule.timesteps)
    load = replace(case.workload, sizes=case.unlimited)
    (plain, recompute, blocks), usual = map(load.sizes, KEPT), other.planner.case(x).unlimited(WHOLE)
    assert plain is not None and usual is not None
    # Other code evaluates in every step, and keeps at least the sources beside the graphs.
    naive = 2 * steps * (usual.graph + load.source) + usual.pull - usual.graph
    per_step = 2 * steps * load.source + usual.graph + usual.pull
    decoders = _decoders(decode, x)
    coders = (getattr(decode, name, None) for name in ("vae", "vocoder"))
    weights = _weights(module_of(chain.denoiser.unet)), sum(map(_weights, coders))
    size = f"{space.height} x {space.width} pixels{', with guidance' if chain.denoiser.guided else ''}"
    subject = f"{space.num_frames} frames of {size}" if isinstance(space, VideoSpace) else f"one picture of {size}"
    return Estimate(*weights, plain, recompute, blocks, decoders, load, naive, max(per_step, decoders[0]), subject)


def _decoding(decode: Decoder, x: Tensor) -> int:
    """The largest number of bytes held while one picture or video is decoded and its VJP taken."""
    leaf = x.to(torch.float32, copy=True).requires_grad_()
    with Tracker("meta") as seen:
        image = decode(leaf)
        torch.autograd.grad(image, leaf, torch.empty_like(image))
    return seen.peak


def _decoders(decode: Decoder, x: Tensor) -> tuple[int, ...]:
    """What decoding takes plainly, and in each version that needs less than the one before."""
    sizes, version = [_decoding(decode, x)], decode.leaner()
    while version is not None:
        size = _decoding(version, x)
        sizes += [size] if size < sizes[-1] else []
        version = version.leaner()
    return tuple(sizes)


def _weights(network: nn.Module | None) -> int:
    """Bytes of a network's weights and buffers, of which tables of positions may be large."""
    if network is None:
        return 0
    return sum(part.numel() * part.element_size() for part in (*network.parameters(), *network.buffers()))
