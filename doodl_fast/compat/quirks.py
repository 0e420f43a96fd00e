"""What the DOODL reference does differently from what one would expect of it, each with a name to switch it off."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Which peculiarities of the reference are reproduced: all by default, so that results match its.

    `Quirks.none()` has none, `Quirks(half_updates=False)` all but one; `dataclasses.replace` changes a given one.
    What each does to a result, and what is reproduced in no case, is in docs/quirks.md.
    """

    # the schedule
    extra_timesteps: bool = True
    """The default scheduler counts timesteps by `1000 // steps` until it runs out: 31 of them for steps=30. Off: as
    many as asked for."""
    fractional_timesteps: bool = True
    """A step leads to the noise level of `t - 1000 / steps`, which is between two timesteps where steps does not divide
    1000. Off: to that of the next timestep."""
    swapped_interpolation: bool = True
    """Between two timesteps alpha is interpolated with the two weights swapped. Off: each has its own."""
    float64_alphas: bool = True
    """The default scheduler's alphas are float64. Off: rounded to float32, as diffusers has them."""

    ignored_prediction_type: bool = True
    """Every network is taken to predict noise, whatever its scheduler says. Off: v- and sample-prediction are
    heeded."""

    # the layers
    half_updates: bool = True
    """fp16 and bf16 latents are updated in their own dtype, each of the three terms of a step rounded. Off: one
    rounding."""
    order_by_index: bool = True
    """Which latent goes first is read off the loop's index, which restarts at 0 with `opt_t` and in a conditioning
    function. Off: off the timestep's place in the schedule."""
    inverse_order_by_count: bool = True
    """`SteppingLayer.inverse` turns its index around by `num_timesteps`. Off: by the number of timesteps there are,
    which differs for steps=30 (see extra_timesteps) and then is what undoes the forward order."""

    # gen()
    averaged_inversion: bool = True
    """Editing with tied latents averages the pair that inversion found, so the start is no longer the source image's.
    Off: the pair is kept, and both get the same update."""
    half_gradient_of_first_image: bool = True
    """With `optimize_first_edict_image_only` the gradient of the one image is halved as the sum of two would be. Off:
    it is not."""
    ignored_one_step_baseline: bool = True
    """`one_step_baseline` has no effect with latent traversal. Off: together they are an error."""
    ignored_opt_t: bool = True
    """Without traversal and without `source_im`, `opt_t` has no effect. Off: together they are an error."""
    skipping_opt_t: bool = True
    """Without traversal and with `source_im`, `opt_t` skips the first opt_t steps. Off: it runs the last opt_t ones, as
    with traversal."""
    unmixed_inversion: bool = True
    """Without traversal a source image is inverted without undoing the mixing, which generation then does. Off: the
    inversion is that of the generation."""
    signed_alpha: bool = True
    """A source image's transparency is taken as being in [-1, 1] when it is composed with white. Off: in [0, 1]."""

    renormalized_to_noise: bool = True
    """With traversal and `opt_t`, latents are renormalised to the norm of the noise that the run began with, which is
    that of another noise level. Off: to their own norms where the optimisation begins."""

    # losses
    aliased_resize: bool = True
    """Pictures are shrunk for a guide without antialiasing, as the torchvision 0.12 that the reference pins does. Off:
    with it, as torchvision does from 0.17 on."""
    skipped_grey_guides: bool = True
    """A greyscale picture in `clip_viz_paths` is left out, with a warning. Off: it counts as the others."""
    minimum_over_cutouts: bool = True
    """`spherical_dist_loss` of several rows is that of the closest one. Off: their mean."""
    infinite_gradient_of_opposites: bool = True
    """`spherical_dist_loss` of opposite vectors has a gradient that is not finite. Off: a finite one."""
    one_clip_model: bool = True
    """`clip_model_str="all"` loads ViT-B/32 alone. Off: all three."""
    ignored_clip_weights: bool = True
    """`weights` in `model_guidance_dict` does not reach the CLIP loss. Off: it does."""
    aesthetic_average_by_count: bool = True
    """The weighted aesthetic score of `"both"` is divided by the number of models. Off: by the sum of the weights."""
    aesthetic_weights_large_first: bool = True
    """The weights of `"both"` are those of (ViT-L/14, ViT-B/32), against what its documentation says. Off: as
    documented, ViT-B/32 first."""

    @classmethod
    def none(cls) -> Quirks:
        """No peculiarity at all."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})
