"""Trains the embedded pipeline from scratch: ``python -m doodl_fast.shapes.train --work DIR [--out DIR] [STAGE ...]``.

Stages: ``text`` (the UNet's text encoder, and what CLIP's starts from), ``vae``, ``unet``, ``clip``, ``classifier``;
then ``export`` writes fp16 safetensors in diffusers' and transformers' folders. Everything is seeded; each stage stores
a checkpoint every minute and continues from it.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import models
from .data import Pictures, pictures
from .scenes import COLOURS, RELATIONS, SHAPES, Prompt, Thing, prompts

SECONDS_BETWEEN_CHECKPOINTS = 60
CAPTION_DROPOUT = 0.1
LAYOUT_SCALE = 10.0
"""of CLIP's unit embeddings, before the layout is read off them"""


@dataclass(frozen=True)
class Recipe:
    """A stage's hyperparameters; the learning rate warms up and then falls as a cosine."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.01
    ema: float | None = None


RECIPES = {
    "text": Recipe(steps=1500, batch=128, learning_rate=1e-3),
    "vae": Recipe(steps=3200, batch=8, learning_rate=2e-3, weight_decay=0.0, ema=0.99),
    "unet": Recipe(steps=4_500, batch=32, learning_rate=6e-4, ema=0.999),
    "clip": Recipe(steps=4500, batch=64, learning_rate=8e-4, weight_decay=0.05, ema=0.995),
    "classifier": Recipe(steps=1200, batch=64, learning_rate=2e-3, weight_decay=0.05),
}


def pixels(batch: np.ndarray) -> Tensor:
    """(N, 64, 64, 3) uint8 to (N, 3, 64, 64) float32 in [-1, 1], channels last."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def batches(indices: np.ndarray, size: int, seed: int, start: int) -> Iterator[np.ndarray]:
    """Endless shuffled batches, the same ones for the same seed; ``start`` skips to a step at no cost."""
    per_epoch = len(indices) // size
    step = start
    while True:
        epoch, position = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(indices)
        for i in range(position, per_epoch):
            yield order[i * size : (i + 1) * size]
            step += 1


def fit(
    name: str,
    work: Path,
    module: nn.Module,
    indices: np.ndarray,
    loss: Callable[[np.ndarray, int], Tensor],
    seed: int = 0,
) -> nn.Module:
    """Runs one stage to its end, from its checkpoint if there is one; returns the averaged (EMA) module."""
    recipe, path = RECIPES[name], work / f"{name}.ckpt"
    optimizer = torch.optim.AdamW(
        module.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=recipe.weight_decay
    )
    average = copy.deepcopy(module)
    step, recent = 0, math.nan
    if path.exists():
        stored = torch.load(path, weights_only=True)
        module.load_state_dict(stored["module"])
        average.load_state_dict(stored["average"])
        optimizer.load_state_dict(stored["optimizer"])
        step, recent = stored["step"], stored["loss"]

    def save() -> None:
        state = {"module": module.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step, "loss": recent}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    module.train()
    saved = time.monotonic()
    with tqdm(total=recipe.steps, initial=step, desc=name, mininterval=5) as bar:
        for chosen in batches(indices, recipe.batch, seed, step):
            if step >= recipe.steps:
                break
            torch.manual_seed(seed * 1_000_003 + step)
            warm, done = min(1.0, (step + 1) / 100), step / recipe.steps
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
            value = loss(chosen, step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            decay = min(recipe.ema or 0.0, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, live in zip(average.state_dict().values(), module.state_dict().values(), strict=True):
                    mean.lerp_(live, 1 - decay) if mean.is_floating_point() else mean.copy_(live)
            recent = float(value) if math.isnan(recent) else 0.98 * recent + 0.02 * float(value)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                save()
                saved = time.monotonic()
    save()
    return average.eval().requires_grad_(False)


def train_vae(work: Path, data: Pictures) -> nn.Module:
    torch.manual_seed(1)
    vae = models.vae()

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        image = pixels(data.images[chosen])
        posterior = vae.encode(image).latent_dist
        rebuilt = vae.decode(posterior.sample()).sample
        edges = sum((rebuilt.diff(dim=d) - image.diff(dim=d)).abs().mean() for d in (-1, -2))
        return F.l1_loss(rebuilt, image) + F.mse_loss(rebuilt, image) + edges + 2e-5 * posterior.kl().mean() / 12.0

    return fit("vae", work, vae, np.arange(len(data)), loss)


@torch.no_grad()
def latents(work: Path, vae: Any, data: Pictures) -> tuple[Tensor, float]:
    """The whole set's latents, scaled to unit standard deviation, and the scaling factor; cached."""
    path = work / "latents.pt"
    if not path.exists():
        parts = [
            vae.encode(pixels(data.images[i : i + 100])).latent_dist.mean
            for i in tqdm(range(0, len(data), 100), "encode")
        ]
        encoded = torch.cat(parts)
        factor = round(1 / float(encoded.std()), 5)
        torch.save({"latents": encoded * factor, "factor": factor}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    stored = torch.load(path, weights_only=True)
    return stored["latents"], stored["factor"]


class Layout(nn.Module):
    """Reads `Prompt.layout` off features: the auxiliary task that teaches who stands where."""

    CHOICES = (3, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(models.TEXT_WIDTH, choices) for choices in self.CHOICES)

    def forward(self, features: Tensor, layouts: Tensor) -> Tensor:
        """Mean cross entropy; features: (N, TEXT_WIDTH), layouts: (N, 5) int64."""
        losses = [
            F.cross_entropy(head(features), wanted) for head, wanted in zip(self.heads, layouts.unbind(-1), strict=True)
        ]
        return torch.stack(losses).mean()


def layouts_of(captions: Iterable[str]) -> Tensor:
    """(N, 5) int64."""
    return torch.tensor([Prompt.parse(caption).layout for caption in captions])


class Reader(nn.Module):
    """A text encoder and the task it is first taught."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder(tokenizer)
        self.layout = Layout()


def train_text(work: Path) -> Reader:
    """Teaches a text encoder, from captions alone, what stands where: every token from the end of text on must tell.

    Noise prediction by itself learns the words quickly and their relation only after tens of thousands of steps.
    """
    torch.manual_seed(5)
    tokenizer = models.tokenizer(work / "tokenizer")
    captions = [str(p) for p in [*list(prompts(1)) * 10, *prompts(2, held_out=False)]]
    ids, layouts = tokens(tokenizer, captions), layouts_of(captions)
    reader = Reader(tokenizer)

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        hidden = reader.text_encoder(ids[chosen])[0]
        ended = (ids[chosen] == tokenizer.eos_token_id).cumsum(1) > 0
        rows = torch.arange(len(chosen))[:, None].expand_as(ended)[ended]
        return reader.layout(hidden[ended], layouts[chosen][rows])

    return fit("text", work, reader, np.arange(len(captions)), loss)  # type: ignore[return-value]


def tokens(tokenizer: Any, captions: list[str]) -> Tensor:
    return torch.tensor(
        tokenizer(captions, padding="max_length", truncation=True, max_length=models.MAX_TOKENS).input_ids
    )


def train_unet(work: Path, data: Pictures, vae: nn.Module, start: Path | None = None) -> nn.Module:
    """Noise prediction, weighted by the square root of the clamped signal-to-noise ratio; the text encoder is frozen.

    start: a pipeline's folder, whose UNet is trained on; None: from scratch.

    Trained along with the UNet, the text encoder forgets who stands where: whether "left of" held could be told from
    its output in half of all captions after 18,000 steps, and pictures were right as often.

    Min-SNR weighting (Hang et al., ICCV 2023, arXiv 2303.09556), with gamma = 5, weighs the squared error of the
    picture by min(SNR, 5): where the layout is decided, a hundredth of what details get. Its square root gives a tenth.
    Timesteps are drawn with a density that rises in proportion to them, for the same reason.
    """
    torch.manual_seed(2)
    unet = models.unet()
    if start is not None:
        unet.load_state_dict(type(unet).from_pretrained(start, subfolder="unet").state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    encoded, _ = latents(work, vae, data)
    alphas = models.scheduler().alphas_cumprod
    texts, which = np.unique(["", *data.captions], return_inverse=True)
    with torch.no_grad():
        hidden = train_text(work).text_encoder(tokens(models.tokenizer(work / "tokenizer"), texts.tolist()))[0]
    empty, captions = int(which[0]), torch.from_numpy(which[1:])

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        clean = encoded[chosen]
        noise, t = torch.randn_like(clean), (1000 * torch.rand(len(chosen)).sqrt()).long().clamp(max=999)
        alpha = alphas[t][:, None, None, None]
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        caption = torch.where(torch.rand(len(chosen)) < CAPTION_DROPOUT, empty, captions[chosen])
        eps = unet(noisy, t, encoder_hidden_states=hidden[caption]).sample
        snr = alphas[t] / (1 - alphas[t])
        return ((eps - noise).square().mean((1, 2, 3)) * snr.clamp(max=5.0).sqrt() / snr).mean() * 4

    return fit("unet", work, unet, np.flatnonzero(~data.held_out), loss)


def confusions(rng: np.random.Generator, caption: str, unchanged: bool = False) -> list[str]:
    """Captions that differ from the given one in a single respect: the negatives that teach binding.

    For two objects: first colour, first shape, second colour, second shape, objects swapped, colours swapped, relation,
    and the first object alone. Changes that change nothing (equal colours swapped) are left out unless ``unchanged``.
    """
    prompt = Prompt.parse(caption)
    first, *rest = prompt.things

    def other(options: Iterable[str], current: str | None) -> str:
        return str(rng.choice([o for o in options if o != current]))

    def recoloured(thing: Thing) -> Thing:
        return Thing(other(COLOURS, thing.colour), thing.shape)

    def reshaped(thing: Thing) -> Thing:
        return Thing(thing.colour, other(SHAPES, thing.shape))

    if rest:
        second, relation = rest[0], prompt.relation
        swapped = (Thing(second.colour, first.shape), Thing(first.colour, second.shape))
        changed = [
            Prompt((recoloured(first), second), relation),
            Prompt((reshaped(first), second), relation),
            Prompt((first, recoloured(second)), relation),
            Prompt((first, reshaped(second)), relation),
            Prompt((second, first), relation),
            Prompt(swapped, relation),
            Prompt(prompt.things, other(RELATIONS, relation)),
            Prompt((first,)),
        ]
    else:
        company = Thing(other(COLOURS, None), other(SHAPES, None))
        changed = [Prompt((recoloured(first),)), Prompt((reshaped(first),)), Prompt((first, company), "left of")]
    return [str(c) for c in changed if unchanged or c != prompt]


class ClipWithLayout(nn.Module):
    """CLIP, and the auxiliary task for the embeddings of both its towers."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.clip = models.clip(tokenizer)
        self.layout = Layout()


def train_clip(work: Path, data: Pictures) -> nn.Module:
    """Contrastive pairs (CLIP, arXiv 2103.00020) with hard negative captions beside the batch's own, and the layout
    as an auxiliary task: pairs alone leave it blind to who is left of whom.
    """
    torch.manual_seed(3)
    tokenizer = models.tokenizer(work / "tokenizer")
    both = ClipWithLayout(tokenizer)
    clip, taught = both.clip, train_text(work).text_encoder
    clip.text_model.load_state_dict(taught.state_dict())

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        rng = np.random.default_rng([3, step])
        captions = [data.captions[i] for i in chosen]
        hard = [str(rng.choice(confusions(rng, c))) for c in captions + captions + captions]
        image = degrade(pixels(data.images[chosen]))
        out = clip(input_ids=tokens(tokenizer, captions + hard), pixel_values=image)
        same = torch.tensor([[a == b for b in captions + hard] for a in captions])
        positive = same.float() / same.sum(1, keepdim=True)
        by_image = -(positive * out.logits_per_image.log_softmax(1)).sum(1).mean()
        square = same[:, : len(captions)].float()
        by_text = -(square / square.sum(0) * out.logits_per_image[:, : len(captions)].log_softmax(0)).sum(0).mean()
        embedded = torch.cat([out.image_embeds, out.text_embeds[: len(captions)]]) * LAYOUT_SCALE
        return (by_image + by_text) / 2 + both.layout(embedded, layouts_of(captions).repeat(2, 1))

    return fit("clip", work, both, np.arange(len(data)), loss).clip  # type: ignore[return-value]


def degrade(image: Tensor) -> Tensor:
    """Blurs, shifts and adds noise, so that a guide does not hang on single pixels."""
    shift = torch.randint(-3, 4, (2,)).tolist()
    image = image.roll(shift, (-2, -1))
    if torch.rand(()) < 0.5:
        image = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return image + torch.rand(len(image), 1, 1, 1) * 0.25 * torch.randn_like(image)


def train_classifier(work: Path, data: Pictures) -> nn.Module:
    torch.manual_seed(4)
    classifier = models.classifier()
    varieties = torch.from_numpy(data.varieties)

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        logits = classifier(degrade(pixels(data.images[chosen]))).logits
        return F.cross_entropy(logits, varieties[chosen], label_smoothing=0.05)

    return fit("classifier", work, classifier, np.flatnonzero(data.varieties >= 0), loss)


def export(work: Path, out: Path, data: Pictures) -> None:
    """Writes the pipeline, the CLIP model and the classifier as fp16 safetensors."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor, CLIPProcessor

    vae = train_vae(work, data)
    _, factor = latents(work, vae, data)
    vae.register_to_config(scaling_factor=factor)  # type: ignore[operator]
    tokenizer = models.tokenizer(work / "tokenizer")
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=train_text(work).text_encoder,
        tokenizer=tokenizer,
        unet=train_unet(work, data, vae),
        scheduler=models.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(out / "pipeline", safe_serialization=True)
    processor = CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    train_clip(work, data).half().save_pretrained(out / "clip")  # type: ignore[operator]
    CLIPProcessor(processor, tokenizer).save_pretrained(out / "clip")
    train_classifier(work, data).half().save_pretrained(out / "classifier")  # type: ignore[operator]
    processor.save_pretrained(out / "classifier")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", choices=[*RECIPES, "export"], help="default: all, then export")
    parser.add_argument("--work", type=Path, required=True, help="folder for the drawn pictures and the checkpoints")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="where export writes")
    parser.add_argument("--start", type=Path, help="pipeline whose UNet the unet stage trains on (default: a new one)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = pictures(args.work)
    for stage in args.stages or [*RECIPES, "export"]:
        if stage == "text":
            train_text(args.work)
        elif stage == "vae":
            train_vae(args.work, data)
        elif stage == "unet":
            train_unet(args.work, data, train_vae(args.work, data), args.start)
        elif stage == "clip":
            train_clip(args.work, data)
        elif stage == "classifier":
            train_classifier(args.work, data)
        else:
            export(args.work, args.out, data)


if __name__ == "__main__":
    main()
