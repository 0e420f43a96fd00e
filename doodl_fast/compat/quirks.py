"""The peculiarities of the DOODL reference, each with a name by which it can be switched off."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Quirks:
    """Which peculiarities of the reference are reproduced.

    By default all of them are, so that results match those of the reference. docs/quirks.md says what each does to a
    result, and which peculiarities are never reproduced.

    Attributes:
        extra_timesteps: The default scheduler counts timesteps by `1000 // steps` until it reaches 1000, which gives 31
            timesteps for steps=30. When off, there are as many as were asked for.
        fractional_timesteps: A step leads to the noise level of `t - 1000 / steps`, which lies between two timesteps if
            `steps` does not divide 1000. When off, it leads to the noise level of the next timestep.
        swapped_interpolation: Between two timesteps, alpha is interpolated with the two weights swapped. When off, each
            timestep has its own weight.
        float64_alphas: The alphas of the default scheduler are float64. When off, they are rounded to float32, as in
            diffusers.
        ignored_prediction_type: Every network is treated as predicting noise, whatever its scheduler says. When off,
            the prediction of v or of the sample is supported.
        half_updates: fp16 and bf16 latents are updated in their own dtype, and each of the three terms of a step is
            rounded. When off, there is one rounding.
        order_by_index: The index of the loop decides which latent goes first. It restarts at 0 with `opt_t` and in a
            conditioning function. When off, the place of the timestep in the schedule decides.
        inverse_order_by_count: `SteppingLayer.inverse` counts its index from `num_timesteps`. When off, it counts from
            the number of timesteps that there are, which undoes the forward order for steps=30 too.
        averaged_inversion: Editing with tied latents averages the pair that the inversion found, so the run no longer
            starts from the source picture. When off, the pair is kept, and both latents get the same update.
        half_gradient_of_first_image: With `optimize_first_edict_image_only`, the gradient of the one picture is halved
            like the sum of two. When off, it is not halved.
        ignored_one_step_baseline: `one_step_baseline` has no effect with latent traversal. When off, the two together
            are an error.
        ignored_opt_t: Without traversal and without `source_im`, `opt_t` has no effect. When off, it is an error.
        skipping_opt_t: Without traversal and with `source_im`, `opt_t` skips the first `opt_t` steps. When off, the
            last `opt_t` steps are run, as with traversal.
        unmixed_inversion: Without traversal, a source picture is inverted without undoing the mixing that generation
            does. When off, the inversion undoes the mixing too.
        signed_alpha: The transparency of a source picture is taken to be in [-1, 1] when it is composed with white.
            When off, it is in [0, 1].
        renormalized_to_noise: With traversal and `opt_t`, latents are scaled to the norm of the noise at the start of
            the run, which has another noise level. When off, they are scaled to their own norms at the start of the
            optimisation.
        aliased_resize: Pictures are shrunk for a guide without antialiasing, as torchvision 0.12 does, which the
            reference requires. When off, they are shrunk with antialiasing, as torchvision does from 0.17 on.
        skipped_grey_guides: A greyscale picture in `clip_viz_paths` is left out, with a warning. When off, it is used.
        minimum_over_cutouts: `spherical_dist_loss` of several rows is the smallest distance. When off, it is the mean.
        infinite_gradient_of_opposites: The gradient of `spherical_dist_loss` of opposite vectors is not finite. When
            off, it is finite.
        one_clip_model: `clip_model_str="all"` loads ViT-B/32 alone. When off, it loads all three models.
        ignored_clip_weights: `weights` in `model_guidance_dict` has no effect on the CLIP loss. When off, it has.
        aesthetic_average_by_count: The weighted aesthetic score of "both" is divided by the number of models. When off,
            it is divided by the sum of the weights.
        aesthetic_weights_large_first: The weights of "both" belong to (ViT-L/14, ViT-B/32), although the reference's
            documentation says otherwise. When off, ViT-B/32 comes first, as documented.

    Example:
        >>> Quirks(half_updates=False)  # all but one
        >>> Quirks.none()
    """

    # The schedule
    extra_timesteps: bool = True
    fractional_timesteps: bool = True
    swapped_interpolation: bool = True
    float64_alphas: bool = True
    ignored_prediction_type: bool = True

    # The layers
    half_updates: bool = True
    order_by_index: bool = True
    inverse_order_by_count: bool = True

    # gen()
    averaged_inversion: bool = True
    half_gradient_of_first_image: bool = True
    ignored_one_step_baseline: bool = True
    ignored_opt_t: bool = True
    skipping_opt_t: bool = True
    unmixed_inversion: bool = True
    signed_alpha: bool = True
    renormalized_to_noise: bool = True

    # The losses
    aliased_resize: bool = True
    skipped_grey_guides: bool = True
    minimum_over_cutouts: bool = True
    infinite_gradient_of_opposites: bool = True
    one_clip_model: bool = True
    ignored_clip_weights: bool = True
    aesthetic_average_by_count: bool = True
    aesthetic_weights_large_first: bool = True

    @classmethod
    def none(cls) -> Quirks:
        """Returns quirks of which all are switched off."""
        return cls(**{field.name: False for field in dataclasses.fields(cls)})
