"""The configuration section: what the source of a migration stream says of itself.

    u32 length, machine type
    subsection 'configuration/capabilities': u32 count, count times u8 length and name
    subsection 'configuration/uuid': the 16 bytes of the VM's UUID

Both subsections are left out where there is nothing to say.  What is received must agree with
this side's own configuration.
"""

from __future__ import annotations

from errno import EINVAL

from cpr.state.fields import MAX_ELEMENTS, Field, check_most, element
from cpr.state.reader import StreamError
from cpr.state.vmstate import VMStateDescription, u8, u32, vbuffer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.state.reader import Reader

CHECKED_CAPABILITIES = ("x-ignore-shared", "mapped-ram")
"""The capabilities that both sides must have alike; no others are in the stream."""


class _CapabilityNames(Field):
    """The names of 'configuration/capabilities': u8 length and name, `caps_count` times."""

    def __init__(self) -> None:
        super().__init__("capabilities", uniform=False)

    def encode(self, state: dict) -> bytes:
        return b"".join([bytes([len(name)]) + name for name in state[self.name]])

    def decode(self, reader: Reader, state: dict) -> None:
        names = state[self.name] = []
        check_most(self.name, state["caps_count"], MAX_ELEMENTS, "elements")
        for _ in range(state["caps_count"]):
            names.append(reader.read(reader.read(1)[0]))

    def describe(self, state: dict, name: str) -> list[dict]:
        names = state[self.name]
        if not names:
            return []
        return [element(name, "capability", 1 + len(names[0]), len(names))]


VMSTATE_CAPABILITIES = VMStateDescription(
    "configuration/capabilities", 1, 1, (u32("caps_count"), _CapabilityNames())
)

VMSTATE_UUID = VMStateDescription("configuration/uuid", 1, 1, (u8("uuid.data", 16),))

VMSTATE_CONFIGURATION = VMStateDescription(
    "configuration",
    1,
    0,
    (u32("len"), vbuffer("name", "len")),
    subsections=(VMSTATE_CAPABILITIES, VMSTATE_UUID),
)


class Configuration:
    """What the source says of itself: the machine type's name, the checked capabilities that are
    on, and the 16 bytes of the UUID or None (it is sent with the capability validate-uuid only).
    """

    __slots__ = ("capabilities", "machine", "uuid")

    def __init__(
        self, machine: str, capabilities: tuple[str, ...] = (), uuid: bytes | None = None
    ) -> None:
        self.machine = machine
        self.capabilities = capabilities
        self.uuid = uuid

    @classmethod
    def from_state(cls, state: dict) -> Configuration:
        names = state.get(VMSTATE_CAPABILITIES.name, {}).get("capabilities", [])
        uuid = state.get(VMSTATE_UUID.name)
        return cls(
            _text(state["name"]),
            tuple([_text(name) for name in names]),
            bytes(uuid["uuid.data"]) if uuid else None,
        )

    def to_state(self) -> dict:
        """The state by VMSTATE_CONFIGURATION."""
        name = self.machine.encode()
        state: dict = {"len": len(name), "name": name}
        if self.capabilities:
            names = [capability.encode() for capability in self.capabilities]
            state[VMSTATE_CAPABILITIES.name] = {"caps_count": len(names), "capabilities": names}
        if self.uuid is not None:
            state[VMSTATE_UUID.name] = {"uuid.data": list(self.uuid)}
        return state

    def check(
        self, machine: str, capabilities: dict[str, bool], uuid: bytes | None
    ) -> tuple[str, ...]:
        """Compares what was received with this side's; returns warnings for stderr.

        `capabilities` holds every capability there is, on or off.  Raises StreamError.
        """
        for name in self.capabilities:
            if name not in capabilities:
                raise _subsection_error(VMSTATE_CAPABILITIES, f"Received unknown capability {name}")
        warnings = self._check_uuid(uuid)
        if self.machine != machine:
            raise _configuration_error(
                f"Machine type received is '{self.machine}' and local is '{machine}'"
            )
        mismatches = []
        for name in CHECKED_CAPABILITIES:
            received, local = name in self.capabilities, capabilities.get(name, False)
            if received != local:
                mismatches.append(
                    f"Capability {name} is {_on_off(local)}, "
                    f"but received capability is {_on_off(received)}"
                )
        if mismatches:
            raise _configuration_error("Failed to validate capabilities", tuple(mismatches))
        return warnings

    def _check_uuid(self, local: bytes | None) -> tuple[str, ...]:
        if self.uuid is None or self.uuid == local:
            return ()
        received = _format_uuid(self.uuid)
        if local is None:
            return (f"warning: UUID is received {received}, but local uuid isn't set",)
        raise _subsection_error(
            VMSTATE_UUID,
            f"post load hook failed for: {VMSTATE_UUID.name}, version_id: 1, "
            f"minimum_version: 1, ret: {-EINVAL}",
            (f"UUID received is {received} and local is {_format_uuid(local)}",),
        )


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")


def _on_off(value: bool) -> str:
    return "on" if value else "off"


def _format_uuid(uuid: bytes) -> str:
    digits = uuid.hex()
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _configuration_error(text: str, stderr: tuple[str, ...] = ()) -> StreamError:
    vmsd = VMSTATE_CONFIGURATION
    return StreamError(
        f"post load hook failed for: {vmsd.name}, version_id: {vmsd.version_id}, "
        f"minimum_version: {vmsd.minimum_version_id}: {text}",
        EINVAL,
        stderr,
    )


def _subsection_error(
    vmsd: VMStateDescription, text: str, stderr: tuple[str, ...] = ()
) -> StreamError:
    place = f"'{vmsd.name}' in '{VMSTATE_CONFIGURATION.name}'"
    return StreamError(f"Loading VM subsection {place} failed: {text}", EINVAL, stderr)
