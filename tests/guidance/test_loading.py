"""Models that lack weights are refused by the names of the weights, and guides refuse arguments that cannot work."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from safetensors.torch import load_file, save_file

from doodl_fast.guidance import Aesthetic, Classifier, ClipImage, ClipText, random_cutouts
from doodl_fast.guidance.aesthetic import load_aesthetic_head
from doodl_fast.guidance.classifier import load_classifier
from doodl_fast.guidance.clip import load_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return tiny_pipeline.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(tmp_path: Path, clip: tuple[Any, Any]) -> Path:
    for part in clip:
        part.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change(folder: Path, function: Any) -> None:
    """Replaces the weights in a folder by what a function makes of them."""
    file = folder / "model.safetensors"
    state = load_file(file)
    function(state)
    save_file(state, file, metadata={"format": "pt"})


def test_a_classifier_without_a_trained_head_is_refused(folder: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"all weights of CLIPForImageClassification .*it lacks 'classifier\.bias'",
    ):
        load_classifier(folder)
    with pytest.raises(ValueError, match=r"guidance model: expected all weights .* random numbers"):
        Classifier.from_pretrained(folder, 0)


def test_a_clip_that_lacks_weights_is_refused(folder: Path) -> None:
    load_clip(folder)
    change(folder, lambda state: state.pop("visual_projection.weight"))
    with pytest.raises(ValueError, match=r"all weights of CLIPModel .*it lacks 'visual_projection\.weight'"):
        ClipText.from_pretrained(folder, "a dog")


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    tiny_pipeline.classifier().save_pretrained(tmp_path)
    load_classifier(tmp_path)

    def narrow(state: dict[str, torch.Tensor]) -> None:
        state["classifier.1.weight"] = state["classifier.1.weight"][:2].clone()

    change(tmp_path, narrow)
    with pytest.raises(
        ValueError, match=r"it has 'classifier\.1\.weight' of shape \(2, 8\) instead of \(4, 8\); they would be random"
    ):
        load_classifier(tmp_path)


def test_many_missing_weights_are_counted(folder: Path) -> None:
    change(folder, lambda state: [state.pop(name) for name in list(state) if "text_model" in name])
    with pytest.raises(ValueError, match=r"it lacks '.*' and \d+ more; they would be"):
        load_clip(folder)


def test_an_aesthetic_head_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1, 4)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"head: expected a weight .* \(bias missing\)"):
        load_aesthetic_head(tmp_path / "head.safetensors")
    save_file(
        {"weight": torch.ones(1, 4), "bias": torch.ones(1), "layers.0.weight": torch.ones(2, 2)},
        tmp_path / "head.safetensors",
    )
    with pytest.raises(ValueError, match=r"head: expected a weight .* \(layers\.0\.weight not known\)"):
        load_aesthetic_head(tmp_path / "head.safetensors")


@pytest.mark.parametrize("power", [float("inf"), float("nan"), 0, -1, True, "0.3"])
def test_cut_powers(clip: tuple[Any, Any], power: Any) -> None:
    with pytest.raises(ValueError, match="cut_power: expected a positive number that is finite, got"):
        ClipText(*clip, "a dog", num_cutouts=2, cut_power=power)
    with pytest.raises(ValueError, match="power: expected a positive number that is finite, got"):
        random_cutouts(torch.zeros(1, 3, 8, 8), 1, 4, power)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5, 0.5)}, r"mean: expected three finite numbers, one for each color, got \(0.5, 0.5\)"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean: expected three finite numbers"),
        ({"std": (1.0, 1.0, 0.0)}, "std: expected three positive finite numbers"),
        ({"std": "abc"}, "std: expected three positive finite numbers"),
        ({"size": 0}, "size: expected an int of at least 1, got 0"),
        ({"size": 2.5}, "size: expected an int of at least 1, got 2.5"),
    ],
)
def test_arguments_of_a_classifier(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(tiny_pipeline.classifier(), None, 0, **options)


@pytest.mark.parametrize("target", [0.5, 11, float("nan"), "7", True])
def test_targets(clip: tuple[Any, Any], target: Any) -> None:
    with pytest.raises(ValueError, match=r"target: expected a score or None, got .* from 1 to 10"):
        Aesthetic(*clip, torch.nn.Linear(16, 1), target)


def test_a_single_file_is_no_list_of_pictures(clip: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match=r"images: expected a tensor, or a list of .*, got 'a\.png' alone"):
        ClipImage(clip[0], "a.png")


def test_guides_in_two_threads_leave_their_model_alone(clip: tuple[Any, Any]) -> None:
    model, processor = clip
    model.train()
    try:
        loss, seen = ClipText(model, processor, "a dog"), []
        images = torch.rand(1, 3, 32, 32, requires_grad=True)
        done = threading.Event()

        def work() -> None:
            for _ in range(10):
                torch.autograd.grad(loss(images), images)
            done.set()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while not done.is_set():
            seen.append(all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules()))
        for thread in threads:
            thread.join()
        assert all(seen)
    finally:
        model.eval()
