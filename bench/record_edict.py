"""Records what EDICT's public code and diffusers' community pipeline compute, for the tests of `compat.edict`.

    python bench/record_edict.py --edict DIR --community FILE [--out tests/golden/edict.safetensors]

DIR is a checkout of github.com/salesforce/EDICT, and FILE is `examples/community/edict_pipeline.py` of a checkout of
github.com/huggingface/diffusers. Their code is run unchanged, except that EDICT's networks, which it loads when it is
imported, are the tiny ones of tests/golden, in float64 on the CPU, and that its prompts have the recorded embeddings.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

GUIDANCE = 3.0
FUNCTIONS = (
    *("coupled_stablediffusion", "forward_step", "reverse_step", "get_alpha_and_beta", "prep_image_for_return"),
    *("init_attention_func", "init_attention_weights", "use_last_tokens_attention_weights"),
)


def networks() -> dict[str, Any]:
    """Returns the recorded UNet and VAE in float64, and a text encoder with the recorded embeddings."""
    import tiny_pipeline
    from conftest import golden, golden_unet

    unet = golden_unet(torch.float64)
    models = golden("models")
    known = {1: models["embedding_conditional"].double(), 0: models["embedding_unconditional"].double()}

    class Tokenizer:
        model_max_length = 8

        def __call__(self, text: str, **options: Any) -> Any:
            return SimpleNamespace(input_ids=torch.tensor([[int(bool(text))]]))

    class TextEncoder(torch.nn.Module):
        dtype, device = torch.float64, torch.device("cpu")

        def forward(self, ids: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=known[int(ids)])

    return {
        "unet": unet,
        "vae": tiny_pipeline.golden_vae(torch.float64),
        "tokenizer": Tokenizer(),
        "text": TextEncoder(),
    }


def edict_functions(folder: Path) -> dict[str, Any]:
    """Executes the functions of EDICT's module that sampling needs, with the tiny networks as its global variables."""
    import math

    import numpy as np
    from PIL import Image

    for name in ("my_diffusers", "my_diffusers.schedulers"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / name.replace(".", "/"))]
        package.__dict__["__version__"] = "0"
        sys.modules[name] = package
    scheduling = importlib.import_module("my_diffusers.schedulers.scheduling_ddim")
    parts = networks()
    unet = parts["unet"]
    space = {
        **{"torch": torch, "np": np, "math": math, "Image": Image, "random": None, "tqdm": lambda items, **_: items},
        **{"DDIMScheduler": scheduling.DDIMScheduler, "device": "cpu"},
        **{"clip_tokenizer": parts["tokenizer"], "clip": parts["text"], "unet": unet, "vae": parts["vae"]},
    }
    tree = ast.parse((folder / "edict_functions.py").read_text(encoding="utf-8"))
    nodes: list[ast.stmt] = [node for node in tree.body if getattr(node, "name", None) in FUNCTIONS]
    exec(compile(ast.Module(nodes, []), "edict_functions.py", "exec"), space)
    torch.cuda.manual_seed = lambda seed: None  # type: ignore[assignment]
    # The number of channels was an attribute of the network when this code was written.
    object.__setattr__(unet, "in_channels", unet.config.in_channels)
    return space


def of_edict(folder: Path, start: Tensor) -> dict[str, Tensor]:
    """Runs EDICT's function: generation from given noise, inversion and generation of a part, with all options."""
    sample = edict_functions(folder)["coupled_stablediffusion"]
    found: dict[str, Tensor] = {}
    for name, steps, options in (
        ("edict", 10, {}),
        ("edict_30", 30, {}),
        ("edict_together", 10, {"leapfrog_steps": False, "mix_weight": 0.8}),
        ("ddim", 10, {"run_baseline": True}),
    ):
        common: dict[str, Any] = {"steps": steps, "guidance_scale": GUIDANCE, "width": 64, "height": 64, **options}
        made = sample("a dog", fixed_starting_latent=start, return_latents=True, **common)
        found[f"{name}/generated"] = torch.cat(made)
        noise = sample("a dog", reverse=True, init_image=[made[0], made[1]], init_image_strength=0.7, **common)
        found[f"{name}/inverted"] = torch.cat(noise)
        again = sample("", fixed_starting_latent=noise, return_latents=True, init_image_strength=0.7, **common)
        found[f"{name}/edited"] = torch.cat(again)
    pictures = sample("a dog", fixed_starting_latent=start, steps=4, guidance_scale=GUIDANCE, width=64, height=64)
    import numpy as np

    found["edict/pictures"] = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return found


def of_community(file: Path, start: Tensor) -> dict[str, Tensor]:
    """Runs the community pipeline on a picture of random pixels, whose latents are the mean of the VAE's posterior."""
    from conftest import sd_scheduler

    spec = importlib.util.spec_from_file_location("edict_pipeline", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = networks()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 2 - 1
    found = {"community/picture": pixels}
    for name, steps, options in (("offset", 10, {"steps_offset": 1}), ("plain", 12, {})):
        for leapfrog in (True, False):
            pipe = module.EDICTPipeline.__new__(module.EDICTPipeline)
            pipe.mixing_coeff, pipe.leapfrog_steps = 0.93, leapfrog
            pipe.__dict__ |= {"unet": parts["unet"], "vae": parts["vae"], "tokenizer": parts["tokenizer"]}
            pipe.__dict__ |= {"text_encoder": parts["text"], "scheduler": sd_scheduler(**options)}
            pipe.vae_scale_factor = 8
            pipe.image_processor = module.VaeImageProcessor(vae_scale_factor=8)
            type(pipe).device = torch.device("cpu")
            call = {"guidance_scale": GUIDANCE, "num_inference_steps": steps, "output_type": "latent"}
            generator = torch.Generator().manual_seed(3)
            latents = pipe("a dog", "", pixels, strength=0.8 if steps == 10 else 0.5, generator=generator, **call)
            found[f"community/{name}/{'alternating' if leapfrog else 'together'}"] = latents
    generator = torch.Generator().manual_seed(11)
    base, other, noise = (torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    found |= {"steps/base": base, "steps/other": other, "steps/noise": noise}
    pipe.__dict__["scheduler"] = sd_scheduler()
    pipe.scheduler.set_timesteps(12)
    for t in (0, 83, 913):
        found[f"steps/{t}/denoised"] = pipe.denoise_step(base, other, noise, torch.tensor(t))[1]
        found[f"steps/{t}/noised"] = pipe.noise_step(base, other, noise, torch.tensor(t))[1]
    found["steps/mixed"] = torch.cat(pipe.denoise_mixing_layer(base, other))
    found["steps/unmixed"] = torch.cat(pipe.noise_mixing_layer(base, other))
    return found


def main() -> None:
    """Records everything and writes it to one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edict", type=Path, required=True)
    parser.add_argument("--community", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "tests" / "golden" / "edict.safetensors")
    args = parser.parse_args()
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        found = {"start": start, **of_edict(args.edict, start), **of_community(args.community, start)}
    save_file({name: value.contiguous() for name, value in found.items()}, args.out)
    for name, value in found.items():
        print(name, tuple(value.shape), f"{float(value.double().std()):.4g}")


if __name__ == "__main__":
    main()
