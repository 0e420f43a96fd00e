"""What Stable Diffusion's users put around its UNet: each kind is an `Addition` in a file of its own."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..decoder import Decoder
from ..latent_space import LatentSpace
from .base import Request, components_of


@dataclass
class Build:
    """A chain in the making, which additions change.

    Attributes:
        pipe: The pipeline.
        request: What `from_pipeline` was given.
        guided: Whether the network is called on both halves of guidance, [uncond; cond].
        unet: The UNet in it: the pipeline's own, or a copy.
        network: What the `Denoiser` will call: the UNet, or a module around it.
        space: The shape of the latents, and what `chain.noise` draws.
        decoder: From latents to images.
        kwargs: Further arguments of the network, or of the `Denoiser`.
        has_own_guidance: Whether the two halves that the network returns are not its predictions.
    """

    pipe: Any
    request: Request
    guided: bool
    unet: Any
    network: Any
    space: LatentSpace
    decoder: Decoder
    kwargs: dict[str, Any] = field(default_factory=dict)
    has_own_guidance: bool = False


class Addition(ABC):
    """One of the things that a pipeline may have around its UNet.

    It is made for one chain, from the pipeline and the options of `from_pipeline` that are its own.

    Args:
        pipe: The pipeline.
        options: The arguments of `options` that were given.
        request: What else `from_pipeline` was given.
    """

    component: ClassVar[str] = ""
    """The component of the pipeline that it is about, if it has one."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """The names of the classes of pipelines in which it is known what is done with the component."""
    options: ClassVar[frozenset[str]] = frozenset()
    """The arguments of the pipeline's `__call__` that it takes."""
    sees_more: ClassVar[bool] = False
    """Whether it serves UNets that take more channels than the latents have."""

    @abstractmethod
    def __init__(self, pipe: Any, options: Mapping[str, Any], request: Request) -> None: ...

    @classmethod
    def takes(cls, pipe: Any) -> frozenset[str]:
        """Returns the names of the options that it takes from a pipeline of this class."""
        return cls.options

    @classmethod
    def is_in(cls, pipe: Any) -> bool:
        """Whether a pipeline has it."""
        names = {base.__name__ for base in type(pipe).__mro__}
        has_part = not cls.component or components_of(pipe).get(cls.component) is not None
        return has_part and not names.isdisjoint(cls.pipelines)

    def size(self) -> tuple[int | None, int | None]:
        """Returns the height and width of the picture in pixels; None leaves them to the pipeline."""
        return None, None

    @abstractmethod
    def add(self, build: Build) -> None:
        """Puts it around the network."""


class AroundUNet(nn.Module):
    """A module around a UNet, which is called as the UNet is and returns a tuple, so that they can be nested.

    Args:
        unet: The UNet, or another such module around it.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.training = unet.training

    def predict(self, sample: Tensor, timestep: Tensor, states: Tensor, **kwargs: Any) -> Tensor:
        """Calls the UNet and returns its prediction.

        Args:
            sample: What the UNet is given, (B, channels, h, w).
            timestep: A 0-dim tensor.
            states: The prompts' embeddings, (B, tokens, features).
            **kwargs: Further arguments of the UNet.
        """
        kwargs["return_dict"] = False
        found: Tensor = self.unet(sample, timestep, encoder_hidden_states=states, **kwargs)[0]
        return found

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class StepWeights(nn.Module):
    """Looks up the weights that belong to a step of the sampler by the step's timestep, without leaving the device.

    Between two timesteps, where some solvers evaluate the network, the weights are those of the step that leads from
    one to the other.

    Args:
        timesteps: One for each step, from noise to picture.
        weights: For each step a list of numbers.
        argument: The argument that makes the weights differ, for errors.
        device: Where the network is.

    Raises:
        ValueError: A timestep belongs to several steps.
    """

    timesteps: Tensor
    weights: Tensor

    def __init__(
        self, timesteps: Sequence[float], weights: Sequence[Sequence[float]], argument: str, device: Any
    ) -> None:
        super().__init__()
        if any(now <= after for now, after in itertools.pairwise(timesteps)):
            raise ValueError(
                f"{argument}: expected a scheduler that has each timestep once, got one that calls the network several "
                "times at a timestep, so that the step is not known by it; use a scheduler of first order"
            )
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.float32, device=device))
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32, device=device))

    def forward(self, t: Tensor) -> Tensor:
        """Returns the weights at a timestep, a vector.

        Args:
            t: The timestep, a 0-dim tensor.
        """
        step = (self.timesteps >= t).sum() - 1
        return self.weights.index_select(0, step.clamp(min=0).reshape(1))[0]


def numbers(name: str, value: Any, count: int) -> list[float]:
    """Returns an argument that is one number for all networks, or a list with one for each.

    Raises:
        ValueError: It is neither, or the list has another length.
    """
    found = list(value) if isinstance(value, (list, tuple)) else [value] * count
    is_number = all(isinstance(entry, (int, float)) and not isinstance(entry, bool) for entry in found)
    if len(found) != count or not is_number:
        raise ValueError(f"{name}: expected a number, or a list of {count}, one for each network, got {value!r}")
    return [float(entry) for entry in found]
