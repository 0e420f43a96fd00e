"""A program on a lattice of integers: its coefficients, units and buffers, in Python numbers.

A value is held as an integer n of units, `value = n s 2^-F`, with a scale s a variable and position in the program. A
coupling that calls the network, or that only rescales, has its `a` taken into the target's scale (DDIM's rescaled
variable), so on the integers it only adds:

    s' = a s ;   n += rint(C n_source + B eps)        with B = b 2^F / s',  C = c (s_source / s')

in float64 and in this order. A mixing coupling (b = 0, c != 0) multiplies by `a` itself, exactly, as a fraction with an
information buffer (see `ops.lattice_mix`): the decimal of 4 digits nearest to it, so that EDICT's 0.93 is 93/100. The
scales are 1 at the program's end; a Stable Diffusion schedule begins at 1/14.6. F is such that values up to 32, in
scale, fit wherever the program goes, and not above a cap that leaves the image's end more room.

The lattice program is a program: its couplings carry the coefficients that are represented, in floating point too, for
the vector-Jacobian product, and `invert` and `group` work on it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ...ops.lattice_mix_op import LARGEST_FACTOR, WORD_BITS
from ..program import Coupling, Program, num_values

DIGITS = 4
LEAST_WORDS = 4
"""Words of a fresh buffer. 124 bits last for 1000 steps of EDICT at p = 0.93, so shorter runs cost the same memory."""
ROOM = 32.0
"""What the state may always hold, in the scale's unit: latents are of the order of 1, noise below 6."""
LEAST_FRACTION_BITS = 10


@dataclass(frozen=True, slots=True)
class Width:
    """Integers of the lattice: how many bits they may use and how many of those are at most behind the point."""

    bits: int
    range_bits: int
    most_fraction_bits: int


# int32: +-512 at the image's end (with Stable Diffusion's schedule +-35 at the noise) in steps of 2.4e-7, which costs
# half of fp32's error or less (tests/test_exact.py). int64: as far as ops.lattice_coupling goes.
WIDTHS = {"exact": Width(32, 31, 22), "exact64": Width(64, 49, 36)}


@dataclass(frozen=True, slots=True)
class LatticeCoupling(Coupling):
    """A coupling with its integers. a, c, b: what is represented, up to the rounding of floats.

    by, over: what the target is multiplied by, through its buffer. per_source, per_eps: C and B. source_unit: the value
    of one unit of the source. undo: whether it subtracts first and multiplies after.
    """

    by: int = 1
    over: int = 1
    per_source: float = 0.0
    per_eps: float = 0.0
    source_unit: float = 1.0
    undo: bool = False

    def inverse(self) -> LatticeCoupling:
        """What undoes it, to the bit."""
        plain = Coupling.inverse(self)
        return LatticeCoupling(
            *(plain.target, plain.a, plain.c, plain.b, plain.step, plain.tag, plain.source),
            *(self.over, self.by, self.per_source, self.per_eps, self.source_unit, not self.undo),
        )


@dataclass(frozen=True, slots=True)
class Lattice:
    """A program on the lattice.

    units: the value of one unit of x and of y, at the program's start (the noise) and its end (the image).
    fingerprint: what tells lattices apart: everything that the integers depend on but the network and its conditions.
    """

    program: Program
    width: Width
    fraction_bits: int
    units: dict[str, tuple[float, float]]
    fingerprint: str


def to_lattice(program: Sequence[Coupling], arithmetic: str) -> Lattice:
    """The program on the lattice named "exact" (int32) or "exact64" (int64).

    Raises ValueError, naming the coupling, for what it cannot represent: a mixing whose `a` is not positive, or is not
    a fraction of integers up to 10000 in four digits; scales that leave no precision.
    """
    forgetting = next((coupling for coupling in program if not coupling.is_invertible), None)
    if forgetting is not None or num_values(program) > 2:
        why = "more than two latents" if forgetting is None else f"a = 0 at step {forgetting.step}"
        raise ValueError(
            f'arithmetic: {arithmetic!r} needs couplings of two latents that can be undone, got {why}; use "float", or '
            "a solver that can be inverted, such as EDICT"
        )
    width = WIDTHS[arithmetic]
    factors = [_factor(coupling) for coupling in program]
    scales = _scales(program)
    largest = max(abs(1 / s) for pair in scales for s in pair)
    fraction_bits = min(width.most_fraction_bits, width.range_bits - math.ceil(math.log2(ROOM * largest)))
    if fraction_bits < LEAST_FRACTION_BITS:
        other = 'use arithmetic="exact64"' if arithmetic == "exact" else 'use arithmetic="float"'
        raise ValueError(
            f"arithmetic: {arithmetic!r} needs latents whose scale changes less: here by {largest:.3g}, which leaves "
            f"{fraction_bits} bits behind the point; {other}"
        )
    unit = 2.0**-fraction_bits
    couplings: list[Coupling] = []
    for coupling, (by, over), before, after in zip(program, factors, scales, scales[1:], strict=False):
        source, target = before[coupling.source], after[coupling.target]
        a, c = _represented(coupling, by / over)
        couplings.append(
            LatticeCoupling(
                *(coupling.target, a, c, coupling.b, coupling.step, coupling.tag, coupling.source, by, over),
                per_source=c * (source / target),
                per_eps=coupling.b * 2.0**fraction_bits / target,
                source_unit=source * unit,
            )
        )
    units = {end: (pair[0] * unit, pair[1] * unit) for end, pair in (("noise", scales[0]), ("image", scales[-1]))}
    return Lattice(tuple(couplings), width, fraction_bits, units, _fingerprint(couplings, width, units))


def _factor(coupling: Coupling) -> tuple[int, int]:
    """What a coupling multiplies integers by: a mixing's `a`, and 1 for one whose `a` goes into the scale."""
    if coupling.b != 0 or coupling.c == 0:
        return 1, 1
    decimal = round(coupling.a * 10**DIGITS)
    fraction = Fraction(decimal, 10**DIGITS)
    if decimal <= 0 or max(fraction.numerator, fraction.denominator) > LARGEST_FACTOR:
        raise ValueError(
            f"arithmetic: exact arithmetic needs mixing factors a > 0 that are, in {DIGITS} decimals, fractions of "
            f"integers up to {LARGEST_FACTOR}, got a={coupling.a} at step {coupling.step}; use another mix_weight or "
            'arithmetic="float"'
        )
    return fraction.numerator, fraction.denominator


def _represented(coupling: Coupling, factor: float) -> tuple[float, float]:
    """The `a` and `c` of a coupling on the lattice.

    Only the `a` of a mixing is rounded, to `factor`. Its `c` is then changed by as much the other way, so that a + c,
    by which the coupling multiplies two equal latents, stays what it was: 1 for EDICT's mixing with any weight.
    """
    if coupling.b != 0 or coupling.c == 0 or factor == coupling.a:
        return coupling.a, coupling.c
    return factor, (coupling.a + coupling.c) - factor


def _scales(program: Sequence[Coupling]) -> list[tuple[float, float]]:
    """The scales of x and y before every coupling and after the last, where they are 1."""
    scales = [(1.0, 1.0)]
    for coupling in reversed(program):
        pair = list(scales[-1])
        if coupling.b != 0 or coupling.c == 0:
            pair[coupling.target] /= coupling.a
        if not all(1e-100 < abs(s) < 1e100 for s in pair):
            raise ValueError(
                f"arithmetic: exact arithmetic cannot hold the scale {pair[coupling.target]:.3g} that a={coupling.a} "
                f'at step {coupling.step} leads to; use arithmetic="float"'
            )
        scales.append((pair[0], pair[1]))
    return scales[::-1]


def _fingerprint(couplings: Sequence[Coupling], width: Width, units: dict[str, tuple[float, float]]) -> str:
    digest = hashlib.sha256(repr((1, width, units)).encode())
    for coupling in couplings:
        digest.update(repr(coupling).encode())
    return digest.hexdigest()


def words_needed(program: Program, buffers: tuple[int, int] = (0, 0)) -> int:
    """How many words buffers need to run the program: `LEAST_WORDS`, or more.

    buffers: upper bounds of x's and y's at the start. No buffer overflows in that many words: a multiplication by
    by/over takes a buffer m to `(m div by) over + v` with v < over, which grows with m, so the bounds that are computed
    here in the same way, without limit on their size, hold for every element.
    """
    bounds = list(buffers)
    largest = max(bounds)
    for coupling in program:
        assert isinstance(coupling, LatticeCoupling)
        if coupling.by != coupling.over:
            bounds[coupling.target] = bounds[coupling.target] // coupling.by * coupling.over + coupling.over - 1
            largest = max(largest, bounds[coupling.target])
    return max(LEAST_WORDS, -(-largest.bit_length() // WORD_BITS))
