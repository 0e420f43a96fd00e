"""The readers of files meet damaged ones: a short round of what `make fuzz` does for longer."""

from __future__ import annotations

import itertools
import random
import sys
import types
from pathlib import Path

import pytest

FUZZ = Path(__file__).resolve().parents[1] / "fuzz"
sys.path.append(str(FUZZ))
run = pytest.importorskip("run", reason="fuzz/ is not here", exc_type=ImportError)
mutate, targets = sys.modules["mutate"], sys.modules["targets"]


def inputs(name: str, count: int, seed: int = 0) -> list[bytes]:
    """Returns changed files, half of them with lengths and checksums that are right again."""
    target, rng = targets.TARGETS[name], random.Random(seed)
    pool = target.seeds()
    changed = [mutate.mutated(rng.choice(pool), rng, rng.choice(pool)) for _ in range(count)]
    return [target.with_valid_header(data) if i % 2 else data for i, data in enumerate(changed)]


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_sound_files_are_read_and_damaged_ones_refused(name):
    target = targets.TARGETS[name]
    assert all(target.run(data) for data in target.seeds())
    assert all(target.run(target.with_valid_header(data)) for data in target.seeds())
    accepted = [target.run(data) for data in inputs(name, 400)]
    assert accepted.count(False) > 100
    if name != "picture":  # Half a picture is a picture for some formats.
        assert not any(target.run(data[: len(data) // 2]) for data in target.seeds())


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_every_input_is_read_by_its_length(name):
    """Cut off after each of its bytes, a file is read or refused."""
    data = min(targets.TARGETS[name].seeds(), key=len)
    for length in range(0, len(data), max(1, len(data) // 150)):
        targets.TARGETS[name].run(data[:length])


def test_the_fuzzer_finds_a_reader_without_checks(monkeypatch, tmp_path):
    from doodl_fast.chain.exact import state_file

    monkeypatch.setattr(state_file, "_check_tensors", lambda tensors: None)
    monkeypatch.setattr(run, "FOUND", tmp_path)
    found: list[bytes] = []
    # The order of a safetensors file's metadata is random, so that no seed gives the same files twice.
    for data in itertools.chain.from_iterable(inputs("lattice_state", 300, seed) for seed in range(40)):
        try:
            run.check("lattice_state", data)
        except Exception:  # noqa: PERF203 - the loop is the test
            found.append(data)
            break
    kept = {path.read_bytes() for path in tmp_path.iterdir()}
    assert found and kept == set(found)


def test_a_run_by_chance_counts_what_it_reads(monkeypatch):
    clock = types.SimpleNamespace(monotonic=itertools.count().__next__)  # a second for each look at it
    monkeypatch.setattr(run, "time", clock)
    count, accepted = run.by_chance("picture", 100, 0)
    assert count == 99 and 0 < accepted < count
