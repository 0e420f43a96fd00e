"""`DoodlPipeline`, which adds a loss to a diffusers pipeline and is called as that is.

DOODL: Wallace et al., ICCV 2023, arXiv 2303.13703.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..diffusion.images import to_pil
from ..diffusion.pipeline import load_pipeline
from ..optimization.loop import optimize
from ..optimization.result import Result, StepInfo
from ..solvers.base import DiffusionChain
from ..solvers.edict import EDICT

OUTPUTS = ("pil", "np", "pt", "latent")
OPTIMIZATION = frozenset(inspect.signature(optimize).parameters) - {
    *("chain", "latents", "decode", "loss", "generator", "callback_on_step_end"),
}
"""The arguments of `optimize` that a call takes."""
StepCallback = Callable[[Any, int, Any, dict[str, Any]], Any]


@dataclass
class DoodlPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What a `DoodlPipeline` returns.

    Attributes:
        images: The pictures after the optimisation, as `output_type` says: one for each prompt.
        nsfw_content_detected: What the pipeline's safety checker says of each picture; None without one.
        losses: The loss of every optimisation step, each taken before the step's update.
        result: All that `doodl_fast.optimize` found: the best pictures, the optimised noise, ...
    """

    images: Any
    nsfw_content_detected: list[bool] | None
    losses: list[float]
    result: Result


class DoodlPipeline:
    """A diffusers pipeline whose starting noise is optimised for a loss on the finished picture.

    Its call takes the arguments of the pipeline, a loss, and the arguments of `doodl_fast.optimize`. Everything else
    (`to`, `components`, `scheduler`, `load_lora_weights`, ...) is the pipeline's own, which is never changed by a call.

    Args:
        pipe: A diffusers pipeline that `from_pipeline` knows, see docs/pipelines.md.
        solver: The class of the chain, for instance `doodl_fast.DDIM`.

    Raises:
        TypeError: `solver` is no solver.

    Example:
        >>> pipe = DoodlPipeline.from_pipe(StableDiffusionPipeline.from_pretrained("org/name"))
        >>> out = pipe("a red circle above a blue square", loss=Symmetry(), num_optimization_steps=20)
        >>> out.images[0].save("circle.png")
    """

    def __init__(self, pipe: Any, solver: type[DiffusionChain] = EDICT) -> None:
        if not (isinstance(solver, type) and issubclass(solver, DiffusionChain)):
            raise TypeError(f"solver: expected a class of solvers, such as doodl_fast.DDIM, got {solver!r}")
        self.pipe, self.solver = pipe, solver
        self.interrupt = False

    @classmethod
    def from_pipe(cls, pipe: Any, solver: type[DiffusionChain] = EDICT) -> DoodlPipeline:
        """Takes a pipeline. It is used as it is: nothing is copied or loaded. Arguments are those of the class."""
        return cls(pipe, solver)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        solver: type[DiffusionChain] = EDICT,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> DoodlPipeline:
        """Loads a pipeline from a folder or the hub, see `doodl_fast.EDICT.from_pretrained`."""
        return cls(load_pipeline(model, device, dtype, variant), solver)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the pipeline."""
        if name in ("pipe", "solver"):
            raise AttributeError(name)  # An unpickled object has neither yet.
        return getattr(self.pipe, name)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        loss: Callable[..., Tensor] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | str = "auto",
        num_images_per_prompt: int = 1,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        **options: Any,
    ) -> Any:
        """Optimises the starting noise and returns the pictures.

        Args:
            prompt: One prompt or several. None with `prompt_embeds`.
            loss: Images (B, 3, H, W) in [-1, 1] -> differentiable scalar, for instance one of `doodl_fast.guidance`.
            negative_prompt: What to steer away from.
            num_inference_steps: The number of sampling steps.
            guidance_scale: The scale of classifier-free guidance; "auto" is the pipeline's usual one.
            num_images_per_prompt: How many pictures are made of each prompt. All are optimised together: the loss is
                given all of them.
            generator: Of the starting noise.
            latents: Starting noise (B, C, h, w) of unit variance to use instead.
            output_type: "pil" for a list of PIL pictures, "np" for an array (B, H, W, 3) and "pt" for a tensor
                (B, 3, H, W), both in [0, 1], or "latent" for the optimised noise, which the pipeline takes as
                `latents`.
            return_dict: Whether to return an output object and not a tuple of images and `nsfw_content_detected`.
            callback_on_step_end: Called as diffusers does, but once for each optimisation step, before the update:
                `callback(self, step, timestep, {"latents": ..., "images": ..., "loss": ...})`. The timestep is that of
                the noise. It ends the run by `self.interrupt = True`; tensors that it returns are an error.
            **options: Arguments of `doodl_fast.optimize` (num_optimization_steps, grad_scale, optimizer, folder,
                resume, ...), and of the solver's `from_pipeline` (height, width, memory, mix_weight, prompt_embeds,
                clip_skip, ...).

        Returns:
            A `DoodlPipelineOutput`, or a tuple of its first two entries.

        Raises:
            TypeError: There is no loss, or an argument is unknown; the error names it.
            ValueError: An argument is out of range.
        """
        if not callable(loss):
            raise TypeError(
                f"loss: expected a function of images, such as doodl_fast.guidance.Symmetry(), got {loss!r}; call the "
                "pipeline itself to sample without one"
            )
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUTS)}, got {output_type!r}")
        ours = {name: options.pop(name) for name in sorted(OPTIMIZATION & options.keys())}
        chain = self.solver.from_pipeline(
            self.pipe,
            repeated(prompt, num_images_per_prompt),
            repeated(negative_prompt, num_images_per_prompt),
            num_inference_steps,
            guidance_scale,
            **options,
        )
        if latents is None:
            batch = num_images_per_prompt if isinstance(prompt, str) else None
            latents = chain.noise(batch=batch, generator=generator)
        self.interrupt = False
        callback = None if callback_on_step_end is None else self._callback(callback_on_step_end, chain)
        result = optimize(chain, latents, chain.decode, loss, callback_on_step_end=callback, **ours)
        images, flags = self._output(result, output_type)
        if not return_dict:
            return images, flags
        return DoodlPipelineOutput(images, flags, result.losses, result)

    def _callback(self, callback: StepCallback, chain: DiffusionChain) -> Callable[[StepInfo], bool]:
        """Returns the callback of `optimize` that calls one in the manner of diffusers."""
        timestep = chain.schedule.timesteps[0]

        def call(info: StepInfo) -> bool:
            values = {"latents": info.latents[0], "images": info.images[0], "loss": info.loss}
            returned = callback(self, info.step, timestep, dict(values))
            changed = [name for name, value in (returned or {}).items() if value is not values.get(name)]
            if changed:
                raise ValueError(
                    f"callback_on_step_end: it returned other {', '.join(changed)}, which are not taken; "
                    "start another call with latents= instead"
                )
            return self.interrupt

        return call

    def _output(self, result: Result, output_type: str) -> tuple[Any, list[bool] | None]:
        """Returns the final pictures as `output_type` says, and what the safety checker says of each."""
        if output_type == "latent":
            return result.latents[0], None
        images, flags = result.images[0].as_subclass(Tensor), None
        if getattr(self.pipe, "safety_checker", None) is not None:
            images, flags = self.pipe.run_safety_checker(images, images.device, self.pipe.text_encoder.dtype)
        # As in diffusers, the checker has replaced flagged pictures by black ones, whose pixels are 0 already.
        hidden = [False] * len(images) if flags is None else flags
        pairs = zip(images, hidden, strict=True)
        images = torch.stack([image if flag else (image / 2 + 0.5).clamp(0, 1) for image, flag in pairs])
        if output_type == "pt":
            return images, flags
        if output_type == "np":
            return images.permute(0, 2, 3, 1).float().cpu().numpy(), flags
        return to_pil(images * 2 - 1), flags


def repeated(texts: str | list[str] | None, times: int) -> str | list[str] | None:
    """Returns each text of a list `times` times, in diffusers' order. One text serves any number of pictures.

    Raises:
        ValueError: `times` is no positive int.
    """
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise ValueError(f"num_images_per_prompt: expected a positive int, got {times!r}")
    return [text for text in texts for _ in range(times)] if isinstance(texts, list) else texts
