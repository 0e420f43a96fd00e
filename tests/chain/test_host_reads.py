"""Numbers that are read together: their values, the order of their checks, and what errors do to them."""

from __future__ import annotations

import pytest
import torch

from doodl_fast.chain.host_reads import at_once, check_later, together


class Refused(Exception):
    """What the checks of these tests raise."""


def refuse(name: str):
    def check(numbers: list[float]) -> None:
        raise Refused(name, *numbers)

    return check


def test_alone_a_check_is_done_at_once():
    seen = []
    check_later(torch.tensor([[1, 2], [3, 4]], dtype=torch.int32), seen.append)
    assert seen == [[1, 2, 3, 4]]


def test_together_the_numbers_are_those_of_tolist():
    """Of every dtype, as each would be read alone."""
    tensors = [
        torch.tensor([True, False]),
        torch.tensor(0.1, dtype=torch.float64),
        torch.rand(2, 3, generator=torch.Generator().manual_seed(0)).half(),
        torch.empty(0, 2),
        torch.tensor([[7]], dtype=torch.int32),
    ]
    seen = []
    values = torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(1))
    with together() as reads:
        for tensor in tensors:
            check_later(tensor, seen.append)
        assert not seen
        assert reads.read(values) == values.tolist()
        assert seen == [tensor.flatten().tolist() for tensor in tensors]
        assert reads.read(torch.tensor(2.5)) == 2.5 and reads.read() is None
    assert len(seen) == 5


def read_together(*checks, error=None):
    """Lets checks of ones wait in a block, which then reads them, or raises an error."""
    with together() as reads:
        for check in checks:
            check_later(torch.ones(1), check)
        if error is not None:
            raise error
        reads.read()


def test_the_first_check_that_fails_is_raised():
    with pytest.raises(Refused, match="first"):
        read_together(refuse("first"), refuse("second"))


def test_the_end_of_the_outermost_block_reads_what_waits():
    seen = []
    with together():
        with together():
            check_later(torch.ones(1), seen.append)
        assert not seen
        with at_once():
            check_later(torch.zeros(1), seen.append)
        assert seen == [[0.0]]
    assert seen == [[0.0], [1.0]]


def test_an_error_lets_the_checks_speak_first():
    with pytest.raises(Refused, match="cause") as caught:
        read_together(refuse("cause"), error=KeyError("what follows from it"))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(KeyError):
        read_together(lambda numbers: None, error=KeyError("something else"))


def test_checks_of_what_ran_out_of_memory_are_left_out():
    """Those from before the attempt stay."""
    seen = []
    with together() as reads:
        check_later(torch.zeros(1), seen.append)
        with pytest.raises(torch.OutOfMemoryError):
            read_together(seen.append, error=torch.OutOfMemoryError("no memory"))
        assert len(reads) == 1 and not seen
    assert seen == [[0.0]]
