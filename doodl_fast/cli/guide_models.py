"""The models of the guides of a command line: which one each guide has, how it is loaded, and checks beforehand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import EMBEDDED, check_model

if TYPE_CHECKING:
    import torch

DEFAULT_CLIP = "openai/clip-vit-large-patch14"
KINDS = {
    "clip-text": "clip",
    "clip-image": "clip",
    "aesthetic": "clip",
    "text-score": "clip",
    "pick-score": "clip",
    "hpsv2": "hpsv2",
    "image-reward": "image-reward",
    "classifier": "classifier",
    "similarity": "similarity",
    "segmentation": "segmentation",
    "depth": "depth",
}
"""By guide what kind of model it has. Guides of one kind may share a model."""
DEFAULTS = {
    "clip-text": DEFAULT_CLIP,
    "clip-image": DEFAULT_CLIP,
    "aesthetic": DEFAULT_CLIP,
    "text-score": DEFAULT_CLIP,
    "pick-score": "yuvalkirstain/PickScore_v1",
    "similarity": "facebook/dinov2-base",
}
"""The models of guides where none is given."""
PICK_SCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
IN_EMBEDDED = ("clip-text", "clip-image", "text-score", "classifier")
"""The guides whose model comes with the embedded pipeline."""
NEEDED = {
    "classifier": "an image classifier",
    "hpsv2": 'the file "HPS_v2.1_compressed.pt" or a folder',
    "image-reward": 'the file "ImageReward.pt"',
    "segmentation": "a model for semantic segmentation",
    "depth": "a model for depth estimation",
}
"""What guides without a default ask for."""
FILES = ("hpsv2", "image-reward")
"""The guides whose model may be one file."""


def own_value(given: Any, guide: str) -> str | None:
    """What --guidance-model or --guidance-processor says of one guide.

    Args:
        given: None, a text, or a list of texts, each of which may begin with the name of a guide and "=".
        guide: The name of the guide.

    Returns:
        The value behind the guide's name, else the one without a name, else None.
    """
    entries = [given] if isinstance(given, str) else given or []
    named, plain = {}, None
    for entry in entries:
        name, separator, value = entry.partition("=")
        if separator and name in KINDS:
            named[name] = value
        else:
            plain = entry
    return named.get(guide, plain)


def model_of(args: argparse.Namespace, guide: str) -> str | None:
    """The folder, file or hub id that --guidance-model gives for a guide."""
    return own_value(args.guidance_model, guide)


def is_embedded(args: argparse.Namespace, guide: str) -> bool:
    """Whether a guide's model is the embedded one."""
    return args.model == EMBEDDED and guide in IN_EMBEDDED and model_of(args, guide) in (None, EMBEDDED)


def key_of(args: argparse.Namespace, guide: str) -> tuple[Any, ...]:
    """What guides with the same model have in common."""
    processor = own_value(args.guidance_processor, guide)
    return KINDS[guide], is_embedded(args, guide), model_of(args, guide) or DEFAULTS.get(guide), processor


def load_guide(guide: str, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads the model of a guide, and its processor or tokenizer."""
    kind = KINDS[guide]
    if is_embedded(args, guide):
        from .. import shapes

        model, processor = shapes.load_clip() if kind == "clip" else shapes.load_classifier()
        return model.to(device, dtype), processor
    source, words = model_of(args, guide) or DEFAULTS.get(guide), own_value(args.guidance_processor, guide)
    if source is None:
        raise ValueError(f"--guidance-model: expected {NEEDED[guide]} with --guidance {guide}, got none")
    if guide == "pick-score" and source == DEFAULTS[guide]:
        words = words or PICK_SCORE_PROCESSOR
    found: tuple[Any, Any] = LOADERS[kind](source, device, dtype, words)
    return found


def _clip(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
    from ..guidance.clip import load_clip

    return load_clip(source, device, dtype, words)


def _hpsv2(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
    from ..guidance.hps import load_hpsv2

    return load_hpsv2(source, device, dtype, words)


def _image_reward(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
    from ..guidance.image_reward import TOKENIZER, load_image_reward, load_tokenizer

    tokenizer = load_tokenizer(words or TOKENIZER)
    return load_image_reward(source, device, dtype), tokenizer


def _classifier(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
    from ..guidance.classifier import load_classifier

    return load_classifier(source, device, dtype)


def _similarity(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
    from ..guidance.similarity import load_embedding

    return load_embedding(source, device, dtype)


def _dense(kind: str) -> Callable[..., tuple[Any, Any]]:
    def load(source: str, device: torch.device, dtype: torch.dtype, words: str | None) -> tuple[Any, Any]:
        from ..guidance.dense import load_dense

        return load_dense(kind, source, device, dtype)

    return load


LOADERS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "clip": _clip,
    "hpsv2": _hpsv2,
    "image-reward": _image_reward,
    "classifier": _classifier,
    "similarity": _similarity,
    "segmentation": _dense("segmentation"),
    "depth": _dense("depth"),
}


def check_models(args: argparse.Namespace, names: list[str]) -> None:
    """Checks --guidance-model and --guidance-processor before anything is loaded.

    Args:
        args: The command line.
        names: The guides that it names.

    Raises:
        ValueError: A model is missing, is no folder or file of the right kind, or is not for one guide alone.
    """
    with_models = [name for name in names if name in KINDS]
    for option in ("guidance_model", "guidance_processor"):
        _check_entries(getattr(args, option), f"--{option.replace('_', '-')}", with_models)
    for name in with_models:
        given = model_of(args, name)
        if given is None or is_embedded(args, name):
            if name not in DEFAULTS and not is_embedded(args, name):
                raise ValueError(f"--guidance-model: expected {NEEDED[name]} with --guidance {name}, got none")
        elif name in FILES and Path(given).expanduser().is_file():
            continue
        elif name == "image-reward":
            raise ValueError(f"--guidance-model: expected {NEEDED[name]} with --guidance {name}, got {given!r}")
        else:
            check_model(given, "config.json", "guidance model")


def _check_entries(given: Any, flag: str, names: list[str]) -> None:
    """Raises ValueError for entries of other guides, for two of one guide, and for one that several kinds share."""
    entries = [given] if isinstance(given, str) else given or []
    marked = [entry.partition("=")[0] for entry in entries if entry.partition("=")[0] in KINDS and "=" in entry]
    plain = [entry for entry in entries if entry.partition("=")[0] not in KINDS or "=" not in entry]
    wrong = [name for name in marked if name not in names]
    if wrong:
        raise ValueError(f"{flag}: expected --guidance {wrong[0]} with {wrong[0]}=..., got {' '.join(names) or 'none'}")
    if len(plain) > 1 or len(set(marked)) < len(marked):
        raise ValueError(f"{flag}: expected one for each guide, as GUIDE=..., got {' '.join(entries)}")
    rest = [name for name in names if name not in marked]
    if plain and len({KINDS[name] for name in rest}) > 1:
        raise ValueError(
            f"{flag}: expected it with one kind of model alone, or as GUIDE=... for each, got it with "
            f"{' and '.join(rest)}"
        )
    if plain and not rest:
        raise ValueError(f"{flag}: expected a guide for each, got {plain[0]!r} for none")
