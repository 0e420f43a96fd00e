"""`Family`: what a kind of diffusers pipeline needs beside its scheduler to become a chain."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..decoder import Decoder
from ..denoiser import Denoiser
from ..latent_space import LatentSpace

ADAPTERS = "docs/adapters.md says how to write your own adapter"
BY_HAND = f"make the chain by hand with Denoiser(network, cond, uncond, ...), which takes any network ({ADAPTERS})"
PACKAGE = __name__.partition(".")[0]
DENOISER_OPTIONS = frozenset({"vjp_dtype", "compile", "lean", "trainable", "cuda_graphs"})


class Parts(NamedTuple):
    """What a chain is made of beside its schedule.

    Attributes:
        denoiser: The network with its conditions.
        space: The shape of the latents.
        decoder: From latents to images.
    """

    denoiser: Denoiser
    space: LatentSpace
    decoder: Decoder


@dataclass(frozen=True)
class Request:
    """The arguments of `from_pipeline` that a family reads.

    Attributes:
        prompt: One prompt, or several; None with `prompt_embeds` in the options.
        negative_prompt: One for all prompts, or one for each; None where the caller gave none.
        num_inference_steps: The number of sampling steps.
        guidance_scale: The guidance scale; "auto" is the family's own.
        height: Of a picture in pixels; None is the pipeline's own.
        width: Of a picture in pixels; None is the pipeline's own.
        options: Further arguments, which are neither from_pipeline's nor the solver's.
        timesteps: Those of the chain, from noise to picture; none before the scheduler was read.
        start: The shares of picture and noise in the latents that the chain starts from.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    num_inference_steps: int = 50
    guidance_scale: float | str = "auto"
    height: int | None = None
    width: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def negative_texts(self) -> str | list[str]:
        """The negative prompt, or "" where the caller gave none."""
        return "" if self.negative_prompt is None else self.negative_prompt

    timesteps: tuple[int | float, ...] = ()
    start: tuple[float, float] = (0.0, 1.0)


class Family(ABC):
    """Turns the diffusers pipelines of one kind into the parts of a chain.

    A subclass says which classes of pipelines it serves and implements `check` and `parts`.
    """

    pipelines: ClassVar[tuple[str, ...]] = ()
    """The names of the pipeline classes that it serves."""
    components: ClassVar[tuple[str, ...]] = ()
    """The components that it uses, or that change no picture."""
    required: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler")
    """The components without which there is no chain."""
    guidance_scale: ClassVar[float] = 7.5
    """The guidance scale where none is given."""
    takes_text: ClassVar[bool] = True
    """Whether its pipelines take a prompt."""
    takes_flows: ClassVar[bool] = False
    """Whether its networks predict the velocity of a flow, so that flow-matching schedulers are right for them."""

    @abstractmethod
    def check(self, pipe: Any) -> None:
        """Refuses a pipeline that lacks a part, or a part of which would be ignored.

        Raises:
            TypeError: A part is missing.
            ValueError: A part would be ignored.
        """

    @abstractmethod
    def parts(self, pipe: Any, request: Request) -> Parts:
        """Builds the denoiser, the latent space and the decoder of a pipeline that `check` has accepted.

        Raises:
            TypeError: An option is unknown, or a prompt is no text.
            ValueError: An argument is out of range.
        """

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """Returns the arguments that the pipeline gives its scheduler's `set_timesteps` beside the number of steps."""
        return {}

    def scale_of(self, request: Request) -> float:
        """Returns the guidance scale that was asked for, or the family's own.

        Raises:
            TypeError: It is no number.
        """
        scale = self.guidance_scale if request.guidance_scale == "auto" else request.guidance_scale
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"guidance_scale: expected a number, got {scale!r}")
        return float(scale)

    def components_of_class(self, names: Sequence[str]) -> set[str]:
        """Returns the names of the components that may be there in a pipeline of a class.

        Args:
            names: The names of the class and of those that it derives from.
        """
        return set(self.components)

    def check_saved(self, parts: Mapping[str, str], names: Sequence[str], source: str) -> None:
        """Refuses a saved pipeline that lacks a part, or a part of which would be ignored, before it is loaded.

        Args:
            parts: The class names of its components, by the components' names.
            names: The names of its class and of those that it derives from.
            source: The folder or hub id, for errors.

        Raises:
            ValueError: A part is missing or would be ignored.
        """
        missing = [name for name in self.required if name not in parts]
        if missing:
            raise ValueError(
                f"model: expected a pipeline with {', '.join(self.required)}, got {names[0]} in {source!r} without "
                f"{', '.join(missing)}"
            )
        ignored = sorted(parts.keys() - self.components_of_class(names))
        if ignored:
            raise ValueError(
                f"model: {names[0]} in {source!r} has {', '.join(ignored)}, which would be ignored; use a folder of "
                "the model without it"
            )

    def check_components(self, pipe: Any, required: tuple[str, ...] | None = None) -> None:
        """Refuses a pipeline without the required components, or with components that the family does not know.

        Args:
            pipe: The pipeline.
            required: Other components than the family's `required`.

        Raises:
            TypeError: A required component is missing.
            ValueError: A component would be ignored.
        """
        required = self.required if required is None else required
        name, parts = type(pipe).__name__, components_of(pipe)
        missing = [part for part in required if parts.get(part) is None]
        if missing:
            raise TypeError(f"pipe: expected {name} with {', '.join(required)}, got one without {', '.join(missing)}")
        ignored = sorted(part for part, value in parts.items() if value is not None and part not in self.components)
        if ignored:
            raise ValueError(
                f"pipe: {name} has {', '.join(ignored)}, which from_pipeline would ignore; use a pipeline without it, "
                f"or another family: {ADAPTERS}"
            )


def components_of(pipe: Any) -> dict[str, Any]:
    """Returns a pipeline's components by name, without its plain settings."""
    try:
        components = getattr(pipe, "components", None)
    except ValueError:  # diffusers' own refuses a pipeline with components that its class does not name.
        components = {name: getattr(pipe, name) for name, value in pipe.config.items() if isinstance(value, tuple)}
    parts = components if isinstance(components, Mapping) else getattr(pipe, "__dict__", {})
    return {name: value for name, value in parts.items() if not isinstance(value, (bool, int, float, str, list, tuple))}


def network_of(pipe: Any) -> Any:
    """Returns the pipeline's transformer, or its UNet."""
    transformer = getattr(pipe, "transformer", None)
    return pipe.unet if transformer is None else transformer


def take(options: dict[str, Any], names: set[str] | frozenset[str]) -> dict[str, Any]:
    """Takes the entries of those names out of the options."""
    return {name: options.pop(name) for name in sorted(names & options.keys())}


def refuse_unknown(options: Mapping[str, Any], pipe: Any, known: set[str]) -> None:
    """Raises TypeError for options that are left, with the names of those that there are."""
    if options:
        raise TypeError(
            f"{', '.join(options)}: from_pipeline has no such argument for {type(pipe).__name__}, and neither has the "
            f"solver; expected some of {', '.join(sorted(known | DENOISER_OPTIONS))}"
        )


def encoding_options(pipe: Any) -> set[str]:
    """Returns the names of the arguments of the pipeline's `encode_prompt` that are the caller's to give."""
    ours = {"prompt", "negative_prompt", "device", "do_classifier_free_guidance", "dtype", "kwargs"}
    known = set(inspect.signature(pipe.encode_prompt).parameters) - ours
    return {name for name in known if not (name.startswith("num_") and name.endswith("_per_prompt"))}


def keep_given(made: dict[str, Tensor | None], given: Mapping[str, Any], device: Any) -> dict[str, Tensor | None]:
    """Returns the embeddings that a pipeline has made, with those that the caller gave in their place.

    The caller's keep their graph, which the pipeline's own handling has cut.
    """
    return {name: value if given.get(name) is None else given[name].to(device) for name, value in made.items()}


def say(message: str) -> None:
    """Warns, at the line outside of this package that called it."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level + 1)


def warn_unused_negative_prompt(request: Request, why: str) -> None:
    """Says that a negative prompt or its embeddings have no effect."""
    given = [name for name, value in request.options.items() if name.startswith("negative_") and value is not None]
    for name in (["negative_prompt"] if request.negative_prompt else []) + given:
        say(f"{name}: it is not used {why}")
