"""Every family of pipelines does what every other does: each test here goes through the table of `families_table`."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative
from families_table import CASES, SHORT, STEPS
from PIL import Image

from doodl_fast import cli
from doodl_fast.chain.memory import profiling
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli import drift, files, profile
from doodl_fast.cli.estimate import estimate
from doodl_fast.cli.published import EMBEDDINGS
from doodl_fast.diffusion.families import FAMILIES, Family, family_of
from doodl_fast.diffusion.images import to_pil
from doodl_fast.diffusion.pipeline import load_pipeline
from doodl_fast.solvers.ddim import DDIM
from doodl_fast.solvers.edict import EDICT

pytestmark = pytest.mark.filterwarnings("ignore:height, width. 16 x 16 is used as it is")


@pytest.fixture(scope="module", params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(name: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = CASES[name].build(tmp_path_factory.mktemp("words"))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def folder(name: str, pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(path)
    if CASES[name].needs_accelerate and importlib.util.find_spec("accelerate") is None:
        with pytest.raises(ValueError, match=r"^model: .* which diffusers loads with the library accelerate alone"):
            load_pipeline(path)
        pytest.skip("diffusers loads this pipeline with the library accelerate alone, which is not installed")
    return path


def make(solver: Any, pipe: Any, name: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solver.from_pipeline(pipe, num_inference_steps=STEPS, **{**CASES[name].call, **options})


def test_a_saved_pipeline_comes_back(name: str, pipe: Any, folder: Path) -> None:
    loaded = load_pipeline(folder)
    assert type(loaded) is type(pipe)
    chains = [make(DDIM, each, name, memory="checkpoint") for each in (pipe, loaded)]
    x = chains[0].noise(seed=1)
    with torch.no_grad():
        (want,), (got,) = (chain(x) for chain in chains)
    assert relative(got, want) < 1e-6 < relative(x, want), "the weights are the same, but not their alignment"
    networks = [part for part in loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert networks and not any(network.training for network in networks)
    assert not any(weight.requires_grad for network in networks for weight in network.parameters())


def test_the_folder_is_checked_before_anything_is_loaded(name: str, folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    kind, part = index["_class_name"], "vae" if "vae" in index else "unet"
    copy = tmp_path / "model_index.json"
    copy.write_text(json.dumps({**index, "style_encoder": ["diffusers", "ControlNetModel"]}))
    with pytest.raises(ValueError, match=rf"^model: {kind} in .* has style_encoder, which would be ignored"):
        load_pipeline(tmp_path)
    copy.write_text(json.dumps({**index, part: [None, None]}))
    with pytest.raises(ValueError, match=rf"^model: expected a pipeline with .*, got {kind} in .* without {part}$"):
        load_pipeline(tmp_path)
    copy.write_text(json.dumps({**index, "_class_name": "UnheardPipeline", "transformer": ["diffusers", "X"]}))
    with pytest.raises(ValueError, match=r"^model: UnheardPipeline in .* is no pipeline that is known; expected one "):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_networks_are_loaded_in_the_dtype_that_is_asked_for(name: str, folder: Path, dtype: torch.dtype) -> None:
    loaded = load_pipeline(folder, dtype=dtype)
    networks = {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
    upcast = dtype == torch.float16 and hasattr(loaded, "upcast_vae") and loaded.vae.config.force_upcast
    for part, network in networks.items():
        assert network.dtype == (torch.float32 if part == "vae" and upcast else dtype), part


def command(*words: Any) -> None:
    """Runs a command line, without the warnings of the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cli.main([*map(str, words), "--device", "cpu"]) == 0


def test_run_on_the_command_line(name: str, pipe: Any, folder: Path, tmp_path: Path) -> None:
    """With a step of no length the first picture is the pipeline's own."""
    line = ["run", "--model", folder, "--steps", STEPS, "--solver", "ddim", "--guidance", "symmetry"]
    line += ["--optimization-steps", 1, "--memory", "auto", "--seed", 3, "--out", tmp_path / "out"]
    command(*line, *CASES[name].flags())
    chain = make(DDIM, pipe, name, memory="checkpoint")
    with torch.no_grad():
        pictures = chain.decode(chain(chain.noise(seed=3))[0])
    pictures = pictures.flatten(0, 1) if pictures.ndim == 5 else pictures
    expected = np.hstack([np.asarray(picture) for picture in to_pil(pictures)]).astype(int)
    found = np.asarray(Image.open(tmp_path / "out" / "before.png").convert("RGB")).astype(int)
    assert np.abs(found - expected).max() <= 1
    after = np.asarray(Image.open(tmp_path / "out" / "after.png").convert("RGB")).astype(int)
    assert np.abs(after - found).max() > 0
    losses = json.loads((tmp_path / "out" / "result.json").read_text())
    assert losses["final_loss"] != losses["losses"][0]


def test_exact_editing_on_the_command_line(name: str, folder: Path, tmp_path: Path) -> None:
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "picture.png")
    flags = CASES[name].flags() + (["--num-frames", "1"] if "num_frames" in CASES[name].call else [])
    command("invert", tmp_path / "picture.png", "--model", folder, *flags, "--steps", 4, "--out", tmp_path / "state")
    command("generate", tmp_path / "state")
    found = json.loads((tmp_path / "state" / "reconstruction.json").read_text())
    assert found["report"]["equal"] and found["report"]["change"] == 0
    if "prompt" in CASES[name].call:
        command("generate", tmp_path / "state", "--prompt", "a cat")
        assert json.loads((tmp_path / "state" / "edit.json").read_text())["report"]["change"] > 0


def test_drift_and_profile_on_the_command_line(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = CASES[name].flags()
    for module, drawing in ((drift, "draw"), (profile, "draw"), (profiling, "draw_timelines")):
        monkeypatch.setattr(module, drawing, lambda *_: None)  # Figures take more time than everything else.
    monkeypatch.setattr(files, "replace", lambda path, write: write(path))
    command("drift", "--model", folder, *flags, "--steps", STEPS, "--out", tmp_path / "drift")
    errors = json.loads((tmp_path / "drift" / "drift.json").read_text())["errors"]
    assert errors["exact"] == [0.0] and 0 < errors["fp32"][0] < errors["fp16"][0]
    line = ["profile", "--model", folder, *flags, "--steps", 2, "--repeats", 1, "--out", tmp_path / "p"]
    command(*line)
    rows = json.loads((tmp_path / "p" / "profile.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["peak"] > 0 for row in rows)


def test_the_estimate_is_the_measured_peak(name: str, pipe: Any, folder: Path) -> None:
    """What the meta device tells of the saved configs, and what a gradient and a decoder hold on the CPU at most."""
    call = {key: value for key, value in CASES[name].call.items() if "prompt" not in key and key not in SHORT}
    family = family_of(pipe)
    texts = EMBEDDINGS[type(family).__name__](pipe) if family.takes_text else {}
    chain = EDICT.from_pipeline(pipe, num_inference_steps=STEPS, memory="checkpoint", **call, **texts)
    x = chain.noise(seed=1).requires_grad_()
    found = estimate(folder, None, torch.float32, STEPS, **call)
    plan = found.workload.plan(0, "checkpoint", blocks=False)
    assert plan is not None
    with Tracker("cpu") as seen:
        chain(x)[0].square().sum().backward()
    # A plan does not count the copies of the conditions, which matter in tiny networks alone.
    copies = sum(tensor.numel() * tensor.element_size() for tensor in chain.denoiser.tensors())
    assert plan.peak + copies == pytest.approx(seen.peak, rel=0.15)
    latents = x.detach().clone().requires_grad_()
    with Tracker("cpu") as seen:
        chain.decode(latents).sum().backward()
    assert found.decoders[0] == pytest.approx(seen.peak, rel=0.15)
    weights = [weight for _, weight in chain.denoiser.weights()]
    weights += getattr(pipe, "vae", torch.nn.Module()).parameters()
    assert found.weights == sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_what_a_family_requires_is_among_what_it_knows(family: Family) -> None:
    assert set(family.required) <= set(family.components)
