"""`MaskedFamily`: what families have in common whose prompts are embeddings with a mask, guided in one batch."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from ..calling import NetworkAdapter
from ..decoder import Decoder, vae_scale_factor
from ..denoiser import Combine, Denoiser
from ..guided import Guided
from .base import (
    DENOISER_OPTIONS,
    Family,
    Parts,
    Request,
    encoding_options,
    refuse_unknown,
    say,
    take,
    warn_unused_negative_prompt,
)
from .encoding import NAMES, encode_masked_pair
from .transformer import padded, transformer_space


class MaskedFamily(Family):
    """A family whose pipelines have a transformer, and prompts that are embeddings with a mask of their tokens.

    Beside the arguments of `from_pipeline` it takes those of the pipeline's `encode_prompt` (prompt_embeds and
    prompt_attention_mask, their negative companions, max_sequence_length, ...), whose defaults are those of the
    pipeline's `__call__`, and the options that the class names.
    """

    components: ClassVar[tuple[str, ...]] = ("transformer", "vae", "scheduler", "text_encoder", "tokenizer")
    network_options: ClassVar[frozenset[str]] = frozenset({"attention_kwargs"})
    """The names of options that are arguments of the network."""
    own_options: ClassVar[frozenset[str]] = frozenset({"sigmas"})
    """The names of options that the family reads itself."""
    returned: ClassVar[tuple[str, ...]] = NAMES
    """The names of what the pipeline's `encode_prompt` returns, in its order."""

    def check(self, pipe: Any) -> None:
        """See `Family.check`."""
        self.check_components(pipe, ("transformer", "vae", "scheduler"))

    def set_timesteps(self, pipe: Any, request: Request) -> dict[str, Any]:
        """See `Family.set_timesteps`."""
        sigmas = request.options.get("sigmas")
        return {} if sigmas is None else {"sigmas": sigmas}

    @abstractmethod
    def network(self, pipe: Any) -> NetworkAdapter:
        """Returns what calls the pipeline's transformer as `(x, t, cond, **kwargs)`."""

    def encoding_names(self, pipe: Any) -> set[str]:
        """Returns the names of options that `encode` reads."""
        return encoding_options(pipe)

    def latents(self, pipe: Any) -> tuple[int, int]:
        """Returns the number of channels of the latents, and how many latents a patch has along each axis."""
        return pipe.transformer.config.in_channels, pipe.transformer.config.patch_size

    def formula_scale(self, guidance_scale: float) -> float:
        """Returns the scale s of `uncond + s (cond - uncond)` for the pipeline's own guidance scale above 1."""
        return guidance_scale

    def conditions(self, pipe: Any, request: Request, size: tuple[int, int], encoded: Any) -> dict[str, Any]:
        """Returns the arguments of the network that follow from the size of the picture and from the prompts.

        Args:
            pipe: The pipeline.
            request: The arguments of `from_pipeline`.
            size: Height and width of a picture in pixels.
            encoded: What `encode` has returned last: the prompts' mask (B, tokens), with guidance a pair.
        """
        return {"encoder_attention_mask": encoded}

    def combine(self, pipe: Any, request: Request) -> Combine | None:
        """Returns how the predictions with and without the prompt are combined; None is classifier-free guidance."""
        return None

    def size(self, pipe: Any, request: Request) -> tuple[int, int]:
        """Returns the height and width of a picture in pixels."""
        own = pipe.transformer.config.sample_size * vae_scale_factor(pipe.vae)
        return own if request.height is None else request.height, own if request.width is None else request.width

    def fixed_by(self, pipe: Any) -> str | None:
        """Returns what holds the size of pictures, in words, or None if noise of another size is right too."""
        return None

    def largest(self, pipe: Any) -> int | None:
        """Returns the largest height and width in pixels that the network has positions for, or None."""
        return None

    def most_tokens(self, pipe: Any) -> int | None:
        """Returns the largest number of tokens that the network has positions for, or None."""
        return None

    def parts(self, pipe: Any, request: Request) -> Parts:
        """See `Family.parts`."""
        guidance_scale = self.scale_of(request)
        options, known = dict(request.options), self.encoding_names(pipe)
        encoding, own = take(options, known), take(options, DENOISER_OPTIONS)
        extra = take(options, self.network_options)
        take(options, self.own_options)
        refuse_unknown(options, pipe, known | self.network_options | self.own_options)
        size = self.size(pipe, request)
        fixed_by, largest = self.fixed_by(pipe), self.largest(pipe)
        space = transformer_space(pipe, size, *self.latents(pipe), fixed_by=fixed_by, largest=largest)
        guided = guidance_scale > 1
        if not guided:
            why = f"with guidance_scale={guidance_scale:g}; guidance needs more than 1"
            warn_unused_negative_prompt(request, why)
        attention = extra.get("attention_kwargs") or {}
        if "lora_scale" in known and "scale" in attention:
            encoding.setdefault("lora_scale", attention["scale"])
        cond, uncond, encoded = self.encode(pipe, request, encoding, guided)
        denoiser = Denoiser(
            self.network(pipe),
            cond,
            uncond,
            self.formula_scale(guidance_scale) if guided else 1.0,
            combine=self.combine(pipe, request),
            **self.conditions(pipe, request, size, encoded),
            **own,
            **extra,
        )
        return Parts(denoiser, space.for_prompts(len(cond)), Decoder(pipe.vae))

    def encode(
        self, pipe: Any, request: Request, encoding: dict[str, Any], guided: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        """Returns the embeddings of the prompts, those of the negative prompts, and the masks of their tokens."""
        check_masks(encoding, self.most_tokens(pipe))
        given = {**call_defaults(pipe), **encoding}
        cond, uncond, masks = encode_masked_pair(pipe, request, given, guided, self.returned)
        if uncond is not None and uncond.shape[1] != cond.shape[1]:
            assert isinstance(masks, Guided)
            longest = max(cond.shape[1], uncond.shape[1])
            cond, mask = padded(cond, masks.cond, longest)
            uncond, negative_mask = padded(uncond, masks.uncond, longest)
            masks = Guided(negative_mask, mask)
        return cond, uncond, masks


def check_masks(encoding: dict[str, Any], most: int | None) -> None:
    """Raises ValueError for given embeddings that do not fit their mask, or have more tokens than the network takes."""
    for prefix in ("", "negative_"):
        states, mask = (encoding.get(f"{prefix}{name}") for name in ("prompt_embeds", "prompt_attention_mask"))
        if states is not None and mask is not None and states.shape[:2] != mask.shape:
            raise ValueError(
                f"{prefix}prompt_attention_mask: expected shape {tuple(states.shape[:2])}, a number for each token of "
                f"{prefix}prompt_embeds, got {tuple(mask.shape)}"
            )
        if states is not None and most is not None and states.shape[1] > most:
            raise ValueError(
                f"{prefix}prompt_embeds: expected at most {most} tokens, for which the network has positions, got "
                f"{states.shape[1]}"
            )
    tokens = encoding.get("max_sequence_length")
    if tokens is not None and most is not None and tokens > most:
        raise ValueError(
            f"max_sequence_length: expected at most {most}, for which the network has positions, got {tokens}"
        )


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Returns the defaults of the pipeline's `__call__` for arguments of its `encode_prompt`, whose own may differ."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {
        name: parameters[name].default
        for name in sorted(encoding_options(pipe) & parameters.keys())
        if parameters[name].default is not None
    }


def warn_unbinned(pipe: Any, request: Request, size: tuple[int, int], own: int) -> None:
    """Says that a size is used as it is, if it is not the pipeline's own.

    Args:
        pipe: A pipeline with `use_resolution_binning`.
        request: The arguments of `from_pipeline`.
        size: Height and width of a picture in pixels.
        own: The pipeline's own height and width.
    """
    if size != (own, own):
        say(
            f"height, width: {size[0]} x {size[1]} is used as it is; the pipeline's use_resolution_binning, which "
            "may take another size and resize the picture, is not part of the chain"
        )
