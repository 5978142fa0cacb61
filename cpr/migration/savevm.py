"""A whole machine to and from the migration stream.

The sections are: ram, the devices in the machine's order, and globalstate, which says whether the
guest was running.  Loading reads and checks the whole stream before anything is applied.
"""

from __future__ import annotations

import os

from cpr import report, runstate
from cpr.accel.x86 import VMSTATE_CPU
from cpr.constants import PROGRAM
from cpr.errors import ConfigError, KernelError, MigrationError
from cpr.migration.statistics import RamCounters
from cpr.state import mapped_ram, ram_section, stream
from cpr.state.configuration import CHECKED_CAPABILITIES, Configuration
from cpr.state.reader import StreamError
from cpr.state.stream import StreamReader, StreamWriter
from cpr.state.vmstate import VMStateDescription, buffer, u8, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.devices.base import Device
    from cpr.machine import Machine
    from cpr.migration.capabilities import Capabilities
    from cpr.migration.channel import Channel
    from cpr.migration.mode import Mode
    from cpr.pages import PagePool, RecordLoader
    from cpr.ram import RAMBlock

RAM_SECTION_ID = 1
RECORDS_SIZE = 1 << 20
PART_SIZE = 256 << 20  # of the pages in one section
FIRST_DEVICE_ID = 2
RUNSTATE_SIZE = 32

VMSTATE_GLOBALSTATE = VMStateDescription(
    "globalstate",
    1,
    1,
    (
        u32("size"),
        buffer("runstate", RUNSTATE_SIZE),
        u8("has_vm_was_suspended"),
        u8("vm_was_suspended"),
        buffer("unused", 66),
    ),
)


def prepare() -> None:
    """Imports what a Saver needs, so that it is not imported while the guest stands still."""
    import json  # noqa: F401


class Saver:
    """Writes the stream of a stopped machine that was in runstate `old_state` before."""

    def __init__(
        self,
        machine: Machine,
        capabilities: Capabilities,
        old_state: str,
        mode: Mode,
        channel: Channel,
    ) -> None:
        self.counters = RamCounters()
        self._channel = channel
        self._mapped = capabilities.enabled("mapped-ram")
        self._machine = machine
        self._old_state = old_state
        self._checked = tuple(c for c in CHECKED_CAPABILITIES if capabilities.enabled(c))
        self._uuid = _uuid(machine) if capabilities.enabled("validate-uuid") else None
        self._ignore_shared = capabilities.enabled("x-ignore-shared")
        self._mode = mode
        self._writer = StreamWriter(channel.write)

    def ram(self) -> None:
        """The header, the list of blocks, and the pages that the mode sends."""
        writer = self._writer
        writer.header()
        machine_type = self._machine.config.machine_type
        writer.configuration(Configuration(machine_type, self._checked, self._uuid))
        ignore = self._ignore_shared
        sent = [block for block in self._machine.blocks if self._mode.sends(block, ignore)]
        self.counters.total = sum(block.size for block in sent)
        writer.open_start(
            RAM_SECTION_ID, ram_section.IDSTR, ram_section.INSTANCE_ID, ram_section.VERSION_ID
        )
        blocks = _blocks(self._machine)
        layouts = []
        writer.write(ram_section.block_total(blocks))
        for block in blocks:
            writer.write(ram_section.block_entry(block, ignore))
            if self._mapped:
                layouts.append(mapped_ram.Layout.at(self._channel.tell(), block.used_length))
                writer.write(layouts[-1].header())
                self._channel.seek(layouts[-1].end)
        writer.write(ram_section.END)
        writer.close_section(RAM_SECTION_ID)
        if self._mapped:
            self._place_pages(sent, dict(zip([b.idstr for b in blocks], layouts, strict=True)))
        else:
            self._write_pages(sent)

    def _place_pages(self, blocks: list[RAMBlock], layouts: dict[str, mapped_ram.Layout]) -> None:
        """mapped-ram: every page that is not zero at its place in the file, and the bitmaps."""
        from cpr.pages import PagePool, Pages

        with PagePool() as pool:
            for block in blocks:
                layout, pages = layouts[block.idstr], Pages.of_block(block)
                self._channel.call_on_shutdown(pages.cancel)
                present = bytearray(layout.bitmap_size)
                counts = pool.save(pages, self._channel.fd, layout.pages_offset, present)
                self.counters.duplicate += counts.zero
                self.counters.normal += counts.normal
                os.pwrite(self._channel.fd, present, layout.bitmap_offset)

    def _write_pages(self, blocks: list[RAMBlock]) -> None:
        """Writes all the pages of `blocks`, from where they are to the channel's descriptor."""
        if not blocks:
            return
        from cpr.pages import PagePool, Pages, RecordWriter

        writer, channel = self._writer, self._channel
        with PagePool() as pool:
            for block in blocks:
                pages = Pages.of_block(block)
                records = RecordWriter(pool, pages, block.idstr)
                channel.call_on_shutdown(pages.cancel)
                while not pages.done:
                    writer.open_part(RAM_SECTION_ID)
                    channel.flush()
                    try:
                        counts = records.write(channel.fd, PART_SIZE)
                    except KernelError as error:
                        raise OSError(error.errno, os.strerror(error.errno)) from error
                    channel.transferred += counts.bytes
                    self.counters.duplicate += counts.zero
                    self.counters.normal += counts.normal
                    writer.write(ram_section.END)
                    writer.close_section(RAM_SECTION_ID)

    def devices(self, described: bool = True, devices: list[Device] | None = None) -> None:
        """The devices, the run state and, if it is `described`, the description: all the rest.

        `devices` are all of the machine's, where nothing else is said.
        """
        writer, machine = self._writer, self._machine
        writer.command(stream.SWITCHOVER_START)
        writer.end(RAM_SECTION_ID, ram_section.END)
        with machine.lock:
            every = machine.sections() if devices is None else devices
            saved = [device for device in every if device.needed()]
            for number, device in enumerate(saved):
                assert device.vmstate is not None
                writer.device(
                    FIRST_DEVICE_ID + number,
                    device.idstr,
                    device.instance_id,
                    device.vmstate,
                    device.save(),
                )
        last_id = FIRST_DEVICE_ID + len(saved)
        state = _globalstate(self._old_state, machine.was_suspended)
        writer.device(last_id, VMSTATE_GLOBALSTATE.name, 0, VMSTATE_GLOBALSTATE, state)
        writer.eof()
        if described:
            writer.vmdescription(PROGRAM)


def load(
    machine: Machine,
    capabilities: Capabilities,
    channel: Channel,
    described: bool = True,
    complete: bool = True,
) -> str:
    """Loads a stream into a stopped machine; returns the run state that the source was in.

    `described`: the description that only tools read is expected at its end.  `complete`: every
    device that requires it has its section.

    Raises StreamError for a stream that is not this machine's; then no device has changed.
    """
    reader = StreamReader(channel.read)
    reader.header()
    configuration = reader.configuration()
    enabled = {entry["capability"]: entry["state"] for entry in capabilities.query()}
    warnings = configuration.check(machine.config.machine_type, enabled, _uuid(machine))
    devices = {(d.idstr, d.instance_id): d for d in machine.sections()}
    versions = {key: d.vmstate.version_id for key, d in devices.items() if d.vmstate is not None}
    versions[ram_section.IDSTR, ram_section.INSTANCE_ID] = ram_section.VERSION_ID
    versions[VMSTATE_GLOBALSTATE.name, 0] = VMSTATE_GLOBALSTATE.version_id
    states: dict[tuple[str, int], dict] = {}
    ram = ram_section.RamDecoder(_blocks(machine), capabilities.enabled("x-ignore-shared"))
    bulk, had_pages = BulkLoader(machine.blocks), False
    ram.bulk = bulk.take
    if capabilities.enabled("mapped-ram"):
        ignored = capabilities.enabled("x-ignore-shared")
        cleared = {b.idstr for b in machine.blocks if b.stale and not (ignored and b.reopened)}
        ram.mapped = MappedLoader(machine.blocks, cleared, channel).take
    try:
        for section in reader.sections(versions):
            key = (section.idstr, section.instance_id)
            try:
                if section.idstr == ram_section.IDSTR:
                    had_pages |= _load_ram(machine, ram, reader, section.version_id)
                else:
                    vmstate = devices[key].vmstate if key in devices else VMSTATE_GLOBALSTATE
                    assert vmstate is not None
                    states[key] = vmstate.decode(reader, section.version_id)
                    if key in devices:
                        _check(devices[key], states[key])
            except StreamError as error:
                raise section.failure(error) from None
    finally:
        bulk.close()
    _check_content(machine, had_pages)
    for key, device in devices.items():
        if complete and device.required and key not in states:
            raise StreamError(f"there is no section '{key[0]}' instance {key[1]} in the stream")
    if described:
        reader.vmdescription()
    for warning in (*warnings, *reader.warnings):
        report.error_report(warning)
    _apply(machine, states)
    return _runstate(machine, states.get((VMSTATE_GLOBALSTATE.name, 0)))


def warm_up(machine: Machine, capabilities: Capabilities, mode: Mode, running: bool) -> None:
    """Goes once through what a hand-over does, so that the guest does not stand still for a first
    time: imports, caches, pages of memory.

    On the old side, of a `running` guest, what was read is dropped, and a vCPU is asked for its
    state as by `info registers`; on the new side, which has no guest yet, it is loaded again, but
    for devices of the host.  Nothing changes by that.
    """
    from cpr.migration.channel import Channel

    if any(mode.sends(block, False) for block in machine.blocks):
        raise ValueError(f"{mode.name} sends RAM, which is the guest's: no trial may write that")
    fd = os.memfd_create("cpr-warm-up")
    channel = Channel(os.dup(fd), "file")
    try:
        saver = Saver(machine, capabilities, runstate.RUNNING, mode, channel)
        saver.ram()
        devices = [d for d in machine.sections() if d.plain and not (running and d.of_vcpu)]
        saver.devices(False, devices)
        if running:
            VMSTATE_CPU.encode(machine.vcpu_state(0))
        channel.flush()
        os.lseek(fd, 0, os.SEEK_SET)
        if not running:
            source, fd = Channel(fd, "file"), -1
            load(machine, capabilities, source, False, False)
            source.close()
    finally:
        channel.close()
        if fd >= 0:
            os.close(fd)


def _check(device: Device, state: dict) -> None:
    try:
        device.check(state)
    except (ConfigError, ValueError) as error:
        raise StreamError(f"Failed to load {device.idstr} state: {error}") from None


def _apply(machine: Machine, states: dict[tuple[str, int], dict]) -> None:
    """Has each device take over its state.  Raises CprError; then the guest is in pieces."""
    with machine.lock:
        for device in machine.sections():
            state = states.get((device.idstr, device.instance_id))
            if state is None:
                continue
            try:
                device.restore(state)
            except (ArithmeticError, LookupError, TypeError, ValueError) as error:
                raise StreamError(
                    f"the state of device '{device.idstr}' instance {device.instance_id} cannot "
                    f"be set: {error}"
                ) from error
        machine.accel.apply_state()


def _load_ram(
    machine: Machine, ram: ram_section.RamDecoder, reader: StreamReader, version_id: int
) -> bool:
    """Loads the pages of one section; true if there were any."""
    blocks = {block.idstr: block for block in machine.blocks}
    zeros = bytes(ram_section.PAGE_SIZE)
    any_page = False
    for idstr, offset, data in ram.pages(reader, version_id):
        any_page = True
        block = blocks[idstr]
        if data is not None:
            block.write(offset, data)
        elif block.view(offset, len(zeros)) != zeros:  # a page that is not there yet stays so
            block.write(offset, zeros)
    return any_page


def _check_content(machine: Machine, had_pages: bool) -> None:
    """Refuses a guest whose RAM has come neither in the stream nor with a CPR state nor a file."""
    for block in machine.blocks:
        if not (had_pages or block.kept or block.reopened or block.regenerated):
            raise StreamError(
                f"Memory region {block.idstr} is empty: its pages are not in the stream, and no "
                "CPR state came with it"
            )


class MappedLoader:
    """mapped-ram: reads the pages of a block from their places in the file.

    Pages that are not there are zero: in blocks that are `cleared` they are made so.
    """

    def __init__(self, blocks: list[RAMBlock], cleared: set[str], channel: Channel) -> None:
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

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _blocks(machine: Machine) -> list[ram_section.Block]:
    """The blocks for the ram section, with the guest-physical address of each."""
    addresses = {s.block.idstr: s.start for s in reversed(machine.memory.sections) if not s.offset}
    return [
        ram_section.Block(b.idstr, b.size, b.max_length, addresses.get(b.idstr))
        for b in machine.blocks
    ]


def _uuid(machine: Machine) -> bytes | None:
    """The 16 bytes of -uuid."""
    text = machine.config.uuid
    return bytes.fromhex(text.replace("-", "")) if text else None


def _globalstate(old_state: str, was_suspended: bool) -> dict:
    text = old_state.encode() + b"\0"
    return {
        "size": len(text),
        "runstate": text.ljust(RUNSTATE_SIZE, b"\0"),
        "has_vm_was_suspended": 1,
        "vm_was_suspended": int(was_suspended or old_state == runstate.SUSPENDED),
        "unused": bytes(66),
    }


def _runstate(machine: Machine, state: dict | None) -> str:
    """The source's run state; whether it slept before it was stopped goes to the machine."""
    if state is None:
        return runstate.RUNNING
    machine.was_suspended = bool(state["has_vm_was_suspended"] and state["vm_was_suspended"])
    text: str = state["runstate"].split(b"\0", 1)[0].decode(errors="replace")
    return text
