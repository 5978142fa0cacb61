"""The migration stream: QEMU's framing of sections, byte for byte.

    'QEVM' u32 3
    u8 7  configuration, see configuration.py
    u8 1  START  u32 section_id, u8 length, idstr, u32 instance_id, u32 version_id, body, footer
    u8 2  PART   u32 section_id, body, footer
    u8 3  END    u32 section_id, body, footer
    u8 4  FULL   as START
    u8 8  COMMAND  u16 command, u16 length, payload
    u8 0  EOF
    u8 6  VMDESCRIPTION  u32 length, JSON of the devices' fields
    footer = u8 0x7e, u32 section_id

A read beyond the end of the stream yields zeros, as QEMU's does, and is found out at the next
place where QEMU looks; so the messages for a stream that is cut short are QEMU's too.
"""

from __future__ import annotations

import struct
from errno import EINVAL, EIO, ENOTSUP, ERANGE

from cpr.constants import PAGE_SIZE
from cpr.state.configuration import VMSTATE_CONFIGURATION, Configuration
from cpr.state.reader import EndOfStream, LoadError, StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cpr.state.vmstate import VMStateDescription

MAGIC = 0x5145564D  # 'QEVM'
VERSION = 3
OBSOLETE_VERSION = 2

EOF = 0
START = 1
PART = 2
END = 3
FULL = 4
VMDESCRIPTION = 6
CONFIGURATION = 7
COMMAND = 8
FOOTER = 0x7E

SWITCHOVER_START = 11  # the command that says: RAM is done, now come the devices

CHUNK = 32768  # bytes asked for in one read
MAX_DESCRIPTION = 16 << 20
"""Bytes of a stream's description of itself that are kept; it ends the stream."""
MOST_SECTIONS = 65536  # of one stream


class Section:
    """The header of a section; `kind` is START, PART, END or FULL, `offset` where it begins.

    A PART or an END has the idstr, instance_id and version_id of the START with its section_id.
    """

    __slots__ = ("idstr", "instance_id", "kind", "offset", "section_id", "version_id")

    def __init__(
        self,
        kind: int,
        section_id: int,
        idstr: str,
        instance_id: int,
        version_id: int,
        offset: int = 0,
    ) -> None:
        self.kind = kind
        self.section_id = section_id
        self.idstr = idstr
        self.instance_id = instance_id
        self.version_id = version_id
        self.offset = offset

    def failure(self, error: StreamError) -> StreamError:
        """The error of the stream that comes of an `error` in this section's body."""
        text, errno = str(error), EINVAL
        if isinstance(error, LoadError):
            text = f"Failed to load vmstate version_id: {self.version_id}, {error}"
            errno = error.errno
        if self.kind in (START, FULL):
            text = (
                f"error while loading state for instance {self.instance_id:#x} "
                f"of device '{self.idstr}': {text}"
            )
        return StreamError(text, errno, error.stderr)


class StreamWriter:
    """Writes a stream; the parts are called in the order in which they are in the stream.

    `write` must take all the bytes that it is given.  Its exceptions pass through.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.write = write
        self._configuration: Configuration | None = None
        self._devices: list[tuple[str, int, VMStateDescription, dict]] = []

    def header(self) -> None:
        self.write(struct.pack(">II", MAGIC, VERSION))

    def configuration(self, configuration: Configuration) -> None:
        self._configuration = configuration
        body = VMSTATE_CONFIGURATION.encode(configuration.to_state())
        self.write(bytes([CONFIGURATION]) + body)

    def start(
        self, section_id: int, idstr: str, instance_id: int, version_id: int, body: bytes
    ) -> None:
        self._section(Section(START, section_id, idstr, instance_id, version_id), body)

    def open_start(self, section_id: int, idstr: str, instance_id: int, version_id: int) -> None:
        """The header of a START whose body the caller writes; `close_section` comes after that."""
        self.write(_header(Section(START, section_id, idstr, instance_id, version_id)))

    def close_section(self, section_id: int) -> None:
        """The inverse of `open_start` and `open_part`."""
        self.write(_footer(section_id))

    def open_part(self, section_id: int) -> None:
        """The header of a PART whose body the caller writes; `close_section` comes after that."""
        self.write(struct.pack(">BI", PART, section_id))

    def end(self, section_id: int, body: bytes) -> None:
        self.write(struct.pack(">BI", END, section_id) + body)
        self.close_section(section_id)

    def device(
        self,
        section_id: int,
        idstr: str,
        instance_id: int,
        vmsd: VMStateDescription,
        state: dict,
        body: bytes | None = None,
    ) -> None:
        """A FULL section, and its place in the description; `state` must stay as it is.

        `body` is what `vmsd` makes of it, where that is known.
        """
        self._devices.append((idstr, instance_id, vmsd, state))
        section = Section(FULL, section_id, idstr, instance_id, vmsd.version_id)
        self._section(section, vmsd.encode(state) if body is None else body)

    def command(self, command: int, payload: bytes = b"") -> None:
        self.write(struct.pack(">BHH", COMMAND, command, len(payload)) + payload)

    def eof(self) -> None:
        self.write(bytes([EOF]))

    def vmdescription(self, program: str = "") -> None:
        """The description of the configuration and of all the devices written before.

        `program` is who has written them, and is in it if it is given.
        """
        import json

        description: dict = {}
        if self._configuration is not None:
            state = self._configuration.to_state()
            description["configuration"] = VMSTATE_CONFIGURATION.describe(state)
        description["page_size"] = PAGE_SIZE
        description["devices"] = [
            {"name": idstr, "instance_id": instance_id, **vmsd.describe(state)}
            for idstr, instance_id, vmsd, state in self._devices
        ]
        if program:
            description["program"] = program
        text = json.dumps(description).encode()
        self.write(struct.pack(">BI", VMDESCRIPTION, len(text)) + text)

    def _section(self, section: Section, body: bytes) -> None:
        self.write(_header(section) + body + _footer(section.section_id))


class StreamReader:
    """Reads a stream from `read(size)`, which returns 1 to `size` bytes, or none at the end.

    Exceptions of `read` pass through.  `offset` counts the bytes taken so far, `failed` says that
    some were wanted beyond the end, and `warnings` holds lines for stderr about what was wrong
    with a stream that could be loaded all the same.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self.offset = 0
        self.failed = False
        self.warnings: list[str] = []
        self._read = read
        self._buffer = b""
        self._position = 0
        self._ended = False

    def peek(self, size: int) -> bytes:
        """Up to `size` bytes, without taking them; fewer only at the end of the stream."""
        end = self._position + size
        if end > len(self._buffer):
            self._fill(size)
            end = size
        return self._buffer[self._position : end]

    def take(self, size: int) -> bytes:
        """Up to `size` bytes; if there are fewer, `failed` is set."""
        piece = self.peek(size)
        self._position += len(piece)
        self.offset += len(piece)
        if len(piece) < size:
            self.failed = True
        return piece

    def read(self, size: int) -> bytes:
        """Exactly `size` bytes.  Raises EndOfStream if there are fewer."""
        start = self._position
        end = start + size
        if end <= len(self._buffer):
            self._position = end
            self.offset += size
            return self._buffer[start:end]
        piece = self.take(size)
        if len(piece) < size:
            raise EndOfStream
        return piece

    def integer(self, size: int) -> int:
        """A big-endian unsigned integer of `size` bytes, with zeros for those that are missing."""
        start = self._position
        end = start + size
        if end <= len(self._buffer):  # the guest stands still while this is done, many times
            self._position = end
            self.offset += size
            return int.from_bytes(self._buffer[start:end], "big")
        return int.from_bytes(self.take(size).ljust(size, b"\0"), "big")

    def jump(self, offset: int, seek: Callable[[int], None]) -> None:
        """Goes on at `offset` of the file, to which `seek` moves what `read` reads from.

        Raises StreamError for one that lies behind, from where the stream would be read again.
        """
        if offset < self.offset:
            raise StreamError(f"the stream goes back from offset {self.offset:#x} to {offset:#x}")
        seek(offset)
        self._buffer = b""
        self._position = 0
        self.offset = offset

    def header(self) -> None:
        """Takes the magic and the version.  Raises StreamError."""
        magic = self.integer(4)
        if magic != MAGIC:
            raise StreamError(f"Not a migration stream, magic: {magic:x} != {MAGIC:x}")
        version = self.integer(4)
        if version == OBSOLETE_VERSION:
            raise StreamError("SaveVM v2 format is obsolete and no longer supported", ENOTSUP)
        if version != VERSION:
            raise StreamError(
                f"Unsupported migration stream version, file version {version:x} != {VERSION:x}",
                ENOTSUP,
            )

    def configuration(self) -> Configuration:
        """Takes the configuration; it is for the caller to `check`.  Raises StreamError."""
        kind = self.integer(1)
        if kind != CONFIGURATION:
            raise StreamError(f"Configuration section missing, {kind:x} != {CONFIGURATION:x}")
        try:
            state = VMSTATE_CONFIGURATION.decode(self, VMSTATE_CONFIGURATION.version_id)
        except StreamError as error:
            raise StreamError(str(error), EINVAL, error.stderr) from None
        return Configuration.from_state(state)

    def sections(self, versions: dict[tuple[str, int], int] | None) -> Iterator[Section]:
        """Yields the sections up to the EOF; takes the commands between them.

        `versions` holds the version_id of each (idstr, instance_id) that this side has; None
        takes any section.  Between two sections the caller takes the whole body of the first from
        this reader, or raises the section's `failure`.  Raises StreamError.
        """
        started: dict[int, Section] = {}
        while True:
            offset = self.offset
            kind = self.integer(1)
            if self.failed:
                raise StreamError(
                    f"Failed to load section ID: stream error: {-EIO}: "
                    "Channel error: Input/output error",
                    EIO,
                )
            if kind == EOF:
                return
            if kind == COMMAND:
                self._command()
                continue
            if kind in (START, FULL):
                section = self._section(kind, offset)
                _check_version(section, versions)
                if len(started) >= MOST_SECTIONS:
                    raise StreamError(f"there are more than {MOST_SECTIONS} sections")
                started[section.section_id] = section
            elif kind in (PART, END):
                section = self._continuation(kind, offset, started)
            else:
                raise StreamError(f"Unknown section type {kind}")
            yield section
            self._footer(section)

    def vmdescription(self) -> bytes:
        """Takes the JSON description; without one, warns and returns b''.  It may be cut short."""
        kind = self.integer(1)
        if kind != VMDESCRIPTION:
            self.warnings.append(f"Expected vmdescription section, but got {kind}")
            return b""
        left = self.integer(4)
        text = self.take(min(left, MAX_DESCRIPTION))
        left -= len(text)
        while left > 0 and not self.failed:
            left -= len(self.take(min(left, CHUNK)))
        return text

    def _fill(self, size: int) -> None:
        pieces = [self._buffer[self._position :]]
        missing = size - len(pieces[0])
        while missing > 0 and not self._ended:
            piece = self._read(max(missing, CHUNK))
            self._ended = not piece
            pieces.append(piece)
            missing -= len(piece)
        self._buffer = b"".join(pieces)
        self._position = 0

    def _section(self, kind: int, offset: int) -> Section:
        section_id = self.integer(4)
        length = self.integer(1)
        raw_idstr = self.take(length)
        if not length or self.failed:
            raise StreamError(f"Unable to read ID string for section {section_id}")
        instance_id, version_id = self.integer(4), self.integer(4)
        if self.failed:
            raise StreamError(f"Failed to read instance/version ID: {-EIO}", EIO)
        return Section(kind, section_id, _text(raw_idstr), instance_id, version_id, offset)

    def _continuation(self, kind: int, offset: int, started: dict[int, Section]) -> Section:
        section_id = self.integer(4)
        if self.failed:
            raise StreamError(f"Failed to read section ID: {-EIO}", EIO)
        if section_id not in started:
            raise StreamError(f"Unknown section {section_id}")
        start = started[section_id]
        return Section(kind, section_id, start.idstr, start.instance_id, start.version_id, offset)

    def _command(self) -> None:
        command, length = self.integer(2), self.integer(2)
        if self.failed:
            raise StreamError(f"Failed to load VM process command: stream error: {-EIO}", EIO)
        if command != SWITCHOVER_START:
            raise StreamError(f"MIG_CMD {command:#x} unknown (len {length:#x})")
        if length:
            raise StreamError(
                f"SWITCHOVER_START received with bad length - expecting 0, got {length}", ERANGE
            )

    def _footer(self, section: Section) -> None:
        section_id = section.section_id
        mark = self.integer(1)
        if self.failed:
            line = f"check_section_footer: Read section footer failed: {-EIO}"
        elif mark != FOOTER:
            line = f"Missing section footer for {section.idstr}"
        else:
            found = self.integer(4)
            if found == section_id:
                return
            line = (
                f"Mismatched section id in footer for {section.idstr} - "
                f"read 0x{found:x} expected 0x{section_id:x}"
            )
        raise StreamError(f"Section footer error, section_id: {section_id}", EINVAL, (line,))


def _check_version(section: Section, versions: dict[tuple[str, int], int] | None) -> None:
    if versions is None:
        return
    version_id = versions.get((section.idstr, section.instance_id))
    if version_id is None:
        raise StreamError(
            f"Unknown section or instance '{section.idstr}' {section.instance_id}. Make sure that "
            "your current VM setup matches your saved VM setup, including any hotplugged devices"
        )
    if section.version_id > version_id:
        raise StreamError(
            f"unsupported version {section.version_id} for '{section.idstr}' v{version_id}"
        )


def _header(section: Section) -> bytes:
    idstr = section.idstr.encode()
    header = struct.pack(">BIB", section.kind, section.section_id, len(idstr)) + idstr
    return header + struct.pack(">II", section.instance_id, section.version_id)


def _footer(section_id: int) -> bytes:
    return struct.pack(">BI", FOOTER, section_id)


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
