"""From noise latents to losses, and back to the gradients of the losses with respect to the latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..chain.memory.planner import release
from ..diffusion.pipeline import Decoder
from . import low_memory
from .checkpoint import random_state, restore_random_state
from .ignored_leaves import warn_of_ignored_leaves
from .result import Pair, as_images

Gradient = tuple[tuple[float, ...], tuple[Tensor, ...], list[Tensor]]
Scores = tuple[tuple[float, ...], tuple[Tensor, ...]]
Decode = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor], Tensor]


@dataclass
class Objective:
    """The function that an optimisation minimises: chain, decoder and loss, one after the other.

    Attributes:
        chain: ``x0, y0 = chain(x, y)``, differentiable.
        decode: Final latents (B, C, ...) -> images, differentiable.
        loss: Images -> scalar, differentiable.
        dtype: The dtype of the latents that the caller gave. A `decode` of the caller's own gets this dtype.
        members: 2 if the images of both x0 and y0 are scored, 1 if only those of x0 are.

    The cotangents that pass from the loss to the chain are float32 or float64, whatever `dtype` is.
    """

    chain: Callable[..., Pair]
    decode: Decode
    loss: Loss
    dtype: torch.dtype
    members: int
    _first: bool = field(default=True, repr=False)

    @property
    def starts(self) -> int:
        """How many latents the chain starts from: 2, unless the chain says that it has one.

        A chain of one latent gets x. Its gradient stands for y's too, so x and y stay equal.
        """
        return getattr(self.chain, "num_starts", 2)

    def gradient(self, latents: list[Tensor], step: int) -> Gradient:
        """Losses, images, and gradients with respect to the latents.

        If memory runs out and the chain plans its memory, decoder and loss, then the chain's plan, are replaced by
        versions that need less memory, and the gradient is computed again.

        Args:
            latents: The noise latents [x, y], each (B, C, ...).
            step: Number of the optimisation step, for error messages.

        Returns:
            The losses of the scored members, their images, and [dL/dx, dL/dy] with L the sum of the losses.

        Raises:
            FloatingPointError: A loss or a gradient is not finite.
        """
        if getattr(self.chain, "planner", None) is None:
            return self._gradient(latents, step)
        random = random_state()
        while True:
            try:
                return self._gradient(latents, step)
            except torch.OutOfMemoryError as error:
                failure = error.with_traceback(None)  # the traceback would keep the tensors of the failed attempt
            release(latents[0].device)
            if not self._shrink(latents[0]):
                raise failure
            restore_random_state(random)

    def _shrink(self, latents: Tensor) -> bool:
        """Makes the decoder, the loss or the chain's plan smaller; False if none of them can be."""
        pair = low_memory.next_smaller(self.decode, self.loss)
        if pair is None:
            return self.chain.planner.make_smaller_plan(latents) is not None  # type: ignore[attr-defined]
        self.decode, self.loss = pair
        return True

    @torch.enable_grad()
    def _gradient(self, latents: list[Tensor], step: int) -> Gradient:
        # the chain gives its gradients in its inputs' dtype
        start = [wide(z.detach()).requires_grad_() for z in latents[: self.starts]]
        ends = self.chain(*start)
        values, images, cotangents = [], [], []
        for end in ends[: self.members]:
            # one member after the other, so that one decoder graph is alive at a time
            leaf = end.detach().to(decoder_dtype(self.decode, self.dtype, end.dtype)).requires_grad_()
            image, value = self._score(leaf)
            if self._first:
                self._first = False
                warn_of_ignored_leaves(value, leaf)
            cotangents.append(cotangent_of(value, leaf, image.numel()).to(end.dtype))
            values.append(value.detach())
            images.append(image.detach())
            del image, value
        losses = _finite_losses(values)
        cotangents += [torch.zeros_like(end) for end in ends[self.members :]]
        gradients = list(torch.autograd.grad(ends, start, cotangents))
        if not bool(torch.stack([torch.isfinite(g).all() for g in gradients]).all()):
            raise FloatingPointError(
                f"gradient: NaN or Inf at optimisation step {step}; a `Chain` names its own, so look at the loss and "
                "the decoder: try float32 for them, or a lower grad_scale"
            )
        return losses, as_images(images), gradients if len(gradients) == 2 else [gradients[0], gradients[0]]

    @torch.no_grad()
    def value(self, latents: Pair) -> Scores:
        """Losses and images of the noise latents (x, y), without gradients."""
        values, images = [], []
        for end in self.chain(*(wide(z) for z in latents[: self.starts]))[: self.members]:
            image, value = self._score(end.to(decoder_dtype(self.decode, self.dtype, end.dtype)))
            values.append(value)
            images.append(image)
        return _finite_losses(values), as_images(images)

    def _score(self, end: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the 0-dim loss of final latents; what decoder and loss return is checked."""
        image = self.decode(end)
        if not isinstance(image, Tensor):
            hint = "return its .sample" if hasattr(image, "sample") else "return the images as one tensor"
            raise TypeError(f"decode: expected a function that returns a tensor, got {type(image).__name__}; {hint}")
        value = self.loss(image)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: expected a differentiable scalar tensor, got {got}; reduce it with .mean()")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(
                "loss: expected a differentiable scalar, got one without a graph; do not detach, and do not decode or "
                "score under torch.no_grad()"
            )
        return image, value.reshape(())


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def decoder_dtype(decode: Decode, dtype: torch.dtype, chain_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `decode` gets the final latents.

    A `Decoder` casts to the dtype of its VAE itself and keeps cotangents in float32, so it gets at least float32. Any
    other function gets the dtype of the latents that the caller gave.
    """
    return torch.promote_types(dtype, chain_dtype) if isinstance(decode, Decoder) else dtype


def cotangent_of(value: Tensor, leaf: Tensor, pixels: int) -> Tensor:
    """d value / d leaf, in float32 or float64.

    In float16 the gradient of a mean over pixels lies among the subnormal numbers or vanishes. So for float16 leaves
    the loss is multiplied by a power of two, which is exact, and the gradient divided by it in float32, as loss scaling
    does in mixed-precision training. The first power follows from the number of pixels alone, and not from earlier
    steps, so that a resumed run computes the same bits.

    Args:
        value: The loss, a 0-dim tensor.
        leaf: The latents of the decoder.
        pixels: Number of elements of the image.
    """
    if leaf.dtype != torch.float16:
        (cotangent,) = torch.autograd.grad(value, leaf)
        return wide(cotangent)
    highest = 15 if value.dtype == torch.float16 else 100  # the scale itself has to fit into the dtype of the loss
    exponent = min(pixels.bit_length(), highest)
    for _ in range(6):
        (cotangent,) = torch.autograd.grad(value, leaf, torch.full_like(value, 2.0**exponent), retain_graph=True)
        largest = float(cotangent.abs().amax())
        better = max(-highest, min(highest, exponent + _exponent_change(largest)))
        if better == exponent:
            break
        exponent = better
    return cotangent.float() * 2.0**-exponent


def _exponent_change(largest: float) -> int:
    """By how much to raise the exponent of the loss scale, for the largest magnitude of a float16 gradient."""
    if largest == 0:
        return 20
    if not math.isfinite(largest):
        return -20
    exponent = math.frexp(largest)[1]
    return 0 if 3 <= exponent <= 14 else 10 - exponent


def _finite_losses(values: list[Tensor]) -> tuple[float, ...]:
    """The losses as numbers, in one transfer from the device. Raises FloatingPointError if one is not finite."""
    losses = tuple(torch.stack([value.detach() for value in values]).tolist())
    for loss in losses:
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss: expected a finite value, got {loss}")
    return losses
