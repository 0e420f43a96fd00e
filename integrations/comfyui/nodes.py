"""Four nodes: load a diffusers model, two losses, and the optimisation of the starting noise.

ComfyUI's own models are no diffusers pipelines, so the nodes have types of their own, `DOODL_PIPELINE` and
`DOODL_LOSS`. Pictures are ComfyUI's `IMAGE`: float tensors (B, H, W, 3) in [0, 1].
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

SOLVERS = ("DDIM", "EDICT", "BDIA", "OBELM", "Sampler")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF


class DoodlLoadModel:
    """Loads a diffusers model, or the small model that comes with doodl_fast."""

    CATEGORY = "doodl"
    RETURN_TYPES = ("DOODL_PIPELINE",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        return {
            "required": {
                "model": ("STRING", {"default": "embedded", "tooltip": "Folder or hub id of a diffusers model"}),
                "device": ("STRING", {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
                "dtype": (list(DTYPES), {"default": "float32"}),
            }
        }

    def load(self, model: str, device: str, dtype: str) -> tuple[Any]:
        """Returns the pipeline."""
        from doodl_fast import shapes
        from doodl_fast.diffusion.pipeline import load_pipeline

        with differentiable():
            if model == "embedded":
                return (shapes.load_pipeline(device=device, dtype=DTYPES[dtype]),)
            return (load_pipeline(model, device, DTYPES[dtype]),)


class DoodlSymmetryLoss:
    """A loss that is low for pictures that are their own mirror image."""

    CATEGORY = "doodl"
    RETURN_TYPES = ("DOODL_LOSS",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        return {"required": {"direction": (["horizontal", "vertical"], {"default": "horizontal"})}}

    def make(self, direction: str) -> tuple[Any]:
        """Returns the loss."""
        from doodl_fast.guidance import Symmetry

        return (Symmetry(direction),)


class DoodlClipTextLoss:
    """A loss that is low for pictures that fit a text, by a CLIP model of transformers."""

    CATEGORY = "doodl"
    RETURN_TYPES = ("DOODL_LOSS",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        return {
            "required": {
                "text": ("STRING", {"multiline": True}),
                "model": ("STRING", {"default": "openai/clip-vit-base-patch32"}),
                "device": ("STRING", {"default": "cuda" if torch.cuda.is_available() else "cpu"}),
            }
        }

    def make(self, text: str, model: str, device: str) -> tuple[Any]:
        """Returns the loss."""
        from doodl_fast.guidance import ClipText

        with differentiable():
            return (ClipText.from_pretrained(model, text, device),)


class DoodlOptimize:
    """Optimises the starting noise so that the finished picture has a low loss (DOODL, arXiv 2303.13703)."""

    CATEGORY = "doodl"
    RETURN_TYPES = ("IMAGE", "IMAGE", "STRING")
    RETURN_NAMES = ("final", "best", "losses")
    FUNCTION = "optimize"
    SETTINGS: ClassVar[dict[str, Any]] = {
        "steps": ("INT", {"default": 50, "min": 1, "max": 1000}),
        "cfg": ("FLOAT", {"default": 7.5, "min": 0.0, "max": 100.0, "step": 0.1}),
        "optimization_steps": ("INT", {"default": 20, "min": 1, "max": 10000}),
        "grad_scale": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1e6, "step": 0.01}),
        "solver": (list(SOLVERS), {"default": "DDIM"}),
        "seed": ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED}),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Returns the node's inputs."""
        texts = {name: ("STRING", {"multiline": True, "default": ""}) for name in ("prompt", "negative_prompt")}
        parts = {"pipeline": ("DOODL_PIPELINE",), "loss": ("DOODL_LOSS",)}
        return {"required": {**parts, **texts, **cls.SETTINGS}}

    def optimize(
        self,
        pipeline: Any,
        loss: Any,
        prompt: str,
        negative_prompt: str,
        steps: int,
        cfg: float,
        optimization_steps: int,
        grad_scale: float,
        solver: str,
        seed: int,
    ) -> tuple[Tensor, Tensor, str]:
        """Returns the final pictures, the best ones, and the losses as text, one in a line."""
        import doodl_fast

        bar = progress_bar(optimization_steps)

        def step(info: Any) -> None:
            if bar is not None:
                bar.update_absolute(info.step + 1)

        with differentiable():
            chain = getattr(doodl_fast, solver).from_pipeline(pipeline, prompt, negative_prompt or None, steps, cfg)
            noise = chain.noise(generator=torch.Generator().manual_seed(seed))
            result = doodl_fast.optimize(
                chain,
                noise,
                chain.decode,
                loss,
                optimization_steps,
                grad_scale=grad_scale,
                callback_on_step_end=step,
                progress=False,
            )
        losses = "\n".join(f"{value:.6g}" for value in [*result.losses, result.final_loss])
        return as_comfy(result.images[0]), as_comfy(result.best_images[0]), losses


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """Leaves the inference mode in which ComfyUI runs nodes: what is made in it can have no gradient."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def as_comfy(images: Tensor) -> Tensor:
    """Returns images (B, 3, H, W) in [-1, 1] as ComfyUI has them: (B, H, W, 3), float32, in [0, 1], on the CPU."""
    return (images.as_subclass(Tensor).detach().float().cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def progress_bar(total: int) -> Any:
    """Returns ComfyUI's progress bar, or None outside of ComfyUI."""
    comfy = sys.modules.get("comfy.utils")
    return None if comfy is None else comfy.ProgressBar(total)


NODE_CLASS_MAPPINGS = {
    "DoodlLoadModel": DoodlLoadModel,
    "DoodlSymmetryLoss": DoodlSymmetryLoss,
    "DoodlClipTextLoss": DoodlClipTextLoss,
    "DoodlOptimize": DoodlOptimize,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DoodlLoadModel": "DOODL: load a diffusers model",
    "DoodlSymmetryLoss": "DOODL: symmetry loss",
    "DoodlClipTextLoss": "DOODL: CLIP text loss",
    "DoodlOptimize": "DOODL: optimise the starting noise",
}
