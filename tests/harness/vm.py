"""A VMM process under test: started, talked to over QMP, updated, and looked at."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.qmp import TIMEOUT, Qmp

ROOT = Path(__file__).resolve().parents[2]
VMM = [sys.executable, "-m", "cpr.vmm", "run"]
HEARTBEAT = 0x8000  # where the example guests count
ENDED = ("completed", "failed", "cancelled")  # an update
ASK_AGAIN = 0.05  # s
ALL_CPUS = os.sched_getaffinity(0)  # which the VMMs may use, wherever this process is


def children(pid: int) -> list[int]:
    """The PIDs of a process's children, zombies too; psutil reads much more."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            found += map(int, path.read_text().split())
    return sorted(found)


class Vm:
    """One VMM process with a QMP socket; a context manager that ends it.

    `command` is another VMM's, such as QEMU's; `root` is the folder that it has as its root;
    `timeout` is for how long its monitor may be silent, in seconds.
    """

    def __init__(
        self,
        *arguments: str,
        command: list[str] | None = None,
        root: str = "",
        timeout: float = TIMEOUT,
        **popen: Any,
    ) -> None:
        self._timeout = timeout
        folder = f"{root}/tmp" if root else None
        self._directory = tempfile.TemporaryDirectory(prefix="cpr-vm-", dir=folder)
        self.directory = Path(self._directory.name)
        self.socket = str(self.directory / "qmp.sock")
        qmp = ["-qmp", f"unix:{self.socket.removeprefix(root)},server=on,wait=off"]
        self.words = [*(command or VMM), *arguments, *qmp]
        self.stderr_path = self.directory / "stderr"
        popen.setdefault("stdin", subprocess.DEVNULL)
        popen.setdefault("stdout", subprocess.DEVNULL)
        environment = popen.pop("env", os.environ) | {"TMPDIR": str(self.directory)}
        own_cpus = os.sched_getaffinity(0)
        os.sched_setaffinity(0, ALL_CPUS)
        try:
            with open(self.stderr_path, "ab") as stderr:
                self.process = subprocess.Popen(
                    self.words,
                    cwd=popen.pop("cwd", ROOT),
                    stderr=stderr,
                    env=environment,
                    **popen,
                )
        finally:
            os.sched_setaffinity(0, own_cpus)
        self.pid = self.process.pid
        self._ram: mmap.mmap | None = None
        try:
            self.qmp = self.connect()
        except BaseException:
            self.close()
            raise

    @property
    def stderr(self) -> str:
        return self.stderr_path.read_text()

    @property
    def complaints(self) -> str:
        """What is on stderr besides the lines that only tell what an update has cost."""
        lines = self.stderr.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("cpr-vmm: info: "))

    def connect(self) -> Qmp:
        """Connects, trying again while the VMM (or its new image) is not yet listening."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                return Qmp(self.socket, self._timeout)
            except OSError as error:
                status = self.process.poll()
                if status is not None and not self.processes():  # nor an old image
                    raise RuntimeError(f"VMM ended with {status}: {self.stderr}") from error
                if time.monotonic() > deadline:
                    text = f"no monitor after {self._timeout:.0f} s: {error}"
                    raise RuntimeError(text) from error
                time.sleep(0.002)

    def reconnect(self) -> Qmp:
        """The monitor of whoever has the guest when the update has ended.

        That is this connection where the update keeps it, which is asked as seldom as can be: the
        guest runs meanwhile.
        """
        deadline = time.monotonic() + self._timeout
        try:
            while self._command("query-migrate").get("status") not in ENDED:
                if time.monotonic() > deadline:
                    text = f"the update has not ended in {self._timeout:.0f} s"
                    raise RuntimeError(f"{text}\n{self.where()}")
                self.qmp.wait_event("RESUME", ASK_AGAIN)
        except ConnectionError:
            self.qmp.close()
            self.qmp = self.connect()
        return self.qmp

    def _command(self, name: str, **arguments: Any) -> Any:
        try:
            return self.qmp.command(name, **arguments)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.where()}") from None

    def where(self) -> str:
        """What each thread of the VM waits for in the kernel, the events so far, and stderr."""
        lines = []
        for pid in self.processes():
            for task in sorted(Path("/proc").glob(f"{pid}/task/*")):
                with suppress(OSError):  # it has ended meanwhile
                    call = (task / "syscall").read_text().split()[0]
                    lines.append(f"{pid}/{task.name}: {(task / 'wchan').read_text()}, call {call}")
        return "\n".join([*lines, str(self.qmp.events), self.stderr])

    def update(self, **arguments: Any) -> None:
        """One cpr-exec, to its end."""
        self._command("cpr-exec", **arguments)
        self.reconnect()

    def descriptors(self) -> dict[int, str]:
        """What each descriptor of the VMM is, as /proc names it."""
        folder = f"/proc/{self.pid}/fd"
        found = {}
        for name in os.listdir(folder):
            try:
                found[int(name)] = os.readlink(f"{folder}/{name}")
            except FileNotFoundError:
                pass
        return found

    def ram_path(self, name: str = "memory-backend-memfd") -> str:
        """The /proc path of the guest's RAM memfd."""
        for fd, target in sorted(self.descriptors().items()):
            if target.startswith(f"/memfd:{name}"):
                return f"/proc/{self.pid}/fd/{fd}"
        raise RuntimeError(f"no memfd {name} in {self.descriptors()}")

    @property
    def ram(self) -> mmap.mmap:
        """The guest's RAM, mapped here; it stays valid over updates."""
        if self._ram is None:
            with open(self.ram_path(), "r+b") as file:
                self._ram = mmap.mmap(file.fileno(), 0)
        return self._ram

    def u32(self, address: int) -> int:
        return int.from_bytes(self.ram[address : address + 4], "little")

    def u64(self, address: int) -> int:
        return int.from_bytes(self.ram[address : address + 8], "little")

    def write_u32(self, address: int, value: int) -> None:
        self.ram[address : address + 4] = value.to_bytes(4, "little")

    def processes(self) -> list[int]:
        """All processes that run this VM or its update: the VMM, a new image, a guard."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):  # psutil reads much more
            try:
                words = Path("/proc", name, "cmdline").read_bytes()  # of a zombie: none
            except OSError:  # it has ended meanwhile
                continue
            if os.fsencode(self._directory.name) in words:
                found.append(int(name))
        return found

    def follow(self) -> int:
        """The PID of the one process that has this VM, which an update may have changed.

        Waits for the old image of an update, which ends when the new one has the guest.
        """
        deadline = time.monotonic() + self._timeout
        while len(found := self.processes()) != 1 and time.monotonic() < deadline:
            time.sleep(0.002)
        (self.pid,) = found
        return self.pid

    def ask(self, name: str, **arguments: Any) -> Any:
        """What a command returns, on a new connection where an update has closed this one."""
        while True:
            try:
                return self._command(name, **arguments)
            except ConnectionError:
                self.qmp.close()
                self.qmp = self.connect()

    def children(self) -> list[int]:
        """The PIDs of the VMM's children, such as the old image in an update."""
        return children(self.pid)

    def resident(self) -> int:
        """Bytes of shared memory in the VMM's page tables, huge pages included."""
        with open(f"/proc/{self.pid}/status") as file:
            values = dict(line.split(":", 1) for line in file)
        return sum(int(values[key].split()[0]) << 10 for key in ("RssShmem", "HugetlbPages"))

    def close(self) -> None:
        if self._ram is not None:
            self._ram.close()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        self._directory.cleanup()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
