"""Compares a diffusers scheduler with the chain: what the chain leaves out, and what would make its pictures wrong."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

NOISE = "the noise that it adds in every step"
MULTISTEP = "its multistep updates"
# By class, what its `step` does besides or instead of DDIM's update. The others need only their timesteps compared.
LEFT_OUT = {
    "CogVideoXDPMScheduler": (NOISE, MULTISTEP),
    "DDPMParallelScheduler": (NOISE,),
    "DDPMScheduler": (NOISE,),
    "DEISMultistepScheduler": (MULTISTEP,),
    "DPMSolverMultistepScheduler": (MULTISTEP,),
    "DPMSolverSDEScheduler": (NOISE, "its second-order steps"),
    "DPMSolverSinglestepScheduler": ("its higher-order steps",),
    "EulerAncestralDiscreteScheduler": ("its ancestral noise",),
    "HeunDiscreteScheduler": ("its second-order steps",),
    "KDPM2AncestralDiscreteScheduler": ("its ancestral noise", "its second-order steps"),
    "KDPM2DiscreteScheduler": ("its second-order steps",),
    "LCMScheduler": (NOISE, "its boundary scalings c_skip and c_out"),
    "LMSDiscreteScheduler": (MULTISTEP,),
    "PNDMScheduler": (MULTISTEP,),
    "SASolverScheduler": (NOISE, MULTISTEP),
    "TCDScheduler": ("the noise that it adds with eta > 0",),
    "UnCLIPScheduler": (NOISE,),
    "UniPCMultistepScheduler": (MULTISTEP,),
}
# Their updates are DDIM's, given the same timesteps.
SAME_UPDATE = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler", "EulerDiscreteScheduler")
STRIDING = ("DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler")
OWN_TIMESTEPS = ("LCMScheduler", "TCDScheduler")
NO_CLIPPING = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")  # they have the setting and never read it
REFUSED = {
    "DDIMInverseScheduler": "runs from picture to noise; use DDIMScheduler and chain.inverse",
    "DPMSolverMultistepInverseScheduler": "runs from picture to noise; use DDIMScheduler and chain.inverse",
    "RePaintScheduler": "needs a picture and a mask in every step; use DDIMScheduler",
}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


def setting(scheduler: Any, key: str, default: Any) -> Any:
    """Returns a setting of the scheduler, whose `config` may be a dict, a diffusers FrozenDict or a plain object."""
    config = getattr(scheduler, "config", None)
    value = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if value is None else value


def is_kind(scheduler: Any, names: Sequence[str]) -> bool:
    """Whether the scheduler's class, or one that it derives from, has one of the names."""
    return any(base.__name__ in names for base in type(scheduler).__mro__)


def is_from_diffusers(scheduler: Any) -> bool:
    """Whether the scheduler is of a class of diffusers, or of one that derives from it."""
    return any(base.__module__.startswith("diffusers.") for base in type(scheduler).__mro__)


def refuse_what_would_be_wrong(scheduler: Any) -> None:
    """Raises ValueError for a scheduler whose pictures a chain of DDIM steps could not come near to.

    A class of diffusers keeps settings that it does not know in its config, so only those that it reads count.
    """
    name = type(scheduler).__name__
    for kind, reason in REFUSED.items():
        if is_kind(scheduler, [kind]):
            raise ValueError(f"scheduler: {name} {reason}")
    for key in ("clip_sample", "thresholding"):
        if setting(scheduler, key, False) and _reads(scheduler, key) and not is_kind(scheduler, NO_CLIPPING):
            raise ValueError(
                f"scheduler: {name} has {key}=True, which changes every predicted picture in a way that cannot be "
                f"undone and is not part of the chain; expected {key}=False. Where the model does not need it, use "
                f"{name}.from_config(scheduler.config, {key}=False)"
            )
    if setting(scheduler, "timestep_type", "discrete") == "continuous":
        raise ValueError(
            f"scheduler: {name} has timestep_type='continuous' (as Stable Video Diffusion has), whose timesteps are "
            "functions of the noise level and not places in a table; expected discrete timesteps"
        )
    if setting(scheduler, "use_flow_sigmas", False) and _reads(scheduler, "use_flow_sigmas"):
        raise ValueError(f"scheduler: {name} has use_flow_sigmas=True; flow matching is not supported")


def left_out(
    scheduler: Any, steps: int, timesteps: Sequence[int], alphas: Sequence[float], last_alpha: float
) -> list[str]:
    """Returns what a diffusers scheduler does and the chain does not, in words.

    Args:
        scheduler: The scheduler, which is not changed.
        steps: The number of inference steps.
        timesteps: The chain's timesteps.
        alphas: The cumulative alphas of all training timesteps.
        last_alpha: The cumulative alpha that the chain's last step leads to.
    """
    phrases = [phrase for kind, own in LEFT_OUT.items() if is_kind(scheduler, [kind]) for phrase in own]
    if not is_kind(scheduler, [*SAME_UPDATE, *LEFT_OUT]):
        phrases.append("whatever its steps do other than DDIM's")
    if str(setting(scheduler, "algorithm_type", "")).startswith("sde"):
        phrases.append(f"{NOISE} (algorithm_type={setting(scheduler, 'algorithm_type', '')!r})")
    phrases += [key for key in SPACINGS if setting(scheduler, key, False) and _reads(scheduler, key)]
    stepper = copy.deepcopy(scheduler)
    stepper.set_timesteps(steps)
    # DDIM itself can have one timestep too many, of -1; second-order schedulers have every timestep twice.
    raw = [float(t) for t in stepper.timesteps]
    own = dict.fromkeys(raw[:steps] if is_kind(scheduler, STRIDING) else raw)
    if list(own) != [float(t) for t in timesteps]:
        phrases.append(f"its own timesteps {_shown(own)}")
    sigmas = getattr(stepper, "sigmas", None)
    if sigmas is not None and abs(1 / (1 + float(sigmas[-1]) ** 2) - last_alpha) > 1e-6:
        phrases.append("its last step, which leads to another noise level")
    if is_kind(scheduler, STRIDING):
        stride = int(setting(scheduler, "num_train_timesteps", len(alphas))) // steps
        nexts = [t - stride for t in timesteps]
        own_alphas = [alphas[t] if t >= 0 else last_alpha for t in nexts]
        if own_alphas != [*(alphas[t] for t in timesteps[1:]), last_alpha]:
            phrases.append(f"its constant stride of {stride}, which misses its own next timestep")
    return list(dict.fromkeys(phrases))


def _reads(scheduler: Any, key: str) -> bool:
    """Whether the scheduler's class has the setting, if it is of diffusers. Of others every setting counts."""
    if not is_from_diffusers(scheduler):
        return True
    constructors = [vars(base)["__init__"] for base in type(scheduler).__mro__[:-1] if "__init__" in vars(base)]
    return any(key in inspect.signature(constructor).parameters for constructor in constructors)


def _shown(timesteps: Any) -> str:
    """Returns the first three timesteps and the last."""
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) < 5 else [*shown[:3], "...", shown[-1]])
