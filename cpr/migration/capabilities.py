"""Migration capabilities: their names, which of them go together, and QEMU's answers."""

from __future__ import annotations

from cpr.errors import CommandError, MigrationError
from cpr.migration.parameters import Parameters

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set
    from typing import Any

IN_PROGRESS = "There's a migration process in progress"

CAPABILITIES = (
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
)

# What background-snapshot cannot be together with, in the order in which it is looked at.
NO_BACKGROUND_SNAPSHOT = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)


class Capabilities:
    """The switches.

    `in_progress()` tells whether a migration runs, which locks them; `parameters` are those that
    some of the switches look at.
    """

    def __init__(
        self,
        parameters: Parameters | None = None,
        in_progress: Callable[[], bool] = lambda: False,
    ) -> None:
        self._parameters = parameters or Parameters()
        self._in_progress = in_progress
        self._states = dict.fromkeys(CAPABILITIES, False)

    def enabled(self, name: str) -> bool:
        return self._states[name]

    def query(self) -> list[dict[str, Any]]:
        """What query-migrate-capabilities returns."""
        return [{"capability": name, "state": on} for name, on in self._states.items()]

    def set(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Takes a list of {"capability", "state"}, all or none.

        Raises MigrationError while a migration runs, CommandError for what does not go together.
        """
        if self._in_progress():
            raise MigrationError(IN_PROGRESS)
        new = dict(self._states)
        for change in changes:
            if change["capability"] not in new:
                raise CommandError(
                    f"Parameter 'capability' does not accept value '{change['capability']}'"
                )
            new[change["capability"]] = change["state"]
        self._check({name for name, on in new.items() if on})
        self._states = new

    def info_lines(self) -> list[str]:
        """The lines of `info migrate_capabilities`."""
        return [f"{name}: {'on' if on else 'off'}" for name, on in self._states.items()]

    def _check(self, on: Set[str]) -> None:
        """Raises CommandError for a set that QEMU refuses."""
        if {"postcopy-ram", "x-ignore-shared"} <= on:
            raise CommandError("Postcopy is not compatible with ignore-shared")
        if "background-snapshot" in on:
            for name in NO_BACKGROUND_SNAPSHOT:
                if name in on:
                    raise CommandError(f"Background-snapshot is not compatible with {name}")
        if "zero-copy-send" in on and not self._plain_multifd(on):
            raise CommandError(
                "Zero copy only available for non-compressed non-TLS multifd migration"
            )
        if "postcopy-preempt" in on and "postcopy-ram" not in on:
            raise CommandError("Postcopy preempt requires postcopy-ram")
        if {"multifd", "xbzrle"} <= on:
            raise CommandError("Multifd is not compatible with xbzrle")
        for name in ("x-colo", "switchover-ack"):
            if name in on and "return-path" not in on:
                raise CommandError(f"Capability '{name}' requires capability 'return-path'")
        if "dirty-limit" in on:
            if "auto-converge" in on:
                raise CommandError(
                    "dirty-limit conflicts with auto-converge either of then available currently"
                )
            raise CommandError(
                "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
            )
        if "mapped-ram" in on:
            for name, word in (("xbzrle", "xbzrle"), ("postcopy-ram", "postcopy")):
                if name in on:
                    raise CommandError(f"Mapped-ram migration is incompatible with {word}")

    def _plain_multifd(self, on: Set[str]) -> bool:
        return (
            "multifd" in on
            and "xbzrle" not in on
            and self._parameters.get("multifd-compression") == "none"
            and not self._parameters.get("tls-creds")
        )
