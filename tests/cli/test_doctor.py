"""`doodl-fast doctor` says what there is, what there is not, and why."""

from __future__ import annotations

import torch

import doodl_fast
from doodl_fast import ops
from doodl_fast.cli import doctor
from doodl_fast.ops.backends import native


def test_report(capsys):
    assert doctor.run(None) == 0
    said = capsys.readouterr().out
    assert torch.__version__ in said and doodl_fast.__version__ in said
    for name in ops.NAMES:
        assert f"    {name} " in said
    assert f"in use       {ops.resolve('cpu')}" in said


def test_missing_backends_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(native, "why_not", lambda device_type: "not built: no compiler was found")
    with doodl_fast.backend("native"):
        doctor.run(None)
    said = capsys.readouterr().out
    assert "native       missing: not built: no compiler was found" in said
    assert "in use       none: backend 'native' cannot compute on 'cpu'" in said


def test_public_name():
    assert doodl_fast.backend is ops.backend
