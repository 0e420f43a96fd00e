"""Estimates the memory of a gradient with networks on PyTorch's meta device, which hold no memory.

The memory tracker sees the results of every operator on the meta device too. So it gives the sizes of one evaluation,
one graph and one VJP, with fused attention (Dao et al., arXiv 2205.14135) as on a GPU. Not included are the scratch
memory of operators, the CUDA context (some hundred MB), fragmentation, text encoders and guides.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.memory.plan import ANCHOR_STEPS, Plan, Sizes, Workload, format_bytes
from ..chain.memory.tracker import Tracker
from ..diffusion.networks import blocks_checkpointed, frozen, run_in_dtype
from ..diffusion.pipeline import Decoder

CARDS = (6, 8, 12, 16, 24, 40, 80)
"""Memory of common GPUs in GiB, which are sold as GB."""
CARD_MARGIN = 0.08
"""The share of a GPU's memory that is left for the CUDA context and fragmentation."""
STATE_DTYPE = torch.float64
TOKENS = 77

# The architectures of the published models as arguments of diffusers' classes (arXiv 2112.10752 and 2307.01952).
SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}
SDXL_UNET = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
MODELS = {
    "sd15": (SD15_UNET, {**VAE, "force_upcast": False}),
    "sdxl": (SDXL_UNET, {**VAE, "force_upcast": True}),
}
"""The configs of the UNet and of the VAE, by the model's name. A VAE with force_upcast overflows in fp16 and runs in
fp32."""


@dataclass(frozen=True)
class Estimate:
    """The memory of one gradient through EDICT and the decoder, for one image with guidance and without a loss.

    Attributes:
        unet_weights: Bytes of the UNet's weights.
        vae_weights: Bytes of the VAE's weights.
        plain: The sizes of one evaluation of the UNet.
        blocks: The same with checkpointed blocks.
        decoders: Bytes that decoding takes at most, plainly and with checkpointed blocks.
        workload: What the planner needs to know of the chain.
        naive: The peak in bytes of plain backpropagation through the chain, without weights.
        per_step: The peak in bytes of `torch.utils.checkpoint` around every EDICT step, without weights.
    """

    unet_weights: int
    vae_weights: int
    plain: Sizes
    blocks: Sizes
    decoders: tuple[int, ...]
    workload: Workload
    naive: int
    per_step: int

    @property
    def weights(self) -> int:
        """Bytes of all weights."""
        return self.unet_weights + self.vae_weights

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
        evaluations = (self.plain, self.blocks)
        lines = [
            ("weights: UNet, VAE", f"{format_bytes(self.unet_weights)}, {format_bytes(self.vae_weights)}"),
            ("graph of a UNet call", " or, checkpointed, ".join(format_bytes(s.graph) for s in evaluations)),
            ("decoding an image", " or, checkpointed, ".join(format_bytes(size) for size in self.decoders)),
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
        blocks = "; blocks checkpointed" if plan.blocks else ""
        fits = [
            name
            for name, peak in (("naive backpropagation", self.naive), ("checkpointed steps", self.per_step))
            if self.weights + peak <= room
        ]
        also = f"; {' and '.join(fits)} would fit too" if fits else ""
        peak = format_bytes(self.weights + plan.peak)
        return f"{card:>2} GB  {peak:>12}  {plan.kept}{blocks}; {plan.recomputed} evaluations again{also}"


def estimate(model: str | Path, resolution: int | None, dtype: torch.dtype, steps: int = 50) -> Estimate:
    """Estimates the memory of a gradient.

    Args:
        model: "sd15", "sdxl", or a diffusers folder with a UNet and a VAE, of which only the configs are read.
        resolution: Side of the square image in pixels. None is the model's own.
        dtype: Of the networks. With float16, a VAE with force_upcast is in float32.
        steps: The number of diffusion steps.

    Raises:
        ValueError: An argument cannot work; the error names it.
    """
    with torch.device("meta"), _fused_attention():
        unet, vae = _networks(model)
        upcast = bool(vae.config.force_upcast) and dtype == torch.float16
        unet.to(dtype).eval()
        vae.to(torch.float32 if upcast else dtype).eval()
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        size = unet.config.sample_size * factor if resolution is None else resolution
        if size < factor or size % factor:
            raise ValueError(f"resolution: expected a positive multiple of {factor}, got {size}")
        shape = (1, unet.config.in_channels, size // factor, size // factor)
        return _measure(unet, Decoder(vae), shape, dtype, steps)


def _measure(unet: nn.Module, decode: Decoder, shape: tuple[int, ...], dtype: torch.dtype, steps: int) -> Estimate:
    """The estimate for networks on the meta device and latents of a shape."""
    sizes = {False: _evaluation(unet, shape, dtype, False), True: _evaluation(unet, shape, dtype, True)}
    latent = torch.empty(shape, dtype=STATE_DTYPE)
    source = latent.numel() * latent.element_size()
    evaluations = 2 * (steps - 1)  # The last step of Stable Diffusion's schedule changes nothing.
    load = Workload(evaluations, steps, source, 2 * source, ("checkpoint", ANCHOR_STEPS), sizes.__getitem__)
    plain = sizes[False]
    # Plain code evaluates in the last step too, and keeps at least the sources beside the graphs.
    naive = 2 * steps * (plain.graph + source) + plain.pull - plain.graph
    per_step = 2 * steps * source + plain.graph + plain.pull
    decoders = tuple(_decoding(decoder, shape) for decoder in _leaner(decode))
    return Estimate(
        _weights(unet), _weights(decode.vae), plain, sizes[True], decoders, load, naive, max(per_step, decoders[0])
    )


def _evaluation(unet: Any, shape: tuple[int, ...], dtype: torch.dtype, blocks: bool) -> Sizes:
    """The sizes of a guided evaluation, which is one call on a batch of two."""
    batch = torch.empty(2, *shape[1:], dtype=dtype)
    options: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        times = 6 * unet.config.addition_time_embed_dim
        texts = torch.empty(2, unet.config.projection_class_embeddings_input_dim - times, dtype=dtype)
        options["added_cond_kwargs"] = {"text_embeds": texts, "time_ids": torch.empty(2, 6, dtype=dtype)}
    cond = torch.empty(2, TOKENS, unet.config.cross_attention_dim, dtype=dtype)
    call = functools.partial(unet, timestep=torch.empty((), dtype=torch.int64), encoder_hidden_states=cond, **options)
    checkpointed = blocks_checkpointed(unet) if blocks else contextlib.nullcontext()
    with frozen(unet), checkpointed:
        with Tracker("meta") as value, torch.no_grad():
            call(batch, return_dict=False)
        with Tracker("meta") as whole:
            leaf = batch.clone().requires_grad_()
            eps = call(leaf, return_dict=False)[0]
            graph = whole.held
            torch.autograd.grad(eps, leaf, torch.empty_like(eps))
    return Sizes(value.peak, graph, whole.peak)


def _decoding(decode: Decoder, shape: tuple[int, ...]) -> int:
    """The largest number of bytes held while one image is decoded and its VJP taken."""
    leaf = torch.empty(shape, dtype=torch.float32).requires_grad_()
    with Tracker("meta") as seen:
        # A call of the decoder itself would look for NaN, which the meta device cannot tell.
        image = run_in_dtype(decode._decode, leaf, decode.vae.dtype)
        torch.autograd.grad(image, leaf, torch.empty_like(image))
    return seen.peak


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Replaces attention by a function with the memory of a fused kernel.

    Its graph holds the inputs, the output and a logsumexp, and never the products of queries and keys. It is a patch
    and not a TorchFunctionMode, because modes are off in backward passes, where checkpointed blocks are called again.
    """
    original = nn.functional.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        return _Attention.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = original


class _Attention(torch.autograd.Function):
    """Attention on the meta device, which has shapes and no values."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _leaner(decode: Decoder) -> Iterator[Decoder]:
    """The plain decoder, and the one with checkpointed blocks if there is one."""
    yield decode
    other = decode.leaner()
    if other is not None:
        yield other


def _weights(network: nn.Module) -> int:
    """Bytes of a network's weights."""
    return sum(p.numel() * p.element_size() for p in network.parameters())


def _networks(model: str | Path) -> tuple[Any, Any]:
    """The UNet and the VAE of a model, made of their configs."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if model in MODELS:
        unet, vae = MODELS[str(model)]
        return UNet2DConditionModel(**unet), AutoencoderKL(**vae)
    found = []
    for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        path = Path(model) / name / "config.json"
        if not path.is_file():
            raise ValueError(
                f"model: expected one of {', '.join(MODELS)} or a diffusers folder with {name}/config.json in it, got "
                f"{str(model)!r}"
            )
        found.append(kind.from_config(json.loads(path.read_text())))
    return found[0], found[1]
