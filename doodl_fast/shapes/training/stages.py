"""The training stages of the embedded pipeline: each trains one network with its own loss."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..captions import confusions
from ..scenes import COLOURS, SHAPES, Prompt, pixels, prompts
from . import models
from .data import Pictures
from .fit import fit
from .tokenizer import make_tokenizer, tokens

CAPTION_DROPOUT = 0.1
LAYOUT_SCALE = 10.0
"""The factor of CLIP's unit embeddings before the layout is read off them."""


def train_vae(work: Path, data: Pictures) -> nn.Module:
    """Trains the VAE on the absolute, squared and edge differences of the pictures, with a small KL term."""
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
    """Encodes all pictures, or reads what an earlier call stored in `work`.

    Returns:
        The latents of shape (N, 4, 16, 16), scaled to a standard deviation of 1, and the scaling factor.
    """
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
    """Linear classifiers that read `Prompt.layout` off features: an auxiliary task that teaches where objects stand."""

    CHOICES = (3, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(models.TEXT_WIDTH, choices) for choices in self.CHOICES)

    def forward(self, features: Tensor, layouts: Tensor) -> Tensor:
        """Returns the mean cross entropy of features (N, TEXT_WIDTH) and layouts (N, 5), int64."""
        losses = [
            F.cross_entropy(head(features), wanted) for head, wanted in zip(self.heads, layouts.unbind(-1), strict=True)
        ]
        return torch.stack(losses).mean()


def layouts_of(captions: Iterable[str]) -> Tensor:
    """Returns the layouts of captions, of shape (N, 5), int64."""
    return torch.tensor([Prompt.parse(caption).layout for caption in captions])


class Reader(nn.Module):
    """A text encoder, and the layout task that it is trained on."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.text_encoder = models.text_encoder(tokenizer)
        self.layout = Layout()


def train_text(work: Path) -> Reader:
    """Trains a text encoder on captions alone: every token from the end of the text on must contain the layout.

    Noise prediction by itself learns the words quickly, and the relation between the objects only after tens of
    thousands of steps.
    """
    torch.manual_seed(5)
    tokenizer = make_tokenizer(work / "tokenizer")
    captions = [str(p) for p in [*list(prompts(1)) * 10, *prompts(2, held_out=False)]]
    ids, layouts = tokens(tokenizer, captions), layouts_of(captions)
    reader = Reader(tokenizer)

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        hidden = reader.text_encoder(ids[chosen])[0]
        ended = (ids[chosen] == tokenizer.eos_token_id).cumsum(1) > 0
        rows = torch.arange(len(chosen))[:, None].expand_as(ended)[ended]
        return reader.layout(hidden[ended], layouts[chosen][rows])

    return fit("text", work, reader, np.arange(len(captions)), loss)  # type: ignore[return-value]


def train_unet(work: Path, data: Pictures, vae: nn.Module, start: Path | None = None) -> nn.Module:
    """Trains the UNet to predict noise, with a text encoder that is frozen.

    A text encoder that is trained along with the UNet forgets where objects stand: after 18,000 steps the relation
    could be read off its output in half of all captions, and half of the pictures were right.

    Min-SNR weighting (Hang et al., ICCV 2023, arXiv 2303.09556) with gamma = 5 multiplies the squared error of the
    predicted picture by min(SNR, 5). At the timesteps where the layout is decided, this is a hundredth of the weight of
    the details. The square root that is used here is a tenth. For the same reason timesteps are drawn with a density
    that rises in proportion to them.

    Args:
        work: The folder of the checkpoints.
        data: The pictures and their captions.
        vae: The trained VAE.
        start: The folder of a pipeline whose UNet is trained further; None to start from random weights.
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
        hidden = train_text(work).text_encoder(tokens(make_tokenizer(work / "tokenizer"), texts.tolist()))[0]
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


class ClipWithLayout(nn.Module):
    """CLIP, and the layout task on the embeddings of pictures and texts."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.clip = models.clip(tokenizer)
        self.layout = Layout()


def train_clip(work: Path, data: Pictures) -> nn.Module:
    """Trains CLIP (arXiv 2103.00020) on the batch's own captions, on wrong captions, and on the layout task.

    Contrastive pairs alone do not teach it which object is on the left.
    """
    torch.manual_seed(3)
    tokenizer = make_tokenizer(work / "tokenizer")
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
    """Blurs, shifts and adds noise to pictures (N, 3, H, W), so that a guide does not depend on single pixels."""
    shift = torch.randint(-3, 4, (2,)).tolist()
    image = image.roll(shift, (-2, -1))
    if torch.rand(()) < 0.5:
        image = F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear", align_corners=False)
    return image + torch.rand(len(image), 1, 1, 1) * 0.25 * torch.randn_like(image)


def train_classifier(work: Path, data: Pictures) -> nn.Module:
    """Trains the classifier of varieties on the pictures of one object."""
    torch.manual_seed(4)
    classifier = models.classifier()
    varieties = torch.from_numpy(data.varieties)

    def loss(chosen: np.ndarray, step: int) -> Tensor:
        logits = classifier(degrade(pixels(data.images[chosen]))).logits
        return F.cross_entropy(logits, varieties[chosen], label_smoothing=0.05)

    return fit("classifier", work, classifier, np.flatnonzero(data.varieties >= 0), loss)
