"""Runs `inspect` in this process, and makes streams with RAM pages for it."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from described import DATA, STREAMS

from cpr.constants import PAGE_SIZE
from cpr.state.configuration import Configuration
from cpr.state.ram_section import END as RAM_END
from cpr.state.ram_section import Block
from cpr.state.stream import SWITCHOVER_START, StreamWriter
from cpr.state.vmstate import VMStateDescription, buffer, i32, u8
from cpr.vmm.inspect import source
from cpr.vmm.inspect.source import Source
from cpr.vmm.main import main

STATES = sorted(path.name for path in DATA.glob("*.cprstate.bin"))
FILES = STATES + [f"{name}.vmstate" for name in STREAMS]


def run(*arguments: object) -> tuple[int, str, str]:
    """The exit status, stdout and stderr of one `inspect`."""
    out, err = io.StringIO(), io.StringIO()

    def error_report(text: object) -> None:  # which writes to the descriptor itself
        err.write(f"cpr-vmm: {text}\n")

    redirected = patch("cpr.vmm.main.error_report", error_report)
    with redirect_stdout(out), redirect_stderr(err), redirected:
        status = main(["inspect", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def as_json(*arguments: object) -> dict:
    return json.loads(run("--json", *arguments)[1])


def inspected(data: bytes) -> source.Found:
    return source.inspect(Source("test", data))


DEVICE = VMStateDescription("d", 1, 1, (u8("x"), i32("y"), buffer("raw", 4)))
BLOCKS = [Block("ram0", 4 * PAGE_SIZE, address=0), Block("rom", PAGE_SIZE, address=0xFFFFF000)]


def stream_with_ram(
    body: bytes, capabilities: tuple[str, ...] = (), device: dict | None = None
) -> bytes:
    written = bytearray()
    writer = StreamWriter(written.extend)
    writer.header()
    writer.configuration(Configuration("pc", capabilities))
    writer.start(1, "ram", 0, 4, body + RAM_END)
    writer.command(SWITCHOVER_START)
    writer.end(1, RAM_END)
    writer.device(2, "d", 0, DEVICE, device or {"x": 1, "y": -2, "raw": b"abcd"})
    writer.eof()
    writer.vmdescription()
    return bytes(written)


def mapped_ram(contents: list[bytes]) -> bytes:
    """A stream with mapped-ram: its ram0 has `contents` (b'' for zeros), its rom is not in it."""
    head = stream_with_ram(b"", ("mapped-ram",))
    begin = head.index(b"\0\0\0\0\0\0\0\x10")  # the END of the body of the START
    used = len(contents) * PAGE_SIZE
    listed = (used + PAGE_SIZE | 4).to_bytes(8, "big")
    listed += b"\4ram0" + used.to_bytes(8, "big") + b"\0\0\0\1" + PAGE_SIZE.to_bytes(8, "big")
    bitmap = sum(1 << i for i, content in enumerate(contents) if content).to_bytes(8, "little")
    bitmap_offset = begin + len(listed) + 16
    listed += bitmap_offset.to_bytes(8, "big") + (1 << 20).to_bytes(8, "big") + bitmap
    pages = b"".join(content.ljust(PAGE_SIZE, b"\0") for content in contents)
    rest = b"\3rom" + PAGE_SIZE.to_bytes(8, "big")
    rest += b"\0\0\0\1" + PAGE_SIZE.to_bytes(8, "big") + bytes(16)
    return (head[:begin] + listed).ljust(1 << 20, b"\0") + pages + rest + head[begin:]
