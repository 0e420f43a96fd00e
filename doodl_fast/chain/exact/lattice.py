"""A program on a lattice of integers: its coefficients, its units and the size of its buffers.

A latent's value is held as an integer n that counts units:

    value = n s 2^-F

F, the number of bits behind the point, is the same everywhere. The scale s is a number for each of x and y at each
position in the program.

A coupling that calls the network, or that only rescales its target, takes its `a` into the target's scale (this is the
rescaled variable of DDIM). On the integers it only adds, in float64 and in this order:

    s' = a s ;   n += rint(C n_source + B eps)        with B = b 2^F / s',  C = c (s_source / s')

A mixing coupling (b = 0, c != 0) multiplies the integer by `a`. It does so exactly, as a fraction with an information
buffer (see `ops.lattice_mix`). The fraction is the decimal of 4 digits that is nearest to `a`, so EDICT's 0.93 is
93/100; `c` is changed by as much the other way.

The scales are 1 at the program's end; with a Stable Diffusion schedule they begin at 1/14.6. F is as large as it can be
while values up to 32, times the scale, fit at every position, but not above a cap that leaves more room at the image.

The result is a program like any other, so `invert` and `group` work on it. Its couplings carry the coefficients that
are represented, as floats too, for the vector-Jacobian products. Everything here is computed in Python's ints and
floats; what is imported from `ops` is two limits of the kernels.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ...ops.lattice_mix_op import LARGEST_FACTOR, WORD_BITS
from ..program import Coupling, Program, num_values

DIGITS = 4
"""How many decimals of a mixing's `a` are represented."""
LEAST_WORDS = 4
"""How many words a buffer has at least. Their 124 bits last for 1000 steps of EDICT at p = 0.93, so all shorter runs
take the same memory."""
ROOM = 32.0
"""The magnitude, times the scale, that the state can hold at every position. Latents are of the order of 1, and noise
stays below 6."""
LEAST_FRACTION_BITS = 10
"""With fewer bits behind the point a program is refused."""


@dataclass(frozen=True, slots=True)
class Width:
    """The integers of a lattice.

    Attributes:
        bits: The bits of their dtype.
        range_bits: How many of these they may use.
        most_fraction_bits: How many of those are behind the point at most.
    """

    bits: int
    range_bits: int
    most_fraction_bits: int


# int32 holds +-512 at the image (and +-35 at the noise of Stable Diffusion's schedule) in steps of 2.4e-7. Their
# rounding error is half of fp32's or less (tests/chain/test_exact.py). int64 goes as far as ops.lattice_coupling does.
WIDTHS = {"exact": Width(32, 31, 22), "exact64": Width(64, 49, 36)}


@dataclass(frozen=True, slots=True)
class LatticeCoupling(Coupling):
    """A coupling on the lattice. Its a, c and b are what is represented, up to the rounding of floats.

    Attributes:
        by: The target is multiplied by `by` / `over`, with the help of its information buffer.
        over: The denominator of that fraction.
        per_source: C, the units that are added for each unit of the source.
        per_eps: B, the units that are added for the network's output.
        source_unit: The value of one unit of the source.
        undo: Whether the coupling subtracts first and multiplies after, as one that undoes another does.
    """

    by: int = 1
    over: int = 1
    per_source: float = 0.0
    per_eps: float = 0.0
    source_unit: float = 1.0
    undo: bool = False

    def inverse(self) -> LatticeCoupling:
        """The coupling that undoes this one, to the bit."""
        plain = Coupling.inverse(self)
        return LatticeCoupling(
            *(plain.target, plain.a, plain.c, plain.b, plain.step, plain.tag, plain.source),
            *(self.over, self.by, self.per_source, self.per_eps, self.source_unit, not self.undo),
        )


@dataclass(frozen=True, slots=True)
class Lattice:
    """A program on a lattice.

    Attributes:
        program: The couplings, all of them `LatticeCoupling`s.
        width: The integers.
        fraction_bits: F, how many bits are behind the point.
        units: The value of one unit of x and of y, at the program's start ("noise") and at its end ("image").
        fingerprint: A digest of everything that the integers depend on, except for the network and its conditions.
    """

    program: Program
    width: Width
    fraction_bits: int
    units: dict[str, tuple[float, float]]
    fingerprint: str


def to_lattice(program: Sequence[Coupling], arithmetic: str) -> Lattice:
    """Puts a program on a lattice.

    Args:
        program: The couplings, in floating point.
        arithmetic: "exact" for integers of 32 bits, "exact64" for 64.

    A mixing factor of more than four decimals is rounded, and a RuntimeWarning says so.

    Raises:
        ValueError: The lattice cannot represent the program: the `a` of a mixing is not positive, or is not, in four
            decimals, a fraction of integers up to 10000; or the scales differ so much that no precision is left. The
            error names the coupling.
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
    _warn_of_rounding(program, couplings)
    units = {end: (pair[0] * unit, pair[1] * unit) for end, pair in (("noise", scales[0]), ("image", scales[-1]))}
    return Lattice(tuple(couplings), width, fraction_bits, units, _fingerprint(couplings, width, units))


def _factor(coupling: Coupling) -> tuple[int, int]:
    """The fraction that a coupling multiplies integers by: a mixing's `a`, or 1 where `a` goes into the scale."""
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


def _warn_of_rounding(program: Sequence[Coupling], couplings: Sequence[Coupling]) -> None:
    """Says, if a mixing was rounded, what is used in its place."""
    for given, used in zip(program, couplings, strict=True):
        if given.a != used.a:
            warnings.warn(
                f"arithmetic: exact arithmetic has mixing factors of {DIGITS} decimals, so it uses a={used.a:.6g} and "
                f"c={used.c:.6g} in place of a={given.a:.8g} and c={given.c:.8g} at step {given.step}, and likewise at "
                f"the others; give a mix_weight of {DIGITS} decimals to choose it yourself",
                RuntimeWarning,
                stacklevel=3,
            )
            return


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
    """A digest of a lattice."""
    digest = hashlib.sha256(repr((1, width, units)).encode())
    for k in couplings:
        assert isinstance(k, LatticeCoupling)
        # The text is spelt out, as saved states carry the digest: a new field of the class must not change it.
        digest.update(
            f"LatticeCoupling(target={k.target!r}, a={k.a!r}, c={k.c!r}, b={k.b!r}, step={k.step!r}, tag={k.tag!r}, "
            f"by={k.by!r}, over={k.over!r}, per_source={k.per_source!r}, per_eps={k.per_eps!r}, "
            f"source_unit={k.source_unit!r}, undo={k.undo!r})".encode()
        )
    return digest.hexdigest()


def words_needed(program: Program, buffers: tuple[int, int] = (0, 0)) -> int:
    """How many words the buffers need to run a program: `LEAST_WORDS`, or more. No buffer overflows in that many.

    A multiplication by `by / over` turns a buffer m into `(m div by) over + v` with v < over, which grows with m. So
    the bounds that are computed here in the same way, in ints of any size, hold for every element.

    Args:
        program: The couplings of a lattice.
        buffers: Upper bounds of x's and of y's buffers at the start.
    """
    bounds = list(buffers)
    largest = max(bounds)
    for coupling in program:
        assert isinstance(coupling, LatticeCoupling)
        if coupling.by != coupling.over:
            bounds[coupling.target] = bounds[coupling.target] // coupling.by * coupling.over + coupling.over - 1
            largest = max(largest, bounds[coupling.target])
    return max(LEAST_WORDS, -(-largest.bit_length() // WORD_BITS))
