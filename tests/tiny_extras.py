"""Tiny versions of what stands around Stable Diffusion's UNet, and the comparisons that their tests share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import tiny_pipeline
import torch
from conftest import relative
from tiny_families import awake
from tolerances import FP32
from torch import Tensor

from doodl_fast.solvers.ddim import DDIM

STEPS = 4


def with_parts(kind: str, pipe: Any, **changes: Any) -> Any:
    """A pipeline of another class from the parts of `pipe`."""
    make = getattr(diffusers, kind)
    parts = {**pipe.components, "requires_safety_checker": False, **changes}
    made = make(**{name: part for name, part in parts.items() if name in inspect.signature(make).parameters})
    made.set_progress_bar_config(disable=True)
    return made


def unet_like(pipe: Any, **changes: Any) -> Any:
    """A UNet of the pipeline's configuration but for the changes, with other weights."""
    torch.manual_seed(0)
    config = {name: value for name, value in pipe.unet.config.items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**{**config, **changes}).eval()


def controlnet(unet: Any, seed: int = 0, **changes: Any) -> Any:
    """A ControlNet whose convolutions that start from zero have random weights, and that looks at its picture."""
    torch.manual_seed(seed)
    config = {"conditioning_embedding_out_channels": (4, 4, 8, 8), **changes}
    made = awake(diffusers.ControlNetModel.from_unet(unet, **config)).requires_grad_(False)
    for weight in made.controlnet_cond_embedding.parameters():
        weight.mul_(3.0)
    return made


def sure_vae() -> Any:
    """A VAE whose posterior has no variance, so that what a pipeline draws from it is its mean."""
    made = copy.deepcopy(tiny_pipeline.golden_vae())
    with torch.no_grad():
        made.quant_conv.weight[4:] = 0
        made.quant_conv.bias[4:] = -100
    return made


def picture(batch: int = 1, height: int = 64, width: int = 64, seed: int = 0, channels: int = 3) -> Tensor:
    """Pixels in [0, 1]."""
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed))


def chain_and_pipeline(
    pipe: Any, options: Mapping[str, Any], ours: Mapping[str, Any] | None = None, solver: Any = DDIM, batch: int = 1
) -> tuple[Tensor, Tensor]:
    """Returns the latents of a chain and those of the pipeline, from the same noise.

    Args:
        pipe: The pipeline.
        options: Arguments of both.
        ours: Arguments of `from_pipeline` alone.
        solver: The class of the chain.
        batch: How many latents.
    """
    negative = options.get("negative_prompt") or ""
    given = {name: value for name, value in options.items() if name not in ("prompt", "negative_prompt")}
    settings = {"num_inference_steps": STEPS, "memory": "checkpoint", **given, **(ours or {})}
    chain = solver.from_pipeline(pipe, options.get("prompt", "a dog"), negative, **settings)
    x = chain.noise(seed=3, batch=batch)
    asked = {"prompt": "a dog", "num_inference_steps": STEPS, **options}
    with torch.no_grad():
        (x0,) = chain(x)
    expected = pipe(**asked, latents=x, output_type="latent").images
    assert relative(x, expected) > 0.1, "the weights must matter"
    return x0, expected


def assert_same_gradients(
    make: Any, inputs: Sequence[Tensor], memories: Sequence[Any], latents: Tensor, tolerance: float = FP32
) -> None:
    """Compares the gradients of chains with those of naive autograd, none of which is zero.

    Args:
        make: Makes a chain of the inputs' copies and of the memory strategy.
        inputs: What the gradients are taken of, besides the latents.
        memories: The strategies.
        latents: The start.
        tolerance: Relative.
    """
    found = []
    for memory in ("naive", *memories):
        leaves = [value.detach().clone().requires_grad_() for value in inputs]
        chain = make(memory, *leaves)
        x = latents.clone().requires_grad_()
        loss = sum((end * (1 + index)).square().mean() for index, end in enumerate(chain(x)))
        found.append(torch.autograd.grad(loss, [x, *leaves]))
    for memory, gradients in zip(memories, found[1:], strict=True):
        for want, got in zip(found[0], gradients, strict=True):
            assert want.norm() > 0
            assert relative(got, want) < tolerance, memory


def pipelines(work: Any) -> dict[str, Any]:
    """Stable Diffusion and Stable Diffusion XL, both tiny."""
    made = {
        "sd": tiny_pipeline.stable_diffusion(work / "sd"),
        "xl": tiny_pipeline.stable_diffusion_xl(work / "xl"),
    }
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


def t2i_adapter(kind: str = "sd", seed: int = 0) -> Any:
    """A T2I-Adapter for the UNets of `with_t2i_adapter`."""
    torch.manual_seed(seed)
    changes: dict[str, Any] = {"channels": [8, 16, 24], "downscale_factor": 8, "adapter_type": "full_adapter"}
    if kind == "xl":
        changes = {"channels": [8, 16, 24, 24], "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
    return diffusers.T2IAdapter(num_res_blocks=1, **changes).eval().requires_grad_(False)


def with_t2i_adapter(pipe: Any, kind: str = "sd", adapter: Any = None) -> Any:
    """A pipeline with a T2I-Adapter, and a UNet that has attention in the same blocks as the real ones."""
    down = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
    up = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
    if kind == "xl":
        down, up = ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2], [*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"]
    name = {"sd": "StableDiffusionAdapterPipeline", "xl": "StableDiffusionXLAdapterPipeline"}[kind]
    unet = unet_like(pipe, down_block_types=down, up_block_types=up).requires_grad_(False)
    return with_parts(name, pipe, unet=unet, adapter=t2i_adapter(kind) if adapter is None else adapter)


def ip_adapter(unet: Any, width: int = 16, seed: int = 0) -> dict[str, Any]:
    """The weights of an IP-Adapter as their files hold them, for pictures' embeddings of a width."""
    generator = torch.Generator().manual_seed(seed)
    cross = unet.config.cross_attention_dim

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    attention = {}
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(names):
        layer = unet.get_submodule(name.removesuffix(".processor"))
        for part in ("k", "v"):
            attention[f"{2 * number + 1}.to_{part}_ip.weight"] = draw(layer.to_k.out_features, cross) * 0.3
    projection = {"proj.weight": draw(4 * cross, width), "proj.bias": draw(4 * cross)}
    projection |= {"norm.weight": torch.ones(cross), "norm.bias": torch.zeros(cross)}
    return {"image_proj": projection, "ip_adapter": attention}
