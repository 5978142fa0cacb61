"""Updates that fail: what each is, and what has to be so when it has failed."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from conftest import ROOT
from harness.vm import HEARTBEAT, VMM, Vm
from waiting import wait_for, wait_for_change

from cpr.live.token import is_kernels, read_stat

BAD = str(ROOT / "tests" / "bad_program.py")
DEADLINE_MS = 1000  # for those that hang
LONG_MS = 60_000
RAM = "64M"


def words(accel: str, ram: str = RAM, cpus: int = 2, guest: str = "timer") -> list[str]:
    """The options of the guest that the updates are tried on; it counts 100 times a second."""
    return [
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", ram, "-smp", str(cpus)),
        *("-object", f"memory-backend-memfd,id=ram0,size={ram},share=on"),
        *("-machine", "pc,memory-backend=ram0,aux-ram-share=on"),
        *("-drive", f"file=examples/build/{guest}.img,format=raw,if=floppy"),
    ]


def bad(kind: str) -> list[str]:
    """A command whose program knows the protocol."""
    return [sys.executable, BAD, kind, "run"]


def script(folder: Path, text: str) -> str:
    path = folder / "program"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


class Failing:
    """A VM and what is to be the same after an update of it that fails."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.first_pid = vm.pid
        self.told = len(vm.complaints.splitlines())
        self.figures = self.look()
        self.counter = wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts")

    def look(self) -> tuple[Any, ...]:
        """Descriptors by what they are, threads, and children of the process that has the VM."""
        pid = self.vm.follow()
        names = [re.sub(r"\[\d+\]|:\d+$", "", name) for name in self.vm.descriptors().values()]
        threads = [t for t in os.listdir(f"/proc/{pid}/task") if not is_kernels_thread(pid, t)]
        return Counter(names), len(threads), self.vm.children()

    def update(self, command: list[str], late: bool, state: Path) -> None:
        """Starts the update; `late` is QEMU's way.  The deadline is short for what hangs only."""
        vm = self.vm
        if any("sleep" in word or "hang" in word.replace("hang-up", "") for word in command):
            vm.qmp.command("migrate-set-parameters", x_cpr_exec_timeout=DEADLINE_MS)
        if not late:
            vm.qmp.command("cpr-exec", command=command)
            return
        full = [*command, "-incoming", f"file:{state}"]
        vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=full)
        vm.qmp.command("migrate", uri=f"file:{state}")

    def check(self, text: str, same_pid: bool) -> None:
        """The guest goes on, in the first process or in another, and the failure is told."""
        vm = self.vm

        def settled() -> bool:
            pids = vm.processes()
            if len(pids) != 1 or (pids[0] == self.first_pid) != same_pid:
                return False
            return vm.ask("query-migrate").get("status") == "failed"

        wait_for(settled, "the update has failed")
        error = vm.ask("query-migrate")["error-desc"]
        assert re.search(text, error), error
        assert f"failed ({error})" in vm.ask("human-monitor-command", command_line="info migrate")
        assert vm.ask("query-status") == {"status": "running", "running": True}
        self.check_counter()
        lines = [line for line in vm.complaints.splitlines() if line.startswith("cpr-vmm: ")]
        *details, line = lines[self.told :]
        assert re.search(text, line)
        assert len(details) <= 1, "QEMU's line on what of the stream it is, and ours"
        self.told = len(lines)
        wait_for(lambda: self.look() == self.figures, "descriptors, threads and children are flat")

    def update_well(self) -> None:
        """One more update, which goes well."""
        self.vm.ask("migrate-set-parameters", x_cpr_exec_timeout=LONG_MS)
        self.vm.update()
        assert self.vm.qmp.command("query-migrate")["status"] == "completed"
        self.check_counter()

    def check_counter(self) -> None:
        now = wait_for_change(lambda: self.vm.u32(HEARTBEAT), "the guest counts on")
        assert (now - self.counter) & 0xFFFFFFFF < 1 << 31, "it went back"
        self.counter = now


def is_kernels_thread(pid: int, task: str) -> bool:
    """Whether it is a worker of KVM's, which a guard does not get, or has ended."""
    try:
        return is_kernels(read_stat(f"/proc/{pid}/task/{task}/stat")[1])
    except FileNotFoundError:
        return True


def own(*options: str) -> list[str]:
    return [*VMM, *options]


def programs(folder: Path, accel: str) -> dict[str, tuple[list[str], str, bool]]:
    """Each bad program: the command, what is told of it, and whether it gives the PID back."""
    missing = script(folder, "#!/nonexistent/interpreter\n")
    killed = folder / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    late_deadline = f"did not take over within {DEADLINE_MS} ms, and was killed"
    return {
        "false": (["false"], "has ended with exit status 1|has ended before", False),
        "killed": ([str(killed)], "ended by signal 9|has ended before", False),
        "hang": (["sh", "-c", "exec sleep 1000"], late_deadline, False),
        "missing": (["/nonexistent/vmm"], "execvp /nonexistent/vmm failed: No such file", True),
        "interpreter": ([missing], f"execvp {missing} failed: No such file", True),
        "no-exec": (["/etc/passwd"], "execvp /etc/passwd failed: Permission denied", True),
        "import": ([sys.executable, "-c", "import nothing"], "exit status 1|has ended", False),
        "bad-option": (own(*words(accel), "-bogus"), "-bogus: invalid option", True),
        "ram-size": (own(*words(accel, "32M")), "Size mismatch|section|load of migration", True),
        "fewer-cpus": (own(*words(accel, cpus=1)), "CPUs|section|load of migration", True),
    }


def protocol_programs() -> dict[str, tuple[list[str], str, bool]]:
    """Programs that know the protocol, which an early update executes."""
    deadline = f"did not take over within {DEADLINE_MS} ms, and was killed"
    ended = "has ended with exit status 1|has ended before"
    signalled = "ended by signal 9|has ended before"
    rows = {
        "exit": (ended, False),
        "die": (signalled, False),
        "hang": (deadline, False),
        "import": (ended, False),
        "die-after-hello": (signalled, False),
        "hang-after-hello": (deadline, False),
        "garbage": ("no message", False),
        "part": ("a new program's message has one packet", False),
        "hello-twice": ("building cannot be building", False),
        "hang-up": ("has hung up", False),
        "die-after-ready": (signalled, False),
        "die-before-commit": (signalled, False),
        "hang-before-commit": (deadline, False),
        "refuse": ("it does not feel like it", True),
        "refuse-before-commit": ("it was just before", True),
        "refuse-and-die": ("it dies", False),
        "talk": (r"\[31mred  \[31mred", True),  # one line, as all that is told
        "protocol": ("speaks version 2 of the hand-over", False),
    }
    return {kind: (bad(kind), *row) for kind, row in rows.items()}


def start_vm(start: Any, accel: str, *more: str, **options: Any) -> Vm:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    vm: Vm = start(*words(accel), *more, env=environment, **options)
    return vm
