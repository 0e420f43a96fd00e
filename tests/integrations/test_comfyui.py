"""The nodes for ComfyUI, called as ComfyUI calls them: by their mappings, in inference mode."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import doodl_fast
from doodl_fast import shapes
from doodl_fast.guidance import Symmetry

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "comfyui"


@pytest.fixture(scope="module")
def nodes():
    """Loads the folder as ComfyUI does: as a package from its `__init__.py`, under a name of its own."""
    options = {"submodule_search_locations": [str(FOLDER)]}
    spec = importlib.util.spec_from_file_location("comfyui_doodl", FOLDER / "__init__.py", **options)
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_doodl"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith("comfyui_doodl")]:
        del sys.modules[name]


def defaults(node):
    """The inputs that a node has when nothing is changed in the user interface."""
    found = {}
    for name, (kind, *settings) in node.INPUT_TYPES()["required"].items():
        if settings and "default" in settings[0]:
            found[name] = settings[0]["default"]
            assert found[name] in kind if isinstance(kind, list) else True
    return found


def test_every_node_has_what_comfyui_reads(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        method = getattr(node, node.FUNCTION)
        assert set(node.INPUT_TYPES()["required"]) == set(method.__code__.co_varnames[1 : method.__code__.co_argcount])
        assert all(isinstance(kind, str) for kind in node.RETURN_TYPES) and isinstance(node.CATEGORY, str)


def test_a_graph_of_the_nodes_gives_what_optimize_gives(nodes, monkeypatch):
    updates = []
    comfy = ModuleType("comfy.utils")
    comfy.ProgressBar = lambda total: type("Bar", (), {"update_absolute": lambda self, n: updates.append((n, total))})()
    monkeypatch.setitem(sys.modules, "comfy.utils", comfy)
    classes = nodes.NODE_CLASS_MAPPINGS
    given = {"prompt": "a red circle", "steps": 3, "cfg": 4.0, "optimization_steps": 2, "grad_scale": 20.0, "seed": 5}
    with torch.inference_mode():
        load = classes["DoodlLoadModel"]()
        (pipeline,) = load.load(**{**defaults(load), "device": "cpu"})
        (loss,) = classes["DoodlSymmetryLoss"]().make("horizontal")
        node = classes["DoodlOptimize"]()
        final, best, losses = node.optimize(**{**defaults(node), **given, "pipeline": pipeline, "loss": loss})
    pipe = shapes.load_pipeline()
    chain = doodl_fast.DDIM.from_pipeline(pipe, "a red circle", num_inference_steps=3, guidance_scale=4.0)
    result = doodl_fast.optimize(chain, chain.noise(5), chain.decode, Symmetry(), 2, grad_scale=20.0, progress=False)
    assert torch.equal(final, (result.images[0] / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    assert final.shape == best.shape == (1, 64, 64, 3) and final.dtype == torch.float32
    assert [float(line) for line in losses.splitlines()] == pytest.approx([*result.losses, result.final_loss], 1e-5)
    assert updates == [(1, 2), (2, 2)]


def test_a_clip_loss_is_made_of_a_folder(nodes, tmp_path):
    import tiny_pipeline

    model, processor = tiny_pipeline.clip(tmp_path)
    model.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    with torch.inference_mode():
        (loss,) = nodes.NODE_CLASS_MAPPINGS["DoodlClipTextLoss"]().make("a dog", str(tmp_path / "clip"), "cpu")
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(images), images)
    assert gradient.abs().sum() > 0
