"""What the tests of the families share: a chain compared with its pipeline, and gradients with plain autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from conftest import relative
from torch import Tensor

CLOSE = 1e-5


def check_pictures(
    solver: Any,
    pipe: Any,
    prompt: str | list[str],
    options: Mapping[str, Any],
    packed: Callable[[Tensor], Tensor] = torch.clone,
    pipeline_only: Mapping[str, Any] | None = None,
    given: Callable[[Tensor], Tensor] | None = None,
) -> Any:
    """Checks that a chain's latents and pictures are the pipeline's, and that the weights and the prompt matter.

    Args:
        solver: A class of chains.
        pipe: The pipeline.
        prompt: One prompt, or several.
        options: Arguments of both the pipeline and `from_pipeline`.
        packed: From a chain's latents to what the pipeline returns.
        pipeline_only: Arguments of the pipeline alone.
        given: From a chain's latents to what the pipeline takes; None is `packed`.

    Returns:
        The chain.
    """
    chain = solver.from_pipeline(pipe, prompt, memory="checkpoint", **options)
    x = chain.noise(seed=3)
    call = {**options, **(pipeline_only or {}), "prompt": prompt, "latents": (given or packed)(x)}
    expected = pipe(output_type="latent", **call).images
    assert relative(packed(x), expected) > 0.1, "the weights must matter"
    with torch.no_grad():
        (x0,) = chain(x)
        images = (chain.decode(x0) + 1) / 2
        changed = "a red cat" if isinstance(prompt, str) else ["a red cat", *prompt[1:]]
        (other,) = solver.from_pipeline(pipe, changed, memory="checkpoint", **options)(x)
    assert relative(packed(other), expected) > 1e-3, "the prompt must matter"
    assert relative(packed(x0), expected) < CLOSE
    assert relative(images.clamp(0, 1), pipe(output_type="pt", **call).images) < CLOSE
    return chain


def check_gradient(
    solver: Any, pipe: Any, memory: Any, embeddings: Mapping[str, Tensor], options: Mapping[str, Any]
) -> None:
    """Checks the gradients of a loss on the picture, for the noise and every embedding, against autograd's.

    Args:
        solver: A class of chains.
        pipe: The pipeline.
        memory: How the chain's gradient is computed.
        embeddings: Embeddings and masks, by name.
        options: Further arguments of `from_pipeline`.
    """
    found = []
    for mode in ("naive", memory):
        given = {
            name: value.detach().clone().requires_grad_("mask" not in name)
            for name, value in embeddings.items()
            if value is not None
        }
        chain = solver.from_pipeline(pipe, memory=mode, **options, **given)
        x = chain.noise(seed=1).requires_grad_()
        leaves = {"noise": x, **{name: value for name, value in given.items() if value.requires_grad}}
        loss = chain.decode(chain(x)[0]).square().mean()
        found.append(dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))
    for name, want in found[0].items():
        assert want.norm() > 0, name
        assert relative(found[1][name], want) < CLOSE, name


def check_no_bit_differs(solver: Any, pipe: Any, prompt: str, options: Mapping[str, Any]) -> None:
    """Checks that exact arithmetic goes from noise to a picture and back without a differing bit, and vice versa."""
    chain = solver.from_pipeline(pipe, prompt, memory="checkpoint", arithmetic="exact", **options)
    x = chain.noise(seed=2)
    start = chain.state(x)
    reached = chain.forward_state(start)
    assert reached.end == "image" and not torch.equal(reached.x, start.x)
    assert chain.inverse_state(reached).equals(start)


def masked_embeddings(pipe: Any, **encoding: Any) -> dict[str, Tensor]:
    """Returns the embeddings and masks of a prompt and of a negative prompt, by name."""
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    made = pipe.encode_prompt("a dog", True, negative_prompt="ugly cat", device="cpu", **encoding)
    return dict(zip(names, made, strict=True))
