"""Which attention processors get copies that rotate by one op, which are left alone, and what the report says."""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux as flux
from lean_cases import gradient
from test_lean_rotary import OLDER, calls, copied, drawn, made, op_for_complex_numbers
from torch import nn

from doodl_fast.frozen import Level, lean_report, rotary

__all__ = ["calls", "op_for_complex_numbers"]  # fixtures
pytestmark = pytest.mark.usefixtures("lean_small_tensors")


def test_the_callers_processors_are_not_changed(calls):
    layer = made("FLUX.1, single")
    processor = layer.layer.processor
    processor.mark = "own"
    before = dict(vars(flux))
    lean = copied(layer)
    assert layer.layer.processor is processor
    assert type(processor) is flux.FluxAttnProcessor
    assert lean.layer.processor is not processor
    assert lean.layer.processor.mark == "own"
    assert isinstance(lean.layer.processor, flux.FluxAttnProcessor)
    assert vars(flux) == before
    assert flux.apply_rotary_emb is embeddings.apply_rotary_emb


def test_without_lean_layers_processors_are_shared():
    layer = made("FLUX.1, single")
    assert copied(layer, Level.OFF).layer.processor is layer.layer.processor


class OwnProcessor(flux.FluxAttnProcessor):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return 2 * super().__call__(attn, hidden_states, *args, **kwargs)


def test_subclasses_of_processors_are_left_alone():
    layer, x = made("FLUX.1, single"), drawn()
    layer.layer.set_processor(OwnProcessor())
    lean = copied(layer)
    assert lean.layer.processor is layer.layer.processor
    assert all(map(torch.equal, gradient(lean, x), gradient(layer, x)))


def test_a_function_that_somebody_has_replaced_is_called(monkeypatch):
    seen = []

    def own(x, *args, **kwargs):
        seen.append(x.shape)
        return embeddings.apply_rotary_emb(x, *args, **kwargs)

    layer, x = made("FLUX.1, single"), drawn()
    monkeypatch.setattr(flux, "apply_rotary_emb", own)
    copied(layer)(x)
    assert len(seen) == 2
    left = lean_report(layer).left
    assert left["FluxAttnProcessor", "its rotary embeddings are a function that was replaced"] == 1


def test_another_attention_function_of_the_module_is_called(monkeypatch, calls):
    """Packages with attention kernels replace it, before or after a first run."""
    layer, x = made("FLUX.1, single"), drawn()
    first = copied(layer)(x)
    attention = flux.dispatch_attention_fn
    monkeypatch.setattr(flux, "dispatch_attention_fn", lambda *args, **kwargs: -attention(*args, **kwargs))
    assert torch.equal(copied(layer)(x), -first)
    monkeypatch.undo()
    assert torch.equal(copied(layer)(x), first)


def test_the_report_names_processors():
    report = lean_report(made("FLUX.1, single"))
    assert report.replaced["FluxAttnProcessor"] == 1
    assert lean_report(made("FLUX.1, single"), False).replaced["FluxAttnProcessor"] == 0
    layer = made("FLUX.1, single")
    layer.layer.set_processor(OwnProcessor())
    assert not any(name == "OwnProcessor" for name, _ in lean_report(layer).left)  # It calls no such function itself.


def test_the_report_names_processors_of_unknown_classes():
    kind = type("Fork", (nn.Module,), {"processor": None})
    layer = kind()

    class Fork:
        def __call__(self, x):
            return apply_rotary_emb(x)  # noqa: F821

    layer.processor = Fork()
    reason = "its rotary embeddings are PyTorch's operators, as its class is not known"
    assert lean_report(layer).left == {("Fork", reason): 1}


def test_every_processor_of_the_table_calls_the_function_that_is_replaced():
    found = 0
    for name in rotary.PROCESSORS:
        module, cls = name.rsplit(".", 1)
        if importlib.util.find_spec(module) is None:
            continue  # An older diffusers has not all of these families.
        found += 1
        why = rotary.why_not_fused(object.__new__(getattr(importlib.import_module(module), cls)))
        assert why == ("" if OLDER and "Qwen" in cls else None), name
    assert found >= len(rotary.PROCESSORS) // 2
