"""The guides of the recordings: a small CLIP model that stood in for the real ones, and its aesthetic heads."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from conftest import DEVICE, golden
from torch import Tensor, nn

from doodl_fast.compat import Quirks
from doodl_fast.compat.views import resize_shorter
from doodl_fast.guidance.clip import CLIP_MEAN, CLIP_STD


class TinyGuide(nn.Module):
    """The CLIP model of `clip.safetensors` (guide/*). Every text has the recorded features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, stride=16)
        self.fc = nn.Linear(8, 16)
        weights = {key[6:]: value for key, value in golden("clip").items() if key.startswith("guide/")}
        self.load_state_dict({key: value for key, value in weights.items() if not key.startswith("emb")})
        self.config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=224), text_config=SimpleNamespace(max_position_embeddings=8)
        )
        self.dtype, self.device = torch.float32, DEVICE
        self.to(DEVICE)
        self.texts: list[Tensor] = []

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        return self.fc(4 * F.gelu(4 * self.conv(pixel_values)).mean((2, 3)))

    def get_text_features(self, input_ids: Tensor) -> Tensor:
        self.texts.append(input_ids)
        return golden("clip")["loss/clip_text_features"]


class Words:
    """A tokenizer that returns the codes of the letters."""

    model_max_length = 77

    def __call__(self, prompts: list[str], max_length: int, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.tensor([[ord(c) for c in text[:max_length]] for text in prompts]))


def tiny_guide() -> tuple[Any, Any]:
    """Returns the model and its processor."""
    return TinyGuide(), SimpleNamespace(tokenizer=Words())


def head(name: str) -> nn.Linear:
    layer = nn.Linear(16, 1)
    layer.load_state_dict({key: golden("clip")[f"aesthetic_head/{name}/{key}"] for key in ("weight", "bias")})
    return layer.to(DEVICE)


def recorded_picture_target(antialias: bool, value: float) -> Tensor:
    """The direction (16,) of the guiding pictures' embeddings, which were not recorded themselves.

    It is where the recorded loss `s angle^2 / 2` of `clip_viz` and its gradient at the pixels point to: the gradient
    at the picture's own direction u is `-s angle` times the unit tangent towards the target. Embeddings are affine in 8
    numbers, so u and the target lie in a space of 9 dimensions.
    """
    record = golden("clip")
    case = "loss/clip_viz" if antialias else "loss/clip_viz/no_antialias"
    pixels = record["loss/pixels"].clone().requires_grad_()
    seen = resize_shorter((pixels / 2 + 0.5).clamp(0, 1), 224, antialias)
    mean, std = (torch.tensor(values, device=DEVICE).reshape(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    guide = TinyGuide()
    u = F.normalize(guide.get_image_features((seen - mean) / std), dim=-1)[0]
    rows = [torch.autograd.grad(entry, pixels, retain_graph=True)[0].flatten()[::7] for entry in u]
    jacobian = torch.stack(rows, 1).double()
    gradient = record[f"{case}/grad_pixels_probe"].double()
    u = u.detach().double()
    spanning = torch.cat([guide.fc.weight, guide.fc.bias[:, None]], 1).detach().double()
    basis = torch.linalg.svd(spanning - torch.outer(u, u @ spanning), full_matrices=False).U[:, :8]  # but for u's own
    tangent = -basis @ torch.linalg.lstsq(jacobian @ basis, gradient[:, None]).solution[:, 0]
    slope = float(tangent.norm())  # s angle
    angle = 2 * value / slope
    return (math.cos(angle) * u + math.sin(angle) * tangent / slope).float()


def antialiased(case: str) -> Quirks:
    """Returns the quirks that a recorded loss was made with."""
    return Quirks(aliased_resize=case.endswith("/no_antialias"))
