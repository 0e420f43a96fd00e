"""The architectures of published models, and pipelines of them on PyTorch's meta device, which hold no memory.

Each entry names its source. Where the defaults of a class of diffusers are the published configuration, the entry says
only what differs. Text encoders are left out: they can be moved off the device before a gradient is taken.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..diffusion.conditions import map_tensors
from ..diffusion.families import Family, family_of_class
from ..diffusion.families.saved import family_of_index, pipeline_class, saved_components
from .embeddings import longest_embeddings

Parts = dict[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        pipeline: The name of diffusers' class of its pipeline.
        parts: The class and the configuration of each component that is needed.
        call: The usual arguments of the pipeline, the size among them.
        source: Where the configuration is from.
        scheduler: The class and the configuration of the scheduler.
        settings: Arguments of the pipeline's class that are no components.
    """

    pipeline: str
    parts: Parts
    call: Mapping[str, Any]
    source: str
    scheduler: tuple[str, Mapping[str, Any]] = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})
    settings: Mapping[str, Any] = field(default_factory=dict)


DDIM = (
    "DDIMScheduler",
    {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
)
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "force_upcast": False,
}
WIDE_VAE = {**VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def _kl(**config: Any) -> tuple[str, Mapping[str, Any]]:
    """The class and the configuration of a VAE of pictures."""
    return "AutoencoderKL", {**VAE, **config}


def _unet(cross: int, heads: int, **config: Any) -> tuple[str, Mapping[str, Any]]:
    """The class and the configuration of a UNet of Stable Diffusion 1 or 2."""
    return "UNet2DConditionModel", {
        "cross_attention_dim": cross,
        "attention_head_dim": heads,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        **config,
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


def _sd3(layers: int, positions: int, **config: Any) -> Parts:
    """The parts of Stable Diffusion 3.5, whose widths follow from its number of heads, which is that of its layers."""
    heads = config.pop("heads", layers)
    transformer = {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": 64,
        "num_attention_heads": heads,
        "joint_attention_dim": 4096,
        "caption_projection_dim": 64 * heads,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": positions,
        "qk_norm": "rms_norm",
        **config,
    }
    vae = {**WIDE_VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
    return {"transformer": ("SD3Transformer2DModel", transformer), "vae": ("AutoencoderKL", vae)}


def _wan(layers: int, heads: int, ffn: int) -> Parts:
    """The parts of Wan 2.1."""
    transformer = {"num_layers": layers, "num_attention_heads": heads, "ffn_dim": ffn}
    return {"transformer": ("WanTransformer3DModel", transformer), "vae": ("AutoencoderKLWan", {})}


FLUX_VAE = ("AutoencoderKL", {**WIDE_VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159})
SHIFTING = {"use_dynamic_shifting": True, "shift": 3.0}
PUBLISHED: dict[str, Published] = {
    "sd15": Published(
        "StableDiffusionPipeline",
        {"unet": _unet(768, 8, sample_size=64), "vae": _kl()},
        {"height": 512, "width": 512},
        "arXiv 2112.10752; stable-diffusion-v1-5",
        DDIM,
    ),
    "sd21": Published(
        "StableDiffusionPipeline",
        {
            "unet": _unet(1024, (5, 10, 20, 20), sample_size=96, use_linear_projection=True),  # type: ignore[arg-type]
            "vae": _kl(),
        },
        {"height": 768, "width": 768},
        "stabilityai/stable-diffusion-2-1",
        DDIM,
    ),
    "sdxl": Published(
        "StableDiffusionXLPipeline",
        {"unet": ("UNet2DConditionModel", SDXL_UNET), "vae": _kl(force_upcast=True)},
        {"height": 1024, "width": 1024},
        "arXiv 2307.01952; stabilityai/stable-diffusion-xl-base-1.0",
        DDIM,
    ),
    "sd35-medium": Published(
        "StableDiffusion3Pipeline",
        _sd3(24, 384, dual_attention_layers=tuple(range(13))),
        {"height": 1024, "width": 1024},
        "stabilityai/stable-diffusion-3.5-medium",
    ),
    "sd35-large": Published(
        "StableDiffusion3Pipeline",
        _sd3(38, 192),
        {"height": 1024, "width": 1024},
        "stabilityai/stable-diffusion-3.5-large",
    ),
    "flux1-dev": Published(
        "FluxPipeline",
        {"transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}), "vae": FLUX_VAE},
        {"height": 1024, "width": 1024},
        "defaults of FluxTransformer2DModel; black-forest-labs/FLUX.1-dev",
        ("FlowMatchEulerDiscreteScheduler", SHIFTING),
    ),
    "pixart-sigma": Published(
        "PixArtSigmaPipeline",
        {
            "transformer": (
                "PixArtTransformer2DModel",
                {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
            ),
            "vae": _kl(scaling_factor=0.13025),
        },
        {"height": 1024, "width": 1024},
        "defaults of PixArtTransformer2DModel; PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        ("DDIMScheduler", {**DDIM[1], "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}),
    ),
    "wan21-1.3b": Published(
        "WanPipeline",
        _wan(30, 12, 8960),
        {"height": 480, "width": 832, "num_frames": 81},
        "arXiv 2503.20314; Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    ),
    "wan21-14b": Published(
        "WanPipeline",
        _wan(40, 40, 13824),
        {"height": 480, "width": 832, "num_frames": 81},
        "defaults of WanTransformer3DModel; Wan-AI/Wan2.1-T2V-14B-Diffusers",
    ),
    "wan22-a14b": Published(
        "WanPipeline",
        {**_wan(40, 40, 13824), "transformer_2": _wan(40, 40, 13824)["transformer"]},
        {"height": 480, "width": 832, "num_frames": 81},
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        settings={"boundary_ratio": 0.875},
    ),
    "wan22-5b": Published(
        "WanPipeline",
        {
            "transformer": ("WanTransformer3DModel", {
                "num_layers": 30, "num_attention_heads": 24, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
            }),
            "vae": ("AutoencoderKLWan", {
                "base_dim": 160,
                "decoder_base_dim": 256,
                "z_dim": 48,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                "scale_factor_spatial": 16,
                "latents_mean": (0.0,) * 48,  # The values matter to no estimate.
                "latents_std": (1.0,) * 48,
            }),
        },
        {"height": 704, "width": 1280, "num_frames": 121},
        "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        ("FlowMatchEulerDiscreteScheduler", {"shift": 5.0}),
        {"expand_timesteps": True},
    ),
    "cogvideox-2b": Published(
        "CogVideoXPipeline",
        {"transformer": ("CogVideoXTransformer3DModel", {}), "vae": ("AutoencoderKLCogVideoX", COGVIDEOX_VAE := {
            "block_out_channels": (128, 256, 256, 512),
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "latent_channels": 16,
            "layers_per_block": 3,
        })},
        {"height": 480, "width": 720, "num_frames": 49},
        "defaults of CogVideoXTransformer3DModel; THUDM/CogVideoX-2b",
        ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                    "snr_shift_scale": 3.0, "timestep_spacing": "trailing", "clip_sample": False}),
    ),
    "cogvideox-5b": Published(
        "CogVideoXPipeline",
        {"transformer": ("CogVideoXTransformer3DModel", {
            "num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True,
        }), "vae": ("AutoencoderKLCogVideoX", COGVIDEOX_VAE)},
        {"height": 480, "width": 720, "num_frames": 49},
        "arXiv 2408.06072; THUDM/CogVideoX-5b",
        ("CogVideoXDDIMScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                                    "snr_shift_scale": 1.0, "timestep_spacing": "trailing", "clip_sample": False}),
    ),
}  # fmt: skip
"""By the model's name on the command line."""


@dataclass
class MetaModel:
    """A pipeline whose networks are on the meta device.

    Attributes:
        pipe: The pipeline, without text encoders.
        family: Its family.
        call: The usual arguments of the pipeline, with embeddings instead of a prompt.
    """

    pipe: Any
    family: Family
    call: dict[str, Any] = field(default_factory=dict)


def meta_model(model: str | Path, dtype: torch.dtype) -> MetaModel:
    """Makes a pipeline on the meta device.

    Args:
        model: The name of a published model, or a diffusers folder, of which only the configs are read.
        dtype: Of the networks. With float16, a VAE with force_upcast is in float32 if its pipeline upcasts it.

    Raises:
        ValueError: There is no such model, or its family is not known.
    """
    import diffusers

    if str(model) in PUBLISHED:
        found = PUBLISHED[str(model)]
        kind, parts, scheduler, call = getattr(diffusers, found.pipeline), found.parts, found.scheduler, found.call
        settings = found.settings
        family = family_of_class(found.pipeline)
        assert family is not None
    else:
        kind, parts, scheduler, family, settings = _of_folder(Path(model))
        call = {}
    made: dict[str, Any] = {"scheduler": getattr(diffusers, scheduler[0]).from_config(dict(scheduler[1]))}
    with torch.device("meta"):
        for name, (component, config) in parts.items():
            network = _network(component, config)
            upcast = name == "vae" and dtype == torch.float16 and hasattr(kind, "upcast_vae")
            is_wide = upcast and network.config.get("force_upcast")
            # diffusers' own method warns of what it is told to keep in float32, which is next to nothing.
            made[name] = torch.nn.Module.to(network, torch.float32 if is_wide else dtype).eval()
    pipe = _assembled(kind, {**settings, **made})
    with torch.device("meta"):
        embeddings = longest_embeddings(pipe, family)
    return MetaModel(
        pipe,
        family,
        {**call, **map_tensors(embeddings, lambda value, _: value.to(dtype) if value.is_floating_point() else value)},
    )


def _network(component: str, config: Mapping[str, Any]) -> Any:
    """A network of a class of diffusers or, a vocoder for instance, of transformers."""
    import diffusers

    if hasattr(diffusers, component):
        return getattr(diffusers, component).from_config(dict(config))
    import transformers

    kind = getattr(transformers, component)
    return kind(kind.config_class(**config))


def _assembled(kind: Any, made: dict[str, Any]) -> Any:
    """A pipeline of the class `kind`, with None for all components that were not made."""
    names = inspect.signature(kind.__init__).parameters
    optional = {"requires_safety_checker": False} if "requires_safety_checker" in names else {}
    needed = [n for n, p in names.items() if n != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return kind(**{**dict.fromkeys(needed), **made, **optional})


def _of_folder(folder: Path) -> tuple[Any, Parts, tuple[str, Mapping[str, Any]], Family, dict[str, Any]]:
    """The pipeline's class, its networks' configs, its scheduler's, its family and its settings, of a diffusers folder.

    Raises:
        ValueError: It is no such folder, or its family is not known.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"model: expected one of {', '.join(PUBLISHED)} or a diffusers folder with model_index.json in it, got "
            f"{str(folder)!r}"
        )
    index = _read(folder / "model_index.json")
    family = family_of_index(index, str(folder))
    kind, components = pipeline_class(index), saved_components(index)
    networks = [name for name in components if name in NETWORKS]
    parts: Parts = {name: (components[name], _read(folder / name / "config.json")) for name in networks}
    # Settings such as the boundary between Wan 2.2's two networks; components are lists of a library and a class.
    accepted = inspect.signature(kind.__init__).parameters.keys() & index.keys()
    settings = {name: index[name] for name in accepted if not isinstance(index[name], list)}
    scheduler = components["scheduler"], _read(folder / "scheduler" / "scheduler_config.json")
    return kind, parts, scheduler, family, settings


NETWORKS = ("unet", "transformer", "transformer_2", "vae", "projection_model", "vocoder")
"""The components that a gradient needs."""


def _read(path: Path) -> dict[str, Any]:
    """A JSON file of a folder. Raises ValueError if there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"model: {str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"model: expected {str(path)!r} to hold an object, got {type(found).__name__}")
    return found
