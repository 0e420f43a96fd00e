"""Aesthetic guidance: a linear score on CLIP's embedding of a picture, as LAION's aesthetic predictor has it
(Schuhmann et al., LAION-5B, arXiv 2210.08402)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .clip import ClipGuide, load_clip

LOWEST, HIGHEST = 1.0, 10.0


def load_aesthetic_head(source: str | Path) -> nn.Linear:
    """A predictor's linear layer (D -> 1) from a file, in float32.

    source: a .safetensors file, or one that `torch.save` made of the layer's state dict; no pickled code is ever run.
    Raises ValueError for a file that is missing, cannot be read so, or holds anything but "weight" (1, D) and "bias"
    (1,).
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise ValueError(
            f"head: the file {str(source)!r} does not exist; expected the weights of an aesthetic predictor"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, torch's and safetensors' own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"head: {str(source)!r} cannot be read as safetensors or a plain state dict: {reason}"
        ) from error
    entries = state.items() if isinstance(state, Mapping) else ()
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in entries}
    weight = shapes.get("weight", ())
    if set(shapes) != {"weight", "bias"} or len(weight) != 2 or weight[0] != 1 or shapes["bias"] != (1,):
        got = shapes or type(state).__name__
        raise ValueError(
            f"head: expected a weight of shape (1, D) and a bias of shape (1,) in {str(source)!r}, got {got}"
        )
    head = nn.Linear(weight[1], 1)
    head.load_state_dict({name: value.float() for name, value in state.items()})
    return head.eval().requires_grad_(False)


def aesthetic_score(features: Tensor, head: nn.Linear) -> Tensor:
    """0-dim mean score, each within 1 to 10, of CLIP embeddings (N, D), which need not be normalised."""
    weight, bias = (tensor.detach().to(features) for tensor in (head.weight, head.bias))
    return F.linear(F.normalize(features, dim=-1), weight, bias).clamp(LOWEST, HIGHEST).mean()


class Aesthetic(ClipGuide):
    """How far pictures are from pleasing: minus their mean aesthetic score, or its distance to a target.

    model, processor: the CLIP that the head was trained on. head: an nn.Linear to one score, see
    `load_aesthetic_head`. target: the score to aim at, 1 to 10; None for as high as possible. num_cutouts, cut_power:
    as for `ClipText`. Scores beyond 1 and 10 count as 1 and 10, and have no gradient.
    Raises TypeError or ValueError, naming the argument.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        head: nn.Linear,
        target: float | None = None,
        num_cutouts: int = 0,
        cut_power: float = 0.3,
    ) -> None:
        super().__init__(model, processor, num_cutouts, cut_power)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise TypeError(f"head: expected an nn.Linear to one score, got {head!r}; see load_aesthetic_head")
        if target is not None and not math.isfinite(target):
            raise ValueError(f"target: expected a score or None, got {target!r}")
        self.head, self.aim = head, target

    def __call__(self, images: Tensor) -> Tensor:
        """0-dim loss of images (B, 3, H, W) in [-1, 1]."""
        score = self.score(images)
        return -score if self.aim is None else (score - self.aim).abs()

    def score(self, images: Tensor) -> Tensor:
        """0-dim mean score, 1 to 10, of images (B, 3, H, W) in [-1, 1]."""
        return self.score_of(self.look(images))

    def score_of(self, features: Tensor) -> Tensor:
        """The same of the model's embeddings (N, D)."""
        if features.shape[-1] != self.head.in_features:
            raise ValueError(
                f"head: expected one for embeddings of {features.shape[-1]} features (the model's), got one for "
                f"{self.head.in_features}"
            )
        return aesthetic_score(features, self.head)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        head: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Aesthetic:
        """CLIP from a folder or a hub id, the head from a file; options are target, num_cutouts and cut_power."""
        model, processor = load_clip(source, device, dtype)
        return cls(model, processor, load_aesthetic_head(head), **options)
