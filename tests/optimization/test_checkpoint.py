"""A stored state is whole at every moment, and damage to it is noticed."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimize import optimize, quiet_loss
from torch import Tensor

from doodl_fast.optimization import checkpoint

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def tree(value: float) -> dict[str, Any]:
    return {"value": torch.full((5,), value), "plain": [value, None, "x", True], 3: {"t": torch.arange(4)}}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def killed_at(call: int, folder: Path) -> bool:
    """Whether a process that stores a second state was killed at the given call that changes files."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                os._exit(9)
            return function(*args, **options)

        return dying

    try:
        os.open, os.fsync = counted(os.open), counted(os.fsync)
        Path.replace, Path.unlink = counted(Path.replace), counted(Path.unlink)  # type: ignore[method-assign]
        checkpoint.save(folder, tree(2), step=2)
    finally:
        os._exit(0)


@needs_fork
def test_killed_at_every_point_of_a_save(tmp_path: Path) -> None:
    found = set()
    for call in range(1, 50):
        folder = tmp_path / str(call)
        checkpoint.save(folder, tree(1), step=1)
        killed = killed_at(call, folder)
        loaded = checkpoint.load(folder)
        assert same(loaded, tree(1)) or same(loaded, tree(2))
        found.add(loaded["plain"][0])
        checkpoint.save(folder, tree(3), step=3)
        assert same(checkpoint.load(folder), tree(3)) and len(list(folder.iterdir())) == 2
        if not killed:
            break
    assert found == {1, 2} and 9 <= call < 49


@needs_fork
def test_killed_at_every_point_of_the_first_save(tmp_path: Path) -> None:
    """There is a whole state, or none and a new run may begin."""
    for call in range(1, 50):
        folder = tmp_path / str(call)
        killed = killed_at(call, folder)
        assert checkpoint.without_index(folder) is None
        if (folder / checkpoint.INDEX).exists():
            assert same(checkpoint.load(folder), tree(2))
        optimize(num_optimization_steps=1, folder=folder, resume=False) if killed and call < 8 else None
        if not killed:
            break
    assert 8 <= call < 49


def loaded_or_none(folder: Path) -> Any:
    try:
        return checkpoint.load(folder)
    except ValueError:
        return None


def test_bit_flips_are_noticed(tmp_path: Path) -> None:
    """In 400 places of both files: refused, or without effect (the case of an exponent's e, for instance)."""
    checkpoint.save(tmp_path, tree(0.1), step=1)
    generator, refused = random.Random(0), 0
    for path in sorted(tmp_path.iterdir()):
        whole = path.read_bytes()
        for _ in range(200):
            data = bytearray(whole)
            data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(bytes(data))
            loaded = loaded_or_none(tmp_path)
            refused += loaded is None
            assert loaded is None or same(loaded, tree(0.1))
        path.write_bytes(whole)
    assert same(checkpoint.load(tmp_path), tree(0.1)) and refused > 390


def rewrite(folder: Path, **changes: Any) -> None:
    """Changes state.json, with the checksum that belongs to the changes."""
    content = json.loads((folder / checkpoint.INDEX).read_text())
    del content["checksum"]
    content.update(changes)
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / checkpoint.INDEX).write_text(json.dumps({**content, "checksum": checksum}))


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "state-1-{}.safetensors/../x", "", 3, None])
def test_no_other_file_is_read(tmp_path: Path, name: Any) -> None:
    checkpoint.save(tmp_path / "run", tree(1), step=1)
    data = next((tmp_path / "run").glob("*.safetensors")).read_bytes()
    (tmp_path / "other.safetensors").write_bytes(data)
    rewrite(tmp_path / "run", tensors=name)
    with pytest.raises(ValueError, match=r"resume: the state in .* is damaged or foreign"):
        checkpoint.load(tmp_path / "run")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "[" * 100_000, '{"format": 2}', "\x00", '"\\ud800"'])
def test_odd_index(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoint.INDEX).write_text(text)
    with pytest.raises(ValueError, match="is damaged or foreign"):
        checkpoint.load(tmp_path)


def test_other_formats(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, tree(1), step=1)
    rewrite(tmp_path, format=3)
    with pytest.raises(ValueError, match="has the format 3, and this version reads 2"):
        checkpoint.load(tmp_path)
    (tmp_path / checkpoint.INDEX).write_text('{"tensors": "state-000001.safetensors", "state": {"__items__": []}}')
    with pytest.raises(ValueError, match=r"written by version 0\.1"):
        checkpoint.load(tmp_path)


def test_a_lost_index_is_not_a_new_run(tmp_path: Path) -> None:
    optimize(num_optimization_steps=2, folder=tmp_path)
    (tmp_path / checkpoint.INDEX).unlink()
    for resume in (True, False):
        with pytest.raises(ValueError, match=r"holds state-000002-.* without the state.json"):
            optimize(num_optimization_steps=2, folder=tmp_path, resume=resume)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs symbolic links")
def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever guesses a temporary name still cannot redirect what is written."""
    target = tmp_path / "target"
    target.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda count: "0" * 2 * count)
    for name in ("state-000001-" + "0" * 16 + ".safetensors." + "0" * 16 + ".tmp", "state.json." + "0" * 16 + ".tmp"):
        (folder / name).symlink_to(target)
        with pytest.raises(FileExistsError):
            checkpoint.save(folder, tree(1), step=1)
        (folder / name).unlink()
    monkeypatch.undo()
    (folder / checkpoint.INDEX).symlink_to(target)
    checkpoint.save(folder, tree(1), step=1)
    assert target.read_text() == "precious" and not (folder / checkpoint.INDEX).is_symlink()


def test_latents_that_are_not_finite_do_not_replace_good_ones(tmp_path: Path) -> None:
    """The optimizer diverges in the third step; the state of the second stays, and can be resumed."""
    steps = 0

    class Diverging(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            nonlocal steps
            steps += 1
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(float("inf") if steps == 3 else 1e-3)

    with pytest.raises(FloatingPointError, match="optimizer: the updated latents hold NaN or Inf"):
        optimize(optimizer=lambda p: Diverging(p, lr=1.0), folder=tmp_path, loss=quiet_loss)
    stored = checkpoint.load(tmp_path)
    assert stored["step"] == 2 and all(bool(torch.isfinite(z).all()) for z in stored["update"]["latents"])
    result = optimize(optimizer=lambda p: Diverging(p, lr=1.0), resume=tmp_path, loss=quiet_loss)
    assert len(result.losses) == 4
