"""Intervals against scipy.stats.bootstrap, and paired differences against plain arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from doodl_fast.sweep import bootstrap_mean, paired_differences
from doodl_fast.sweep.summary import as_text, summarise

VALUES = np.random.default_rng(1).gamma(2.0, size=23)


def oracle(values: Any, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    found = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=9999,
        confidence_level=level,
        random_state=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high


@pytest.mark.parametrize("values", [VALUES, np.array([0.0, 1.0, 1.0, 0.0, 1.0]), np.array([2.0, 3.0])])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_an_interval_is_that_of_scipy(values: Any, level: float) -> None:
    """With the same generator the draws are the same ones, so the ends agree but for rounding."""
    found = bootstrap_mean(list(values), level=level)
    assert (found.low, found.high) == pytest.approx(oracle(values, level=level), rel=1e-12)
    assert found.mean == pytest.approx(values.mean(), rel=1e-15) and found.count == found.units == len(values)


def test_many_values_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from doodl_fast.sweep import summary

    whole = bootstrap_mean(list(VALUES))
    monkeypatch.setattr(summary, "BATCH", 1000)
    assert bootstrap_mean(list(VALUES)) == whole


def test_groups_of_one_size_are_drawn_like_their_means() -> None:
    """A group's mean is one value then, whose interval scipy has."""
    values = VALUES[:20]
    groups = [f"prompt {number // 4}" for number in range(20)]
    found = bootstrap_mean(list(values), groups)
    assert (found.low, found.high) == pytest.approx(oracle(values.reshape(5, 4).mean(1)), rel=1e-12)
    assert found.mean == pytest.approx(values.mean(), rel=1e-15) and (found.count, found.units) == (20, 5)
    shuffled = np.random.default_rng(2).permutation(20)
    other = bootstrap_mean(list(values[shuffled]), [groups[number] for number in shuffled])
    assert other.mean == pytest.approx(found.mean, rel=1e-15)


def test_groups_of_other_sizes_weigh_by_their_values() -> None:
    values, groups = [1.0, 1.0, 1.0, 5.0], ["a", "a", "a", "b"]
    found = bootstrap_mean(values, groups)
    assert found.mean == 2.0
    assert (found.low, found.high) == (1.0, 5.0)  # both draws of a, both of b


def test_a_single_unit_says_nothing_of_the_spread() -> None:
    found = bootstrap_mean([1.0, 2.0], ["a", "a"])
    assert (found.mean, found.low, found.high, found.units) == (1.5, -np.inf, np.inf, 1)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    """Of 300 samples of 40 normal values, 95% within the error of that count."""
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(300):
        found = bootstrap_mean(list(generator.normal(size=40)), resamples=999)
        hits += found.low <= 0 <= found.high
    assert 268 <= hits <= 297


def rows() -> list[dict[str, Any]]:
    made = []
    for prompt in ("a", "b", "c"):
        for seed in (0, 1):
            for method, shift in (("none", 0.0), ("doodl", -0.5 - 0.1 * seed)):
                row = {"prompt": prompt, "seed": seed, "guide": "g", "setting": "", "method": method, "status": "done"}
                row |= {"measures": {"right": float(seed)}, "loss_after": ord(prompt) / 50 + shift}
                made.append(row | {"timing": {"seconds": 2.0, "resumed": prompt == "c"}})
    return made


def test_differences_are_those_of_the_same_prompt_and_seed() -> None:
    found = paired_differences(rows(), "loss_after", "doodl", "none")
    assert found is not None
    interval, differences = found
    assert differences == pytest.approx([-0.5, -0.6] * 3)
    # Every prompt has the same mean difference, however much the prompts themselves differ.
    assert (interval.mean, interval.low, interval.high) == pytest.approx((-0.55, -0.55, -0.55))
    changed = rows()
    changed[1]["status"] = "failed"  # its partner is left out too
    other = paired_differences(changed, "loss_after", "doodl", "none")
    assert other is not None and len(other[1]) == 5
    assert paired_differences(changed[:2], "loss_after", "doodl", "none") is None


def test_the_summary_has_every_column_and_method() -> None:
    found = summarise(rows())
    places = [(entry["column"], entry["method"]) for entry in found]
    assert places == [(c, m) for c in ("loss_after", "right", "seconds") for m in ("none", "doodl")]
    assert found[0]["difference"] is None and found[1]["difference"]["mean"] == pytest.approx(-0.55)
    assert found[4]["mean"]["count"] == 4  # runs that were interrupted have no time of their own
    text = as_text(found, "none")
    assert "## loss after" in text and "| g | doodl | 6 (3) | " in text and "-0.55 [-0.55, -0.55]" in text
    only = summarise(rows(), "doodl", ["right"])
    assert {entry["column"] for entry in only} == {"right"} and only[1]["difference"] is None


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="groups: expected one for each of the 2 values, got 1"):
        bootstrap_mean([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match="--baseline: expected one of none, doodl, got 'best'"):
        summarise(rows(), "best")
    with pytest.raises(ValueError, match=r"--columns: expected some of .*right, got 'beauty'"):
        summarise(rows(), columns=["beauty"])
    with pytest.raises(ValueError, match="expected runs that are done, got 1 of which none is"):
        summarise([{**rows()[0], "status": "pending"}])
