"""Programs in plain floats."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doodl_fast.chain.program import (
    Coupling,
    compact,
    count_network_calls,
    invert,
    is_invertible,
    num_values,
    step_boundaries,
)

factors = st.floats(0.3, 3.0) | st.floats(-3.0, -0.3)
couplings = st.builds(
    Coupling,
    target=st.sampled_from([0, 1]),
    a=factors,
    c=st.floats(-2, 2),
    b=st.floats(-2, 2),
    tag=st.integers(0, 9),
)


def run(program, pair):
    """The definition, on two floats, with f = sin(source + tag)."""
    state = list(pair)
    for k in program:
        source = state[k.source]
        state[k.target] = k.a * state[k.target] + k.c * source + (k.b * math.sin(source + k.tag) if k.b else 0.0)
    return state


@given(st.lists(couplings, max_size=6), st.floats(-3, 3), st.floats(-3, 3))
def test_inverse_program_undoes_the_program(program, x, y):
    assert run(invert(program), run(program, (x, y))) == pytest.approx([x, y], rel=1e-6, abs=1e-6)


@given(couplings)
def test_inverse_keeps_place_and_tag(coupling):
    back = coupling.inverse()
    assert (back.target, back.step, back.tag) == (coupling.target, coupling.step, coupling.tag)
    assert back.calls_network == coupling.calls_network


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 2}, "target: expected 0 or 1, got 2"),
        ({"target": 0, "source": 0}, "another value than the target"),
        ({"target": 2}, "any other needs a source beside it"),
        ({"target": 0, "source": -1}, "source: expected an int"),
        ({"target": 0, "c": math.nan}, "finite"),
        ({"target": 1, "b": math.inf}, "finite"),
    ],
)
def test_bad_couplings(arguments, message):
    with pytest.raises(ValueError, match=message):
        Coupling(**arguments)


def test_compact_drops_only_exact_no_ops():
    kept = [Coupling(0, 1.0, 0.0, 1e-300), Coupling(1, 1.0, 1e-300), Coupling(0, 1 + 2**-52)]
    assert compact([Coupling(0), *kept, Coupling(1, tag=3)]) == tuple(kept)
    assert count_network_calls(kept) == 1


def test_step_boundaries():
    program = tuple(Coupling(i % 2, 2.0, step=i // 2) for i in range(10))  # five steps of two
    assert step_boundaries(program, 1) == {2, 4, 6, 8, 10}
    assert step_boundaries(program, 2) == {4, 8, 10}
    assert step_boundaries(program, 99) == {10}
    assert step_boundaries(invert(program), 2) == {4, 8, 10}
    assert step_boundaries((), 1) == {0}
    with pytest.raises(ValueError, match="at least 1"):
        step_boundaries(program, 0)


def test_a_coupling_that_forgets_its_target_cannot_be_undone():
    forgetting = Coupling(0, a=0.0, c=1.0, step=3)
    assert not forgetting.is_invertible and not is_invertible([Coupling(1), forgetting])
    with pytest.raises(ValueError, match=r"a must not be zero: the coupling of step 3 forgets its target"):
        forgetting.inverse()


def test_couplings_on_more_than_two_values():
    program = (Coupling(2, 0.5, 1.0, 0.0, source=0), Coupling(1, 1.0, 2.0, 0.0, source=2))
    assert num_values(program) == 3 and num_values(()) == 2
    assert run(program, (1.0, 10.0, 4.0)) == [1.0, 16.0, 3.0]
    assert run(invert(program), run(program, (1.0, 10.0, 4.0))) == pytest.approx([1.0, 10.0, 4.0])
