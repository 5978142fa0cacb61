"""A whole machine to the migration stream; `loadvm` is the inverse.

The sections are: ram, the devices in the machine's order, and globalstate, which says whether the
guest was running.
"""

from __future__ import annotations

import os

from cpr import runstate
from cpr.accel.x86 import VMSTATE_CPU
from cpr.errors import KernelError
from cpr.migration.globalstate import (
    VMSTATE_GLOBALSTATE,
    encode_runstate,
    encode_uuid,
    list_blocks,
)
from cpr.migration.statistics import RamCounters
from cpr.state import mapped_ram, ram_section, stream
from cpr.state.configuration import CHECKED_CAPABILITIES, Configuration
from cpr.state.stream import StreamWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.devices.base import Device
    from cpr.machine import Machine
    from cpr.migration.capabilities import Capabilities
    from cpr.migration.channel import Channel
    from cpr.migration.mode import Mode
    from cpr.ram import RAMBlock

RAM_SECTION_ID = 1
PART_SIZE = 256 << 20  # of the pages in one section
FIRST_DEVICE_ID = 2


def prepare() -> None:
    """Imports what a Saver needs, so that it is not imported while the guest stands still."""
    import json  # noqa: F401


class Saver:
    """Writes the stream of a machine, which is stopped before anything of the guest's is read."""

    def __init__(
        self,
        machine: Machine,
        capabilities: Capabilities,
        mode: Mode,
        channel: Channel,
    ) -> None:
        self.counters = RamCounters()
        self._channel = channel
        self._mapped = capabilities.enabled("mapped-ram")
        self._machine = machine
        self._checked = tuple(c for c in CHECKED_CAPABILITIES if capabilities.enabled(c))
        self._uuid = encode_uuid(machine) if capabilities.enabled("validate-uuid") else None
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
        blocks = list_blocks(self._machine)
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

    def devices(
        self, old_state: str, described: bool = True, devices: list[Device] | None = None
    ) -> None:
        """The devices, the run state and, if it is `described`, the description: all the rest.

        `old_state` is the runstate that the machine was in before it was stopped.
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
        state = encode_runstate(old_state, machine.was_suspended)
        writer.device(last_id, VMSTATE_GLOBALSTATE.name, 0, VMSTATE_GLOBALSTATE, state)
        writer.eof()
        if described:
            writer.vmdescription()


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
        saver = Saver(machine, capabilities, mode, channel)
        saver.ram()
        devices = [d for d in machine.sections() if d.plain and not (running and d.of_vcpu)]
        saver.devices(runstate.RUNNING, False, devices)
        if running:
            VMSTATE_CPU.encode(machine.vcpu_state(0))
        channel.flush()
        os.lseek(fd, 0, os.SEEK_SET)
        if not running:
            from cpr.migration import loadvm

            source, fd = Channel(fd, "file"), -1
            loadvm.load(machine, capabilities, source, False, False)
            source.close()
    finally:
        channel.close()
        if fd >= 0:
            os.close(fd)
