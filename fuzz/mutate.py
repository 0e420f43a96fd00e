"""Random changes of sound files, for where no fuzzing engine is installed, and for the tests."""

from __future__ import annotations

import random
import re

ODD_VALUES = (
    *(b"0", b"1", b"2", b"7", b"-1", b"0.5", b"1e999", b"NaN", b"2147483648", b"18446744073709551616"),
    *(b"null", b"[]", b"{}", b'""', b'"I32"', b'"I64"', b'"F32"', b'"U8"'),
)
"""What numbers and texts in a JSON header are replaced by."""
VALUES = re.compile(rb'(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])|"[^"\\]*"')


def mutated(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Returns a changed copy of some bytes.

    Args:
        data: A file.
        rng: Where the changes are drawn from.
        other: Another file, of which a piece may be put in.
    """
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        place = rng.randrange(len(result) + 1)
        kind = rng.randrange(10)
        if kind == 0 and result:
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
        elif kind == 1 and result:
            result[rng.randrange(len(result))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            del result[place : place + rng.randrange(1, 17)]
        elif kind == 3:
            result[place:place] = rng.randbytes(rng.randrange(1, 17))
        elif kind == 4:
            del result[place:]
        elif kind == 5 and other:
            start = rng.randrange(len(other))
            result[place:place] = other[start : start + rng.randrange(1, 65)]
        elif kind == 6:
            result[place:place] = result[place : place + rng.randrange(1, 65)]
        else:
            values = [match.span() for match in VALUES.finditer(bytes(result))]
            if values:
                start, end = rng.choice(values)
                first, last = rng.choice(values)
                result[start:end] = rng.choice((*ODD_VALUES, bytes(result[first:last])))
    return bytes(result)
