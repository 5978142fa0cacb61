"""A whole machine to the migration stream; `loadvm` is the inverse.

The sections are: ram, the devices in the machine's order, and globalstate, which says whether the
guest was running.
"""

from __future__ import annotations

import os
import time

from cpr import runstate
from cpr.accel.x86 import VMSTATE_CPU
from cpr.constants import PROGRAM_VERSION
from cpr.errors import KernelError
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import Channel, MemoryChannel
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
from cpr.vcpus import VCPUS_FIRST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from cpr.devices.base import Device
    from cpr.machine import Machine
    from cpr.migration.mode import Mode
    from cpr.ram import RAMBlock

RAM_SECTION_ID = 1
PART_SIZE = 256 << 20  # of the pages in one section
FIRST_DEVICE_ID = 2
BETWEEN_STOPS = 400e-6
"""How long, in s, vCPUs that a save has kept waiting run before the next one."""


def prepare() -> None:
    """Imports what a Saver needs, so that it is not imported while the guest stands still."""
    import json  # noqa: F401


class Saver:
    """Writes the stream of a machine, which is stopped before anything of the guest's is read.

    `devices` are all of the machine's, where nothing else is said.  A stream in memory has no
    pages.
    """

    def __init__(
        self,
        machine: Machine,
        capabilities: Capabilities,
        mode: Mode,
        channel: Channel | MemoryChannel,
        devices: list[Device] | None = None,
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
        self._devices = machine.sections() if devices is None else devices

    def ram(self) -> None:
        """The header and all of RAM: the list of blocks, and the pages that the mode sends."""
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
                assert isinstance(self._channel, Channel)
                layouts.append(mapped_ram.Layout.at(self._channel.tell(), block.used_length))
                writer.write(layouts[-1].header())
                self._channel.seek(layouts[-1].end)
        writer.write(ram_section.END)
        writer.close_section(RAM_SECTION_ID)
        if self._mapped:
            self._place_pages(sent, dict(zip([b.idstr for b in blocks], layouts, strict=True)))
        else:
            self._write_pages(sent)
        writer.command(stream.SWITCHOVER_START)
        writer.end(RAM_SECTION_ID, ram_section.END)

    def _place_pages(self, blocks: list[RAMBlock], layouts: dict[str, mapped_ram.Layout]) -> None:
        """mapped-ram: every page that is not zero at its place in the file, and the bitmaps."""
        from cpr.pages import PagePool, Pages

        channel = self._channel
        assert isinstance(channel, Channel)
        with PagePool() as pool:
            for block in blocks:
                layout, pages = layouts[block.idstr], Pages.of_block(block)
                channel.call_on_shutdown(pages.cancel)
                present = bytearray(layout.bitmap_size)
                counts = pool.save(pages, channel.fd, layout.pages_offset, present)
                self.counters.duplicate += counts.zero
                self.counters.normal += counts.normal
                view, offset = memoryview(present), layout.bitmap_offset
                while view:  # a disk that becomes full takes a part
                    done = os.pwrite(channel.fd, view, offset)
                    view, offset = view[done:], offset + done

    def _write_pages(self, blocks: list[RAMBlock]) -> None:
        """Writes all the pages of `blocks`, from where they are to the channel's descriptor."""
        if not blocks:
            return
        from cpr.pages import PagePool, Pages, RecordWriter

        writer, channel = self._writer, self._channel
        assert isinstance(channel, Channel)
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
        self,
        old_state: str,
        known: Mapping[tuple[str, int], bytes] | None = None,
    ) -> dict[tuple[str, int], bytes]:
        """The devices and the run state: all but the `end`.

        `old_state` is the runstate that the machine was in before it was stopped.  A section of
        which the reader has the same body already, in `known`, is left out; one of which it has
        another is there also where the device no longer needs it.  Returns the bodies of
        all the devices' sections by idstr and instance.
        """
        writer, machine = self._writer, self._machine
        bodies: dict[tuple[str, int], bytes] = {}
        known, native = known or {}, machine.accel.saves_native
        number = FIRST_DEVICE_ID
        for device in self._devices:
            if native and device.of_accel:
                continue
            key = (device.idstr, device.instance_id)
            with machine.lock:  # of each for itself: the vCPUs may run
                if not device.needed() and key not in known:
                    continue
                vmstate, state = device.vmstate, device.save()
            assert vmstate is not None
            bodies[key] = body = vmstate.encode(state)
            if known.get(key) != body:
                writer.device(number, *key, vmstate, state, body)
            number += 1
        state = encode_runstate(old_state, machine.was_suspended)
        writer.device(number, VMSTATE_GLOBALSTATE.name, 0, VMSTATE_GLOBALSTATE, state)
        return bodies

    def end(self, described: bool = True) -> None:
        """After that the guest can be loaded; the description, if there is one, is for tools."""
        self._writer.eof()
        if described:
            self._writer.vmdescription(PROGRAM_VERSION)


def _saved_running(machine: Machine) -> list[Device]:
    return [device for device in machine.sections() if device.plain and not device.of_vcpu]


def save_running(machine: Machine, mode: Mode) -> tuple[bytes, dict[tuple[str, int], bytes]]:
    """What of a machine can be saved while its guest runs: all but its vCPUs and host devices.

    Most of it stays as it is to the hand-over, and need not be sent again then.  It also makes that
    run warm code.  Returns the stream, and the bodies as `Saver.devices` does.
    """
    _check_no_ram(machine, mode)
    channel = MemoryChannel()
    saver = Saver(machine, Capabilities(), mode, channel, _saved_running(machine))
    saver.ram()
    bodies = saver.devices(runstate.RUNNING)
    saver.end(described=False)
    time.sleep(VCPUS_FIRST)  # not two moments of a stopped vCPU in a row
    if machine.accel.native_layout() is None:
        VMSTATE_CPU.encode(machine.vcpu_state(0))
    else:
        machine.threads[0].run_on(lambda vcpu: machine.accel.get_native(0))
    return channel.written(), bodies


def save_again(machine: Machine, mode: Mode, known: Mapping[tuple[str, int], bytes]) -> None:
    """Saves what `save_running` has, which gave `known`, once more and for nobody.

    The CPU then has it in its caches when it is saved for the hand-over, for which the guest stands
    still.  The vCPUs run a while after that: it is no part of that pause.
    """
    saver = Saver(machine, Capabilities(), mode, MemoryChannel(), _saved_running(machine))
    saver.devices(runstate.RUNNING, known)
    saver.end(described=False)
    time.sleep(BETWEEN_STOPS)


def warm_up(machine: Machine, mode: Mode) -> None:
    """Saves a machine that has no guest yet, and loads it again, but for devices of the host.

    Nothing changes by that; a hand-over then does nothing for the first time, for which the guest
    would stand still: imports, caches, pages of memory.
    """
    _save_and_load(machine, mode, [device for device in machine.sections() if device.plain])


def warm_up_native(machine: Machine, mode: Mode) -> None:
    """As `warm_up`, of what the accelerator has in its own format alone."""
    from cpr.devices.system import NativeState

    machine.accel.saves_native = True
    try:
        _save_and_load(
            machine, mode, [each for each in machine.sections() if isinstance(each, NativeState)]
        )
    finally:
        machine.accel.saves_native = False


def _save_and_load(machine: Machine, mode: Mode, devices: list[Device]) -> None:
    from cpr.migration.loadvm import Loader

    _check_no_ram(machine, mode)
    channel = MemoryChannel()
    saver = Saver(machine, Capabilities(), mode, channel, devices)
    saver.ram()
    saver.devices(runstate.RUNNING)
    saver.end(described=False)
    source = MemoryChannel(channel.written())
    Loader(machine, Capabilities()).load(source, described=False, complete=False)


def _check_no_ram(machine: Machine, mode: Mode) -> None:
    """RAM is the guest's, which runs: nothing that is saved beside it may be written there."""
    if any(mode.sends(block, False) for block in machine.blocks):
        raise ValueError(f"{mode.name} sends RAM")
