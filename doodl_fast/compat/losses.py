"""The reference's losses on pixels, standing on `doodl_fast.guidance`.

Every factory returns `loss_fn(im_pix)` of images (B, 3, H, W) in [-1, 1], a 0-dim tensor, `grad_scale` included. Guides
are loaded when a factory is called, safetensors only, and get no gradients for their weights. What the factories take
beyond the reference is by keyword: where guides come from, `device` (default: CUDA if there is one), `dtype` of the
guides (default: fp16 on CUDA, else fp32), and `quirks`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion.images import open_picture, read_picture
from ..guidance import Classifier, ClipText, Symmetry, random_cutouts, spherical_distance
from ..guidance import aesthetic as scores
from ..guidance.classifier import load_classifier
from ..guidance.clip import ClipGuide, image_features, load_clip
from ..guidance.cutouts import check_images, unit_range
from .quirks import Quirks

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


class MakeCutouts(nn.Module):
    """`cutouts(pixel_values, num_cutouts)`: random squares averaged down to cut_size; see `guidance.random_cutouts`."""

    def __init__(self, cut_size: int, cut_power: float = 1.0) -> None:
        super().__init__()
        self.cut_size = cut_size
        self.cut_power = cut_power

    def forward(self, pixel_values: Tensor, num_cutouts: int) -> Tensor:
        """(num_cutouts * B, C, cut_size, cut_size) of (B, C, H, W)."""
        return random_cutouts(pixel_values, num_cutouts, self.cut_size, self.cut_power)


def spherical_dist_loss(x: Tensor, y: Tensor, quirks: Quirks = DEFAULT) -> Tensor:
    """Half the squared angle between x and y (..., D), in radians; of several rows the least one's, 0-dim.

    See `guidance.spherical_distance`, and `Quirks.minimum_over_cutouts`, `Quirks.infinite_gradient_of_opposites`.
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
    """Distance of a picture's CLIP embedding from that of a text, or from the mean of other pictures'.

    prompt or clip_viz_paths: one of them, a text or picture files. use_cutouts, num_cuts, cut_power: look at random
    cutouts, else at the whole. clip_model_str: "vit_b_32", "vit_l_14", "vit_g_14" or "all" (see
    `Quirks.one_clip_model`); also a folder or hub id. weights: of the models, in the order b, l, g.
    clip_models: name -> folder, hub id, or (transformers CLIPModel, processor), in place of the hub's.
    Raises ValueError, naming the argument.
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
        seen = _shared(views, im_pix)
        distances = [distance(*each) for each in zip(seen, guides, targets, strict=True)]
        total: Tensor = sum(w * d for w, d in zip(weights, distances, strict=True)) / sum(weights)  # type: ignore[assignment]
        return total * grad_scale

    return loss_fn


def symmetry_loss_fn(symmetry_type: str, grad_scale: float = 0) -> LossFn:
    """Mean squared difference from the mirror image: "horizontal" as in the reference, or "vertical"."""
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
    """Cross-entropy of a classifier with one class.

    model: the classifier, as no network comes with a `dataset` here: a folder or hub id of a transformers
    image-classification model, such a model and its processor as a tuple, or a module from pictures normalised as
    ImageNet's, of 512 x 512, to logits, to an object with `.logits` or to a tuple that ends with them (WS-DAN's).
    class_idx: the index, or the name in the model's config. Raises TypeError or ValueError, naming the argument.
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
    view = View(classifier.size or CLASSIFIER_SIZE, num_cuts if use_cutouts else None, cut_power, quirks)
    return lambda im_pix: grad_scale * classifier(view(im_pix) * 2 - 1)


def get_aesthetic_model(clip_model: str = "vit_l_14", source: str | Path | None = None) -> nn.Linear:
    """The linear head of LAION's aesthetic predictor for a CLIP, in float32.

    source: its file, see `guidance.aesthetic.load_aesthetic_head`; default: where the reference keeps it,
    ~/.cache/emb_reader/sa_0_4_<clip_model>_linear.pth. It is never downloaded. Raises ValueError.
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
    """0-dim mean score, 1 to 10, of pictures (B, 3, h, w) as the CLIP wants them, normalised.

    model: a CLIP with `encode_image` (open_clip) or `get_image_features` (transformers). amodel: the head.
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
    """Minus the aesthetic score, or its distance to aesthetic_target.

    clip_model_str: "vit_l_14", "vit_b_32" or "both", whose scores are weighted (see the quirks' `aesthetic_...`).
    heads: name -> file or nn.Linear, or that alone for one model; see `get_aesthetic_model`. The rest as for
    `clip_loss_fn`, but that "vit_l_14" and "vit_b_32" are OpenAI's.
    Raises TypeError or ValueError, naming the argument.
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
        seen = _shared(views, im_pix)
        predictions = [guide.score_of(guide.embed(pixels)) for guide, pixels in zip(guides, seen, strict=True)]
        prediction: Tensor = sum(w * p for w, p in zip(used, predictions, strict=True)) / divisor  # type: ignore[assignment]
        loss = -prediction if aesthetic_target is None else (prediction - aesthetic_target).abs()
        return loss * grad_scale

    return loss_fn


@dataclass(frozen=True)
class View:
    """What a guide sees of pictures: num_cuts random cutouts, or (None) the whole, its shorter side brought to size."""

    size: int
    num_cuts: int | None
    cut_power: float
    quirks: Quirks

    def __call__(self, im_pix: Tensor) -> Tensor:
        """Pixels in [0, 1], (N, 3, h, w), of images (B, 3, H, W) in [-1, 1]."""
        pixels = unit_range(check_images(im_pix, "im_pix"))
        if self.num_cuts is not None:
            return random_cutouts(pixels, self.num_cuts, self.size, self.cut_power)
        return resize_shorter(pixels, self.size, not self.quirks.aliased_resize)


def resize_shorter(pixels: Tensor, size: int, antialias: bool) -> Tensor:
    """(B, C, h, w) with the shorter side brought to `size`, bilinearly, of (B, C, H, W)."""
    short = min(pixels.shape[-2:])
    if short == size:
        return pixels
    shape = [size if side == short else int(size * side / short) for side in pixels.shape[-2:]]
    return F.interpolate(pixels, shape, mode="bilinear", antialias=antialias, align_corners=False)


def _shared(views: Sequence[View], im_pix: Tensor) -> list[Tensor]:
    """What each guide sees; guides with the same view see the same cutouts."""
    seen = {view: view(im_pix) for view in dict.fromkeys(views)}
    return [seen[view] for view in views]


def _mean_direction(guide: ClipGuide, pictures: Sequence[Any], quirks: Quirks) -> Tensor:
    """(1, D): the mean of the pictures' embeddings, normalised."""
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
    """The models that clip_model_str names: all whose name it contains."""
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
    source = (given or {}).get(name, known.get(name, name))
    return source if isinstance(source, tuple) else load_clip(source, *_place(device, dtype))


def _head(name: str, given: Any) -> nn.Linear:
    return given if isinstance(given, nn.Linear) else get_aesthetic_model(name, given)


def _place(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, dtype or (torch.float16 if device.type == "cuda" else torch.float32)
