"""The reference's layers, `SteppingLayer` and `MixingLayer`, on the library's own couplings.

One EDICT step (arXiv 2211.12446) is a program of two couplings, so a layer's call is a short run of the engine:
guidance in one batched network call, frozen weights, fused updates; backwards one evaluation with a graph a coupling.
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
    """One EDICT step: `i, t, latent_pair = s(i, t, latent_pair)`; `s.inverse` undoes it.

    unet: a diffusers UNet, or any module with its calling convention. embedding_uc, embedding_c: (1, L, D), or with the
        latents' batch; None as embedding_uc: no guidance.
    scheduler: a diffusers scheduler, or None for Stable Diffusion's; `set_timesteps(num_timesteps)` is called on it.
    guidance_scale: g in `eps_uc + g (eps_c - eps_uc)`. clip_cond_fn: a function `(latent, t, scheduler=) -> gradient`,
        of which `sqrt(1 - alpha) gradient` is subtracted from the noise; no derivative is taken of it.
    single_variable: plain DDIM on the first latent, which then stands for both; its inverse is not exact.
    quirks: see `Quirks`.

    i, t: the loop's index and the timestep: tensors of one element, of any dtype, or numbers. On a GPU their values are
        read back, the one synchronisation on the way in; numbers and CPU tensors cost none.
    latent_pair: (2, C, ...), or (2B, C, ...) = [x; y], floating, of any rank. What comes after it goes to
        `predict_noise`, and is passed through.
    Returns i and t as clones, the pair, and what came after it.

    To condition on anything else, override `predict_noise`; the class's one place for it. Gradients go to the pair and
    to those further inputs, and to the embeddings if they require grad; never to weights.
    Raises FloatingPointError where NaN or Inf appears, ValueError or TypeError, naming the argument.
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
        return apply(self.operation((i, t, latent_pair, *extra), reverse), (i, t, latent_pair, *extra))

    def inverse(self, i: Number, t: Number, latent_pair: Tensor, *extra: Any) -> Values:
        """Undoes the step at timestep t. i: the index of a loop in the opposite direction, `n - 1 - i` of the forward
        one; wrapped layers need no such care to rebuild their inputs."""
        return self.forward(i, t, latent_pair, *extra, reverse=True)

    def predict_noise(self, latent: Tensor, t: Tensor, *extra: Any) -> Tensor:
        """The noise in `latent`: the one method to override for ControlNet, video or other conditions.

        latent: (B, C, ...) in the dtype of the layer's weights. t: the timestep, 0-dim int64 on its device. extra: what
        the layer was given after the pair. Called without weight gradients, in eval mode; it must give the same value
        at every call, and call what has weights as attributes of the layer.
        Returns a tensor of latent's shape.
        """
        if self._fits(latent.shape[0]):
            return self._denoiser()(latent, t)
        noise = self._noise(latent, t, self.e_c)
        if self.e_uc is None:
            return noise
        noise_uc = self._noise(latent, t, self.e_uc)
        return noise_uc + self.guidance_scale * (noise - noise_uc)

    def operation(self, inputs: Values, inverse: bool) -> Operation:
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
        """The noise levels that a step goes from and to, read off the scheduler once for its current timesteps."""
        timesteps, rows = self._table
        if timesteps is not self.scheduler.timesteps:
            rows = {}
            self._table = self.scheduler.timesteps, rows
        if timestep not in rows:
            rows[timestep] = levels(self.scheduler, timestep, self.quirks)
        return rows[timestep]

    def _denoiser(self) -> Denoiser:
        """Made anew when one of the attributes that it stands for was replaced; it keeps tables on the device."""
        made, parts = self._made, (self.unet, self.e_c, self.e_uc, self.guidance_scale)
        if made is None or any(old is not new for old, new in zip(made[0], parts, strict=True)):
            self._made = made = parts, Denoiser(*parts)
        return made[1]

    def _noise(self, latent: Tensor, t: Tensor, embedding: Tensor | None) -> Tensor:
        cond = None if embedding is None else embedding.to(latent.dtype)
        return as_tensor(self.unet(latent, t, encoder_hidden_states=cond), "unet")

    def _fits(self, batch: int) -> bool:
        """Whether both embeddings have the latents' batch: those of every frame of a video have not, and cannot be
        batched without knowing how the network takes them."""
        return all(e is None or e.shape[0] in (1, batch) for e in (self.e_uc, self.e_c))

    def _evaluator(self, pair: Tensor, extra: Values) -> Evaluator:
        plain = getattr(self.predict_noise, "__func__", None) is SteppingLayer.predict_noise
        if plain and extra:
            raise TypeError(f"latent_pair: {len(extra)} more inputs came after it, and predict_noise takes none")
        if plain and self.clip_cond_fn is None and self._fits(pair.shape[0] // 2):
            return self._denoiser()
        return LayerNoise(self, extra)

    def _place(self, i: Number, t: Number, inverse: bool) -> tuple[int, int]:
        """Which latent the forward step at this place changes first, and the timestep."""
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
        return apply(self.operation((input_x,), False), (input_x,))[0]

    def inverse(self, input_x: Tensor) -> Tensor:
        return apply(self.operation((input_x,), True), (input_x,))[0]

    def operation(self, inputs: Values, inverse: bool) -> Operation:
        check_pair(inputs[0], "input_x")
        return Mix(self.p, inputs[0].dtype, inverse, self.quirks.half_updates)


def check_pair(pair: Any, name: str) -> None:
    if not isinstance(pair, Tensor) or not pair.is_floating_point():
        got = pair.dtype if isinstance(pair, Tensor) else type(pair).__name__
        raise TypeError(f"{name}: expected a floating tensor of two latents, [x; y], got {got}")
    if pair.ndim < 2 or pair.shape[0] % 2 or not pair.shape[0]:
        raise ValueError(
            f"{name}: expected shape (2, C, ...), or (2B, C, ...), got {tuple(pair.shape)}; "
            "torch.cat([latent, latent]) makes a pair"
        )


def _read(i: Number, t: Number) -> tuple[int, int]:
    """Index and timestep as ints, in one transfer where they lie on a device."""
    values = [value.detach().reshape(-1) for value in (i, t) if isinstance(value, Tensor)]
    if any(value.numel() != 1 for value in values):
        raise ValueError(f"i, t: expected one index and one timestep, got shapes {[tuple(v.shape) for v in values]}")
    if len(values) == 2 and values[0].device == values[1].device:
        i, t = torch.cat([value.float() for value in values]).tolist()
    return int(i), int(t)
