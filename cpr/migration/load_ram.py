"""RAM out of the migration stream: by page, in bulk by C threads, or from its place in a file."""

from __future__ import annotations

import os

from cpr.errors import MigrationError
from cpr.state import mapped_ram, ram_section
from cpr.state.reader import StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.migration.channel import Channel
    from cpr.pages import PagePool, RecordLoader
    from cpr.ram import RAMBlock
    from cpr.state.stream import StreamReader

RECORDS_SIZE = 1 << 20


def load_pages(
    machine: Machine, ram: ram_section.RamDecoder, reader: StreamReader, version_id: int
) -> set[str]:
    """Loads the pages of one section; the blocks of those that `ram.bulk` has not taken."""
    blocks = {block.idstr: block for block in machine.blocks}
    zeros = bytes(ram_section.PAGE_SIZE)
    came = set()
    for idstr, offset, data in ram.pages(reader, version_id):
        came.add(idstr)
        block = blocks[idstr]
        if data is not None:
            block.write(offset, data)
        elif block.view(offset, len(zeros)) != zeros:  # a page that is not there yet stays so
            block.write(offset, zeros)
    return came


def check_content(machine: Machine, came: set[str]) -> None:
    """Refuses a guest whose RAM has come neither in the stream nor with a CPR state nor a file.

    `came` are the blocks of which there were pages.
    """
    for block in machine.blocks:
        has_file = block.reopened and not block.fresh
        if not (block.idstr in came or block.kept or has_file or block.regenerated):
            raise StreamError(
                f"Memory region {block.idstr} is empty: its pages are not in the stream, and no "
                "CPR state came with it"
            )


class MappedLoader:
    """mapped-ram: reads the pages of a block from their places in the file.

    Pages that are not there are zero: in blocks that are `cleared` they are made so.  `check` is
    called with a block of which there are pages, and may raise.
    """

    def __init__(
        self,
        blocks: list[RAMBlock],
        cleared: set[str],
        channel: Channel,
        check: Callable[[ram_section.Block], None],
    ) -> None:
        self._check = check
        self._blocks = {block.idstr: block for block in blocks}
        self._cleared = cleared
        self._channel = channel

    def take(self, reader: StreamReader, listed: ram_section.Block) -> None:
        """For RamDecoder.mapped."""
        from cpr.pages import PagePool, Pages

        layout = mapped_ram.Layout.take(reader, listed.used_length)
        fd = self._channel.fd
        try:
            present = bytearray(os.pread(fd, layout.bitmap_size, layout.bitmap_offset))
        except OSError as error:
            raise MigrationError(
                f"the bitmap of RAM block {listed.idstr} cannot be read: {error.strerror}; "
                "mapped-ram needs a file"
            ) from None
        present.extend(bytes(layout.bitmap_size - len(present)))
        block = self._blocks[listed.idstr]
        with PagePool() as pool:
            if block.idstr in self._cleared:
                pool.clear(Pages.of_block(block, present, inverted=True))
            if any(present):
                self._check(listed)
                pool.load(Pages.of_block(block, present, holes=False), fd, layout.pages_offset)
                block.kept = True
        try:
            reader.jump(layout.end, self._channel.seek)
        except OSError as error:
            raise MigrationError(
                f"the end of RAM block {listed.idstr} cannot be found: {error.strerror}"
            ) from None


class BulkLoader:
    """Takes runs of page records in C; its threads are started by the first page."""

    def __init__(self, blocks: list[RAMBlock]) -> None:
        self._blocks = blocks
        self._pool: PagePool | None = None
        self._loader: RecordLoader | None = None

    def take(self, reader: StreamReader, idstr: str) -> str | None:
        """For RamDecoder.bulk."""
        if self._loader is None:
            from cpr.pages import PagePool, Pages, RecordLoader

            self._pool = PagePool()
            blocks = [(block.idstr, Pages.of_block(block)) for block in self._blocks]
            self._loader = RecordLoader(self._pool, blocks)
        loader = self._loader
        loader.current = idstr
        while True:
            taken = loader.feed(reader.peek(RECORDS_SIZE))
            reader.take(taken)
            if loader.stopped or not taken:
                return loader.current

    @property
    def came(self) -> set[str]:
        """The blocks of which it has taken pages."""
        return self._loader.came if self._loader is not None else set()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
