"""Every family of pipelines does what every other does: each test here goes through the table of `families_table`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative
from families_table import CASES, STEPS

from doodl_fast.diffusion.families import FAMILIES, Family
from doodl_fast.diffusion.pipeline import load_pipeline
from doodl_fast.solvers.ddim import DDIM

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
def folder(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(path)
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


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_what_a_family_requires_is_among_what_it_knows(family: Family) -> None:
    assert set(family.required) <= set(family.components)
