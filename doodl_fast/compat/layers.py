"""The reference's layers, `SteppingLayer` and `MixingLayer`, built on the couplings of the chains.

One EDICT step (arXiv 2211.12446) is a program of two couplings, so one call of a layer is a short run of such a
program. Guidance takes one batched network call, the network's weights are frozen, and the updates are fused. The
backward pass evaluates the network once with a graph for each coupling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..chain.evaluator import Evaluator
from ..chain.program import Coupling, compact, invert
from ..diffusion.denoiser import Denoiser
from ..diffusion.networks import as_tensor
from ..solvers.edict import ddim_coefficients
from .noise import LayerNoise, NoiseLayer
from .operations import Mix, Step
from .quirks import Quirks
from .reversible import Operation, ReversibleLayer, Values, apply
from .schedule import DEFAULT, ReferenceScheduler, levels

Number = int | float | Tensor


class SteppingLayer(NoiseLayer):
    """One EDICT step of the reference (arXiv 2211.12446), without the mixing: `i, t, pair = layer(i, t, pair)`.

    `layer.inverse` undoes it. Gradients are computed for the pair, for the inputs that come after it, and for the
    embeddings if they require grad, but never for weights. To condition the network on anything else, override
    `predict_noise`.

    Args:
        unet: A diffusers UNet, or a module that is called in the same way.
        embedding_uc: The embedding of the negative prompt, of shape (1, L, D) or (B, L, D). None means no guidance.
        embedding_c: The embedding of the prompt, of shape (1, L, D) or (B, L, D).
        scheduler: A diffusers scheduler; None for Stable Diffusion's. Its `set_timesteps(num_timesteps)` is called.
        num_timesteps: The number of sampling steps.
        guidance_scale: The scale g in `eps_uc + g (eps_c - eps_uc)`. It is applied at any value, as in the reference.
        clip_cond_fn: A function `(latent, t, scheduler=) -> gradient`. `sqrt(1 - alpha)` times the gradient is
            subtracted from the noise. It is treated as a constant: no derivative is taken of it.
        single_variable: Whether the step is plain DDIM on the first latent, which then stands for both. The inverse of
            such a step is not exact.
        quirks: Which peculiarities of the reference are reproduced.

    Raises:
        TypeError: An argument of a call has the wrong type.
        ValueError: An argument of a call has the wrong shape or value.
        FloatingPointError: NaN or Inf appears in the latents or in a gradient.

    Example:
        >>> layer, mix = SteppingLayer(unet, uncond, cond), MixingLayer()
        >>> for i, t in enumerate(layer.scheduler.timesteps):
        ...     i, t, pair = layer(i, t, pair)
        ...     pair = mix(pair)
    """

    def __init__(
        self,
        unet: Any,
        embedding_uc: Tensor | None,
        embedding_c: Tensor | None,
        scheduler: Any = None,
        num_timesteps: int = 50,
        guidance_scale: float = 7.5,
        clip_cond_fn: Callable[..., Tensor] | None = None,
        single_variable: bool = False,
        *,
        quirks: Quirks = DEFAULT,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.e_uc = embedding_uc
        self.e_c = embedding_c
        self.num_timesteps = num_timesteps
        self.guidance_scale = guidance_scale
        self.scheduler = ReferenceScheduler(quirks) if scheduler is None else scheduler
        self.scheduler.set_timesteps(num_timesteps)
        self.clip_cond_fn = clip_cond_fn
        self.single_variable = single_variable
        self.quirks = quirks
        self._made: tuple[tuple[Any, ...], Denoiser] | None = None
        self._table: tuple[Any, dict[int, tuple[float, float]]] = None, {}

    def forward(self, i: Number, t: Number, latent_pair: Tensor, *extra: Any, reverse: bool = False) -> Values:
        """Does one step.

        Args:
            i: The index of the loop, a number or a tensor of one element and any dtype. The value of a GPU tensor is
                read back, which synchronises once for i and t together. Numbers and CPU tensors need no
                synchronisation.
            t: The timestep, likewise.
            latent_pair: The latents [x; y], a floating tensor of shape (2, C, ...) or (2B, C, ...).
            extra: Further inputs, which are handed to `predict_noise` and returned as they are.
            reverse: Whether to undo the step instead, as `inverse` does.

        Returns:
            Clones of i and t, the new pair, and the further inputs.
        """
        return apply(self.operation((i, t, latent_pair, *extra), reverse), (i, t, latent_pair, *extra))

    def inverse(self, i: Number, t: Number, latent_pair: Tensor, *extra: Any) -> Values:
        """Undoes the step at timestep t.

        Arguments and results are those of `forward`, except that `i` counts a loop in the opposite direction: it is
        `n - 1 - i` for the i-th of n forward steps. A wrapped layer turns the index around by itself when it rebuilds
        its inputs.
        """
        return self.forward(i, t, latent_pair, *extra, reverse=True)

    def predict_noise(self, latent: Tensor, t: Tensor, *extra: Any) -> Tensor:
        """Predicts the noise in a latent; override this method for ControlNet, video or other conditions.

        It must return the same value whenever it is given the same arguments. Every module with weights that it calls
        must be an attribute of the layer, because only those are frozen during a call.

        Args:
            latent: One latent of shape (B, C, ...), in the dtype of the layer's weights.
            t: The timestep, a 0-dim int64 tensor on the latent's device.
            extra: What the layer was given after the pair.

        Returns:
            The noise, in the latent's shape.
        """
        if self._fits(latent.shape[0]):
            return self._denoiser()(latent, t)
        noise = self._noise(latent, t, self.e_c)
        if self.e_uc is None:
            return noise
        noise_uc = self._noise(latent, t, self.e_uc)
        return noise_uc + self.guidance_scale * (noise - noise_uc)

    def operation(self, inputs: Values, inverse: bool) -> Operation:
        """Returns what one call with these inputs does; see `ReversibleLayer.operation`."""
        i, t, pair, *extra = inputs
        check_pair(pair, "latent_pair")
        first, timestep = self._place(i, t, inverse)
        alpha, alpha_prev = self._levels(timestep)
        kind = "epsilon" if self.quirks.ignored_prediction_type else self.scheduler.config.prediction_type
        a, c, b = ddim_coefficients(alpha, alpha_prev, kind)
        targets = (0,) if self.single_variable else (first, 1 - first)
        program = compact(Coupling(target, a, c, b, 0, timestep) for target in targets)
        return Step(
            self._evaluator(pair, tuple(extra)),
            invert(program) if inverse else program,
            (alpha_prev, alpha) if inverse else (alpha, alpha_prev),
            pair.dtype,
            self.single_variable,
            self.quirks.half_updates,
        )

    def _levels(self, timestep: int) -> tuple[float, float]:
        """Returns the noise levels that a step goes from and to.

        They are read off the scheduler once for each timestep, until its timesteps are set anew.
        """
        timesteps, rows = self._table
        if timesteps is not self.scheduler.timesteps:
            rows = {}
            self._table = self.scheduler.timesteps, rows
        if timestep not in rows:
            rows[timestep] = levels(self.scheduler, timestep, self.quirks)
        return rows[timestep]

    def _denoiser(self) -> Denoiser:
        """Returns the layer's denoiser, which is made anew only when one of the attributes that it uses was replaced.

        It is kept between calls because it holds tables on the device.
        """
        made, parts = self._made, (self.unet, self.e_c, self.e_uc, self.guidance_scale)
        if made is None or any(old is not new for old, new in zip(made[0], parts, strict=True)):
            self._made = made = parts, Denoiser(*parts, guide_below_one=True)
        return made[1]

    def _noise(self, latent: Tensor, t: Tensor, embedding: Tensor | None) -> Tensor:
        """Returns the network's prediction with one embedding, in a call of its own."""
        cond = None if embedding is None else embedding.to(latent.dtype)
        return as_tensor(self.unet(latent, t, encoder_hidden_states=cond), "unet")

    def _fits(self, batch: int) -> bool:
        """Returns whether both embeddings have one row or the latents' batch.

        Embeddings with a row for every frame of a video do not, and only the caller knows how to batch them.
        """
        return all(e is None or e.shape[0] in (1, batch) for e in (self.e_uc, self.e_c))

    def _evaluator(self, pair: Tensor, extra: Values) -> Evaluator:
        """Returns the function that a call's couplings evaluate: a `Denoiser` where that computes the same noise."""
        plain = getattr(self.predict_noise, "__func__", None) is SteppingLayer.predict_noise
        if plain and extra:
            raise TypeError(f"latent_pair: {len(extra)} more inputs came after it, and predict_noise takes none")
        if plain and self.clip_cond_fn is None and self._fits(pair.shape[0] // 2):
            return self._denoiser()
        return LayerNoise(self, extra)

    def _place(self, i: Number, t: Number, inverse: bool) -> tuple[int, int]:
        """Returns which latent the forward step at this place changes first (0 for x, 1 for y), and the timestep."""
        index, timestep = _read(i, t)
        if not self.quirks.order_by_index:
            return self.scheduler.timesteps.tolist().index(timestep) % 2, timestep
        if inverse:
            by_count = self.quirks.inverse_order_by_count
            index = (self.num_timesteps if by_count else len(self.scheduler.timesteps)) - 1 - index
        return index % 2, timestep


class MixingLayer(ReversibleLayer):
    """EDICT's mixing, `x <- p x + (1 - p) y`, then `y <- p y + (1 - p) x` (arXiv 2211.12446): `pair = mix(pair)`.

    Its input is a floating tensor of shape (2, ...), or (2B, ...) for [x; y]. Its gradient needs no stored tensor.

    Args:
        mix_weight: The weight p, with 0 < p <= 1.
        quirks: Which peculiarities of the reference are reproduced.

    Raises:
        TypeError: The input is no floating tensor.
        ValueError: `mix_weight` is out of range, or the input is no pair.
    """

    def __init__(self, mix_weight: float = 0.93, *, quirks: Quirks = DEFAULT) -> None:
        super().__init__()
        if not 0 < mix_weight <= 1:
            raise ValueError(f"mix_weight: expected a number in (0, 1], got {mix_weight!r}; DOODL uses 0.93")
        self.p = mix_weight
        self.quirks = quirks

    def forward(self, input_x: Tensor) -> Tensor:
        """Mixes x and y, and returns the pair in the shape and dtype of the input."""
        return apply(self.operation((input_x,), False), (input_x,))[0]

    def inverse(self, input_x: Tensor) -> Tensor:
        """Undoes the mixing."""
        return apply(self.operation((input_x,), True), (input_x,))[0]

    def operation(self, inputs: Values, inverse: bool) -> Operation:
        """Returns what one call with this input does; see `ReversibleLayer.operation`."""
        check_pair(inputs[0], "input_x")
        return Mix(self.p, inputs[0].dtype, inverse, self.quirks.half_updates)


def check_pair(pair: Any, name: str) -> None:
    """Raises TypeError or ValueError, naming the argument, unless `pair` is a floating tensor of two latents."""
    if not isinstance(pair, Tensor) or not pair.is_floating_point():
        got = pair.dtype if isinstance(pair, Tensor) else type(pair).__name__
        raise TypeError(f"{name}: expected a floating tensor of two latents, [x; y], got {got}")
    if pair.ndim < 2 or pair.shape[0] % 2 or not pair.shape[0]:
        raise ValueError(
            f"{name}: expected shape (2, C, ...), or (2B, C, ...), got {tuple(pair.shape)}; "
            "torch.cat([latent, latent]) makes a pair"
        )


def _read(i: Number, t: Number) -> tuple[int, int]:
    """Returns index and timestep as ints, read in one transfer if both are tensors on the same device."""
    values = [value.detach().reshape(-1) for value in (i, t) if isinstance(value, Tensor)]
    if any(value.numel() != 1 for value in values):
        raise ValueError(f"i, t: expected one index and one timestep, got shapes {[tuple(v.shape) for v in values]}")
    if len(values) == 2 and values[0].device == values[1].device:
        i, t = torch.cat([value.float() for value in values]).tolist()
    return int(i), int(t)
