"""The VM with an emulated IOMMU, PCI devices and KVM: its command line, its events, its end."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from .initramfs import MOUNT_TAG
from .kernels import Kernel

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 1024
DISK = 64 << 20  # bytes of the NVMe controller's namespace
# Each device is an IOMMU group of its own, but the two functions of slot 9, which share one; the
# addresses are those of inside/machine.py.
DEVICES = (
    "-device edu,addr=4",
    "-device e1000e,addr=5",
    "-drive if=none,id=d0,driver=raw,file={disk} -device nvme,serial=x,drive=d0,addr=7",
    "-device edu,addr=8",
    "-device edu,addr=9.0,multifunction=on -device edu,addr=9.1",
)
# Without -cx16 QEMU 7.2 delivers double faults in some boots; without no_timer_check the kernel
# panics on a loaded host.
CPU = "EPYC,+svm,-cx16"
COMMAND_LINE = "console=ttyS0 intel_iommu=on iommu=nopt no_timer_check panic=-1 quiet"

BOOT_SECONDS = 600.0  # until the first event of pytest, on a loaded host
SILENCE_SECONDS = 400.0  # the inner pytest says every few seconds that it is alive
CONSOLE_LINES = 25


class Ended(Exception):
    """The VM ended or stopped answering before it had delivered what was asked of it."""


def emulator(root: str | None) -> list[str]:
    """The words that run this host's QEMU, or that of the Debian in the folder `root`."""
    if root is None:
        return [QEMU]
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    return [
        *("env", f"QEMU_MODULE_DIR={libraries}/qemu", f"{root}/lib64/ld-linux-x86-64.so.2"),
        *("--library-path", libraries, f"{root}/usr/bin/{QEMU}"),
        *("-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios"),
    ]


class NestedVm:
    """One run of the VM; `close` ends it, and so does the end of this process."""

    def __init__(
        self, kernel: Kernel, initramfs: Path, console: Path, log: Path, root: str | None = None
    ) -> None:
        """Starts QEMU, that of `root`.  The kernel's console goes to `console`, each event also to
        `log`."""
        self.console = console
        self._started = time.monotonic()
        self._limit = BOOT_SECONDS
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._disk = tempfile.NamedTemporaryFile(prefix="cpr-nvme-")  # noqa: SIM115
        os.truncate(self._disk.name, DISK)
        machine = f"-accel tcg -cpu {CPU} -m {MEMORY_MIB} -smp 1 -machine q35 -no-reboot"
        machine += " -device intel-iommu,intremap=on -nodefaults -display none"
        share = f"local,path=/,mount_tag={MOUNT_TAG},security_model=none,readonly=on"
        command = ["setpriv", "--pdeathsig", "KILL", *emulator(root)]
        command += " ".join((machine, *DEVICES)).format(disk=self._disk.name).split()
        command += ["-virtfs", f"{share},multidevs=remap"]
        command += ["-serial", f"file:{console}", "-serial", "stdio", "-monitor", "none"]
        command += ["-kernel", str(kernel.image), "-initrd", str(initramfs)]
        command += ["-append", COMMAND_LINE]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors
        )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def _read(self, log: Path) -> None:
        assert self._process.stdout is not None
        with open(log, "wb") as copy:
            for line in self._process.stdout:
                copy.write(line)
                copy.flush()
                start = line.find(b"{")  # firmware and drivers may have left bytes on the line
                try:
                    event = json.loads(line[start:]) if start >= 0 else None
                except ValueError:
                    event = None
                if isinstance(event, dict):
                    self._events.put(event)
        self._events.put(None)

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next event within `seconds`, or None.

        Raises Ended, with the last lines of the console, when the VM is gone or has been silent
        for too long.
        """
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            self._limit -= seconds
            if self._limit <= 0:
                raise Ended(self._describe("the VM says nothing any more")) from None
            return None
        if event is None:
            self._events.put(None)
            status = self._process.wait()
            raise Ended(self._describe(f"the VM has ended (QEMU's status {status})"))
        self._limit = SILENCE_SECONDS if event["event"] != "init" else BOOT_SECONDS
        return event

    def _describe(self, what: str) -> str:
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").splitlines()
        said = [line for line in said if "TCG doesn't support" not in line]
        lines = self.console_text().splitlines()
        first = max(0, len(lines) - CONSOLE_LINES)
        for number, line in enumerate(lines):
            if "Kernel panic" in line:
                what += ": a kernel panic"
                first = min(first, max(0, number - CONSOLE_LINES))
                break
        shown = "\n".join([*said, f"last lines of {self.console}:", *lines[first:]])
        return f"{what} after {self.seconds:.0f} s\n{shown}"

    def console_text(self) -> str:
        """What the kernel has written so far."""
        if not self.console.exists():
            return ""
        return self.console.read_bytes().decode(errors="replace").replace("\r", "")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
        self._disk.close()
