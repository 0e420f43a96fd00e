"""`RunFactory`: makes the runs of one chain. It holds everything that a chain's runs have in common."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .arithmetic import Arithmetic, Floats
from .checks import Trust
from .evaluator import Evaluator, as_evaluator
from .exact.arithmetic import Exact
from .exact.lattice import WIDTHS, Lattice, to_lattice, words_needed
from .exact.state_file import ENDS
from .program import Coupling, Program, invert
from .run import ProgramRun
from .ways import WHOLE, Way

ARITHMETICS = ("float", *WIDTHS)
NO_FLOAT64 = frozenset({"mps"})
"""Types of device that have no float64."""


class RunFactory:
    """Makes the runs of one chain, in both directions.

    Args:
        evaluator: The function f in the couplings. Later runs use whatever `self.evaluator` is then.
        program: The couplings. In exact arithmetic `self.program` is the program on the lattice instead.
        state_dtype: The dtype of x, y and their cotangents, torch.float32 or torch.float64. None means float64, or
            float32 on devices without it.
        arithmetic: "float", "exact" or "exact64".
        trust: What the runs' checks remember, the latest drift for instance.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        program: Sequence[Coupling],
        state_dtype: torch.dtype | None,
        arithmetic: str,
        trust: Trust,
    ) -> None:
        self.evaluator = as_evaluator(evaluator)
        self.state_dtype, self.arithmetic, self.trust = state_dtype, arithmetic, trust
        self.lattice: Lattice | None = None if arithmetic == "float" else to_lattice(program, arithmetic)
        self.program: Program = tuple(program) if self.lattice is None else self.lattice.program

    def new_run(
        self,
        x: Tensor,
        inverse: bool = False,
        *,
        stores: bool = False,
        states: str | int = "checkpoint",
        graphs: Sequence[tuple[Way, int]] = (),
        way: Way = WHOLE,
        launched: bool = False,
    ) -> ProgramRun:
        """Makes one run.

        Args:
            x: The latents, or any tensor of their dtype and device.
            inverse: Whether it runs from the image to the noise.
            stores: Whether it keeps what its gradient will need.
            states: What that is: "checkpoint" for the source of every evaluation, "reversible" for the final state, or
                an int k for the state every k steps.
            graphs: The ways in which it keeps the network graphs of its last evaluations, in the program's order, and
                of how many evaluations each.
            way: How the other evaluations have their graphs.
            launched: Whether calls of the network are never replayed.

        A way that the network does not have stands for whole graphs.

        Raises:
            ValueError: Exact arithmetic is asked for on a device that has no float64.
        """
        program = invert(self.program) if inverse else self.program
        no_float64 = x.device.type in NO_FLOAT64
        state_dtype = torch.promote_types(self.state_dtype or (torch.float32 if no_float64 else torch.float64), x.dtype)
        new_arithmetic: Callable[[], Arithmetic] = functools.partial(Floats, x.dtype, state_dtype)
        if self.lattice is not None:
            if no_float64:
                raise ValueError(f'arithmetic: exact arithmetic needs float64, which {x.device} lacks; use "float"')
            ends, words = ENDS[::-1] if inverse else ENDS, words_needed(program)
            new_arithmetic = functools.partial(Exact, self.lattice, program, ends, words, x.dtype, state_dtype)
        own = self.evaluator.launched() if launched else self.evaluator
        evaluators = {one: one.of(own) or own for one in {way, *(kept for kept, _ in graphs)}}
        kept = [(evaluators[one], count) for one, count in graphs]
        return ProgramRun.create(
            evaluators[way], program, states, x, state_dtype, new_arithmetic, stores, self.trust, kept
        )
