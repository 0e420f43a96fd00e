"""`Denoiser`: a network that predicts noise, with its conditions and classifier-free guidance in one batched call."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.evaluator import guided_output
from ..frozen import Level, level_of
from .active_calls import Variant, active_call, active_conditions, active_run, calling_copies, explain_cast
from .calling import NetworkCall, module_of
from .conditions import Fit, check_conditions, map_tensors, tensors_of
from .cuda_graphs import CudaGraphs
from .denoiser_forms import AUTO, DenoiserForms
from .hooks import first_weight, refuse_caches
from .networks import FLOAT_DTYPES, as_tensor, refuse_stochastic
from .timesteps import Timesteps
from .trainable import Trainable, trained_weights

Combine = Callable[[Tensor, Tensor, float, Tensor], Tensor]


class Denoiser(DenoiserForms):
    """Predicts the noise eps(x, t) by a network, with its conditions and classifier-free guidance bound to it.

    With guidance, `eps = eps_u + guidance_scale * (eps_c - eps_u)` (arXiv 2207.12598), where both predictions come from
    one call on a batch of 2B, [uncond; cond]. As in diffusers, a `guidance_scale` of at most 1 means the prediction for
    `cond` alone, from one call on a batch of B. For the prediction without a prompt, give its condition as `cond`:
    `Denoiser(unet, uncond)`.

    The network must return the same value whenever it is given the same arguments. It gets copies of the latents and
    the conditions, so it may change them in place. All attributes are read-only, because a gradient must see what its
    forward run saw.

    Args:
        unet: A diffusers UNet, or any module or function whose parameters include `encoder_hidden_states`; it is called
            as `unet(x, t, encoder_hidden_states=cond, return_dict=False, **unet_kwargs)[0]`. Any other callable is
            called as `unet(x, t, cond, **unet_kwargs)` and returns a tensor, a tuple that begins with it, or an object
            that has it as `.sample`. x arrives in the dtype of the network's weights, or, for a callable that is not a
            module, in the dtype of the caller's latents. t is a 0-dim tensor on x's device, int64, or float32 for a
            fraction; it must not be changed in place.
        cond: The condition, a tensor (1, ...) or (B, ...); None for a network that needs none.
        uncond: The condition without a prompt, (1, ...) or (B, ...); None for no guidance. Floating conditions are cast
            to the network's dtype.
        guidance_scale: The weight of classifier-free guidance.
        vjp_dtype: The dtype in which chains evaluate the network for its VJPs: torch.float32, torch.float64, or None
            for that of its weights. "auto" is float32 for fp16 and bf16 weights on a CPU, whose half-precision kernels
            are less accurate and slower than its float32 ones, and None otherwise. The weights are cast once for each
            backward pass and freed with it. Where couplings are undone too (`memory` is an int or "reversible"), the
            value that undoes them needs a call of its own. It has no effect on plain callables; memory="naive" takes
            the network's own VJPs under "auto" and refuses a dtype. See docs/precision.md.
        compile: Whether the network is called through `torch.compile`, for its value and its VJP. It rounds otherwise
            than the network itself, and may round otherwise with a graph than without; see docs/memory.md.
        guide_below_one: Whether the formula of guidance is used for a `guidance_scale` below 1 too. At 0 it gives the
            prediction for `uncond`.
        combine: For guidance that is not the formula above, such as one that keeps the norm of the prediction for
            `cond`: a function `(uncond, cond, guidance_scale, t)` of both predictions (B, C, ...), in float32 at least,
            that returns eps. It is differentiated by autograd, so it must be made of differentiable operations, and it
            must return the same value whenever it is given the same arguments. It is not called without guidance.
        lean: Whether the graph of an evaluation keeps no more than the gradient needs, see docs/lean.md. With
            "recompute" it keeps still less, and computes some matrix products again. The bits are those of False, but
            for GroupNorm with SiLU on GPUs (and on CPUs for channels_last in half precision), which rounds less often.
        trainable: The weights that chains give gradients, see docs/weights.md: True for all that require grad now, a
            predicate on the names of `named_parameters`, or a list of parameters. All others are frozen in every run.
        cuda_graphs: Whether a chain's calls and their VJPs are recorded once as CUDA graphs and replayed, see
            docs/cuda-graphs.md. "auto" does so on CUDA devices where it is faster, and where the network's modules are
            those of known libraries without hooks. True does so with any modules, and warns where it cannot. The
            attribute `cuda_graphs.why_not` says why calls are not replayed. The bits are the same.
        **unet_kwargs: Further arguments of the network. Tensors may be nested in dicts, lists and tuples. A tensor has
            1 or B rows. If `uncond` is given these are used for both halves, and a tensor may also have 2 or 2B rows,
            [uncond; cond], whose second half is used where the prediction for `cond` is used alone. Two rows for a
            batch of 2 can be read in both ways and are refused; a `Guided` pair has no such ambiguity. 0-dim tensors
            and other values are passed on as they are.

    Raises:
        TypeError: An argument is of a wrong kind.
        ValueError: `guidance_scale` is not finite, the conditions do not fit each other, `vjp_dtype`, `lean` or
            `cuda_graphs` is not one of the above, or `trainable` asks for weights that can have no gradient.

    Example:
        >>> denoiser = Denoiser(pipe.unet, cond, uncond, guidance_scale=7.5)
        >>> eps = denoiser(latents, 500)
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
        guide_below_one: bool = False,
        combine: Combine | None = None,
        lean: bool | str = True,
        trainable: Trainable = False,
        cuda_graphs: bool | str = "auto",
        **unet_kwargs: Any,
    ) -> None:
        if not callable(unet):
            raise TypeError(f"unet: expected a module or a callable (x, t, cond) -> eps, got {type(unet).__name__}")
        check_conditions(cond, uncond, guidance_scale)
        if uncond is not None and guidance_scale < 1 and not guide_below_one:
            warnings.warn(
                f"guidance_scale: {guidance_scale:g} is treated as 1, so the prediction for cond is used alone, as in "
                "diffusers; use Denoiser(unet, uncond) for the prediction without a prompt, and guide_below_one=True "
                "for eps_u + guidance_scale * (eps_c - eps_u)",
                RuntimeWarning,
                stacklevel=2,
            )
        self._unet: Callable[..., Any] = unet
        self._cond: Tensor | None = cond
        self._uncond: Tensor | None = uncond
        self._guidance_scale: float = float(guidance_scale)
        self._guided = uncond is not None and (guidance_scale > 1 or (guide_below_one and guidance_scale < 1))
        if combine is not None and not callable(combine):
            raise TypeError(
                f"combine: expected a function (uncond, cond, guidance_scale, t) -> eps or None, got {combine!r}"
            )
        self._combine = combine
        self._unet_kwargs: dict[str, Any] = unet_kwargs
        self._module: nn.Module | None = module_of(unet)
        self._call: NetworkCall = NetworkCall(unet, compile)
        self._trainable: tuple[nn.Parameter, ...] = trained_weights(self._module, unet, trainable, compile)
        if vjp_dtype not in (AUTO, None, torch.float32, torch.float64):
            raise ValueError(f'vjp_dtype: expected "auto", torch.float32, torch.float64 or None, got {vjp_dtype!r}')
        if isinstance(vjp_dtype, torch.dtype) and self._module is None:
            raise ValueError(
                'vjp_dtype: expected "auto" or None for a callable without weights; cast inside the callable'
            )
        self._vjp_dtype: torch.dtype | str | None = vjp_dtype
        self._variant: Variant = Variant(lean=level_of(lean))
        self._cuda_graphs: CudaGraphs = CudaGraphs(cuda_graphs)
        self._said: list[str] = []
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
    def combine(self) -> Combine | None:
        return self._combine

    @property
    def unet_kwargs(self) -> dict[str, Any]:
        """A copy of the extra arguments (the tensors themselves are not copied)."""
        return dict(self._unet_kwargs)

    @property
    def lean(self) -> Level:
        """How little the graphs of this denoiser keep."""
        return self._variant.lean

    @property
    def cuda_graphs(self) -> CudaGraphs:
        """The recordings of the network's calls; `cuda_graphs.why_not` says why there are none."""
        return self._cuda_graphs

    @property
    def trainable(self) -> tuple[nn.Parameter, ...]:
        """The weights of the network that chains give gradients."""
        return self._trainable

    @property
    def vjp_dtype(self) -> torch.dtype | str | None:
        return self._vjp_dtype

    @property
    def guided(self) -> bool:
        """Whether the predictions for `uncond` and `cond` are combined."""
        return self._guided

    def __repr__(self) -> str:
        name = type(self._module).__name__ if self._module is not None else getattr(self._unet, "__name__", "callable")
        return f"Denoiser({name}, guidance_scale={self._guidance_scale if self.guided else 1.0:g})"

    # What the chain's engine asks for

    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions and the trained weights. Those that require grad are given gradients."""
        return (*tensors_of(self._conditions()), *self._trainable)

    def compute_dtype(self, latents_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which the network gets x: that of its weights, or the latents' if it has none."""
        if self._variant.cast_to is not None:
            return self._variant.cast_to
        found = first_weight(self._module)
        return latents_dtype if found is None else found[1]

    def weights(self) -> tuple[tuple[str, Tensor], ...]:
        """The name and the tensor of each of the network's parameters and buffers."""
        if self._module is None:
            return ()
        return (*self._module.named_parameters(), *self._module.named_buffers())

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A context for the length of a run, in which no graph is recorded for gradients of the network's weights.

        If they require grad, this thread calls copies of the network wherever it records a graph. The copies share the
        network's weights, but those do not require grad, as autograd would keep the activations that only their
        gradients need. The network itself is not changed, so any number of threads may run at once. Where copies would
        not do what the network does, because its `forward` was replaced, it is compiled or wrapped for parallel use, or
        its weights are of a class of their own, the network itself is called, and its weights do not require grad for
        the length of the context.

        Raises:
            ValueError: The network has active dropout or batch statistics.
        """
        if self._module is None:
            yield
            return
        if self._variant.cast_to is None:
            refuse_stochastic(self._module)
            refuse_caches(self._module)
        with calling_copies(self._call, self._module, self._variant):
            yield

    def __call__(
        self,
        x: Tensor,
        t: int | float | Tensor,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Predicts the noise; guidance is combined in float32 at least.

        Args:
            x: Noisy latents, a floating tensor (B, C, ...).
            t: The timestep, a number or a tensor of one element.
            tensors: Used in place of what `tensors()` returns, in that order; None means those themselves.
            latents_dtype: The dtype in which a callable without weights computes; None means x's.

        Returns:
            eps, of x's shape and dtype. It raises what `raw` raises.
        """
        return guided_output(self.raw(x, t, tensors, latents_dtype), x.dtype)

    def raw(
        self,
        x: Tensor,
        t: int | float | Tensor,
        tensors: Sequence[Tensor] | None = None,
        latents_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, float | None]:
        """Evaluates the network, and returns its own output in its own dtype.

        The fused operators of a chain cast, combine and differentiate it in one pass. Arguments are as in `__call__`.

        Returns:
            Either (eps, None), or ([uncond; cond], guidance_scale) where two predictions are to be combined. What
            `combine` returns is eps.

        Raises:
            ValueError: The network's output has another shape than its input, or a condition does not fit the batch.
            RuntimeError: The network changed its timestep in place.
        """
        conditions = self._conditions()
        left = iter(self._trainable if tensors is None else tensors)
        if tensors is not None:
            conditions = map_tensors(conditions, lambda _leaf, _name: next(left))
        given = dict(zip(map(id, self._trainable), left, strict=True))
        fit = Fit(x.shape[0], self.compute_dtype(latents_dtype or x.dtype), self._guided, self._uncond is not None)
        network_x = x.to(fit.dtype, copy=True)
        if self._guided:
            network_x = torch.cat([network_x, network_x])
        shape = network_x.shape
        cond, kwargs = active_conditions(self._call, self._variant).fitted(fit, conditions)
        timestep = self._timestep(t, x.device)
        version = None if timestep.is_inference() else timestep._version
        run = active_run(self._call, self._variant)
        with explain_cast(self._variant.cast_to):
            output = self._cuda_graphs.call(
                run,
                bool(given),
                lambda: active_call(self._call, self._variant, given),
                network_x,
                timestep,
                cond,
                kwargs,
            )
        if version is not None and timestep._version != version:
            self._timestep = Timesteps()  # The timestep is a view of a table, which is wrong now.
            raise RuntimeError("unet: expected it to leave its timestep as it is, got one that it changed in place")
        eps = as_tensor(output, "unet")
        if eps.shape != shape:
            raise ValueError(
                f"unet: expected an output of its input's shape {tuple(shape)}, got {tuple(eps.shape)}; "
                "wrap a network that also predicts a variance, or takes more channels, as (x, t, cond) -> eps"
            )
        if eps.dtype not in FLOAT_DTYPES:  # Such a dtype, float8 for instance, is for storage.
            eps = eps.float()
        if not self._guided or self._combine is None:
            return eps, self._guidance_scale if self._guided else None
        eps_uncond, eps_cond = eps.to(torch.promote_types(eps.dtype, torch.float32)).chunk(2)
        combined = self._combine(eps_uncond, eps_cond, self._guidance_scale, timestep)
        if combined.shape != x.shape:
            raise ValueError(
                f"combine: expected it to return a tensor of shape {tuple(x.shape)}, got {tuple(combined.shape)}"
            )
        return combined, None

    def _conditions(self) -> dict[str, Any]:
        """All conditions as one tree, without those for `uncond` if they are not used."""
        tree: dict[str, Any] = {"cond": self._cond, "kwargs": self._unet_kwargs}
        if self._guided:
            tree["uncond"] = self._uncond
        return tree
