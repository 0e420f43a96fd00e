"""Every family of pipelines does what every other does: each test here goes through the table of `families_table`."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny_audio
import torch
from conftest import relative
from families_table import CASES, COLUMNS, PAGE, STEPS, page
from PIL import Image

from doodl_fast import cli
from doodl_fast.chain.memory import profiling
from doodl_fast.chain.memory.tracker import Tracker
from doodl_fast.cli import drift, files, profile
from doodl_fast.cli.embeddings import longest_embeddings
from doodl_fast.cli.estimate import estimate
from doodl_fast.diffusion.audio import AudioDecoder
from doodl_fast.diffusion.families import FAMILIES, Family, family_of
from doodl_fast.diffusion.families.flow_from_picture import FlowFromPicture
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
    return CASES[name].make(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module", autouse=True)
def without_torchsde() -> Iterator[None]:
    """diffusers has Stable Audio's scheduler only beside torchsde, which draws the noise that no test here draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers, "CosineDPMSolverMultistepScheduler", tiny_audio.cosine_scheduler())
        yield


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


@contextmanager
def done_or_refused(name: str, column: str) -> Iterator[None]:
    """Expects the error that the table has for what a family does not do."""
    no = CASES[name].no.get(column)
    if no is None:
        yield
    else:
        with pytest.raises((TypeError, ValueError, OverflowError), match=no.match):
            yield


def test_pictures_are_the_pipelines(name: str, pipe: Any) -> None:
    case = CASES[name]
    assert type(family_of(pipe)).__name__ == case.family
    with done_or_refused(name, "pictures"):
        chain = make(DDIM, pipe, name, memory="checkpoint")
        x = chain.noise(generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            (x0,) = chain(x)
            made = chain.decode(x0)
        options = {**case.call, **case.pipeline_only, "generator": torch.Generator().manual_seed(3)}
        made_by = pipe if case.oracle is None else case.oracle()
        theirs = made_by(num_inference_steps=STEPS, output_type=case.output_type, **options)[0]
        if case.output_type == "np":
            theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
        assert theirs.std() > 0.01 and relative(x0, x) > 0.1, "the weights must matter"
        if case.lowest == 0 and not isinstance(chain.decode, AudioDecoder):
            made = (made / 2 + 0.5).clamp(0, 1)
        assert relative(made, theirs) < 1e-5


def gradient(chain: Any) -> torch.Tensor:
    x = chain.noise(seed=1).requires_grad_()
    (found,) = torch.autograd.grad(chain(x)[0].square().sum(), x)
    return found


def test_gradient_is_that_of_plain_autograd(name: str, pipe: Any) -> None:
    """Also for exact reversal, and in the smallest plan. Gradients of embeddings are in the tests of each family."""
    with done_or_refused(name, "gradient"):
        want = gradient(make(EDICT, pipe, name, memory="naive"))
        assert want.norm() > 0
        chain = make(EDICT, pipe, name, memory="auto")
        assert relative(gradient(chain), want) < 1e-5
        least = int(1.02 * chain.smallest_plan(chain.noise()).peak)
        assert relative(gradient(make(EDICT, pipe, name, memory="auto", memory_budget=least)), want) < 1e-5
        assert relative(gradient(make(EDICT, pipe, name, memory="reversible", arithmetic="exact64")), want) < 1e-5


def test_exact_inversion(name: str, pipe: Any) -> None:
    with done_or_refused(name, "exact"):
        chain = make(EDICT, pipe, name, memory="checkpoint", arithmetic=CASES[name].arithmetic)
        for state in (chain.state(chain.noise(seed=2)), chain.state(0.5 * chain.noise(seed=2), end="image")):
            there, back = chain.forward_state, chain.inverse_state
            there, back = (there, back) if state.end == "noise" else (back, there)
            reached = there(state)
            assert reached.end != state.end and not torch.equal(reached.x, state.x)
            assert back(reached).equals(state)


def test_the_plan_is_the_measured_peak(name: str, pipe: Any) -> None:
    with done_or_refused(name, "plan"):
        chain = make(EDICT, pipe, name, memory="auto")
        x = chain.noise(seed=1).requires_grad_()
        plan = chain.make_plan(x)
        with Tracker("cpu") as seen:
            chain(x)[0].square().sum().backward()
        # A plan counts the joined conditions with every graph, where one copy of them serves all, and not the copies
        # that they are joined of. That matters in tiny networks alone.
        copies = sum(tensor.numel() * tensor.element_size() for tensor in chain.denoiser.tensors())
        assert plan.num_graphs == plan.evaluations
        assert plan.peak + (2 - plan.num_graphs) * copies == pytest.approx(seen.peak, rel=0.15)


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


def refused_by_the_command_line(name: str, column: str, line: list[Any], capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the table says that a command refuses the family; it is checked that it does."""
    no = CASES[name].no.get(column)
    if no is None:
        return False
    assert cli.main([*map(str, line), "--device", "cpu"]) == 2
    assert no.match in capsys.readouterr().err
    return True


def test_run_on_the_command_line(
    name: str, pipe: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first picture is the chain's."""
    line = ["run", "--model", folder, "--steps", STEPS, "--solver", "ddim", "--guidance", "symmetry"]
    line += ["--optimization-steps", 1, "--memory", "auto", "--seed", 3, "--out", tmp_path / "out"]
    if refused_by_the_command_line(name, "run", [*line, *CASES[name].flags()], capsys):
        return
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


def test_exact_editing_on_the_command_line(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "picture.png")
    flags = CASES[name].flags() + (["--num-frames", "1"] if "num_frames" in CASES[name].call else [])
    line = ["invert", tmp_path / "picture.png", "--model", folder, *flags, "--steps", 4, "--out", tmp_path / "state"]
    if refused_by_the_command_line(name, "edit", line, capsys):
        return
    command(*line)
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
    line = ["profile", "--model", folder, *flags, "--steps", STEPS, "--repeats", 1, "--out", tmp_path / "p"]
    command(*line)
    rows = json.loads((tmp_path / "p" / "profile.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["peak"] > 0 for row in rows)


def test_the_estimate_is_the_measured_peak(name: str, pipe: Any, folder: Path) -> None:
    """What the meta device tells of the saved configs, and what a gradient and a decoder hold on the CPU at most."""
    with done_or_refused(name, "estimate"):
        compare_estimate(name, pipe, folder)


def compare_estimate(name: str, pipe: Any, folder: Path) -> None:
    of_texts = ("prompt", "negative_prompt", "max_sequence_length", "text_encoder_out_layers")
    call = {key: value for key, value in CASES[name].call.items() if key not in of_texts}
    texts = longest_embeddings(pipe, family_of(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chain = EDICT.from_pipeline(pipe, num_inference_steps=STEPS, memory="checkpoint", **call, **texts)
    x = chain.noise(seed=1).requires_grad_()
    found = estimate(folder, None, torch.float32, STEPS, **call)
    plan = found.workload.plan()
    with Tracker("cpu") as seen:
        chain(x)[0].square().sum().backward()
    # A plan does not count the copies of the conditions, which matter in tiny networks alone.
    copies = sum(tensor.numel() * tensor.element_size() for tensor in chain.denoiser.tensors())
    assert plan.peak + copies == pytest.approx(seen.peak, rel=0.15)
    latents = x.detach().clone().requires_grad_()
    with Tracker("cpu") as seen:
        made = chain.decode(latents)
        torch.autograd.grad(made, latents, torch.ones_like(made))
    assert found.decoders[0] == pytest.approx(seen.peak, rel=0.15)
    weights = [weight for _, weight in chain.denoiser.weights()]
    for part in ("vae", "vocoder"):
        network = getattr(pipe, part, torch.nn.Module())
        weights += [*network.parameters(), *network.buffers()]
    assert found.weights == sum(weight.numel() * weight.element_size() for weight in weights)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_what_a_family_requires_is_among_what_it_knows(family: Family) -> None:
    assert set(family.required) <= set(family.components)


def test_the_page_of_the_documentation_is_the_table() -> None:
    assert PAGE.read_text() == page(), "write it with `python tests/families_table.py`"
    assert {column for case in CASES.values() for column in case.no} <= set(COLUMNS)
    from_noise = {type(family).__name__ for family in FAMILIES if not isinstance(family, FlowFromPicture)}
    assert {case.family for case in CASES.values()} == from_noise
