"""Comparisons of chains of video pipelines with the pipelines themselves, and of gradients with naive autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from conftest import relative
from torch import Tensor


def compare_with_pipeline(
    pipe: Any, solver: Any, options: dict[str, Any], pack: Callable[[Tensor], Tensor] = torch.clone
) -> None:
    """Compares latents and videos with the pipeline's, and checks that network and prompt matter.

    Args:
        pipe: The pipeline.
        solver: A chain with this solver is the pipeline's own sampler.
        options: What both take, beside a prompt.
        pack: From the chain's latents to the pipeline's.
    """
    chain = solver.from_pipeline(pipe, "a dog", memory="checkpoint", **options)
    x = chain.noise(seed=3)

    def theirs(output_type: str) -> Tensor:
        source = torch.Generator().manual_seed(0)  # of noise that a decoder adds
        made: Tensor = pipe("a dog", latents=pack(x), generator=source, output_type=output_type, **options).frames
        return made

    expected, frames = theirs("latent"), theirs("pt")
    with torch.no_grad():
        (x0,) = chain(x)
        videos = (chain.decode(x0) / 2 + 0.5).clamp(0, 1)
        other = solver.from_pipeline(pipe, "a cat", memory="checkpoint", **options)(x)[0]
    assert relative(pack(x), expected) > 0.1, "the weights must matter"
    assert relative(pack(other), expected) > 1e-3, "the prompt must matter"
    assert relative(pack(x0), expected) < 1e-5
    assert frames.std() > 0.05 and videos.shape == frames.shape
    assert relative(videos, frames) < 1e-5


def compare_gradients(
    pipe: Any, solver: Any, memory: str, options: dict[str, Any], embeddings: Callable[[], dict[str, Tensor]]
) -> None:
    """Compares the gradients of the noise and of the embeddings with those of naive autograd."""
    gradients = []
    for mode in ("naive", memory):
        given = embeddings()
        leaves = {
            name: value.detach().clone().requires_grad_() if value.is_floating_point() else value
            for name, value in given.items()
        }
        chain = solver.from_pipeline(pipe, memory=mode, **options, **leaves)
        x = chain.noise(seed=1).requires_grad_()
        loss = chain.decode(chain(x)[0]).square().mean()
        wanted = [x, *(leaf for leaf in leaves.values() if leaf.requires_grad)]
        gradients.append(torch.autograd.grad(loss, wanted))
    for got, want in zip(gradients[1], gradients[0], strict=True):
        assert want.norm() > 0 and relative(got, want) < 1e-5


def compare_frames(decode: Any, latents: Tensor, frames: list[int] | None) -> None:
    """Compares some frames as pictures, and their gradient, with those of the whole video."""
    leaves = [latents.clone().requires_grad_() for _ in range(2)]
    whole, some = decode(leaves[0]), decode.pictures(frames)(leaves[1])
    expected = (whole if frames is None else whole[:, frames]).flatten(0, 1)
    assert torch.allclose(some, expected, atol=1e-5) and expected.std() > 0.05
    pairs = zip((expected, some), leaves, strict=True)
    gradients = [torch.autograd.grad(made.square().sum(), leaf)[0] for made, leaf in pairs]
    assert relative(gradients[1], gradients[0]) < 1e-5


def compare_leaner(decode: Any, latents: Tensor) -> int:
    """Compares the versions of a decoder that need less memory with itself, and returns how many there are."""
    gradients, count = [], -1
    while decode is not None:
        leaf = latents.clone().requires_grad_()
        gradients.append(torch.autograd.grad(decode(leaf).square().sum(), leaf)[0])
        decode, count = decode.leaner(), count + 1
    assert all(relative(gradient, gradients[0]) < 1e-5 for gradient in gradients)
    return count
