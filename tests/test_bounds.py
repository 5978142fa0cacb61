"""What a stream, a file or a peer makes this program keep is bounded, whatever lengths it names."""

from __future__ import annotations

import io
import resource
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from descriptors import open_fds

from cpr import boot
from cpr.errors import ConfigError, StateError
from cpr.memory import GuestMemory
from cpr.migration import cpr_transfer
from cpr.state.configuration import VMSTATE_CAPABILITIES, VMSTATE_CONFIGURATION
from cpr.state.fields import MAX_ELEMENTS, MAX_VARIABLE_SIZE
from cpr.state.mapped_ram import Layout
from cpr.state.reader import BytesReader, LoadError, StreamError
from cpr.state.stream import MAX_DESCRIPTION, StreamReader
from cpr.state.vmstate import VMStateDescription, qlist, u8, u32, varray
from cpr.vmm.inspect import values
from cpr.vmm.inspect.cursor import Cursor, Damage

ROOM = 200 << 20  # above what the process has already


class Endless:
    """A Reader of `head`, and then of `fill` for ever; it counts what is taken."""

    def __init__(self, head: bytes, fill: bytes = b"\0") -> None:
        self.head = head
        self.fill = fill
        self.taken = 0

    def peek(self, size: int) -> bytes:
        return self.head[:size] + self.fill * (size - len(self.head))

    def read(self, size: int) -> bytes:
        piece = self.peek(size)
        self.head = self.head[size:]
        self.taken += size
        return piece


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    """More than ROOM is a MemoryError here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


EMPTY = VMStateDescription("empty", 1, 1, ())
BYTE = VMStateDescription("byte", 1, 1, (u8("x"),))
BYTES = VMStateDescription("a", 1, 1, (u32("n"), varray("x", BYTE, "n")))
NOTHINGS = VMStateDescription("a", 1, 1, (u32("n"), varray("x", EMPTY, "n")))
LISTS = {
    "name": (VMSTATE_CONFIGURATION, b"\xff\xff\xff\xff", b"\0"),
    "capabilities": (VMSTATE_CAPABILITIES, b"\xff\xff\xff\xff", b"\0"),
    "records": (
        VMStateDescription("a", 1, 1, (u32("n"), varray("x", BYTE, "n"))),
        b"\xff" * 4,
        b"\0",
    ),
    "structs": (
        VMStateDescription("a", 1, 1, (u32("n"), varray("x", EMPTY, "n"))),
        b"\xff" * 4,
        b"\0",
    ),
    "list": (VMStateDescription("a", 1, 1, (qlist("x", BYTE),)), b"", b"\1"),
}


@pytest.mark.parametrize(("vmsd", "head", "fill"), LISTS.values(), ids=LISTS)
def test_no_length_in_a_stream_is_believed(
    vmsd: VMStateDescription, head: bytes, fill: bytes
) -> None:
    reader = Endless(head, fill)
    with pytest.raises(StreamError, match=r"field '\w+' has \d+ \w+, more than the \d+ there can"):
        vmsd.decode(reader, 1)
    assert reader.taken <= 4 + max(MAX_VARIABLE_SIZE, 3 * MAX_ELEMENTS)


def test_the_most_there_can_be_is_taken() -> None:
    data = MAX_ELEMENTS.to_bytes(4, "big") + bytes(MAX_ELEMENTS)
    assert len(BYTES.decode(BytesReader(data), 1)["x"]) == MAX_ELEMENTS


def test_a_description_of_4_gib_is_read_past() -> None:
    size = (1 << 32) - 1
    pieces = [bytes([6]) + size.to_bytes(4, "big")]
    left = [size]

    def read(most: int) -> bytes:
        if pieces:
            return pieces.pop()
        piece = min(most, left[0], 1 << 20)
        left[0] -= piece
        return bytes(piece)

    reader = StreamReader(read)
    assert len(reader.vmdescription()) == MAX_DESCRIPTION
    assert not left[0] and not reader.failed


@pytest.mark.parametrize(
    ("bitmap", "pages"),
    [(1 << 63, 0), (0, 1 << 63), ((1 << 63) - 1, 0), (0, (1 << 63) - 1), (0, (1 << 64) - 1)],
)
def test_mapped_ram_at_offsets_that_no_file_has(bitmap: int, pages: int) -> None:
    header = struct.pack(">IQQQ", 1, 4096, bitmap, pages)
    with pytest.raises(LoadError):
        Layout.take(BytesReader(header), 16 << 20)


def test_empty_structs_in_empty_structs() -> None:
    entry: dict[str, Any] = {"name": "s", "type": "struct", "size": 0, "struct": {"fields": []}}
    for _ in range(8):
        entry = {**entry, "array_len": 50, "struct": {"fields": [entry]}}
    with pytest.raises(Damage, match="more structs than there is room for"):
        values.decode(Cursor(bytes(100)), {"fields": [entry]})


# -kernel


def elf(*segments: tuple[int, int, int]) -> bytes:
    """An ELF32 image of (address, size in the file, size in memory), all of them at offset 0."""
    headers = b"".join(
        struct.pack("<8I", 1, 0, address, address, in_file, size, 7, 1)
        for address, in_file, size in segments
    )
    head = b"\x7fELF\1\1\1" + bytes(9)
    head += struct.pack(
        "<HHIIIIIHHHHHH", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, len(segments), 0, 0, 0
    )
    return head + headers


def kernel(path: str) -> boot.BootImage:
    return boot.create(SimpleNamespace(kernel=path, drives=(), boot_order="cad", initrd=None))


def test_segments_of_4_gib(tmp_path: Any) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(elf((0x100000, 16, 0xFFFFFFFF)))
    with pytest.raises(ConfigError, match="the boot image needs RAM at"):
        kernel(str(path)).load(GuestMemory())
    path.write_bytes(elf(*[(0x100000, 16, 0xFFFFFFFF)] * 8))
    with pytest.raises(ConfigError, match="too large together"):
        kernel(str(path))


def test_segments_that_are_the_same_bytes_a_thousand_times(tmp_path: Any) -> None:
    path = tmp_path / "kernel"
    head = elf(*[(0x100000, 1 << 20, 1 << 20)] * 1000)
    path.write_bytes(head.ljust(1 << 20, b"\0"))
    with pytest.raises(ConfigError, match="too large together"):
        kernel(str(path))


def test_a_kernel_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boot, "MAX_FILE_SIZE", 1 << 20)
    with pytest.raises(ConfigError, match="'/dev/zero' is larger than 1 MiB"):
        kernel("/dev/zero")
    with pytest.raises(ConfigError, match="NUL"):
        kernel("a\0b")


# The cpr channel.


@pytest.mark.parametrize("descriptors", [False, True])
def test_a_cpr_channel_without_end(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, descriptors: bool
) -> None:
    monkeypatch.setattr(cpr_transfer, "MAX_SIZE", 1 << 20)
    monkeypatch.setattr(cpr_transfer, "MAX_ALL_DESCRIPTORS", 20)
    path = str(tmp_path / "cpr")
    peers: list[socket.socket] = []

    def flood(send: Callable[[socket.socket], object]) -> None:
        peer = socket.socket(socket.AF_UNIX)
        while True:
            try:
                peer.connect(path)
                break
            except OSError:
                pass
        peers.append(peer)
        try:
            while True:
                send(peer)
        except OSError:
            pass

    def with_descriptors(peer: socket.socket) -> None:
        socket.send_fds(peer, [b"x"], [1, 2])

    send = with_descriptors if descriptors else lambda peer: peer.send(bytes(65536))
    thread = threading.Thread(target=flood, args=(send,), daemon=True)
    thread.start()
    listener = cpr_transfer.CprListener({"type": "unix", "path": path})
    before = len(open_fds())
    with pytest.raises(StateError, match="its sender is no VMM"):
        listener.receive()
    assert len(open_fds()) == before
    listener.close()
    thread.join()
    peers[0].close()


def test_a_stream_that_leads_back_ends() -> None:
    """A file whose block ends before its own entry would be read for ever."""
    reader = StreamReader(io.BytesIO(bytes(100)).read)
    reader.take(50)
    with pytest.raises(StreamError, match="goes back from offset 0x32 to 0x31"):
        reader.jump(49, lambda offset: None)
    reader.jump(4096, lambda offset: None)
    with pytest.raises(StreamError, match="goes back from offset 0x1000"):
        reader.jump(100, lambda offset: None)
