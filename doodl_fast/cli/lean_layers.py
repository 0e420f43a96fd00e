"""What `doodl-fast doctor --model` says: which layers of a model's networks run in a lean way."""

from __future__ import annotations

import torch

from ..frozen import lean_report
from .published import NETWORKS, meta_model


def lean_layers(model: str) -> list[str]:
    """Returns the lines of the report on a model's networks, which are made on the meta device of their configs.

    Args:
        model: The name of a published model, or a diffusers folder.

    Raises:
        ValueError: There is no such model.
    """
    pipe, lines = meta_model(model, torch.float16).pipe, list[str]()
    for name in NETWORKS:
        network = getattr(pipe, name, None)
        if network is not None:
            lines += ["", f"{name} ({type(network).__name__}), lean=True", *str(lean_report(network)).splitlines()]
    return lines[1:]
