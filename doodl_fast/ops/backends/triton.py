"""The Triton backend: for CUDA devices, and with `TRITON_INTERPRET=1` for the CPU, in Triton's interpreter.

The interpreter is slow and meant for tests. Nothing is autotuned: the kernels read and write memory once, and one block
size gives the widest loads for every dtype.

Each function that launches a kernel takes the arguments of one call as a named tuple (`Signature.kernel_call`), whose
first fields are the outputs to be filled.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .. import signatures
from ..lattice_coupling_op import limit
from . import triton_layers
from .registry import Kernel
from .triton_launch import arithmetic, blocks, floats, launch

OLDEST = (3, 6)


def why_not(device_type: str) -> str | None:
    """Returns the reason for which this backend cannot compute on a type of device, or None if it can."""
    try:
        import triton
    except Exception as error:  # A broken installation may raise anything.
        return f"triton cannot be imported ({type(error).__name__}: {error})"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "Triton compiles for no CPU; TRITON_INTERPRET=1, set before the first use, runs its interpreter"
    if device_type != "cuda":
        return "the kernels are tested for CUDA alone"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def kernels(device_type: str) -> dict[str, Kernel]:
    """Returns the kernels by the names of their ops. They are the same for every type of device."""
    return {signature.name: signature.kernel(function) for signature, function in (*_KERNELS, *triton_layers.KERNELS)}


_NO_MIXING = (1.0, 0.0, 1.0, 0.0)


def _coupling(call: Any, mixes: bool = False) -> None:
    """Launches `coupling` or, with `mixes`, `coupling_mix`."""
    n = call.target.numel()
    outs = (call.out_target, call.out_source) if mixes else (call.out, None)
    a0, c0, a1, c1 = (call.a0, call.c0, call.a1, call.c1) if mixes else _NO_MIXING
    launch(
        "coupling_kernel",
        (blocks(n),),
        call.target,
        *(*outs, call.target, call.source, call.eps, n),
        *floats(call.a, call.c, call.b, call.g, a0, c0, a1, c1),
        **arithmetic(call.target, call.eps, c0=c0, c1=c1),
        SOURCE=call.source is not None and call.c != 0,
        EPS=call.eps is not None,
        GUIDED=call.g is not None,
        MIXES=mixes,
        TARGET_FIRST=call.target_first if mixes else True,
    )


def _coupling_mix(call: Any) -> None:
    """Launches `coupling_mix`."""
    _coupling(call, mixes=True)


def _coupling_vjp(call: Any, mixes: bool = False) -> None:
    """Launches `coupling_vjp` or, with `mixes`, `coupling_mix_vjp`."""
    grad, grad_source = (call.grad_target, call.grad_source) if mixes else (call.grad, None)
    n = grad.numel()
    a0, c0, a1, c1 = (call.a0, call.c0, call.a1, call.c1) if mixes else _NO_MIXING
    launch(
        "vjp_kernel",
        (blocks(n),),
        grad,
        *(call.out_target if mixes else call.out, call.out_source, call.out_eps, grad, grad_source, call.scale, n),
        *floats(call.a, call.c, call.b, call.g, a0, c0, a1, c1),
        **arithmetic(grad, call.out_eps, c=call.c, c0=c0, c1=c1),
        SOURCE=call.out_source is not None,
        EPS=call.out_eps is not None,
        SCALED=call.scale is not None,
        GUIDED=call.g is not None,
        MIXES=mixes,
        TARGET_FIRST=call.target_first if mixes else True,
    )


def _coupling_mix_vjp(call: Any) -> None:
    """Launches `coupling_mix_vjp`."""
    _coupling_vjp(call, mixes=True)


def _latent_update(call: Any) -> None:
    """Launches the update and, if start norms are given, the scaling of the samples."""
    x, starts = call.x, call.starts
    batch = x.shape[0]
    sample = x.numel() // batch
    grid = (blocks(sample), batch)
    sums = None if starts is None else x.new_empty(2, batch, grid[0], dtype=torch.float64)
    launch(
        "update_kernel",
        grid,
        x,
        *(call.out_x, call.out_y, call.out_mx, call.out_my, sums),
        *(x, call.y, call.mx, call.my, call.gx, call.gy, call.noise, sample),
        *floats(call.rate, call.clip, call.momentum, call.sigma),
        **arithmetic(x),
        SQUARES=sums is not None,
        NESTEROV=call.nesterov,
        TIED=call.tied,
        NOISY=call.noise is not None,
    )
    if starts is not None and sums is not None:
        factors = (starts / sums.sum(2).sqrt()).to(x.dtype)
        launch("scale_kernel", grid, x, call.out_x, call.out_y, factors, sample)


def _lattice_coupling(call: Any) -> None:
    """Launches `lattice_coupling`."""
    _lattice(call, (call.out, None, None, None), (None, None), (True, 1, 1, 0.0, 1, 1, 0.0), words=0)


def _lattice_mix(call: Any) -> None:
    """Launches `lattice_mix`."""
    _lattice(
        call,
        (call.out_target, call.out_source, call.out_target_buffer, call.out_source_buffer),
        (call.target_buffer, call.source_buffer),
        (call.target_first, call.by0, call.over0, call.c0, call.by1, call.over1, call.c1),
        words=call.target_buffer.shape[0],
    )


def _lattice(
    call: Any,
    outs: tuple[Tensor | None, ...],
    buffers: tuple[Tensor | None, ...],
    mixing: tuple[Any, ...],
    words: int,
) -> None:
    """Launches the kernel of both lattice ops. words: the number of words of a buffer, or 0 without the mixing."""
    from .triton_lattice import BLOCK as SMALL

    target_first, by0, over0, c0, by1, over1, c1 = mixing
    n = call.target.numel()
    launch(
        "lattice_kernel",
        (-(-n // SMALL),),
        call.target,
        *(*outs, call.target, call.source, *buffers, call.eps, call.faults, n, call.row, by0, over0, by1, over1),
        *floats(call.c, call.b, call.g, c0, c1),
        block=SMALL,
        EPS=call.eps is not None,
        GUIDED=call.g is not None,
        UNDO=call.undo,
        MIXES=words > 0,
        TARGET_FIRST=target_first,
        WORDS=words,
        LIMIT=limit(call.target.dtype),
        DIGITS=2 if call.target.dtype == torch.int32 else 4,
    )


_KERNELS = (
    (signatures.COUPLING, _coupling),
    (signatures.COUPLING_VJP, _coupling_vjp),
    (signatures.COUPLING_MIX, _coupling_mix),
    (signatures.COUPLING_MIX_VJP, _coupling_mix_vjp),
    (signatures.LATENT_UPDATE, _latent_update),
    (signatures.LATTICE_COUPLING, _lattice_coupling),
    (signatures.LATTICE_MIX, _lattice_mix),
)
