"""The layers of the public DOODL code as a baseline of `doodl-fast profile --against reference=DIR`.

This file executes code of another project's checkout, so it is not part of the installed package.
"""

from __future__ import annotations

import ast
import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LAYERS = {
    "helper_functions.py": ("get_alpha_and_beta", "forward_step", "reverse_step"),
    "doodl.py": ("SteppingLayer", "MixingLayer"),
}
"""The definitions that are executed, by the file that they are in."""


class ReferenceUnavailable(Exception):
    """The public code, or something that it needs, is missing, or it cannot run the setting."""


def reference(folder: str, setting: Any, steps: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Makes a chain of the layers of the public DOODL code (arXiv 2303.13703), in the order of its `gen()`.

    They run on the caller's UNet, in its dtype, on one image. Only the definitions named in LAYERS are executed,
    because the modules of the public code load models from the hub when they are imported.

    Args:
        folder: A checkout of the public DOODL code.
        setting: A `doodl_fast.cli.baselines.Setting`.
        steps: The number of diffusion steps.

    Returns:
        A function from a start x that requires grad to the final latents (x0, y0).

    Raises:
        ReferenceUnavailable: The folder lacks the definitions, memcnn is not installed, or the setting is one that the
            public code cannot run.
    """
    if len(setting.x) != 1:
        raise ReferenceUnavailable(f"the reference takes one image, got a batch of {len(setting.x)}; use --batch 1")
    if setting.denoiser.uncond is None:
        raise ReferenceUnavailable("the reference always guides; use a --guidance-scale above 1")
    found = definitions(Path(folder), setting.x.device)
    try:
        memcnn: Any = importlib.import_module("memcnn")
    except ImportError as error:
        raise ReferenceUnavailable(f"the reference needs memcnn ({error}); install it with pip") from error
    own = setting.denoiser

    def wrapped(layer: Any) -> Any:
        options = {"keep_input": True, "keep_input_inverse": True, "num_bwd_passes": 1}
        return memcnn.InvertibleModuleWrapper(layer, **options)

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        scheduler = copy.deepcopy(setting.scheduler)
        stepping = found["SteppingLayer"](own.unet, own.uncond, own.cond, scheduler, steps, own.guidance_scale)
        step, mix = wrapped(stepping), wrapped(found["MixingLayer"](setting.mix_weight))
        dtype = own.compute_dtype(x.dtype)
        pair = torch.cat([x, x]).to(dtype)
        for i, t in enumerate(scheduler.timesteps):
            numbers = (torch.tensor([float(n)], dtype=dtype, device=x.device) for n in (i, t))
            _, _, pair = step(*numbers, pair)
            pair = mix(pair)
        return pair[:1], pair[1:]

    return forward


def definitions(folder: Path, device: torch.device) -> dict[str, Any]:
    """Executes the definitions that LAYERS names, and returns them by their names."""
    space: dict[str, Any] = {"torch": torch, "nn": torch.nn, "device": device}
    for file, names in LAYERS.items():
        path = folder / file
        if not path.is_file():
            raise ReferenceUnavailable(f"expected a checkout of DOODL with {file} in it, got {str(folder)!r}")
        nodes = [
            node for node in ast.parse(path.read_text(encoding="utf-8")).body if getattr(node, "name", None) in names
        ]
        missing = set(names) - {node.name for node in nodes}  # type: ignore[attr-defined]
        if missing:
            absent = ", ".join(sorted(missing))
            raise ReferenceUnavailable(f"expected {absent} in {str(folder)!r}, but {path} does not define {absent}")
        exec(compile(ast.Module(nodes, []), str(path), "exec"), space)
    return space
