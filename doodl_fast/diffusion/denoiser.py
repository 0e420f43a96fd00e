"""The noise prediction eps(x, t): a network, its conditions, classifier-free guidance in one batched call."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.evaluator import Evaluator
from .calling import NetworkCall, module_of
from .guided import join_pairs
from .networks import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    as_tensor,
    blocks_checkpointed,
    has_blocks,
    lock_of,
    weights_cast,
    without_weight_grad,
)
from .timesteps import Timesteps

AUTO = "auto"


class Denoiser(Evaluator):
    """`eps = denoiser(x, t)` with the conditions bound to it.

    unet: a diffusers UNet (anything whose forward takes `encoder_hidden_states`), called as
        `unet(x, t, encoder_hidden_states=cond, return_dict=False, **unet_kwargs)[0]`, or any callable
        `(x, t, cond, **unet_kwargs) -> eps` (a tensor, a tuple, or an object with `.sample`). t is a 0-dim tensor
        on x's device, int64, or float32 for a fraction. It must be deterministic; x reaches it in the dtype of its
        weights, or, for a callable that is not a module, in the dtype of the caller's latents.
    cond, uncond: tensors whose leading dimension is 1 or the batch size B; cond may be None where none is needed.
    guidance_scale: g in `eps_u + g (eps_c - eps_u)` (classifier-free guidance, arXiv 2207.12598), both from one call on
        a batch of 2B, [uncond; cond]. With g = 1 or without uncond: one call on a batch of B, with cond alone.
    unet_kwargs: passed on; tensors may be nested in dicts, lists and tuples. Under guidance a leading dimension of B is
        used for both halves, 1 is expanded, 2B is taken as [uncond; cond], 2 as one of each (B wins over 2; a `Guided`
        pair has no such ambiguity). Without
        guidance: 1 or B, and when uncond was given also 2B or 2, whose second half is used. 0-dim tensors and other
        values pass through.

    vjp_dtype: dtype in which chains evaluate the network for its VJPs, torch.float32 or torch.float64; None: that of
        its weights. "auto": float32 for fp16 and bf16 weights on a CPU, whose half-precision kernels are less accurate
        and slower than its float32 ones, else None. What an fp16 network costs a gradient in accuracy it costs mostly
        there (docs/precision.md). The weights are cast anew for each VJP and freed with its graph. Where couplings are
        undone too (an int k, "reversible"), the value that undoes them needs a call of its own. Has no effect on plain
        callables; memory="naive" has the network's own VJPs under "auto" and refuses a dtype.
    compile: whether the network is called through `torch.compile`, for its value and its VJP. Rounds otherwise than the
        network itself, and may round otherwise with a graph than without; see docs/memory.md.

    Floating conditions are cast to the network's dtype. All attributes are read-only: a gradient must see what its
    forward saw.
    Raises TypeError or ValueError, naming the argument, for conditions that do not fit.
    """

    def __init__(
        self,
        unet: Callable[..., Any],
        cond: Tensor | None,
        uncond: Tensor | None = None,
        guidance_scale: float = 7.5,
        *,
        vjp_dtype: torch.dtype | str | None = AUTO,
        compile: bool = False,
        **unet_kwargs: Any,
    ) -> None:
        if not callable(unet):
            raise TypeError(f"unet: expected a module or a callable (x, t, cond) -> eps, got {type(unet).__name__}")
        for name, value in (("cond", cond), ("uncond", uncond)):
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
            if value is not None and value.ndim == 0:
                raise ValueError(f"{name}: expected a leading batch dimension, got a 0-dim tensor")
        if (
            isinstance(guidance_scale, bool)
            or not isinstance(guidance_scale, Real)
            or not math.isfinite(guidance_scale)
        ):
            raise ValueError(f"guidance_scale: expected a finite number, got {guidance_scale!r}")
        if cond is None and uncond is not None:
            raise ValueError("cond: expected a tensor because uncond is given, got None; guidance needs both")
        if cond is not None and uncond is not None and cond.shape[1:] != uncond.shape[1:]:
            raise ValueError(f"uncond: expected cond's shape {tuple(cond.shape)} but for B, got {tuple(uncond.shape)}")
        self._unet: Callable[..., Any] = unet
        self._cond: Tensor | None = cond
        self._uncond: Tensor | None = uncond
        self._guidance_scale: float = float(guidance_scale)
        self._unet_kwargs: dict[str, Any] = unet_kwargs
        self._module: nn.Module | None = module_of(unet)
        self._call: NetworkCall = NetworkCall(unet, compile)
        if vjp_dtype not in (AUTO, None, torch.float32, torch.float64):
            raise ValueError(f'vjp_dtype: expected "auto", torch.float32, torch.float64 or None, got {vjp_dtype!r}')
        if isinstance(vjp_dtype, torch.dtype) and self._module is None:
            raise ValueError(
                'vjp_dtype: expected "auto" or None for a callable without weights; cast inside the callable'
            )
        self._vjp_dtype: torch.dtype | str | None = vjp_dtype
        self._cast_to: torch.dtype | None = None
        self._checkpoints: bool = False
        self._timestep: Timesteps = Timesteps()

    @property
    def unet(self) -> Callable[..., Any]:
        return self._unet

    @property
    def cond(self) -> Tensor | None:
        return self._cond

    @property
    def uncond(self) -> Tensor | None:
        return self._uncond

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def unet_kwargs(self) -> dict[str, Any]:
        """A copy of the extra arguments (the tensors themselves are not copied)."""
        return dict(self._unet_kwargs)

    @property
    def vjp_dtype(self) -> torch.dtype | str | None:
        return self._vjp_dtype

    @property
    def guided(self) -> bool:
        """Whether two evaluations are combined."""
        return self._uncond is not None and self._guidance_scale != 1

    def __repr__(self) -> str:
        name = type(self._module).__name__ if self._module is not None else getattr(self._unet, "__name__", "callable")
        return f"Denoiser({name}, guidance_scale={self._guidance_scale if self.guided else 1.0:g})"

    # What the chain's engine asks for

    def tensors(self) -> tuple[Tensor, ...]:
        """Every tensor besides x that eps depends on, weights excepted: gradients are given to those that require
        grad."""
        return tuple(_leaves(self._conditions()))

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the network gets x: that of its weights, else the latents'."""
        if self._cast_to is not None:
            return self._cast_to
        weight = self._weight()
        return latents_dtype if weight is None else weight.dtype

    def _weight(self) -> Tensor | None:
        """The first of the network's weights that it computes with."""
        if self._module is None:
            return None
        with lock_of(self._module):
            # float8 and integer weights are storage formats that the module unpacks itself.
            return next((weight for weight in self._module.parameters() if weight.dtype in FLOAT_DTYPES), None)

    def for_vjp(self) -> Denoiser | None:
        """The same in vjp_dtype, whose `running` casts the weights; None where VJPs need no other. For chains."""
        dtype, weight = self._vjp_dtype, self._weight()
        if dtype == AUTO:
            slow = weight is not None and weight.device.type == "cpu" and weight.dtype in HALF_DTYPES
            dtype = torch.float32 if slow else None
        if not isinstance(dtype, torch.dtype) or self._module is None:
            return None
        other = copy.copy(self)
        other._vjp_dtype, other._cast_to = None, dtype
        return other

    def for_blocks(self) -> Denoiser | None:
        """The same, whose network keeps its blocks' inputs alone and computes the rest again; None if it has no blocks
        that can. For chains."""
        if not has_blocks(self._module):
            return None
        other = copy.copy(self)
        other._checkpoints = True
        return other

    @property
    def insists_on_vjps(self) -> bool:
        """Whether `vjp_dtype` names a dtype, which plain autograd through the network would not heed."""
        return isinstance(self._vjp_dtype, torch.dtype)

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """The name and the tensor of each of the network's parameters and buffers."""
        if self._module is None:
            return ()
        with lock_of(self._module):
            return (*self._module.named_parameters(), *self._module.named_buffers())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For the length of a run: the network is checked to be deterministic, and its weights do not require grad.

        Without this autograd would keep the activations that only weight gradients need. The flags are restored
        afterwards, also after an exception. Raises ValueError for active dropout or batch statistics.
        """
        if self._module is None:
            yield
            return
        if self._cast_to is not None:
            with weights_cast(self._module, self._cast_to):
                yield
            return
        _refuse_stochastic(self._module)
        blocks = blocks_checkpointed(self._module) if self._checkpoints else contextlib.nullcontext()
        with without_weight_grad(self._module), blocks:
            yield

    def __call__(
        self,
        x: Tensor,
        t: int | float | Tensor,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """eps of x's shape and dtype.

        x: (B, ...) floating. t: the timestep. tensors: replacements for `tensors()`, in that order.
        latents_dtype: what a callable without weights computes in (default: x's dtype).
        Guidance is combined in at least float32. Raises as `raw`.
        """
        eps, scale = self.raw(x, t, tensors, latents_dtype)
        eps = eps.to(torch.promote_types(x.dtype, torch.float32))
        if scale is not None:
            eps_uncond, eps_cond = eps.chunk(2)
            eps = eps_uncond + scale * (eps_cond - eps_uncond)
        return eps.to(x.dtype)

    def raw(
        self,
        x: Tensor,
        t: int | float | Tensor,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        """The network's own output, in its own dtype: (eps, None), or under guidance ([uncond; cond], guidance_scale).

        Arguments as in `__call__`. For the engine, whose fused ops combine, cast and differentiate it in one pass.
        Raises ValueError when the network's output has another shape than its input.
        """
        conditions = self._conditions()
        if tensors is not None:
            left = iter(tensors)
            conditions = _map_tensors(conditions, lambda _leaf, _name: next(left))
        batch, dtype = x.shape[0], self.compute_dtype(latents_dtype or x.dtype)
        network_x = x.to(dtype)
        cond: Tensor | None = None
        if self.guided:
            network_x = torch.cat([network_x, network_x])
            cond = torch.cat([_expand(conditions[name], batch, dtype, name) for name in ("uncond", "cond")])
        elif self._cond is not None:
            cond = _expand(conditions["cond"], batch, dtype, "cond")
        fit = _for_both if self.guided else _for_cond if self._uncond is not None else _expand
        pairs_joined = join_pairs(
            conditions["kwargs"], self.guided, lambda leaf, name: _expand(leaf, batch, dtype, name)
        )
        kwargs = _map_tensors(
            pairs_joined,
            lambda leaf, name: fit(leaf, batch, dtype, name) if leaf.ndim else _cast(leaf, dtype),
        )
        # Another thread may have cast the weights for a VJP.
        casts = dtype in HALF_DTYPES or self.insists_on_vjps
        with lock_of(self._module) if casts and self._module is not None else contextlib.nullcontext():
            output = self._call(network_x, self._timestep(t, x.device), cond, kwargs)
        eps = as_tensor(output, "unet")
        if eps.shape != network_x.shape:
            raise ValueError(
                f"unet: expected an output of its input's shape {tuple(network_x.shape)}, got {tuple(eps.shape)}; "
                "wrap a network that also predicts a variance, or takes more channels, as (x, t, cond) -> eps"
            )
        if eps.dtype not in FLOAT_DTYPES:  # a storage format
            eps = eps.float()
        return eps, self._guidance_scale if self.guided else None

    def _conditions(self) -> dict[str, Any]:
        """The tree of everything that eps is conditioned on; uncond is left out where it is not used."""
        tree: dict[str, Any] = {"cond": self._cond, "kwargs": self._unet_kwargs}
        if self.guided:
            tree["uncond"] = self._uncond
        return tree


def _refuse_stochastic(network: nn.Module) -> None:
    """A backward pass evaluates the network again and must find the same value: no noise, no running state."""
    for name, module in network.named_modules():
        if not module.training:
            continue
        dropout: float = 0.0
        if isinstance(module, nn.modules.dropout._DropoutNd):
            dropout = module.p
        elif isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
            dropout = module.dropout
        batch_statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) or (
            isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats
        )
        # its power iteration goes on at every call
        batch_statistics = batch_statistics or isinstance(module, nn.utils.parametrizations._SpectralNorm)
        if dropout > 0 or batch_statistics or isinstance(module, nn.RReLU):
            why = f"dropout p={dropout:g}" if dropout > 0 else "random or running statistics"
            raise ValueError(
                f"unet: {type(module).__name__} {name!r} is in training mode ({why}), so a second evaluation "
                "differs from the first and no gradient can be right; call unet.eval() first"
            )


# Trees of conditions


def _map_tensors(tree: Any, function: Callable[[Tensor, str], Any], name: str = "") -> Any:
    """The same tree of dicts, lists and tuples with every tensor replaced by function(tensor, its name)."""
    if isinstance(tree, Tensor):
        return function(tree, name)
    if isinstance(tree, dict):
        return {k: _map_tensors(v, function, f"{name}[{k!r}]" if name else str(k)) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [_map_tensors(v, function, f"{name}[{i}]") for i, v in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _leaves(tree: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _map_tensors(tree, lambda leaf, _: found.append(leaf))
    return found


def _cast(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf.to(dtype) if leaf.is_floating_point() else leaf


def _expand(leaf: Tensor, batch: int, dtype: torch.dtype, name: str) -> Tensor:
    if leaf.shape[0] not in (1, batch):
        raise ValueError(
            f"{name}: expected a leading dimension of 1 or {batch} (the latents' batch), got {leaf.shape[0]}"
        )
    return _cast(leaf, dtype).expand(batch, *leaf.shape[1:])


def _for_both(leaf: Tensor, batch: int, dtype: torch.dtype, name: str) -> Tensor:
    """An extra condition for the batch [uncond; cond]."""
    if leaf.shape[0] in (1, batch):
        half = _expand(leaf, batch, dtype, name)
        return torch.cat([half, half])
    if leaf.shape[0] == 2 * batch:
        return _cast(leaf, dtype)
    if leaf.shape[0] == 2:
        return _cast(leaf, dtype).repeat_interleave(batch, dim=0)
    raise ValueError(
        f"{name}: expected a leading dimension of 1, {batch} (used for both halves), {2 * batch} ([uncond; cond]) or 2 "
        f"(one of each), got {leaf.shape[0]}"
    )


def _for_cond(leaf: Tensor, batch: int, dtype: torch.dtype, name: str) -> Tensor:
    """An extra condition for cond alone, of which one made for [uncond; cond] gives its second half."""
    if leaf.shape[0] not in (1, batch) and leaf.shape[0] in (2, 2 * batch):
        leaf = leaf[leaf.shape[0] // 2 :]
    return _expand(leaf, batch, dtype, name)
