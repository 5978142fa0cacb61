"""A whole machine out of the migration stream; `savevm` is the inverse.

The whole stream is read and checked before anything is applied, but for RAM.
"""

from __future__ import annotations

from cpr import report
from cpr.errors import ConfigError
from cpr.migration.channel import Channel, MemoryChannel
from cpr.migration.globalstate import (
    VMSTATE_GLOBALSTATE,
    decode_runstate,
    encode_uuid,
    list_blocks,
)
from cpr.migration.load_ram import BulkLoader, MappedLoader, check_content, load_pages
from cpr.state import ram_section
from cpr.state.reader import StreamError
from cpr.state.stream import StreamReader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container

    from cpr.devices.base import Device
    from cpr.machine import Machine
    from cpr.migration.capabilities import Capabilities


class Loader:
    """Loads streams into a stopped machine, whose devices are all there when it is made."""

    def __init__(self, machine: Machine, capabilities: Capabilities) -> None:
        self._machine = machine
        self._capabilities = capabilities
        self._enabled = {entry["capability"]: entry["state"] for entry in capabilities.query()}
        self._devices = {(d.idstr, d.instance_id): d for d in machine.sections()}
        self._versions = {
            key: device.vmstate.version_id
            for key, device in self._devices.items()
            if device.vmstate is not None
        }
        self._versions[ram_section.IDSTR, ram_section.INSTANCE_ID] = ram_section.VERSION_ID
        self._versions[VMSTATE_GLOBALSTATE.name, 0] = VMSTATE_GLOBALSTATE.version_id
        self._required = [key for key, device in self._devices.items() if device.required]
        self.devices_offset = 0
        """Where in the stream loaded last the first device begins."""

    def load(
        self,
        channel: Channel | MemoryChannel,
        described: bool = True,
        complete: bool = True,
        loaded: Container[tuple[str, int]] = (),
        begun: bool = False,
    ) -> str:
        """Returns the run state that the source was in.

        `described`: the description that only tools read is expected at the stream's end.
        `complete`: every device that requires it has its section, here or in what was `loaded`
        before.  `begun`: what comes before the devices was there in the stream loaded last, and is
        not here.  Raises StreamError for a stream that is not this machine's; then no device has
        changed.
        """
        machine = self._machine
        reader = StreamReader(channel.read)
        warnings: tuple[str, ...] = ()
        if not begun:
            reader.header()
            warnings = reader.configuration().check(
                machine.config.machine_type, self._enabled, encode_uuid(machine)
            )
        states, came = self._read(reader, channel)
        check_content(machine, came)
        for key in self._required if complete else ():
            if key not in states and key not in loaded:
                raise StreamError(f"there is no section '{key[0]}' instance {key[1]} in the stream")
        if described:
            reader.vmdescription()
        for warning in (*warnings, *reader.warnings):
            report.error_report(warning)
        _apply(machine, states)
        return decode_runstate(machine, states.get((VMSTATE_GLOBALSTATE.name, 0)))

    def _read(
        self, reader: StreamReader, channel: Channel | MemoryChannel
    ) -> tuple[dict[tuple[str, int], dict], set[str]]:
        """The devices' states, checked, and the blocks whose pages there were, which are in RAM."""
        machine, capabilities = self._machine, self._capabilities
        states: dict[tuple[str, int], dict] = {}
        ignores = capabilities.enabled("x-ignore-shared")
        theirs = {block.idstr for block in machine.blocks if block.is_theirs}
        ignored = {block.idstr for block in machine.blocks if ignores and block.reopened}
        ram = ram_section.RamDecoder(list_blocks(machine), ignores, theirs, ignored)
        bulk = BulkLoader([b for b in machine.blocks if b.idstr not in theirs | ignored])
        came: set[str] = set()
        self.devices_offset = 0
        ram.bulk = bulk.take
        if isinstance(channel, Channel) and capabilities.enabled("mapped-ram"):
            cleared = {b.idstr for b in machine.blocks if b.stale} - ignored
            ram.mapped = MappedLoader(machine.blocks, cleared, channel, ram.check).take
        try:
            for section in reader.sections(self._versions):
                key = (section.idstr, section.instance_id)
                device = self._devices.get(key)
                try:
                    if section.idstr == ram_section.IDSTR:
                        came |= load_pages(machine, ram, reader, section.version_id)
                        continue
                    self.devices_offset = self.devices_offset or section.offset
                    vmstate = VMSTATE_GLOBALSTATE if device is None else device.vmstate
                    assert vmstate is not None
                    states[key] = vmstate.decode(reader, section.version_id)
                    if device is not None:
                        _check(device, states[key])
                except StreamError as error:
                    raise section.failure(error) from None
        finally:
            bulk.close()
        return states, came | bulk.came


def load(machine: Machine, capabilities: Capabilities, channel: Channel) -> str:
    """Loads a whole stream, as Loader.load."""
    return Loader(machine, capabilities).load(channel)


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
