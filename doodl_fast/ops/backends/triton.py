"""The Triton backend: CUDA devices, and with `TRITON_INTERPRET=1` the CPU, in Triton's interpreter (slow, for tests).

Nothing is autotuned: the kernels stream through memory once, and one block size gives the widest loads for every dtype.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..lattice_coupling_op import limit
from ..layout import compute_dtype, vanishes
from .registry import Kernel

OLDEST = (3, 6)
BLOCK = 1024
WARPS = 4


def why_not(device_type: str) -> str | None:
    """Why it cannot compute on a device type; None when it can."""
    try:
        import triton
    except Exception as error:  # a broken install raises whatever it likes
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


def kernels() -> dict[str, Kernel]:
    """The kernels behind the registry's names."""
    return {
        "coupling": coupling,
        "coupling_vjp": coupling_vjp,
        "coupling_mix": coupling_mix,
        "coupling_mix_vjp": coupling_mix_vjp,
        "latent_update": latent_update,
        "lattice_coupling": lattice_coupling,
        "lattice_mix": lattice_mix,
    }


def _launch(
    name: str, grid: tuple[int, ...], like: Tensor, *arguments: Any, block: int = BLOCK, **constants: Any
) -> None:
    from . import triton_kernels, triton_lattice

    kernel = getattr(triton_lattice if name == "lattice_kernel" else triton_kernels, name)
    if like.is_cpu:  # the interpreter
        kernel[grid](*arguments, **constants, BLOCK=block)
        return
    with torch.cuda.device(like.device):
        kernel[grid](*arguments, **constants, BLOCK=block, num_warps=WARPS, enable_fp_fusion=False)


def _arithmetic(*tensors: Tensor | None, **coefficients: float) -> dict[str, Any]:
    """The kernels' constants: the dtype of the arithmetic, and which of the coefficients are not zero in it."""
    import triton.language as tl

    dtype = compute_dtype(*(tensor.dtype for tensor in tensors if tensor is not None))
    there = {f"HAS_{name.upper()}": not vanishes(value, dtype) for name, value in coefficients.items()}
    return {"COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32, **there}


def _blocks(n: int) -> int:
    return -(-n // BLOCK)


def coupling(
    out: Tensor,
    target: Tensor,
    source: Tensor | None,
    eps: Tensor | None,
    *coefficients: Any,
    out_source: Tensor | None = None,
    mixing: tuple[Any, ...] = (True, 1.0, 0.0, 1.0, 0.0),
) -> None:
    """Fills `out`, and `out_source` when the mixing is to follow."""
    a, c, b, g = coefficients
    target_first, a0, c0, a1, c1 = mixing
    n = target.numel()
    _launch(
        "coupling_kernel",
        (_blocks(n),),
        target,
        *(out, out_source, target, source, eps, n),
        *(float(number) for number in (a, c, b, g or 0.0, a0, c0, a1, c1)),
        **_arithmetic(target, eps, c0=c0, c1=c1),
        SOURCE=source is not None and c != 0,
        EPS=eps is not None,
        GUIDED=g is not None,
        MIXES=out_source is not None,
        TARGET_FIRST=target_first,
    )


def coupling_mix(
    out_target: Tensor, out_source: Tensor, target: Tensor, source: Tensor, eps: Tensor | None, *numbers: Any
) -> None:
    """Fills both outputs."""
    coupling(out_target, target, source, eps, *numbers[5:], out_source=out_source, mixing=numbers[:5])


def coupling_vjp(
    out: Tensor,
    to_source: Tensor | None,
    to_eps: Tensor | None,
    grad: Tensor,
    scale: Tensor | None,
    *coefficients: Any,
    grad_source: Tensor | None = None,
    mixing: tuple[Any, ...] = (True, 1.0, 0.0, 1.0, 0.0),
) -> None:
    """Fills the cotangents that are given."""
    a, c, b, g = coefficients
    target_first, a0, c0, a1, c1 = mixing
    n = grad.numel()
    _launch(
        "vjp_kernel",
        (_blocks(n),),
        grad,
        *(out, to_source, to_eps, grad, grad_source, scale, n),
        *(float(number) for number in (a, c, b, g or 0.0, a0, c0, a1, c1)),
        **_arithmetic(grad, to_eps, c=c, c0=c0, c1=c1),
        SOURCE=to_source is not None,
        EPS=to_eps is not None,
        SCALED=scale is not None,
        GUIDED=g is not None,
        MIXES=grad_source is not None,
        TARGET_FIRST=target_first,
    )


def coupling_mix_vjp(
    to_target: Tensor,
    to_source: Tensor,
    to_eps: Tensor | None,
    grad_target: Tensor,
    grad_source: Tensor,
    scale: Tensor | None,
    *numbers: Any,
) -> None:
    """Fills the cotangents that are given."""
    coupling_vjp(
        *(to_target, to_source, to_eps, grad_target, scale, *numbers[5:]), grad_source=grad_source, mixing=numbers[:5]
    )


def latent_update(*arguments: Any) -> None:
    """Fills x, y, mx, my."""
    outs, inputs, noise, starts = arguments[:4], arguments[4:10], arguments[10], arguments[11]
    rate, clip, momentum, nesterov, tied, sigma = arguments[12:]
    x = inputs[0]
    batch = x.shape[0]
    sample = x.numel() // batch
    grid = (_blocks(sample), batch)
    sums = None if starts is None else x.new_empty(2, batch, grid[0], dtype=torch.float64)
    _launch(
        "update_kernel",
        grid,
        x,
        *(*outs, sums, *inputs, noise, sample),
        *(float(number) for number in (rate, clip, momentum, sigma)),
        **_arithmetic(x),
        SQUARES=sums is not None,
        NESTEROV=nesterov,
        TIED=tied,
        NOISY=noise is not None,
    )
    if starts is not None and sums is not None:
        factors = (starts / sums.sum(2).sqrt()).to(x.dtype)
        _launch("scale_kernel", grid, x, outs[0], outs[1], factors, sample)


def lattice_coupling(
    out: Tensor,
    target: Tensor,
    source: Tensor,
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    c: float,
    b: float,
    g: float | None,
    undo: bool,
) -> None:
    """Fills `out`, and a row of faults."""
    _lattice((out, None, None, None), (target, source, None, None), eps, faults, row, (True,), (c, b, g, undo))


def lattice_mix(*arguments: Any) -> None:
    """Fills the four outputs, and a row of faults."""
    eps, faults, row = arguments[8:11]
    _lattice(arguments[:4], arguments[4:8], eps, faults, row, arguments[11:18], arguments[18:])


def _lattice(
    outs: tuple[Tensor | None, ...],
    inputs: tuple[Any, ...],
    eps: Tensor | None,
    faults: Tensor,
    row: int,
    mixing: tuple[Any, ...],
    numbers: tuple[Any, ...],
) -> None:
    from .triton_lattice import BLOCK as SMALL

    target, buffer = inputs[0], inputs[2]
    target_first, by0, over0, c0, by1, over1, c1 = mixing if buffer is not None else (True, 1, 1, 0.0, 1, 1, 0.0)
    c, b, g, undo = numbers
    n = target.numel()
    _launch(
        "lattice_kernel",
        (-(-n // SMALL),),
        target,
        *(*outs, *inputs, eps, faults, n, row, by0, over0, by1, over1),
        *(float(number) for number in (c, b, g or 0.0, c0, c1)),
        block=SMALL,
        EPS=eps is not None,
        GUIDED=g is not None,
        UNDO=undo,
        MIXES=buffer is not None,
        TARGET_FIRST=target_first,
        WORDS=0 if buffer is None else buffer.shape[0],
        LIMIT=limit(target.dtype),
        DIGITS=2 if target.dtype == torch.int32 else 4,
    )
