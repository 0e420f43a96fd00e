"""The tables of what has a gradient: variables of an optimisation, and losses. One row for each.

`tests/guidance/test_gradients.py` compares the gradient of every row with central differences in float64, and
renders the page docs/gradients.md from the tables: `python tests/gradients_table.py` writes it. A row is made by a
function of what fixtures give, so that nothing is loaded for the page.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[1] / "docs" / "gradients.md"
TEXTS = ["a red star", "a blue circle"]


@dataclass(frozen=True)
class Loss:
    """A loss whose gradient is compared with central differences.

    Attributes:
        name: The name of its class in `doodl_fast.guidance`.
        make: From a CLIP and its processor, in float64, and an empty folder, to the loss.
        of: What it is a function of: "pictures", or "noise", whose gradient is taken by the parameter `start`.
        rel: The largest relative error.
    """

    name: str
    make: Callable[[tuple[Any, Any], Path], Any]
    of: str = "pictures"
    rel: float = 1e-5


@dataclass(frozen=True)
class Variable:
    """A variable of `optimize` whose gradient is compared with central differences of the loss.

    Attributes:
        name: What `variables` calls it.
        make: From what the chain keeps ("checkpoint", "reversible" or "naive") and an empty folder, to the chain.
        modes: The values of `memory` that are tested.
        chain: The solver, for the page.
        rel: The largest relative error.
        shape: Of the starting latents.
    """

    name: str
    make: Callable[[Any, Path], Any]
    modes: tuple[str, ...] = ("checkpoint", "reversible", "naive")
    chain: str = "EDICT"
    rel: float = 1e-6
    shape: tuple[int, ...] = (2, 3, 4, 4)


def shown(seed: int = 5, batch: int = 1, height: int = 32, width: int = 32) -> Tensor:
    """Other pictures, for losses that compare."""
    from conftest import smooth_pictures

    return smooth_pictures(batch, height, width, seed).clamp(-0.95, 0.95).double()


# losses


def _clip(kind: str, *more: Any, **options: Any) -> Callable[..., Any]:
    """A guide by CLIP, which is called with the model, its processor and more."""

    def make(clip: tuple[Any, Any], work: Path) -> Any:
        from doodl_fast import guidance

        return getattr(guidance, kind)(*clip, *more, **options)

    return make


def _clip_image(clip: tuple[Any, Any], work: Path) -> Any:
    from doodl_fast.guidance import ClipImage

    return ClipImage(clip[0], shown(), clip[1])


def _head(features: int) -> nn.Linear:
    torch.manual_seed(0)
    head = nn.Linear(features, 1)
    nn.init.constant_(head.bias, 5.0)
    return head


def _hpsv2(clip: tuple[Any, Any], work: Path) -> Any:
    from test_hps import recorded_weights

    from doodl_fast.guidance import HPSv2
    from doodl_fast.guidance.hps import load_open_clip_file

    torch.save({"state_dict": recorded_weights()}, work / "HPS.pt")
    return HPSv2(load_open_clip_file(work / "HPS.pt", dtype=torch.float64), clip[1], TEXTS)


def _image_reward(clip: tuple[Any, Any], work: Path) -> Any:
    from bert_words import bert_words
    from test_image_reward import recorded_weights

    from doodl_fast.guidance import ImageReward
    from doodl_fast.guidance.image_reward import load_image_reward

    torch.save(recorded_weights(), work / "ImageReward.pt")
    return ImageReward(load_image_reward(work / "ImageReward.pt", dtype=torch.float64), bert_words(), TEXTS)


def _siglip(clip: tuple[Any, Any], work: Path) -> Any:
    from test_text_score import siglip

    from doodl_fast.guidance import TextScore

    model, processor = siglip.__wrapped__(_Folders(work))
    return TextScore(model.double(), processor, TEXTS)


def _naflex(clip: tuple[Any, Any], work: Path) -> Any:
    from test_naflex import pair

    from doodl_fast.guidance import TextScore

    model, processor = pair.__wrapped__(_Folders(work))
    return TextScore(model.double(), processor, TEXTS)


@dataclass(frozen=True)
class _Folders:
    """What fixtures of those tests ask for folders."""

    work: Path

    def mktemp(self, name: str) -> Path:
        return self.work


def _classifier(clip: tuple[Any, Any], work: Path) -> Any:
    import tiny_pipeline

    from doodl_fast.guidance import Classifier

    return Classifier(tiny_pipeline.classifier().double(), None, "blue circle")


def _similarity(look: str) -> Callable[..., Any]:
    def make(clip: tuple[Any, Any], work: Path) -> Any:
        import test_similarity

        from doodl_fast.guidance import Similarity

        return Similarity(test_similarity.dinov2().double(), shown(), test_similarity.processor(), look=look)

    return make


def _faces(clip: tuple[Any, Any], work: Path) -> Any:
    from doodl_fast.guidance import Similarity

    torch.manual_seed(0)
    face = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.LazyLinear(8))
    face.eval()(torch.zeros(1, 3, 24, 24))
    face.double()
    return Similarity(lambda pixels: face(pixels[..., :24, :24]), shown())


def _picture(clip: tuple[Any, Any], work: Path) -> Any:
    from doodl_fast.guidance import Picture

    return Picture(shown())


def _distance(clip: tuple[Any, Any], work: Path) -> Any:
    from test_similarity import Distance

    from doodl_fast.guidance import Picture

    return Picture(shown(), Distance())


def _symmetry(clip: tuple[Any, Any], work: Path) -> Any:
    from doodl_fast.guidance import Symmetry

    return Symmetry("horizontal")


def _dense(name: str) -> Callable[..., Any]:
    """A guide of `test_dense` by its name there."""

    def make(clip: tuple[Any, Any], work: Path) -> Any:
        import test_dense

        return test_dense.LOSSES[name]()

    return make


def _masks(clip: tuple[Any, Any], work: Path) -> Any:
    import test_masks

    from doodl_fast.guidance import Segmentation

    return Segmentation(test_masks.mask2former().double(), 1, size=32)


def _noise(kind: str, *more: Any) -> Callable[..., Any]:
    """A regulariser of noise."""

    def make(clip: tuple[Any, Any], work: Path) -> Any:
        from doodl_fast import guidance

        return getattr(guidance, kind)(*more)

    return make


def _all_noise(clip: tuple[Any, Any], work: Path) -> Any:
    from doodl_fast.guidance import AllNoise, NoiseNorm

    both = AllNoise(NoiseNorm())
    return lambda images, start: both(images, start=start, noise=[2 * start, start.flip(0)])


LOSSES: dict[str, Loss] = {
    "distance to a text by CLIP": Loss("ClipText", _clip("ClipText", TEXTS[0])),
    "the same, by cutouts": Loss("ClipText", _clip("ClipText", TEXTS[0], num_cutouts=2)),
    "distance to pictures by CLIP": Loss("ClipImage", _clip_image),
    "the logit of CLIP": Loss("TextScore", _clip("TextScore", TEXTS)),
    "the logit of SigLIP": Loss("TextScore", _siglip),
    "the logit of SigLIP 2 NaFlex": Loss("TextScore", _naflex, rel=1e-4),
    "PickScore": Loss("PickScore", _clip("PickScore", TEXTS)),
    "HPSv2": Loss("HPSv2", _hpsv2),
    "ImageReward": Loss("ImageReward", _image_reward),
    "LAION's aesthetic score": Loss("Aesthetic", lambda clip, work: _clip("Aesthetic", _head(16))(clip, work)),
    "a class of a classifier": Loss("Classifier", _classifier),
    "cosine to a picture by DINOv2": Loss("Similarity", _similarity("whole")),
    "the same, patch by patch": Loss("Similarity", _similarity("patches")),
    "faces, by a network of one's own": Loss("Similarity", _faces),
    "a picture": Loss("Picture", _picture),
    "a picture, by a network's distance": Loss("Picture", _distance),
    "mirror symmetry": Loss("Symmetry", _symmetry),
    "a class of pixels by SegFormer": Loss("Segmentation", _dense("class")),
    "a map of classes by SegFormer": Loss("Segmentation", _dense("map")),
    "a class of pixels by Mask2Former": Loss("Segmentation", _masks, rel=1e-4),
    "relative depth": Loss("Depth", _dense("relative depth")),
    "metric depth": Loss("Depth", _dense("metric depth")),
    "chi density of the noise's norm (ReNO)": Loss("NoiseNorm", _noise("NoiseNorm"), "noise"),
    "DNO's statistics of noise": Loss("NoiseProbability", _noise("NoiseProbability", 4, 2), "noise"),
    "distance to white noise": Loss("Whiteness", _noise("Whiteness", 4), "noise"),
    "KL divergence to the start": Loss("StartDistance", _noise("StartDistance", torch.zeros(1, 3, 6, 6)), "noise"),
    "a regulariser of all steps' noise": Loss("AllNoise", _all_noise, "noise"),
}


# variables


class LowRank(nn.Module):
    """A LoRA of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from conftest import randn

        self.down = nn.Parameter(randn(2, weight.shape[1]).to(weight))
        self.up = nn.Parameter(randn(weight.shape[0], 2, seed=1).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def _chain(solver: str, memory: Any, trainable: Any = False, lora: bool = False, **options: Any) -> Any:
    """A chain of four steps on a tiny network."""
    from conftest import TinyNet, conditions, sd_scheduler
    from diffusers import DDPMScheduler

    import doodl_fast

    network = TinyNet().double().requires_grad_(False)
    if lora:
        nn.utils.parametrize.register_parametrization(network, "inside", LowRank(network.inside))
    denoiser = doodl_fast.Denoiser(network, *conditions(), 3.0, vjp_dtype=None, trainable=trainable, **options)
    if solver == "Sampler":
        steps = doodl_fast.SamplerSteps.from_scheduler(DDPMScheduler(clip_sample=False), 4)
        return doodl_fast.Sampler(denoiser, steps, memory=memory)
    schedule = doodl_fast.Schedule.from_scheduler(sd_scheduler(), 4)
    return getattr(doodl_fast, solver)(denoiser, schedule, memory=memory)


def _tiny(solver: str = "EDICT") -> Callable[[Any, Path], Any]:
    return lambda memory, work: _chain(solver, memory)


def _with_shift(memory: Any, work: Path) -> Any:
    from conftest import DEVICE

    return _chain("EDICT", memory, shift=torch.tensor([0.3], dtype=torch.float64, device=DEVICE))


def _controlled(trainable: Any = False) -> Callable[[Any, Path], Any]:
    """A pipeline with a ControlNet."""

    def make(memory: Any, work: Path) -> Any:
        from tiny_extras import controlnet, picture, pipelines, unet_like, with_parts

        from doodl_fast import EDICT

        base = pipelines(work)["sd"]
        parts = {"controlnet": controlnet(base.unet).double(), "unet": unet_like(base).double().requires_grad_(False)}
        for name, weight in parts["controlnet"].named_parameters():
            weight.requires_grad_(bool(trainable) and "down_blocks.0" in name)
        pipe = with_parts("StableDiffusionControlNetPipeline", base, **parts)
        options = {"height": 64, "width": 64, "image": picture().double(), "trainable": trainable}
        return EDICT.from_pipeline(pipe, "a dog", num_inference_steps=2, guidance_scale=3.0, memory=memory, **options)

    return make


VARIABLES: dict[str, Variable] = {
    "the starting latents": Variable("start", _tiny()),
    "the noise of every step": Variable("noise", _tiny("Sampler"), ("checkpoint", "naive"), "Sampler"),
    "the noise of an equation that can be undone": Variable("noise", _tiny("RexSDE"), chain="RexSDE"),
    "prompt embeddings": Variable("prompt_embeds", _tiny()),
    "those of the negative prompt": Variable("negative_prompt_embeds", _tiny()),
    "the guidance scale": Variable("guidance_scale", _tiny()),
    "any other argument of the network": Variable("shift", _with_shift),
    "the picture that a ControlNet reads": Variable(
        "controlnet_cond", _controlled(), ("checkpoint", "reversible"), rel=1e-5, shape=(1, 4, 8, 8)
    ),
    "weights: a LoRA": Variable("weights", lambda memory, work: _chain("EDICT", memory, True, lora=True)),
    "weights of a ControlNet": Variable(
        "weights",
        _controlled(lambda name: name.startswith("controlnet") and "down_blocks.0" in name),
        ("checkpoint", "reversible"),
        rel=1e-5,
        shape=(1, 4, 8, 8),
    ),
}

HEAD = """# Which gradients are tested

This page is written by `python tests/gradients_table.py`, out of the tables that `tests/guidance/test_gradients.py`
goes through. Every row is a test that passes on the CPU: the gradient in float64 is compared with central differences
of the loss in three random directions. Networks are tiny and have random weights. What the values of rewards are
compared with is on the page about [rewards](rewards.md#rewards).

"""
BETWEEN = """
The gradient of a [variable](optimization.md#variables) is read from one step of `optimize` by gradient descent, and
compared with losses at displaced values, through the whole chain. Other tests compare the same gradients with plain
autograd:

- Variables of `optimize`, to 1e-10: `tests/optimization/test_variables.py`.
- Weights in every memory mode, all, by name and as a LoRA, to 1e-10: `tests/chain/test_weight_gradients.py`. In two
  processes: `tests/chain/test_weights_in_parallel.py`.
- Rows of a token embedding (textual inversion), through the text encoder: `tests/solvers/test_trained_weights.py`.
- Pictures of T2I-Adapters and embeddings of IP-Adapters: `tests/solvers/test_with_adapters.py`.
- Models of open_clip, and LPIPS where its package is installed: `tests/guidance/test_open_clip.py`,
  `tests/guidance/test_similarity.py`.

"""


def page() -> str:
    """The page of the documentation."""
    heads = "| variable | in `variables` | chain | memory | largest relative error |\n|---|---|---|---|---|\n"
    lines = ["## Variables\n\n", heads]
    for title, row in VARIABLES.items():
        modes = ", ".join(f'`"{mode}"`' for mode in row.modes)
        lines.append(f"| {title} | `{row.name}` | {row.chain} | {modes} | {row.rel:.0e} |\n")
    losses = ["## Losses\n\n| loss | class | a function of | largest relative error |\n|---|---|---|---|\n"]
    for title, loss in LOSSES.items():
        losses.append(f"| {title} | `{loss.name}` | {loss.of} | {loss.rel:.0e} |\n")
    return HEAD + "".join(lines) + BETWEEN + "".join(losses)


def double(clip: tuple[Any, Any]) -> tuple[Any, Any]:
    """A CLIP in float64, and its processor."""
    return copy.deepcopy(clip[0]).double(), clip[1]


if __name__ == "__main__":
    PAGE.write_text(page())
