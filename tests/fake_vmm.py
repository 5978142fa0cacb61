"""A VMM for tests of the monitors: real loop, events and parameters; machine and migration only
record what they are asked."""

from __future__ import annotations

import threading
from typing import Any

from cpr import runstate
from cpr.accel import x86
from cpr.chardev.base import CLOSED, OPENED, Chardev
from cpr.errors import CommandError, MigrationError
from cpr.events import EventBus
from cpr.mainloop import MainLoop
from cpr.migration.capabilities import Capabilities
from cpr.migration.parameters import Parameters
from cpr.migration.rehearsal import Rehearsed
from cpr.monitor.passed_fds import PassedFds

RAM_SIZE = 1 << 20


class Namespace:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class FakeMachine:
    """1 MiB of RAM at 0; `calls` has what a monitor did."""

    def __init__(self, events: EventBus) -> None:
        self.events = events
        self.calls: list[str] = []
        self.balloon = Namespace(actual=RAM_SIZE, set_target=self._balloon)
        self.devices: list[Any] = [Namespace(balloon=None), Namespace(balloon=self.balloon)]
        self.lock = threading.RLock()
        self.runstate = runstate.RunState()
        self.accel = Namespace(name="tcg")
        self.vcpus = [object(), object()]
        self.ram = bytearray(RAM_SIZE)
        self.states = [x86.reset_state(0), x86.reset_state(1)]
        block: Any = Namespace(
            fd=-1,
            idstr="ram0",
            page_size=4096,
            offset=0,
            size=RAM_SIZE,
            max_length=RAM_SIZE,
            host=0x7F5086FFF000,
            readonly=False,
            backend="memory-backend-memfd",
            prealloc=False,
            populated=0,
            shared=True,
        )
        rom: Any = Namespace(**{**block.__dict__, "idstr": "pc.bios", "readonly": True})
        rom.backend, rom.offset, rom.size, rom.max_length = "aux", RAM_SIZE, 0x40000, 0x40000
        self.blocks = [block, rom]
        self.files = list[tuple[str, int]]

    def check_finalized(self) -> None:
        pass

    def _balloon(self, size: int) -> None:
        self.calls.append(f"balloon {size}")

    def stop(self) -> None:
        self.calls.append("stop")
        if self.runstate.running:
            self.runstate.set(runstate.PAUSED)
            self.events.emit("STOP")

    def cont(self) -> None:
        self.calls.append("cont")
        self.runstate.set(runstate.RUNNING)
        self.events.emit("RESUME")

    def reset(self) -> None:
        self.calls.append("reset")

    def powerdown(self) -> None:
        self.calls.append("powerdown")

    def wakeup(self) -> None:
        self.calls.append("wakeup")

    def read_physical(self, address: int, size: int) -> bytes:
        if address + size > RAM_SIZE:
            raise CommandError(f"Invalid addr 0x{address:016x}/size {size} specified")
        return bytes(self.ram[address : address + size])

    def read_virtual(self, index: int, address: int, size: int, state: dict | None = None) -> bytes:
        return self.read_physical(address, size)

    def vcpu_state(self, index: int) -> dict:
        return self.states[index]

    def vcpu_thread_ids(self) -> list[int]:
        return [101, 102]

    def regions(self) -> list[tuple[int, int, str, str, int]]:
        return [
            (0x3F8, 0x3FF, "serial0", "port", 0),
            (0xFFFC0000, 0xFFFFFFFF, "pc.bios", "rom", 0),
            (0, RAM_SIZE - 1, "ram0", "ram", 0),
        ]


class FakeMigration:
    """Refuses or takes a migration; the test says when it has ended."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.status = "none"
        self.info: dict = {}
        self.notice = ""
        self.refusal = ""
        self.rehearses = True
        self.update_times = None
        self.finish_callbacks: list[Any] = []
        self.parameters = Parameters()
        self.capabilities = Capabilities(self.parameters, lambda: self.status == "active")
        self.incoming_side: Any = Namespace(start_paused=False)

    def _take(self, *call: Any) -> None:
        if self.refusal:
            raise MigrationError(self.refusal)
        self.calls.append(call)

    def migrate(self, uri: str | None, channels: list | None, resume: bool) -> None:
        self._take("migrate", uri, channels, resume)

    def incoming(self, uri: str | None, channels: list | None, exit_on_error: bool) -> None:
        self._take("incoming", uri, channels, exit_on_error)

    def start_cpr_exec(self, command: list[str] | None) -> None:
        self._take("cpr-exec", command)

    def check_cpr_exec(self, command: list[str] | None) -> Rehearsed:
        if self.refusal:
            return Rehearsed([self.refusal], None)
        return Rehearsed([], 12 if self.rehearses else None)

    def can_rehearse(self, command: list[str] | None) -> bool:
        return self.rehearses

    def cancel(self) -> None:
        self.calls.append(("cancel",))

    def continue_(self, state: str) -> None:
        if self.status != state:
            raise MigrationError(f"Migration not in expected state: {self.status}")
        self.calls.append(("continue", state))

    def check_cont(self) -> None:
        if self.refusal:
            raise MigrationError(self.refusal)

    def query(self) -> dict:
        return self.info

    def add_finish_callback(self, callback: Any) -> None:
        self.finish_callbacks.append(callback)

    def finish(self) -> None:
        callbacks, self.finish_callbacks = self.finish_callbacks, []
        for callback in callbacks:
            callback()


class FakeVmm:
    def __init__(self) -> None:
        self.loop = MainLoop()
        self.events = EventBus()
        self.machine = FakeMachine(self.events)
        self.migration = FakeMigration()
        self.passed_fds = PassedFds()
        self.config = Namespace(name="guest", uuid=None, cpu_model=None, only_migratable=False)
        self.chardevs: dict[str, Chardev] = {}
        self.quits: list[str] = []

    def quit(self, reason: str) -> None:
        self.quits.append(reason)

    def close(self) -> None:
        self.passed_fds.close_all()
        self.loop.close()


class ScriptedChardev(Chardev):
    """A chardev whose client is the test: `type` is the keyboard, `output` the screen."""

    backend = "scripted"

    def __init__(self, loop: MainLoop, label: str = "mon0") -> None:
        super().__init__(label, loop)
        self.output = b""
        self.typed = b""
        self.stalled = False  # the client reads nothing until `take_output`
        self.fds: list[int] = []
        self.connected = True

    @property
    def waiting(self) -> int:
        return len(self.output) if self.stalled else 0

    def write(self, data: bytes) -> None:
        self.output += data

    def type(self, data: bytes) -> None:
        self.typed += data
        self.accept_input()

    def accept_input(self) -> None:
        while self.typed and (room := self.can_receive()) > 0:
            data, self.typed = self.typed[:room], self.typed[room:]
            self.receive(data)

    def take_fd(self) -> int:
        return self.fds.pop(0) if self.fds else -1

    def reconnect(self) -> None:
        self.event(CLOSED)
        self.event(OPENED)

    def take_output(self) -> bytes:
        output, self.output = self.output, b""
        return output
