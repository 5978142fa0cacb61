"""The body of the section 'ram': the list of RAM blocks, and pages.

    body    = record* END
    record  = u64 address | flags, then by the flags
      MEM_SIZE   the address is the total of the used lengths; for each block u8 length, idstr,
                 u64 used length, and, with x-ignore-shared, u64 guest-physical address
      ZERO       unless CONTINUE u8 length, idstr; then u8 0
      PAGE       unless CONTINUE u8 length, idstr; then the page
      EOS        the end of the body
    CONTINUE  the page is in the same block as the one before, maybe in an earlier section

The address of a page is its offset in the block.  In cpr-exec every block stays where it is: the
START has the list, and no section has pages.
"""

from __future__ import annotations

import struct
from errno import EINVAL, EIO

from cpr.constants import PAGE_SIZE
from cpr.state.reader import LoadError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from cpr.state.stream import StreamReader

IDSTR = "ram"
INSTANCE_ID = 0
VERSION_ID = 4

FLAGS = PAGE_SIZE - 1

ZERO = 0x02
MEM_SIZE = 0x04
PAGE = 0x08
EOS = 0x10
CONTINUE = 0x20
HOOK = 0x80  # RDMA has registered memory: nothing to do
MULTIFD_FLUSH = 0x200  # multifd channels are to be waited for: nothing to do without them

END = struct.pack(">Q", EOS)


class Block:
    """A RAM block as this section knows it; lengths in bytes.

    The block can be resized where `max_length` is more than `used_length`.  `address` is the
    guest-physical one, or None where the stream's need not agree with it.
    """

    __slots__ = ("address", "idstr", "max_length", "used_length")

    def __init__(
        self,
        idstr: str,
        used_length: int,
        max_length: int | None = None,
        address: int | None = None,
    ) -> None:
        self.idstr = idstr
        self.used_length = used_length
        self.max_length = used_length if max_length is None else max_length
        self.address = address


def block_total(blocks: Iterable[Block]) -> bytes:
    """The beginning of the record of all the blocks, before their entries."""
    return struct.pack(">Q", sum([block.used_length for block in blocks]) | MEM_SIZE)


def block_entry(block: Block, with_addresses: bool) -> bytes:
    entry = _counted(block.idstr) + struct.pack(">Q", block.used_length)
    return entry + struct.pack(">Q", block.address or 0) if with_addresses else entry


class RamDecoder:
    """Takes the bodies of 'ram' sections; one decoder for all the sections of a stream.

    `blocks` are this side's.  A block list must name only them; the used lengths of those that
    can be resized become the stream's.  `bulk(reader, idstr)`, if it is set, is called after each
    page with its block: it may take more page records itself, and returns the block of the last.
    `mapped(reader, block)`, set where mapped-ram is on, takes what follows each block's entry.
    Of the blocks `theirs` no page is taken: another image or VMM may run a guest in them.  Nor is
    one of those `ignored`, which x-ignore-shared leaves as they are.
    """

    def __init__(
        self,
        blocks: Iterable[Block],
        with_addresses: bool = False,
        theirs: Container[str] = (),
        ignored: Container[str] = (),
    ) -> None:
        self.blocks = {block.idstr: block for block in blocks}
        self._theirs = theirs
        self._ignored = ignored
        self.mapped: Callable[[StreamReader, Block], None] | None = None
        self.bulk: Callable[[StreamReader, str], str | None] | None = None
        self._with_addresses = with_addresses
        self._block: Block | None = None

    def pages(
        self, reader: StreamReader, version_id: int
    ) -> Iterator[tuple[str, int, bytes | None]]:
        """Takes one body and yields its pages: idstr, offset, and the data or None for zeros.

        Raises LoadError.
        """
        if version_id != VERSION_ID:
            raise LoadError(EINVAL)
        while True:
            word = reader.integer(8)
            if reader.failed:
                raise LoadError(EIO, "Getting RAM address failed")
            address, flags = word & ~FLAGS, word & FLAGS
            kind = flags & ~CONTINUE
            if kind == MEM_SIZE:
                self._take_block_list(reader, address)
            elif kind & (ZERO | PAGE):
                yield self._take_page(reader, address, flags)
                self._take_more_pages(reader)
            elif kind == EOS:
                return
            elif kind not in (HOOK, MULTIFD_FLUSH):
                raise _unknown_flags(flags)
            if reader.failed:
                raise LoadError(EIO)

    def _take_block_list(self, reader: StreamReader, total: int) -> None:
        while total:
            idstr = _take_idstr(reader)
            used_length = reader.integer(8)
            block = self.blocks.get(idstr)
            if block is None:
                raise LoadError(EINVAL, f'Unknown ramblock "{idstr}", cannot accept migration')
            _resize(block, used_length)
            if self._with_addresses:
                _check_address(block, reader.integer(8))
            if self.mapped is not None:
                self.mapped(reader, block)
            total = (total - used_length) % (1 << 64)

    def _take_more_pages(self, reader: StreamReader) -> None:
        if self.bulk is not None and self._block is not None:
            self._block = self.blocks[self.bulk(reader, self._block.idstr) or self._block.idstr]

    def _take_page(
        self, reader: StreamReader, offset: int, flags: int
    ) -> tuple[str, int, bytes | None]:
        block = self._take_block(reader, offset, flags)
        kind = flags & ~CONTINUE
        if kind == PAGE:
            data = reader.take(PAGE_SIZE)
            if reader.failed:
                raise LoadError(EIO)
            return block.idstr, offset, data
        if kind != ZERO:
            raise _unknown_flags(flags)
        fill = reader.integer(1)
        if fill:
            raise LoadError(EINVAL, f"Found a zero page with value {fill}")
        if reader.failed:
            raise LoadError(EIO)
        return block.idstr, offset, None

    def _take_block(self, reader: StreamReader, offset: int, flags: int) -> Block:
        if flags & CONTINUE:
            line = "Ack, bad migration stream!"
        else:
            idstr = _take_idstr(reader)
            self._block = self.blocks.get(idstr)
            line = f"Can't find block {idstr}"
        outside = f"Illegal RAM offset {offset:x}"
        if self._block is None:
            raise LoadError(EINVAL, line, outside)
        if offset >= self._block.used_length:
            raise LoadError(EINVAL, outside)
        self.check(self._block)
        return self._block

    def check(self, block: Block) -> None:
        """Raises LoadError where no page of the block is taken."""
        if block.idstr in self._ignored:
            raise LoadError(EINVAL, f"block {block.idstr} should not be migrated !")
        if block.idstr in self._theirs:
            raise LoadError(
                EINVAL,
                f"RAM block {block.idstr} has come with the CPR state, and its pages are in the "
                "stream too: it is not the one that belongs to that state",
            )


def _resize(block: Block, used_length: int) -> None:
    if used_length == block.used_length:
        return
    if block.max_length == block.used_length:
        problem = f"Size mismatch: {block.idstr}: {used_length:#x} != {block.used_length:#x}"
    elif used_length > block.max_length:
        problem = f"Size too large: {block.idstr}: {used_length:#x} > {block.max_length:#x}"
    else:
        block.used_length = used_length
        return
    raise LoadError(EINVAL, f"{problem}: Invalid argument")


def _check_address(block: Block, address: int) -> None:
    if block.address is not None and address != block.address:
        raise LoadError(
            EINVAL, f"Mismatched GPAs for block {block.idstr} {address}!= {block.address}"
        )


def _unknown_flags(flags: int) -> LoadError:
    return LoadError(EINVAL, f"Unknown combination of migration flags: 0x{flags:x}")


def _counted(idstr: str) -> bytes:
    name = idstr.encode()
    return bytes([len(name)]) + name


def _take_idstr(reader: StreamReader) -> str:
    return reader.take(reader.integer(1)).decode(errors="replace")
