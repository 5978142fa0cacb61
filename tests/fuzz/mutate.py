"""Inputs made from others, as a fuzzer makes them that knows no coverage."""

from __future__ import annotations

import random
from collections.abc import Sequence

EDGES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62)
EDGES_64 = (*EDGES, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
WORDS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"'",
    b"\\u",
    b",",
    b"=",
    b"\0",
    b"\xff",
    b"-",
    b"=on",
    b"\n",
)
MOST = 1 << 20  # bytes of an input


def mutate(chance: random.Random, inputs: Sequence[bytes]) -> bytes:
    """One of `inputs`, changed in one to six places."""
    data = bytearray(chance.choice(inputs))
    for _ in range(chance.randrange(1, 7)):
        where = chance.randrange(len(data) + 1)
        kind = chance.randrange(8)
        if kind == 0 and data:
            data[where % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[where % len(data)] = chance.randrange(256)
        elif kind == 2:
            size = chance.choice((1, 2, 4, 8))
            edge = chance.choice(EDGES_64) % (1 << 8 * size)
            data[where : where + size] = edge.to_bytes(size, chance.choice(("big", "little")))
        elif kind == 3:
            del data[where : where + chance.choice((1, 2, 8, 100))]
        elif kind == 4:
            data[where:where] = chance.choice(WORDS) * chance.choice((1, 1, 1, 600))
        elif kind == 5:
            piece = data[where : where + chance.choice((1, 4, 40, 4000))]
            data[where:where] = piece * chance.choice((1, 2, 20))
        elif kind == 6:
            other = chance.choice(inputs)
            begin = chance.randrange(len(other) + 1)
            data[where:] = other[begin:]
        else:
            del data[where:]
    return bytes(data[:MOST])
