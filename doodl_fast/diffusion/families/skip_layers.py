"""Skip-layer guidance of Stable Diffusion 3.5: away from what the network predicts without some of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..conditions import map_tensors
from ..hooks import device_of
from .additions import StepWeights, numbers
from .base import Request
from .transformer import TransformerCall

SKIP_OPTIONS = frozenset(
    {"skip_guidance_layers", *(f"skip_layer_guidance_{part}" for part in ("scale", "start", "stop"))}
)


class SkipLayerCall(TransformerCall):
    """Calls a transformer, and in a part of the steps once more for the prompt and without some of its layers.

    `scale * (eps_cond - eps_without_layers)` is added to both halves of the prediction, so that classifier-free
    guidance, which combines them, adds it once.

    Args:
        module: The transformer.
        layers: The numbers of the layers that are left out.
        weights: The scale in each step; 0 where the network is called once.
    """

    def __init__(self, module: Any, layers: list[int], weights: StepWeights) -> None:
        super().__init__(module)
        self.layers, self.weights = layers, weights

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None, **kwargs: Any) -> Tensor:
        """See `TransformerCall.__call__`; the rows are [uncond; cond]."""
        found = super().__call__(x, t, cond, **kwargs)
        (weight,) = self.weights(t).tolist()
        if weight == 0:
            return found
        half = map_tensors(
            {"x": x, "cond": cond, **kwargs}, lambda leaf, _name: leaf.chunk(2)[1] if leaf.ndim else leaf
        )
        without = super().__call__(half.pop("x"), t, half.pop("cond"), **half, skip_layers=self.layers)
        uncond, by_prompt = found.chunk(2)
        added = weight * (by_prompt - without)
        return torch.cat([uncond + added, by_prompt + added])


def network_call(transformer: Any, options: Mapping[str, Any], request: Request, guided: bool) -> TransformerCall:
    """Returns how the transformer is called, with or without skip-layer guidance.

    Args:
        transformer: The network.
        options: The arguments of `SKIP_OPTIONS` that were given.
        request: What else was given.
        guided: Whether there is classifier-free guidance.

    Raises:
        TypeError: The layers are no list of ints.
        ValueError: An argument has no effect, or is out of range.
    """
    layers = options.get("skip_guidance_layers")
    if layers is None:
        if options:
            name = min(options)
            raise ValueError(f"{name}: expected None without skip_guidance_layers, got {options[name]!r}")
        return TransformerCall(transformer)
    if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, int) for layer in layers):
        raise TypeError(f"skip_guidance_layers: expected a list of ints, got {layers!r}")
    count = transformer.config.num_layers
    if not all(0 <= layer < count for layer in layers):
        raise ValueError(f"skip_guidance_layers: expected numbers of layers from 0 to {count - 1}, got {layers!r}")
    if not guided:
        raise ValueError("skip_guidance_layers: expected None without guidance; it needs a guidance_scale above 1")
    given = {part: options.get(f"skip_layer_guidance_{part}", own) for part, own in DEFAULTS.items()}
    scale, start, stop = (numbers(f"skip_layer_guidance_{part}", value, 1)[0] for part, value in given.items())
    steps = request.timesteps
    rows = [[scale * float(len(steps) * start < number < len(steps) * stop)] for number in range(len(steps))]
    return SkipLayerCall(
        transformer, list(layers), StepWeights(steps, rows, "skip_guidance_layers", device_of(transformer))
    )


DEFAULTS = {"scale": 2.8, "start": 0.01, "stop": 0.2}
"""Those of the pipeline."""
