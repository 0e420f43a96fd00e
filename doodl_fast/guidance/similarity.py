"""`Similarity`: guidance to pictures that a network finds similar to given ones: DINO, DINOv2, face recognition, ..."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..diffusion.networks import check_source, loading
from ..frozen import level_of
from .model_loading import load_model
from .view import View, load_processor, run_network, target_pictures

LOOKS = ("whole", "patches")


def load_embedding(
    source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """Loads a network that embeds pictures from safetensors files.

    Args:
        source: The folder or the hub id of a model that transformers loads, a DINO or a DINOv2 for instance.
        device: Where the model is put.
        dtype: The dtype of its weights.

    Returns:
        The transformers model in eval mode, and its image processor, or None if it was saved without one. A pooling
        layer that the model can do without is left out, as DINO has none.

    Raises:
        ValueError: There is none, or some of its weights are missing.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    name = check_source(source, "config.json", "guidance model")
    with loading(name, "guidance model"):
        kind = MODEL_MAPPING.get(type(AutoConfig.from_pretrained(name)), AutoModel)
    has_pooling = "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    more: dict[str, Any] = {"add_pooling_layer": False} if has_pooling else {}
    model, name = load_model(kind, name, dtype, **more)
    return model.to(device), load_processor(name)


class Similarity:
    """One minus the cosine of a network's features of pictures and of target pictures, as a mean over pictures.

    With a DINO (Caron et al., arXiv 2104.14294) or a DINOv2 (Oquab et al., arXiv 2304.07193) it asks for the same
    things, with a network for faces (ArcFace, arXiv 1801.07698, for instance) for the same person. The network is
    called in its own dtype, in eval mode and without gradients of its weights, and is not changed.

    Args:
        model: A transformers model of pictures, or any callable from pixels (N, 3, h, w) to features (N, D), to an
            object that has them as `.last_hidden_state` or `.pooler_output`, or to a tuple that begins with them. A
            function that crops faces and calls a network has to set that network to eval mode itself.
        target: The pictures to resemble: a tensor (1 or B, 3, H, W) in [-1, 1], a file, or a PIL picture. One is for
            all pictures.
        processor: The model's image processor, or None.
        look: "whole" compares one vector for each picture: the class token, or the features of a network without
            tokens. "patches" compares each patch's vector with that of the same place, which asks for the same layout
            too.
        mean: Three numbers that are subtracted from pixels in [0, 1]. By default those of the processor, else 0.5.
        std: Three positive numbers that pixels are divided by then. By default those of the processor, else 0.5.
        size: The side of the square, in pixels, to which pictures are resized and cropped. By default that of the
            processor, else that of the config, else pictures keep their size.
        lean: Whether graphs keep no more than the gradient needs, to the same bits (docs/lean.md).

    Raises:
        TypeError: `model` cannot be called with pictures alone, or `target` holds something else than pictures.
        ValueError: The network has no such features, a file cannot be read, or an argument is out of range.

    Example:
        >>> loss = Similarity.from_pretrained("facebook/dinov2-base", "dog.png")
        >>> loss(images).backward()
    """

    def __init__(
        self,
        model: Any,
        target: Tensor | str | Path | Any,
        processor: Any = None,
        *,
        look: str = "whole",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        size: int | None = None,
        lean: bool | str = True,
    ) -> None:
        if not callable(model) or callable(getattr(model, "get_image_features", None)):
            raise TypeError(
                f"model: expected a network that is called with pictures, got {type(model).__name__}; for a CLIP take "
                "ClipImage"
            )
        if look not in LOOKS:
            raise ValueError(f"look: expected one of {', '.join(map(repr, LOOKS))}, got {look!r}")
        self.model, self.look, self.lean = model, look, level_of(lean)
        self.view = View.of(model, processor, mean, std, size)
        with torch.no_grad():
            self.target = self.features(target_pictures(target, model)).detach()

    def __call__(self, images: Tensor) -> Tensor:
        """Computes the loss, a 0-dim tensor from 0 to 2, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: There are several targets, and not as many as pictures; or features of other shapes.
        """
        features = self.features(images)
        target = self.target.to(features)
        if target.shape[1:] != features.shape[1:] or len(target) not in (1, len(features)):
            raise ValueError(
                f"target: expected 1 picture or {len(features)} with features of shape {tuple(features.shape[1:])} "
                f"each, as the pictures have, got {len(target)} of {tuple(target.shape[1:])}; give `size`, so that all "
                "pictures get one size"
            )
        return 1 - (features * target).sum(-1).mean()

    def features(self, images: Tensor) -> Tensor:
        """Computes the features of images (B, 3, H, W) in [-1, 1], of length 1: (B, D), or (B, patches, D)."""
        return F.normalize(run_network(self.model, self.view(images), self._pick, self.lean), dim=-1)

    def _pick(self, output: Any) -> Tensor:
        """The features that are compared, in what the network returns."""
        tokens = getattr(output, "last_hidden_state", None)
        found = output[0] if isinstance(output, tuple) else output
        if tokens is None and isinstance(found, Tensor):
            tokens = found
        if isinstance(tokens, Tensor) and tokens.ndim == 3:
            config = getattr(self.model, "config", None)
            others = 1 + int(getattr(config, "num_register_tokens", None) or 0)
            return tokens[:, 0] if self.look == "whole" else tokens[:, others:]
        pooled = getattr(output, "pooler_output", None)
        if self.look == "whole" and isinstance(pooled, Tensor):
            return pooled.flatten(1)
        if isinstance(tokens, Tensor) and tokens.ndim == 4:  # the map of a convolutional network
            return tokens.mean((2, 3)) if self.look == "whole" else tokens.flatten(2).mT
        if self.look == "whole" and isinstance(tokens, Tensor) and tokens.ndim == 2:
            return tokens
        got = f"shape {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(output).__name__
        raise ValueError(f"model: expected one with features for look={self.look!r}, got {got} from it")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        target: Tensor | str | Path | Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Similarity:
        """Loads the model; see `load_embedding`.

        Args:
            source: The folder or the hub id, "facebook/dinov2-base" or "facebook/dino-vits16" for instance.
            target: The pictures to resemble.
            device: Where the model is put.
            dtype: The dtype of its weights.
            **options: `look`, `mean`, `std`, `size` and `lean`.

        Raises:
            ValueError: There is no such model, it lacks weights, or an argument is out of range.
        """
        model, processor = load_embedding(source, device, dtype)
        return cls(model, target, processor, **options)
