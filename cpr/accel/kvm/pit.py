"""KVM's PIT, by the fields of its device's vmstate; it stands still while the VM is stopped.

KVM does not tell when channel 0 was loaded, and begins its whole count anew when the PIT is
written: a period is longer once, and a count that ends once ends once more.  Of the other channels
it forgets the time too.
"""

from __future__ import annotations

import time

from cpr.uapi import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.uapi.fd import Fd

PIT = kvm.StateStruct("kvm_pit_state2", "PIT2")
LOAD_TIME = "count_load_time"
FIELDS = (
    "count",
    "latched_count",
    "count_latched",
    "status_latched",
    "status",
    "read_state",
    "write_state",
    "write_latch",
    "rw_mode",
    "mode",
    "bcd",
    "gate",
    LOAD_TIME,
)


class Pit:
    """The PIT of one VM; the times of KVM's struct, of CLOCK_MONOTONIC, are relative to now here.

    While the VM is stopped, now is when it was stopped.
    """

    def __init__(self, vm: Fd) -> None:
        self._vm = vm
        self._state = PIT.new()
        self._held = False

    def get(self) -> Any:
        """The struct, which stays this object's, with its times in ns from now."""
        if not self._held:
            self._read(time.monotonic_ns())
        return self._state

    def set(self, state: Any) -> None:
        """The inverse of `get`, in force when the VM runs."""
        self._state[0] = state
        self._held = True

    def get_fields(self) -> dict:
        state = self.get()
        return {
            "channels": [
                {name: getattr(channel, name) for name in FIELDS} for channel in state.channels
            ],
            "flags": state.flags,
        }

    def set_fields(self, fields: dict) -> None:
        state = self._state
        state.flags = fields["flags"]
        for channel, saved in zip(state.channels, fields["channels"], strict=True):
            for name in FIELDS:
                setattr(channel, name, saved[name])
        self._held = True

    def hold(self, now_ns: int) -> None:
        """The VM has stopped; nothing happens where it has not run since `set`."""
        if not self._held:
            self._read(now_ns)
            self._held = True

    def release(self, now_ns: int) -> None:
        """The inverse of `hold`: what is held goes on from `now_ns`."""
        if self._held:
            self._held = False
            self._shift(now_ns)
            PIT.set(self._vm, self._state)

    def _read(self, now_ns: int) -> None:
        PIT.read(self._vm, self._state)
        self._shift(-now_ns)

    def _shift(self, ns: int) -> None:
        for channel in self._state.channels:
            channel.count_load_time += ns
