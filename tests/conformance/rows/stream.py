"""Part 2: what the loader of the migration stream takes, and how it refuses the rest.

The stream that is damaged was written by the VMM itself.  `globalstate` is a device that each of
them has; a text that names another device has it from the stream.
"""

from __future__ import annotations

import struct

from ..incoming_steps import cut, replace, take_over, without
from ..lab import Lab
from ..match import Mismatch, expect, has, like
from ..ram_section import PAGE_SIZE
from ..row import Row, Steps, step
from ..steps import (
    FILE,
    boot,
    capabilities,
    comes_to,
    connect,
    counting,
    exits,
    guest,
    new_command,
    parameters,
    qmp,
    reconnect,
    stderr,
)
from ..stream import CONFIGURATION_AT, SWITCHOVER_START, Stream

RAM_SIZE = 16 << 20
BIOS_SIZE = 256 << 10
BOOT_SECTOR_AT = 0x7C00
END_OF_RAM = struct.pack(">BIQBI", 3, 1, 0x10, 0x7E, 1)
LOAD = "load of migration failed: "
INVALID = f"{LOAD}Invalid argument: "
CHANNEL_END = (
    f"{LOAD}Input/output error: Failed to load section ID: stream error: -5: "
    "Channel error: Input/output error"
)
IN_GLOBALSTATE = f"{INVALID}error while loading state for instance 0x0 of device 'globalstate': "
IN_RAM = (
    f"{INVALID}error while loading state for instance 0x0 of device 'ram': "
    "Failed to load vmstate version_id: 4, ret: -22"
)


def last(stream: Stream) -> int:
    """Where the section of globalstate starts."""
    return stream.device("globalstate").start


def ram_size_at(stream: Stream) -> int:
    return stream.data.index(b"\4ram0", stream.ram) + 5


def ends(id: str, source: str, damage: object, *lines: object, start: Steps = ()) -> Row:
    """A stream that is refused: these lines on stderr, exit status 1."""
    return Row(id, source, start or take_over(stream=damage), exits(1, *lines))


def taken(id: str, source: str, damage: object, *lines: object) -> Row:
    """A stream that is taken: the guest goes on, with these lines on stderr."""
    return Row(
        id,
        source,
        take_over(stream=damage),
        connect(),
        comes_to("running"),
        counting(),
        stderr(*lines),
    )


def _without_configuration(stream: Stream) -> bytes:
    return stream.data[:CONFIGURATION_AT] + stream.data[stream.ram :]


def _other_machine(stream: Stream) -> bytes:
    """The name of the machine with another last letter."""
    at = CONFIGURATION_AT + 5
    return stream.put(at, stream.machine[:-1].encode() + b"!")


def _with_unknown_device(stream: Stream) -> bytes:
    at = last(stream) + 6
    return stream.put(at, b"globalstatx")


def read_stream(lab: Lab) -> Stream:
    """$dir/state.  Raises Mismatch where the format is another."""
    try:
        return Stream(lab.path("$dir/state").read_bytes())
    except (ValueError, StopIteration, IndexError, struct.error) as error:
        raise Mismatch(f"the stream is not well formed: {error}") from None


@step
def stream_is_well_formed(lab: Lab) -> None:
    """The stream reads as the format says, from the first byte to the last."""
    stream = read_stream(lab)
    last_of_ram = stream.ram_section.end - len(END_OF_RAM)
    expect(
        "end of the ram section",
        SWITCHOVER_START + END_OF_RAM,
        stream.data[last_of_ram - len(SWITCHOVER_START) : stream.ram_section.end],
        lab.names,
    )


@step
def ram_blocks(lab: Lab, addressed: bool) -> None:
    """RAM and the machine's own blocks; no page of them; with x-ignore-shared their addresses."""
    stream = read_stream(lab)
    section = stream.ram_section
    own = {"ram0": RAM_SIZE, "pc.bios": BIOS_SIZE}
    expect("blocks", has(own), section.blocks, lab.names)
    expect("pages", {}, section.pages, lab.names)
    expect("capabilities", ["x-ignore-shared"] if addressed else [], stream.capabilities, {})
    if addressed:
        at = {"ram0": 0, "pc.bios": (1 << 32) - BIOS_SIZE}
        expect("addresses", has(at), section.addresses, lab.names)


@step
def ram_pages(lab: Lab, block: str) -> None:
    """The pages of a block are in the stream, with the guest's boot sector among them."""
    section = read_stream(lab).ram_section
    offsets = {offset for name, offset in section.pages if name == block}
    missing = set(range(0, section.blocks[block], PAGE_SIZE)) - offsets
    if missing:
        raise Mismatch(f"{len(missing)} pages of {block} are not in the stream")
    page = section.pages[block, BOOT_SECTOR_AT & -PAGE_SIZE]
    sector = page[BOOT_SECTOR_AT % PAGE_SIZE :][:512]
    expect("boot sector", lab.path("$dir/guest.img").read_bytes()[:512], sector, lab.names)


@step
def globalstate_is(lab: Lab, runstate: str) -> None:
    """globalstate holds the run state from before the migration, and 66 spare bytes."""
    stream = read_stream(lab)
    section = stream.device("globalstate")
    body = stream.data[section.body : section.footer]
    raw = runstate.encode()
    expected = struct.pack(">I32sBB", len(raw) + 1, raw, 1, 0) + bytes(66)
    if body != expected:
        raise Mismatch(f"globalstate is {body!r}")


@step
def description_names_devices(lab: Lab) -> None:
    """The JSON has a page size, and each device its name, instance, version and fields."""
    description = read_stream(lab).description
    if description.get("page_size") != 4096:
        raise Mismatch(f"page_size is {description.get('page_size')}")
    for device in description["devices"]:
        missing = {"name", "instance_id", "vmsd_name", "version", "fields"} - device.keys()
        if missing or not all({"name", "type", "size"} <= each.keys() for each in device["fields"]):
            raise Mismatch(f"{device['name']}: no {missing or 'name, type or size of a field'}")


def saved(*steps: Steps) -> Steps:
    """A state in $dir/state, written by an update whose new image waits."""
    return [
        boot(),
        counting(),
        steps,
        new_command("-incoming defer"),
        qmp("migrate", {"uri": FILE}, {}),
        reconnect(),
    ]


ROWS = [
    Row("stream-format", "2: the migration stream", saved(), stream_is_well_formed()),
    Row("stream-ram", "2: RAM body of SECTION_START, cpr-exec", saved(), ram_blocks(False)),
    Row(
        "stream-ram-ignore-shared",
        "2: RAM body of SECTION_START: With x-ignore-shared",
        saved(capabilities("x-ignore-shared")),
        ram_blocks(True),
    ),
    Row(
        "stream-ram-pages",
        "2: Where RAM is written",
        boot(guest(ram="-m 16M", machine="-machine pc")),
        counting(),
        parameters(mode="cpr-reboot"),
        qmp("migrate", {"uri": FILE}, {}),
        comes_to("postmigrate"),
        stream_is_well_formed(),
        ram_pages("pc.ram"),
    ),
    Row("stream-vmdesc", "2: JSON", saved(), description_names_devices()),
    Row("stream-globalstate-running", "2: globalstate", saved(), globalstate_is("running")),
    Row(
        "stream-globalstate-paused",
        "2: globalstate",
        saved(qmp("stop")),
        globalstate_is("paused"),
    ),
    Row(
        "stream-globalstate-prelaunch",
        "2: globalstate",
        boot(guest("-S")),
        new_command("-incoming defer"),
        qmp("migrate", {"uri": FILE}, {}),
        reconnect(),
        globalstate_is("prelaunch"),
    ),
    taken("stream-whole", "2: loader", cut(lambda stream: len(stream.data))),
    taken(
        "stream-no-vmdesc",
        "2: missing VMDESCRIPTION",
        cut(lambda stream: stream.description_at),
        "Expected vmdescription section, but got 0",
    ),
    taken(
        "stream-cut-in-json",
        "2: cut inside the JSON",
        cut(lambda stream: stream.description_at + 100),
    ),
    taken(
        "stream-no-switchover-start",
        "2: missing SWITCHOVER_START command",
        without(lambda stream: SWITCHOVER_START),
    ),
    ends(
        "stream-empty",
        "2: empty",
        cut(lambda stream: 0),
        f"{INVALID}Not a migration stream, magic: 0 != 5145564d",
    ),
    ends(
        "stream-magic",
        "2: bad magic",
        replace(lambda stream: 0, b"XXXX"),
        f"{INVALID}Not a migration stream, magic: 58585858 != 5145564d",
    ),
    ends(
        "stream-version-2",
        "2: version 2",
        replace(lambda stream: 4, b"\0\0\0\2"),
        f"{LOAD}Operation not supported: SaveVM v2 format is obsolete and no longer supported",
    ),
    ends(
        "stream-version-4",
        "2: version 4",
        replace(lambda stream: 4, b"\0\0\0\4"),
        f"{LOAD}Operation not supported: Unsupported migration stream version, file version 4 != 3",
    ),
    ends(
        "stream-cut-in-version",
        "2: version",
        cut(lambda stream: 4),
        f"{LOAD}Operation not supported: Unsupported migration stream version, file version 0 != 3",
    ),
    ends(
        "stream-no-configuration",
        "2: no config",
        _without_configuration,
        f"{INVALID}Configuration section missing, 1 != 7",
    ),
    ends(
        "stream-cut-before-configuration",
        "2: no config",
        cut(lambda stream: CONFIGURATION_AT),
        f"{INVALID}Configuration section missing, 0 != 7",
    ),
    ends(
        "stream-cut-in-configuration",
        "2: cut config",
        cut(lambda stream: CONFIGURATION_AT + 6),
        f"{INVALID}Failed to load configuration state: stream error: -5",
    ),
    ends(
        "stream-cut-after-configuration-type",
        "2: cut config",
        cut(lambda stream: CONFIGURATION_AT + 1),
        f"{INVALID}Failed to load configuration state: stream error: -5",
    ),
    ends(
        "stream-cut-between-sections",
        "2: cut between sections",
        cut(last),
        CHANNEL_END,
    ),
    ends(
        "stream-cut-before-end",
        "2: cut between sections",
        cut(lambda stream: stream.end),
        CHANNEL_END,
    ),
    ends(
        "stream-cut-in-ram-header",
        "2: cut in section header",
        cut(lambda stream: stream.ram + 3),
        f"{INVALID}Unable to read ID string for section 0",
    ),
    ends(
        "stream-cut-in-device",
        "2: cut in a device",
        cut(lambda stream: stream.device("globalstate").body + 20),
        f"{IN_GLOBALSTATE}Failed to load globalstate state: stream error: -5",
    ),
    ends(
        "stream-cut-in-first-device",
        "2: cut in a device",
        cut(lambda stream: stream.devices[0].body + 2),
        like(
            f"{INVALID}error while loading state for instance 0x$first_instance of device "
            "'$first': Failed to load .+ state: stream error: -5"
        ),
    ),
    ends(
        "stream-footer-id",
        "2: footer id",
        replace(lambda stream: stream.device("globalstate").footer + 1, b"\0\0\0\x63"),
        "Mismatched section id in footer for globalstate - read 0x63 expected 0x$last_hex",
        f"{INVALID}Section footer error, section_id: $last_id",
    ),
    ends(
        "stream-footer-byte",
        "2: footer byte",
        replace(lambda stream: stream.device("globalstate").footer, b"\x55"),
        "Missing section footer for globalstate",
        f"{INVALID}Section footer error, section_id: $last_id",
    ),
    ends(
        "stream-footer-of-ram",
        "2: footer byte",
        replace(lambda stream: stream.data.index(SWITCHOVER_START) - 5, b"\x55"),
        "Missing section footer for ram",
        f"{INVALID}Section footer error, section_id: 1",
    ),
    ends(
        "stream-section-type",
        "2: section type",
        replace(last, b"\x55"),
        f"{INVALID}Unknown section type 85",
    ),
    ends(
        "stream-device-version",
        "2: version",
        replace(lambda stream: stream.device("globalstate").version_at, b"\0\0\0\x09"),
        f"{INVALID}unsupported version 9 for 'globalstate' v1",
    ),
    ends(
        "stream-first-device-version",
        "2: version",
        replace(lambda stream: stream.devices[0].version_at, b"\0\0\0\x63"),
        f"{INVALID}unsupported version 99 for '$first' v$first_version",
    ),
    ends(
        "stream-unknown-device",
        "2: unknown device",
        _with_unknown_device,
        f"{INVALID}Unknown section or instance 'globalstatx' 0. Make sure that your current VM "
        "setup matches your saved VM setup, including any hotplugged devices",
    ),
    ends(
        "stream-machine",
        "2: machine",
        _other_machine,
        like(
            f"{INVALID}post load hook failed for: configuration, version_id: 1, "
            "minimum_version: 0: Machine type received is '.*!' and local is '$machine'"
        ),
    ),
    ends(
        "stream-ram-size",
        "2: RAM size",
        replace(ram_size_at, (8 << 20).to_bytes(8, "big")),
        "Size mismatch: ram0: 0x800000 != 0x1000000: Invalid argument",
        IN_RAM,
    ),
    ends(
        "stream-ram-name",
        "2: RAM name",
        replace(lambda stream: ram_size_at(stream) - 4, b"ramX"),
        'Unknown ramblock "ramX", cannot accept migration',
        IN_RAM,
    ),
    Row(
        "stream-file-missing",
        "2: file missing",
        take_over(more="-incoming file:$dir/missing"),
        exits(
            1,
            "-incoming file:$dir/missing: Could not open '$dir/missing': No such file or directory",
        ),
    ),
    ends(
        "stream-beyond-offset",
        "2: empty",
        None,
        f"{INVALID}Not a migration stream, magic: 0 != 5145564d",
        start=[take_over(more="-incoming file:$dir/state,offset=16M")],
    ),
]
