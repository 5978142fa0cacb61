"""Records of a 'ram' section, made one by one: what the C writer is compared with."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from cpr.state.ram_section import CONTINUE, PAGE, ZERO, Block, block_entry, block_total


def block_list(blocks: Iterable[Block], with_addresses: bool = False) -> bytes:
    """The record of all the blocks; `with_addresses` iff x-ignore-shared is on."""
    listed = list(blocks)
    return block_total(listed) + b"".join([block_entry(b, with_addresses) for b in listed])


class PageEncoder:
    """Makes the records of pages; one encoder for all the sections of a stream."""

    __slots__ = ("_block",)

    def __init__(self) -> None:
        self._block: str | None = None

    def zero_page(self, idstr: str, offset: int) -> bytes:
        return self._header(idstr, offset | ZERO) + b"\0"

    def page(self, idstr: str, offset: int, data: bytes) -> bytes:
        return self._header(idstr, offset | PAGE) + data

    def _header(self, idstr: str, word: int) -> bytes:
        if idstr == self._block:
            return struct.pack(">Q", word | CONTINUE)
        self._block = idstr
        return struct.pack(">Q", word) + bytes([len(idstr)]) + idstr.encode()
