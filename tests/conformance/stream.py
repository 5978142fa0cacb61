"""A migration stream taken apart as far as damaging it takes, without knowing any device.

The sections of a stream follow one another as { type, id, name, instance, version, body, footer },
and nothing says how long a body is.  But the JSON at the end names the devices in the order of
their sections, and a footer (0x7e, id) stands before each header: so the headers can be looked for.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from .ram_section import RamSection

SECTION_START = 1
SECTION_FULL = 4
VMDESCRIPTION = 6
CONFIGURATION = 7
COMMAND = 8
FOOTER = 0x7E
SWITCHOVER_START = bytes([COMMAND, 0, 0x0B, 0, 0])
CAPABILITIES = bytes([5, 26]) + b"configuration/capabilities" + bytes([0, 0, 0, 1])
CONFIGURATION_AT = 8
"""Magic and version come first."""


class Section:
    """One device's section: [start, end) with header and footer, `body` is where its state starts.

    `version_at` is where its version stands.
    """

    def __init__(self, data: bytes, start: int, name: str, instance: int) -> None:
        self.start = start
        self.name = name
        self.instance = instance
        self.id = struct.unpack_from(">I", data, start + 1)[0]
        self.version_at = start + 6 + len(name) + 4
        self.version = struct.unpack_from(">I", data, self.version_at)[0]
        self.body = self.version_at + 4
        self.end = 0

    @property
    def footer(self) -> int:
        """Where the footer starts."""
        return self.end - 5


class Stream:
    """A good stream.  Raises ValueError where it is not what the module says.

    `capabilities` are the names in the configuration, `ram` is where the ram section starts.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        if data[:8] != b"QEVM\0\0\0\3" or data[8] != CONFIGURATION:
            raise ValueError(f"the stream begins with {data[:9]!r}")
        length = struct.unpack_from(">I", data, 9)[0]
        self.machine = data[13 : 13 + length].decode()
        self.description = self._find_description()
        self.capabilities, self.ram = self._read_capabilities(13 + length)
        self.ram_section = RamSection(data, self.ram, "x-ignore-shared" in self.capabilities)
        self.devices = self._find_devices()
        self.end = self.devices[-1].end
        if data[self.end] != 0:
            raise ValueError(f"no end after the last section, but {data[self.end]}")

    def _find_description(self) -> dict[str, Any]:
        start = self.data.rindex(b"\0", 0, len(self.data)) + 1
        start = self.data.index(b"{", start)
        description: dict[str, Any] = json.loads(self.data[start:])
        self.description_at = start - 5
        if self.data[self.description_at] != VMDESCRIPTION:
            raise ValueError("the JSON is not a description section")
        return description

    def _read_capabilities(self, at: int) -> tuple[list[str], int]:
        """The names in the configuration's subsection, if there is one, and where it ends."""
        if self.data[at] == SECTION_START:
            return [], at
        if not self.data.startswith(CAPABILITIES, at):
            raise ValueError(f"after the machine comes {self.data[at : at + 40]!r}")
        at += len(CAPABILITIES)
        (count,) = struct.unpack_from(">I", self.data, at)
        at += 4
        names = []
        for _ in range(count):
            length = self.data[at]
            names.append(self.data[at + 1 : at + 1 + length].decode())
            at += 1 + length
        return names, at

    def _find_devices(self) -> list[Section]:
        found: list[Section] = []
        at = self.ram_section.end
        for device in self.description["devices"]:
            name, instance = device["name"], device["instance_id"]
            version = device["version"]
            tail = bytes([len(name)]) + name.encode() + struct.pack(">II", instance, version)
            at = self.data.index(tail, at) - 5
            section = Section(self.data, at, name, instance)
            if self.data[at] != SECTION_FULL or self.data[at - 5] != FOOTER:
                raise ValueError(f"section {name} at {at:#x} has no header or none before it")
            if found:
                found[-1].end = at
            found.append(section)
        found[-1].end = self.data.index(struct.pack(">BI", FOOTER, found[-1].id), at) + 5
        return found

    def device(self, name: str) -> Section:
        return next(each for each in self.devices if each.name == name)

    def put(self, at: int, new: bytes) -> bytes:
        """The stream with `new` in place of as many bytes."""
        return self.data[:at] + new + self.data[at + len(new) :]

    def names(self) -> dict[str, str]:
        """What texts about this stream may name: its first device, and globalstate."""
        first = self.devices[0]
        last = self.device("globalstate")
        return {
            "machine": self.machine,
            "first": first.name,
            "first_version": str(first.version),
            "first_instance": f"{first.instance:x}",
            "first_id": str(first.id),
            "last_id": str(last.id),
            "last_hex": f"{last.id:x}",
        }
