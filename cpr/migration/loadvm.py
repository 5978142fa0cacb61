"""A whole machine out of the migration stream; `savevm` is the inverse.

The whole stream is read and checked before anything is applied, but for RAM.
"""

from __future__ import annotations

from cpr import report
from cpr.errors import ConfigError
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
    from cpr.migration.channel import Channel


def load(
    machine: Machine,
    capabilities: Capabilities,
    channel: Channel,
    described: bool = True,
    complete: bool = True,
    loaded: Container[tuple[str, int]] = (),
) -> str:
    """Loads a stream into a stopped machine; returns the run state that the source was in.

    `described`: the description that only tools read is expected at its end.  `complete`: every
    device that requires it has its section, here or in what was `loaded` before.

    Raises StreamError for a stream that is not this machine's; then no device has changed.
    """
    reader = StreamReader(channel.read)
    reader.header()
    configuration = reader.configuration()
    enabled = {entry["capability"]: entry["state"] for entry in capabilities.query()}
    warnings = configuration.check(machine.config.machine_type, enabled, encode_uuid(machine))
    devices = {(d.idstr, d.instance_id): d for d in machine.sections()}
    versions = {key: d.vmstate.version_id for key, d in devices.items() if d.vmstate is not None}
    versions[ram_section.IDSTR, ram_section.INSTANCE_ID] = ram_section.VERSION_ID
    versions[VMSTATE_GLOBALSTATE.name, 0] = VMSTATE_GLOBALSTATE.version_id
    states: dict[tuple[str, int], dict] = {}
    ram = ram_section.RamDecoder(list_blocks(machine), capabilities.enabled("x-ignore-shared"))
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
                    had_pages |= load_pages(machine, ram, reader, section.version_id)
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
    check_content(machine, had_pages)
    for key, device in devices.items():
        if complete and device.required and key not in states and key not in loaded:
            raise StreamError(f"there is no section '{key[0]}' instance {key[1]} in the stream")
    if described:
        reader.vmdescription()
    for warning in (*warnings, *reader.warnings):
        report.error_report(warning)
    _apply(machine, states)
    return decode_runstate(machine, states.get((VMSTATE_GLOBALSTATE.name, 0)))


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
