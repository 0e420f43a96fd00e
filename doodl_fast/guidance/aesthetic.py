"""`Aesthetic`: guidance to pictures that people like, by a linear score of the embedding of CLIP or SigLIP.

These are LAION's aesthetic predictors (Schuhmann et al., LAION-5B, arXiv 2210.08402) and aesthetic-predictor-v2-5.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import is_finite
from .clip import ClipGuide, load_clip
from .model_loading import read_tensors

LOWEST, HIGHEST = 1.0, 10.0
HEAD = "a weight of shape (1, D) and a bias of shape (1,)"
"""What the file of a head holds, in errors."""
STACKS = {"layers": (0, 2, 4, 6, 7), "scoring_head": (0, 2, 4, 6, 8)}
"""The linear layers in heads that have several: LAION's "linearMSE", and aesthetic-predictor-v2-5."""


def load_aesthetic_head(source: str | Path) -> nn.Linear:
    """Loads the head of a predictor as one linear layer. Code in a pickle is never run.

    The heads of LAION's "improved" predictor and of its successor for SigLIP, aesthetic-predictor-v2-5, are five linear
    layers with dropout between them and no activation, which together are one linear layer: the product of their
    matrices, which is computed in float64.

    Args:
        source: A .safetensors file, or one that `torch.save` made of a head's state dict: LAION's linear layers
            ("sa_0_4_vit_l_14_linear.pth"), "sac+logos+ava1-l14-linearMSE.pth", or "aesthetic_predictor_v2_5.pth".

    Returns:
        The layer, from D features to one score, in float32 and eval mode.

    Raises:
        ValueError: The file is missing or cannot be read, or its entries are not a "weight" of shape (1, D) and a
            "bias" of shape (1,), nor the layers of one of those heads.
    """
    state = read_tensors(source, "head", HEAD)
    if _layers(state):
        return linear_head(state, source)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    weight = shapes.get("weight", ())
    missing, others = sorted({"weight", "bias"} - set(shapes)), sorted(map(str, set(shapes) - {"weight", "bias"}))
    if missing or others or len(weight) != 2 or weight[0] != 1 or shapes["bias"] != (1,):
        notes = [f"{', '.join(missing)} missing"] if missing else []
        notes += [f"{', '.join(others[:5])} not known"] if others else []
        raise ValueError(
            f"head: expected {HEAD} in {str(source)!r}, got {shapes}" + (f" ({'; '.join(notes)})" if notes else "")
        )
    return _linear(state["weight"], state["bias"])


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A frozen layer of a matrix (1, D) and a bias (1,), in float32."""
    head = nn.Linear(weight.shape[1], 1)
    head.load_state_dict({"weight": weight.float(), "bias": bias.float()})
    return head.eval().requires_grad_(False)


def _layers(state: dict[str, Tensor]) -> list[str]:
    """The names of the linear layers of a head that has several, in their order, or nothing."""
    for prefix, places in STACKS.items():
        if f"{prefix}.0.weight" in state and "weight" not in state:
            return [f"{prefix}.{place}" for place in places]
    return []


def linear_head(state: dict[str, Tensor], source: str | Path) -> nn.Linear:
    """Makes one linear layer of several that have no activation between them.

    Args:
        state: Their weights, under names that begin with a key of `STACKS`.
        source: The file that errors name.

    Raises:
        ValueError: Layers are missing, there are other ones, one does not fit to the next, or they do not end in one
            score.
    """
    layers = _layers(state)
    expected = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    if set(state) != expected:
        raise ValueError(
            f"head: expected the entries {', '.join(sorted(expected))} in {str(source)!r}, got "
            f"{', '.join(sorted(state))}; heads with activations between their layers are others"
        )
    weight, bias = state[f"{layers[0]}.weight"].double(), state[f"{layers[0]}.bias"].double()
    try:
        for layer in layers[1:]:
            matrix = state[f"{layer}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + state[f"{layer}.bias"].double()
    except RuntimeError as error:
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        raise ValueError(
            f"head: expected layers of which each fits to the next in {str(source)!r}, got {shapes}"
        ) from error
    if weight.shape[0] != 1:
        raise ValueError(
            f"head: expected layers that end in one score in {str(source)!r}, got {weight.shape[0]} of them"
        )
    return _linear(weight, bias)


def aesthetic_score(features: Tensor, head: nn.Linear) -> Tensor:
    """Computes the mean score of CLIP embeddings.

    Args:
        features: Embeddings (N, D), of any length.
        head: The predictor's linear layer.

    Returns:
        A 0-dim tensor. Each score is clamped to the range from 1 to 10.
    """
    weight, bias = (tensor.detach().to(features) for tensor in (head.weight, head.bias))
    return F.linear(F.normalize(features, dim=-1), weight, bias).clamp(LOWEST, HIGHEST).mean()


class Aesthetic(ClipGuide):
    """Minus the mean aesthetic score of pictures, or the distance of that score to a target.

    Scores below 1 and above 10 count as 1 and 10, and have no gradient.

    Args:
        model: The transformers CLIPModel or SiglipModel that the head was trained on.
        processor: Its processor or image processor; see `ClipGuide`.
        head: The predictor's linear layer, from the features of the model to one score; see `load_aesthetic_head`.
        target: The score to aim at, from 1 to 10; None for as high a score as possible.
        num_cutouts: See `ClipGuide`.
        cut_power: See `ClipGuide`.
        lean: See `ClipGuide`.

    Raises:
        TypeError: `model` is no CLIPModel, or `head` no such layer.
        ValueError: Another argument is out of range.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        head: nn.Linear,
        target: float | None = None,
        num_cutouts: int = 0,
        cut_power: float = 0.3,
        lean: bool | str = True,
    ) -> None:
        super().__init__(model, processor, num_cutouts, cut_power, lean)
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            raise TypeError(f"head: expected an nn.Linear to one score, got {head!r}; see load_aesthetic_head")
        if target is not None and not (is_finite(target) and LOWEST <= target <= HIGHEST):
            raise ValueError(f"target: expected a score or None, got {target!r}; scores go from 1 to 10")
        self.head, self.aim = head, target

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor, of images (B, 3, H, W) in [-1, 1]."""
        score = self.score(images)
        return -score if self.aim is None else (score - self.aim).abs()

    def score(self, images: Tensor) -> Tensor:
        """Computes the mean score, a 0-dim tensor from 1 to 10, of images (B, 3, H, W) in [-1, 1]."""
        return self.score_of(self.look(images))

    def score_of(self, features: Tensor) -> Tensor:
        """Computes the mean score of the model's embeddings (N, D)."""
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
        """Loads the model and the head.

        Args:
            source: The folder or the hub id of the CLIP or SigLIP: that of "openai/clip-vit-large-patch14" for
                LAION's heads for ViT-L/14, "google/siglip-so400m-patch14-384" for aesthetic-predictor-v2-5.
            head: The file of the head, see `load_aesthetic_head`.
            device: Where the model is put.
            dtype: The dtype of the model's weights.
            **options: `target`, `num_cutouts` and `cut_power`.

        Raises:
            ValueError: There is no such model or file, weights are missing, or an argument is out of range.
        """
        model, processor = load_clip(source, device, dtype)
        return cls(model, processor, load_aesthetic_head(head), **options)
