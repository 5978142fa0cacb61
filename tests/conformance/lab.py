"""One row's laboratory: a folder, the VMMs that were started in it, and the row's names."""

from __future__ import annotations

import os
import shlex
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.qmp import Qmp, QmpError
from harness.vm import HEARTBEAT

from .match import Mismatch, fill
from .process import DEADLINE, POLL, Process, Snapshot
from .terminal import Terminal

if TYPE_CHECKING:
    from .peer import Pump
    from .target import Target

STATE_VARIABLE = "QEMU_CPR_EXEC_STATE"
NULL = (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0)
SILENT = [NULL, (os.POSIX_SPAWN_DUP2, 0, 1)]


class Vm:
    """A VMM process of a row, and the QMP connection to it once there is one.

    It was started by `command` with `options`; `prefix` are the words of its command line before
    the options, once it is connected to (`chroot DIR` is no longer among them).  `count` is the
    guest's counter when it was last looked at.
    """

    def __init__(
        self, name: str, process: Process, command: list[str], options: list[str], qmp_path: str
    ) -> None:
        self.name = name
        self.process = process
        self.command = command
        self.options = options
        self.prefix: list[str] = []
        self.count = 0
        self.terminal: Terminal | None = None
        self._qmp_path = qmp_path
        self._qmp: Qmp | None = None

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            raise Mismatch(f"{self.name} has no QMP connection")
        return self._qmp

    def connect(self) -> None:
        """Connects, again and again while the VMM lives and nobody answers.

        For a moment before an exec the old image still takes connections that it will not serve.
        """
        deadline = time.monotonic() + DEADLINE
        self.disconnect()
        while self._qmp is None:
            try:
                self._qmp = Qmp(self._qmp_path, DEADLINE)
            except OSError as error:
                status = self.process.poll()
                if status is not None:
                    raise Mismatch(f"{self.name} ended with status {status}") from error
                if time.monotonic() > deadline:
                    raise Mismatch(f"no QMP greeting from {self.name}: {error}") from error
                time.sleep(POLL)
        if not self.prefix:
            self.prefix = self.process.command_line()[: -len(self.options)]

    def disconnect(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None

    def query(self, command: str, arguments: Any = None) -> Any:
        """What a command returns.  Raises Mismatch for an error."""
        try:
            return self.qmp.command(command, arguments)
        except QmpError as error:
            raise Mismatch(f"{command}: {error.error}") from None

    def hmp(self, line: str) -> str:
        return str(self.query("human-monitor-command", {"command-line": line}))

    def counter(self) -> int:
        """The guest's heartbeat, as the VMM's monitor reads it."""
        text = self.hmp(f"xp /1wx {HEARTBEAT:#x}")
        return int(text.split(":")[1], 16)

    def close(self) -> None:
        self.disconnect()
        self.process.kill()
        if self.terminal is not None:
            self.terminal.close()


class Lab:
    """`directory` is the row's folder; $dir is the name that the VMM knows it by.

    Steps act on `vm`, the VMM that was last started or turned to.  `before` is its process as a
    step has seen it, for a later step to compare.
    """

    def __init__(self, target: Target, directory: Path) -> None:
        self.target = target
        self.directory = directory
        self.names = {"dir": target.inside(directory)}
        self.vms: dict[str, Vm] = {}
        self.pumps: dict[str, Pump] = {}
        self.fds: list[int] = []
        self.sockets: list[socket.socket] = []
        self._before: Snapshot | None = None
        self._current = ""

    @property
    def vm(self) -> Vm:
        return self.vms[self._current]

    @property
    def before(self) -> Snapshot:
        if self._before is None:
            raise Mismatch("no step has looked at the process before")
        return self._before

    def look_at_process(self) -> None:
        """Makes `before` of the VMM's process as it is now."""
        self._before = Snapshot(self.vm.process)

    def turn_to(self, name: str) -> None:
        self._current = name

    def fill(self, value: Any) -> Any:
        """`value` with the names in all its texts replaced."""
        if isinstance(value, str):
            return fill(value, self.names)
        if isinstance(value, dict):
            return {key: self.fill(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.fill(each) for each in value]
        return value

    def words(self, text: str) -> list[str]:
        """A text of options as words."""
        return shlex.split(self.fill(text))

    def path(self, name: str) -> Path:
        """The file of ours that the VMM calls `name`."""
        return Path(self.target.root + self.fill(name))

    def start(
        self,
        name: str,
        options: str,
        environment: dict[str, str] | None = None,
        files: list[tuple] | None = None,
    ) -> Vm:
        """Starts a VMM, with a QMP socket, and turns to it.

        `files` are the file actions for its descriptors, stdin and stdout to /dev/null if there
        are none.
        """
        self.target.make_image(self.directory / "guest.img")
        words = [*self.words(options), "-qmp"]
        words += self.words(f"unix:$dir/{name}.sock,server=on,wait=off")
        ours = {key: value for key, value in os.environ.items() if key != STATE_VARIABLE}
        ours |= {"TMPDIR": self.names["dir"], **(environment or {})}
        process = Process(
            [*self.target.command, *words],
            ours,
            self.directory / f"{name}.stderr",
            [*SILENT, *(files or [])],
        )
        qmp_path = str(self.directory / f"{name}.sock")
        self.vms[name] = Vm(name, process, self.target.command, words, qmp_path)
        self.turn_to(name)
        return self.vm

    def start_on_terminal(self, name: str, options: str) -> Vm:
        """As start, with a pty for stdin and stdout."""
        terminal = Terminal()
        vm = self.start(name, options, files=terminal.files())
        vm.terminal = terminal
        return vm

    def boot(self, name: str, options: str, **more: Any) -> Vm:
        """Starts a VMM and connects to it."""
        vm = self.start(name, options, **more)
        vm.connect()
        return vm

    def close(self) -> None:
        for vm in self.vms.values():
            vm.close()
        for each in self.sockets:
            each.close()
        for fd in self.fds:
            os.close(fd)
