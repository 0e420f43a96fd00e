"""The reference's losses on pixels, built on `doodl_fast.guidance`.

Every factory returns a function `loss_fn(im_pix)` of images (B, 3, H, W) in [-1, 1]. Its result is a 0-dim tensor that
includes `grad_scale`. A guide is loaded when its factory is called, from safetensors only, and no gradients are
computed for its weights. The arguments that the reference does not have are keyword-only: where guides come from, their
`device` (by default CUDA if there is one), their `dtype` (by default fp16 on CUDA, else fp32), and `quirks`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.images import open_picture, read_picture
from ..guidance import Classifier, ClipText, Symmetry, spherical_distance
from ..guidance import aesthetic as scores
from ..guidance.classifier import load_classifier
from ..guidance.clip import ClipGuide, image_features, load_clip
from ..guidance.cutouts import unit_range
from .quirks import Quirks
from .views import MakeCutouts as MakeCutouts
from .views import View, resize_shorter, shared_views

LossFn = Callable[[Tensor], Tensor]
DEFAULT = Quirks()
CLIP_MODELS = {
    "vit_b_32": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "vit_l_14": "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
    "vit_g_14": "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
}
AESTHETIC_MODELS = {"vit_l_14": "openai/clip-vit-large-patch14", "vit_b_32": "openai/clip-vit-base-patch32"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSIFIER_SIZE = 512


def spherical_dist_loss(x: Tensor, y: Tensor, quirks: Quirks = DEFAULT) -> Tensor:
    """Returns half the squared angle between x and y, in radians; see `guidance.spherical_distance`.

    Args:
        x: Vectors of shape (..., D).
        y: Vectors of shape (..., D).
        quirks: `minimum_over_cutouts` and `infinite_gradient_of_opposites` are used.

    Returns:
        A 0-dim tensor for several rows: the smallest distance, or, without the quirk, their mean. For a single row the
        leading dimensions stay.
    """
    if quirks.infinite_gradient_of_opposites:
        chord = torch.linalg.vector_norm(F.normalize(x, dim=-1) - F.normalize(y, dim=-1), dim=-1)
        distance = 2 * torch.arcsin(chord / 2).square()
    else:
        distance = spherical_distance(x, y)
    if distance.numel() == 1:
        return distance
    return distance.min() if quirks.minimum_over_cutouts else distance.mean()


def clip_loss_fn(
    prompt: str | None = None,
    clip_viz_paths: Sequence[Any] | None = None,
    use_cutouts: bool = False,
    num_cuts: int = 64,
    cut_power: float = 0.6,
    grad_scale: float = 0,
    clip_model_str: str = "vit_b_32",
    weights: Sequence[float] = (1,),
    *,
    clip_models: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quirks: Quirks = DEFAULT,
) -> LossFn:
    """Makes a loss that pulls a picture's CLIP embedding towards that of a text, or to the mean of other pictures'.

    Args:
        prompt: The text. Either this or `clip_viz_paths` is given.
        clip_viz_paths: Picture files or PIL pictures.
        use_cutouts: Whether the guide sees random cutouts of the picture, and not the whole of it.
        num_cuts: The number of cutouts.
        cut_power: The exponent of their random sizes.
        grad_scale: A factor of the loss.
        clip_model_str: "vit_b_32", "vit_l_14", "vit_g_14", "all" (see `Quirks.one_clip_model`), a folder or a hub id.
        weights: The weights of the models, in the order b, l, g.
        clip_models: A dict from a model's name to a folder, a hub id or a tuple (transformers CLIPModel, processor),
            which is used in place of the default one.
        device: The device of the guide.
        dtype: The dtype of the guide.
        quirks: Which peculiarities of the reference are reproduced.

    Returns:
        The loss function.

    Raises:
        ValueError: Both or none of `prompt` and `clip_viz_paths` are given, or an argument is out of range.
    """
    if (prompt is None) == (clip_viz_paths is None):
        raise ValueError("prompt, clip_viz_paths: expected one of them (as gen: clip_prompt or clip_viz_paths)")
    names = _clip_names(clip_model_str, clip_models or {}, quirks)
    if len(weights) != len(names):
        if tuple(weights) != (1,):
            raise ValueError(f"weights: expected one for each of {', '.join(names)}, got {tuple(weights)}")
        weights = [1] * len(names)
    loaded = [_load(name, CLIP_MODELS, clip_models, device, dtype) for name in names]
    if prompt is not None:
        guides: list[ClipGuide] = [ClipText(model, processor, prompt) for model, processor in loaded]
        targets = [guide.target for guide in guides]
    else:
        guides = [ClipGuide(model, processor) for model, processor in loaded]
        targets = [_mean_direction(guide, clip_viz_paths or (), quirks) for guide in guides]
    views = [View(guide.size, num_cuts if use_cutouts else None, cut_power, quirks) for guide in guides]

    def distance(seen: Tensor, guide: ClipGuide, target: Tensor) -> Tensor:
        features = guide.embed(seen)
        return spherical_dist_loss(features, target.to(features), quirks).mean()

    def loss_fn(im_pix: Tensor) -> Tensor:
        seen = shared_views(views, im_pix)
        distances = [distance(*each) for each in zip(seen, guides, targets, strict=True)]
        total: Tensor = sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)  # type: ignore[assignment]
        return total * grad_scale

    return loss_fn


def symmetry_loss_fn(symmetry_type: str, grad_scale: float = 0) -> LossFn:
    """Makes a loss that is the mean squared difference of a picture and its mirror image.

    Args:
        symmetry_type: "horizontal" as in the reference, or "vertical".
        grad_scale: A factor of the loss.

    Raises:
        ValueError: `symmetry_type` is unknown.
    """
    symmetry = Symmetry(symmetry_type)
    return lambda im_pix: grad_scale * symmetry(im_pix)


def fgvc_loss_fn(
    dataset: str | None = None,
    class_idx: int | str = 0,
    use_cutouts: bool = False,
    num_cuts: int = 64,
    cut_power: float = 0.6,
    grad_scale: float = 0,
    *,
    model: Any = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quirks: Quirks = DEFAULT,
) -> LossFn:
    """Makes a loss that is the cross entropy of a classifier's logits with one class.

    Args:
        dataset: The reference's name of a classifier. No classifier comes with this package, so `model` is required.
        class_idx: The index of the class, or its name in the model's config.
        use_cutouts: Whether the guide sees random cutouts of the picture, and not the whole of it.
        num_cuts: The number of cutouts.
        cut_power: The exponent of their random sizes.
        grad_scale: A factor of the loss.
        model: The classifier: a folder or hub id of a transformers image-classification model; such a model and its
            processor as a tuple; or a module that takes pictures of 512 x 512 pixels, normalised as ImageNet's, and
            returns logits, an object with `.logits`, or a tuple that ends with logits, as WS-DAN does.
        device: The device of the guide.
        dtype: The dtype of the guide.
        quirks: Which peculiarities of the reference are reproduced.

    Returns:
        The loss function.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: There is no model, or an argument is out of range.
    """
    if model is None:
        raise ValueError(
            f"model: expected a classifier for dataset={dataset!r}, got none; pass a module or a transformers "
            "image-classification folder (as gen: model_guidance_dict['model'])"
        )
    if isinstance(model, (str, Path)):
        model = load_classifier(model, *_place(device, dtype))
    if isinstance(model, tuple):
        network, processor = model
        classifier = Classifier(network, processor, class_idx)
    else:
        classifier = Classifier(model, None, class_idx, mean=IMAGENET_MEAN, std=IMAGENET_STD, size=CLASSIFIER_SIZE)
    view = View(classifier.view.size or CLASSIFIER_SIZE, num_cuts if use_cutouts else None, cut_power, quirks)
    return lambda im_pix: grad_scale * classifier(view(im_pix) * 2 - 1)


def get_aesthetic_model(clip_model: str = "vit_l_14", source: str | Path | None = None) -> nn.Linear:
    """Returns the linear head of LAION's aesthetic predictor for a CLIP model, in float32.

    Args:
        clip_model: "vit_l_14" or "vit_b_32".
        source: The file of the head, see `guidance.aesthetic.load_aesthetic_head`. By default it is the file that the
            reference keeps, ~/.cache/emb_reader/sa_0_4_<clip_model>_linear.pth. It is never downloaded.

    Raises:
        ValueError: The name is unknown, or the file is missing or holds something else.
    """
    if source is None:
        if clip_model not in AESTHETIC_MODELS:
            raise ValueError(f"clip_model: expected one of {', '.join(AESTHETIC_MODELS)}, got {clip_model!r}")
        source = Path.home() / ".cache" / "emb_reader" / f"sa_0_4_{clip_model}_linear.pth"
        if not source.is_file():
            raise ValueError(
                f"heads: no aesthetic head for {clip_model!r} was given, and there is none at {str(source)!r}; get "
                f"{source.name} from LAION's aesthetic-predictor repository, and pass its path (as gen: "
                "model_guidance_dict['aesthetic_heads'])"
            )
    return scores.load_aesthetic_head(source)


def aesthetic_score(image: Tensor, model: Any, amodel: nn.Linear) -> Tensor:
    """Returns the mean aesthetic score of pictures, roughly from 1 to 10, as a 0-dim tensor.

    Args:
        image: Pictures of shape (B, 3, h, w) in the size that the CLIP model expects, normalised as it expects.
        model: A CLIP model with `encode_image` (open_clip) or `get_image_features` (transformers).
        amodel: The head, see `get_aesthetic_model`.
    """
    features = model.encode_image(image) if hasattr(model, "encode_image") else image_features(model, image)
    return scores.aesthetic_score(features, amodel)


def aesthetic_loss_fn(
    aesthetic_target: float | None = None,
    use_cutouts: bool = False,
    num_cuts: int = 64,
    cut_power: float = 0.6,
    grad_scale: float = 0,
    clip_model_str: str = "vit_l_14",
    weights: Sequence[float] = (1, 1),
    *,
    heads: Any = None,
    clip_models: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quirks: Quirks = DEFAULT,
) -> LossFn:
    """Makes a loss that is minus the aesthetic score of a picture, or the distance of the score from a target.

    Args:
        aesthetic_target: The score that is aimed at; None to make it as high as possible.
        use_cutouts: Whether the guide sees random cutouts of the picture, and not the whole of it.
        num_cuts: The number of cutouts.
        cut_power: The exponent of their random sizes.
        grad_scale: A factor of the loss.
        clip_model_str: "vit_l_14", "vit_b_32" or "both". By default these are OpenAI's models.
        weights: The weights of the scores of "both"; see the quirks that begin with `aesthetic_`.
        heads: A file or nn.Linear, or a dict from a model's name to one; see `get_aesthetic_model`.
        clip_models: A dict from a model's name to a folder, a hub id or a tuple (transformers CLIPModel, processor),
            which is used in place of the default one.
        device: The device of the guide.
        dtype: The dtype of the guide.
        quirks: Which peculiarities of the reference are reproduced.

    Returns:
        The loss function.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a head is missing.
    """
    names = list(AESTHETIC_MODELS) if clip_model_str == "both" else [clip_model_str]
    if not isinstance(heads, Mapping):
        if heads is not None and len(names) > 1:
            raise ValueError(f"heads: expected a dict with {' and '.join(names)}, got {type(heads).__name__}")
        heads = {} if heads is None else {names[0]: heads}
    if len(weights) < len(names):
        raise ValueError(f"weights: expected one for each of {', '.join(names)}, got {tuple(weights)}")
    used = list(weights[: len(names)])
    if not quirks.aesthetic_weights_large_first:
        used.reverse()
    layers = [_head(name, heads.get(name)) for name in names]
    loaded = [_load(name, AESTHETIC_MODELS, clip_models, device, dtype) for name in names]
    guides = [scores.Aesthetic(*pair, layer) for pair, layer in zip(loaded, layers, strict=True)]
    views = [View(guide.size, num_cuts if use_cutouts else None, cut_power, quirks) for guide in guides]
    divisor = len(names) if quirks.aesthetic_average_by_count else sum(used)

    def loss_fn(im_pix: Tensor) -> Tensor:
        seen = shared_views(views, im_pix)
        predictions = [guide.score_of(guide.embed(pixels)) for guide, pixels in zip(guides, seen, strict=True)]
        prediction: Tensor = sum(w * p for w, p in zip(used, predictions, strict=True)) / divisor  # type: ignore[assignment]
        loss = -prediction if aesthetic_target is None else (prediction - aesthetic_target).abs()
        return loss * grad_scale

    return loss_fn


def _mean_direction(guide: ClipGuide, pictures: Sequence[Any], quirks: Quirks) -> Tensor:
    """Returns the normalised mean of the embeddings of pictures, of shape (1, D)."""
    squares = []
    for picture in pictures:
        opened = picture
        if isinstance(picture, (str, Path)):
            opened = read_picture(picture, "clip_viz_paths", upright=False)
        if quirks.skipped_grey_guides and len(opened.getbands()) == 1:
            warnings.warn(f"clip_viz_paths: {picture} is greyscale, and left out", stacklevel=3)
            continue
        whole = resize_shorter(unit_range(open_picture(opened)), guide.size, not quirks.aliased_resize)
        top, left = (round((side - guide.size) / 2) for side in whole.shape[-2:])
        squares.append(whole[..., top : top + guide.size, left : left + guide.size])
    if not squares:
        raise ValueError("clip_viz_paths: expected at least one picture in colour, got none")
    with torch.no_grad():
        embedded = F.normalize(guide.embed(torch.cat(squares).to(guide.model.device)), dim=-1)
    return F.normalize(embedded.mean(0, keepdim=True), dim=-1)


def _clip_names(text: str, given: Mapping[str, Any], quirks: Quirks) -> list[str]:
    """Returns the names of the models that `clip_model_str` asks for: all those that it contains."""
    if text in given or "/" in text or Path(text).expanduser().is_dir():
        return [text]
    found = [name for name in CLIP_MODELS if text == "all" or name in text]
    if found:
        return found[:1] if quirks.one_clip_model else found
    raise ValueError(
        f"clip_model_str: expected one of {', '.join(CLIP_MODELS)}, 'all', a folder or a hub id, got {text!r}"
    )


def _load(
    name: str,
    known: Mapping[str, str],
    given: Mapping[str, Any] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> tuple[Any, Any]:
    """Returns a CLIP model and its processor: the one that the caller gave for a name, or the default one."""
    source = (given or {}).get(name, known.get(name, name))
    return source if isinstance(source, tuple) else load_clip(source, *_place(device, dtype))


def _head(name: str, given: Any) -> nn.Linear:
    """Returns an aesthetic head that is given as a layer, a file or None."""
    return given if isinstance(given, nn.Linear) else get_aesthetic_model(name, given)


def _place(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Returns the device and the dtype of a guide, with the defaults filled in."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.float16 if device.type == "cuda" else torch.float32)
