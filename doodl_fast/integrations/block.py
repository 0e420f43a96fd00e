"""`DoodlNoiseStep`, a block for diffusers' modular pipelines that optimises the starting noise.

It stands before the blocks of a text-to-image pipeline and gives them `latents`, from which they sample as always. By
default the gradient goes through the steps of the pipeline's own scheduler, so that they make the very picture whose
loss was lowered.
"""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from ..optimization.loop import optimize
from ..solvers.base import DiffusionChain
from ..solvers.sampler import Sampler
from .pipeline import OPTIMIZATION

PIPELINES = {
    "stable-diffusion-xl": "StableDiffusionXLPipeline",
    "stable-diffusion-3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "qwenimage": "QwenImagePipeline",
}
"""The class of pipelines whose arguments and parts a kind of modular pipelines has, by diffusers' `model_name`."""


class DoodlNoiseStep(ModularPipelineBlocks):  # type: ignore[misc]
    """Optimises the starting noise for a loss on the finished picture, by DOODL (arXiv 2303.13703).

    Inputs are `loss` (images (B, 3, H, W) in [-1, 1] -> a scalar), `prompt`, `negative_prompt`, `num_inference_steps`,
    `guidance_scale`, `height`, `width`, `generator`, and `optimization`, a dict with arguments of
    `doodl_fast.optimize`. Without a `loss` the block does nothing. Outputs are `latents`, the optimised noise
    (B, C, h, w), and `losses`.

    Args:
        model_name: The kind of the modular pipeline, one of the keys of `PIPELINES`.
        solver: The class of the chain. `doodl_fast.Sampler` takes the steps of the pipeline's own scheduler.

    Raises:
        ValueError: The kind is not known.

    Example:
        >>> blocks = StableDiffusionXLAutoBlocks()
        >>> blocks.sub_blocks.insert("doodl", DoodlNoiseStep("stable-diffusion-xl"), 0)
        >>> pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        >>> pipe.load_components()
        >>> image = pipe(prompt="a dog", loss=Symmetry(), output="images")[0]
    """

    def __init__(self, model_name: str = "stable-diffusion-xl", solver: type[DiffusionChain] = Sampler) -> None:
        if model_name not in PIPELINES:
            raise ValueError(f"model_name: expected one of {', '.join(PIPELINES)}, got {model_name!r}")
        super().__init__()
        self.model_name, self.solver = model_name, solver

    @property
    def description(self) -> str:
        """What diffusers shows of the block."""
        return "Optimises the starting noise for a loss on the finished picture (DOODL, arXiv 2303.13703)."

    @property
    def inputs(self) -> list[Any]:
        """The arguments of the pipeline that the block reads."""
        return [
            InputParam("loss", default=None, description="Images (B, 3, H, W) in [-1, 1] -> differentiable scalar."),
            InputParam("optimization", default=None, description="Arguments of doodl_fast.optimize."),
            InputParam("prompt"),
            InputParam("negative_prompt", default=None),
            InputParam("num_inference_steps", default=50),
            InputParam("guidance_scale", default=None),
            InputParam("height", default=None),
            InputParam("width", default=None),
            InputParam("generator", default=None),
            InputParam("latents", default=None),
        ]

    @property
    def intermediate_outputs(self) -> list[Any]:
        """What the blocks behind this one may read."""
        return [
            OutputParam("latents", description="The optimised starting noise (B, C, h, w)."),
            OutputParam("losses", type_hint=list, description="The loss of every optimisation step."),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        """Runs the block; diffusers calls it.

        Raises:
            TypeError: `optimization` has an unknown argument.
        """
        block = self.get_block_state(state)
        block.losses = []
        if block.loss is not None:
            options = dict(block.optimization or {})
            unknown = sorted(options.keys() - OPTIMIZATION)
            if unknown:
                raise TypeError(
                    f"optimization: unknown {', '.join(unknown)}; expected arguments of doodl_fast.optimize"
                )
            chain = self.solver.from_pipeline(
                self._pipeline(components),
                block.prompt,
                block.negative_prompt,
                block.num_inference_steps,
                "auto" if block.guidance_scale is None else block.guidance_scale,
                height=block.height,
                width=block.width,
            )
            start = chain.noise(generator=block.generator) if block.latents is None else block.latents
            result = optimize(chain, start, chain.decode, block.loss, **options)
            block.latents, block.losses = result.latents[0].to(start.dtype), result.losses
        self.set_block_state(state, block)
        return components, state

    def _pipeline(self, components: Any) -> Any:
        """Returns the pipeline that has the parts of the modular one; nothing is copied."""
        kind = getattr(diffusers, PIPELINES[self.model_name])
        names = kind._get_signature_keys(kind)[0]
        return kind(**{name: getattr(components, name, None) for name in names})
