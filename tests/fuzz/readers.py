"""What reads bytes of others: each as a function that a fuzzer calls, and inputs to begin with.

A reader may raise what it says it raises; anything else is a finding, as is a reader that takes
long or keeps much.
"""

from __future__ import annotations

import gzip
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

sys.path[:0] = [str(folder) for folder in (Path(__file__).parents[2], Path(__file__).parents[1])]

from cpr import boot, pc  # noqa: E402
from cpr.config import parse_command_line, readconfig  # noqa: E402
from cpr.errors import CprError  # noqa: E402
from cpr.events import EventBus  # noqa: E402
from cpr.live import messages  # noqa: E402
from cpr.mainloop import MainLoop  # noqa: E402
from cpr.migration import address, loadvm, savevm  # noqa: E402
from cpr.migration.capabilities import Capabilities  # noqa: E402
from cpr.migration.channel import Channel  # noqa: E402
from cpr.monitor.json_stream import JsonStream  # noqa: E402
from cpr.state import cpr_channel  # noqa: E402
from cpr.state.cpr_state import CprState  # noqa: E402
from cpr.state.fds import PreservedFds  # noqa: E402
from cpr.vmm.inspect import source  # noqa: E402
from cpr.vmm.inspect.source import Source  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
CORPUS = Path(__file__).parent / "corpus"
GROUPS = ("machine", "memory", "object", "drive", "chardev", "mon", "name", "device")
MACHINE = "-nodefaults -accel tcg -m 1M -smp 2 -serial null"
MAPPED = [{"capability": "mapped-ram", "state": True}]

Reader = Callable[[bytes], None]


def cpr_state(data: bytes) -> None:
    """The memfd of a CPR state: what is taken is written back the same."""
    try:
        state = CprState.decode(data)
    except CprError:
        return
    again = CprState.decode(state.encode())
    assert (again.fds, len(again.vfio_devices)) == (state.fds, len(state.vfio_devices))


def cpr_of_channel(data: bytes) -> None:
    """The same as a cpr-transfer sends it."""
    try:
        cpr_channel.decode(data, [0, 1, 2])
    except CprError:
        pass


@cache
def machine() -> pc.Machine:
    """A machine of this process; what is loaded into it is overwritten by the next load."""
    words = [*MACHINE.split(), "-object", "memory-backend-ram,id=ram0,size=1M"]
    config = parse_command_line([*words, "-machine", "pc,memory-backend=ram0"])
    return pc.build(config, PreservedFds(), MainLoop(), EventBus())


def close_machine() -> None:
    """The inverse of `machine`: its threads end."""
    if machine.cache_info().currsize:
        machine().close()
        machine.cache_clear()


def _load(data: bytes, capabilities: Capabilities) -> None:
    fd = os.memfd_create("fuzz")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    channel = Channel(fd, "file")
    try:
        loadvm.load(machine(), capabilities, channel)
    except CprError:
        pass
    finally:
        channel.close()


def stream(data: bytes) -> None:
    """A migration stream, loaded into a machine."""
    _load(data, Capabilities())


def mapped(data: bytes) -> None:
    """One with mapped-ram."""
    capabilities = Capabilities()
    capabilities.set(MAPPED)
    _load(data, capabilities)


def inspect(data: bytes) -> None:
    """`inspect`, with the description of a stream's fields."""
    try:
        source.inspect(Source("fuzz", data))
    except (CprError, source.NoState):
        pass


def qmp(data: bytes) -> None:
    """What a QMP client sends, in two pieces."""
    stream = JsonStream()
    half = len(data) // 2
    stream.feed(data[:half])
    stream.feed(data[half:] + b"\n")


def message(data: bytes) -> None:
    """What the other image of an update says."""
    ours, theirs = messages.pair()
    with ours, theirs:
        try:
            ours.send(data[: messages.MOST_INLINE])
            theirs.settimeout(0.0)
            messages.receive(theirs).close()
        except (messages.Ended, OSError):
            pass


def command_line(data: bytes) -> None:
    """The options of the command line."""
    text = data.decode(errors="surrogateescape")
    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    words = [word for word in words if "\0" not in word and "readconfig" not in word]
    try:
        parse_command_line(words)
    except (CprError, SystemExit):
        pass


def config(data: bytes) -> None:
    """A guest.cfg."""
    try:
        readconfig.parse_config(data.decode(errors="replace"), "fuzz", GROUPS)
    except CprError:
        pass


def uri(data: bytes) -> None:
    """Where a migration goes to or comes from."""
    try:
        address.parse_uri(data.decode(errors="replace"))
    except CprError:
        pass


def kernel(data: bytes) -> None:
    """An ELF file for -kernel."""
    try:
        boot._elf("fuzz", data)
    except CprError:
        pass


def _files(*patterns: str) -> list[bytes]:
    found = [path for pattern in patterns for path in sorted(DATA.glob(pattern))]
    return [
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for path in found
    ]


@cache
def _own_stream(has_places: bool) -> bytes:
    """What this program writes of the machine here."""
    capabilities = Capabilities()
    capabilities.set(MAPPED if has_places else [])
    from cpr.migration.mode import Mode

    fd = os.memfd_create("fuzz")
    channel = Channel(os.dup(fd), "file")
    saver = savevm.Saver(machine(), capabilities, Mode("cpr-reboot"), channel)
    saver.ram()
    saver.devices("running")
    saver.end()
    channel.finish()
    with open(fd, "rb") as file:
        file.seek(0)
        return file.read()


def _texts(name: str) -> list[bytes]:
    lines = (DATA / name).read_text().splitlines()
    return [line[2:].encode() for line in lines if line.startswith("$ ")]


COMMANDS = [
    b'{"execute": "qmp_capabilities", "id": 1}',
    b"{'execute': 'migrate', 'arguments': {'uri': 'file:x', 'resume': false}}",
    b'{"execute": "cpr-exec", "arguments": {"command": ["a", "b\\u00e9"], "test": true}}[1e3,null]',
]
URIS = [
    b"tcp:127.0.0.1:4444,ipv4=on",
    b"unix:/tmp/x",
    b"fd:7",
    b"file:/x,offset=0x100",
    b"exec:a b",
    b"vsock:2:3",
]
PACKETS = [b'i{"kind": "hello", "protocol": 1}', b"+", b"m", b"i[]", b'i{"kind": {}}']


def _elves() -> list[bytes]:
    return [
        path.read_bytes()[: 1 << 16] for path in sorted((ROOT / "examples" / "build").glob("*.o"))
    ][:2]


READERS: dict[str, tuple[Reader, Callable[[], Iterable[bytes]]]] = {
    "cpr-state": (cpr_state, lambda: _files("*.cprstate.bin", "releases/*/*/*.cprstate")),
    "cpr-channel": (cpr_of_channel, lambda: _files("*.cprstate.bin")),
    "stream": (stream, lambda: [_own_stream(False), *_files("none_pages.vmstate")]),
    "mapped-ram": (mapped, lambda: [_own_stream(True)]),
    "inspect": (inspect, lambda: [*_files("machine_none.vmstate", "*.cprstate.bin")]),
    "qmp-json": (qmp, lambda: COMMANDS),
    "messages": (message, lambda: PACKETS),
    "command-line": (command_line, lambda: _texts("command_line_errors.txt")),
    "config": (
        config,
        lambda: [path.read_bytes() for path in sorted((ROOT / "examples").glob("*.cfg"))],
    ),
    "uri": (uri, lambda: URIS),
    "kernel": (kernel, _elves),
}


def seeds(name: str) -> list[bytes]:
    """The inputs to begin with: those of READERS, and what is in the corpus."""
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    return [*READERS[name][1](), *kept]
