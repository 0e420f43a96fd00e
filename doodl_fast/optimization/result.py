"""What an optimisation shows while it runs (`StepInfo`) and what it returns (`Result`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from ..diffusion.images import ImageTensor
from ..diffusion.videos import VideoTensor

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepInfo:
    """The state of an optimisation just before one update, as a callback receives it.

    Attributes:
        step: Number of the optimisation step, counted from 0.
        loss: Mean of the losses of the decoded images.
        latents: The noise latents (x, y) that were decoded, each (B, C, ...).
        terms: The value of each loss by name, without its weight.
        sample_losses: With ``per_sample=True`` the loss of each sample of the batch.
        variables: The values of the other variables, by name.
        images: The decoded images, detached: those of x and of y, or those of x alone with ``first_image_only``.
            Pictures (B, 3, H, W) are `ImageTensor`s and videos (B, F, 3, H, W) `VideoTensor`s, which have a method
            `save`.
    """

    step: int
    loss: float
    latents: Pair
    images: tuple[Tensor, ...]
    terms: dict[str, float] = field(default_factory=dict)
    sample_losses: tuple[float, ...] = ()
    variables: dict[str, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What an optimisation found.

    Attributes:
        latents: The final noise latents (x, y), each (B, C, ...), in float32 or float64.
        images: The images that they decode to: those of x and of y, or those of x alone with ``first_image_only``.
            Images of shape (B, 3, H, W) are `ImageTensor`s and videos (B, F, 3, H, W) `VideoTensor`s, which have a
            method `save`.
        losses: The mean loss of every step, each taken before the step's update.
        pair_losses: For every step the loss of each decoded image.
        final_loss: The mean loss of the final latents.
        best_step: The step whose latents had the lowest loss. It is ``len(losses)`` if the final latents, after the
            last update, had it.
        best_loss: The lowest loss.
        best_latents: The latents (x, y) with the lowest loss.
        best_images: The images that they decode to.
        history: For each loss by name its values, without its weight, as in `losses`.
        variables: The final values of the variables besides the starting latents, by name: lists of tensors.
        best_variables: Those with the lowest loss.
        weight_names: The names of the network's weights that were optimised, in the order of ``variables["weights"]``.
        samples: With ``per_sample=True`` the result of each sample, as a run of its own would have returned it. Then
            `best_latents`, `best_images` and `best_variables` are each sample's own best ones, `best_loss` is the mean
            of theirs, and `best_step` is the last of theirs.

    Example:
        >>> optimize(chain, noise, decoder, loss).images[0].save("dog.png")

    If a callback ended the run, then no update followed the last entry of ``losses``: the final latents, images and
    loss are those that the callback saw.
    """

    latents: Pair
    images: tuple[Tensor, ...]
    losses: list[float]
    pair_losses: list[tuple[float, ...]]
    final_loss: float
    best_step: int
    best_loss: float
    best_latents: Pair
    best_images: tuple[Tensor, ...]
    history: dict[str, list[float]] = field(default_factory=dict)
    variables: dict[str, list[Tensor]] = field(default_factory=dict)
    best_variables: dict[str, list[Tensor]] = field(default_factory=dict)
    samples: list[Result] = field(default_factory=list)
    weight_names: tuple[str, ...] = ()

    def state_dict(self, best: bool = False) -> dict[str, Tensor]:
        """The weights that were optimised by their names in the network, which itself has been left as it was.

        Args:
            best: Whether to return those with the lowest loss, in the place of the final ones.

        Raises:
            ValueError: No weights were optimised.

        Example:
            >>> pipe.unet.load_state_dict(result.state_dict(), strict=False)
        """
        if not self.weight_names:
            raise ValueError(
                "state_dict: expected a run whose variables include 'weights', got one without; pass "
                "variables=['weights'] to optimize"
            )
        tensors = (self.best_variables if best else self.variables)["weights"]
        return dict(zip(self.weight_names, tensors, strict=True))


def as_images(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, pictures (B, 3, H, W) as `ImageTensor`s and videos (B, F, 3, H, W) as `VideoTensor`s."""
    return tuple(_as_image(tensor) for tensor in tensors)


def _as_image(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.ndim == 4 and tensor.shape[1] == 3:
        return ImageTensor(tensor)
    return VideoTensor(tensor) if tensor.ndim == 5 and tensor.shape[2] == 3 else tensor
