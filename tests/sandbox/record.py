"""Writes cpr/_native/sandbox_calls.h: the system calls that a real QEMU's -sandbox denies.

    python -m tests.sandbox.record FOLDER     a root in which a QEMU is installed; needs root, gcc

QEMU is started with each setting of the option, with `recorder.c` between it and libseccomp.  What
it asks for is what its tables have (system/qemu-seccomp.c); the names and numbers are libseccomp's.
A name that has no number on x86_64 is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "cpr" / "_native" / "sandbox_calls.h"
QEMU = "qemu-system-x86_64"
RULE = re.compile(r"^rule (\S+) (-?\d+) (\d+) (\d+)$", re.M)
SETTINGS = {
    "DEFAULT": "on,obsolete=allow",
    "OBSOLETE": "on",
    "ELEVATEPRIVILEGES": "on,obsolete=allow,elevateprivileges=deny",
    "SPAWN": "on,obsolete=allow,spawn=deny",
    "RESOURCECONTROL": "on,obsolete=allow,resourcecontrol=deny",
}
# linux/seccomp.h
ACTIONS = {
    0x80000000: "SECCOMP_RET_KILL_PROCESS",
    0x00050001: "SECCOMP_RET_ERRNO | EPERM",
    0x00050026: "SECCOMP_RET_ERRNO | ENOSYS",
}
SECONDS = 3  # in which it has made its filter; it has nothing to run

Rule = tuple[str, int, int]  # name, action, and how many arguments are looked at


def rules(root: Path, recorder: str, setting: str) -> list[Rule]:
    """What one QEMU asks for, each once, in its order."""
    command = ["timeout", str(SECONDS), "chroot", str(root), "env", f"LD_PRELOAD={recorder}", QEMU]
    command += ["-nodefaults", "-display", "none", "-machine", "none", "-S", "-sandbox", setting]
    text = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    found = [
        (name, int(action), int(count))
        for name, number, action, count in RULE.findall(text)
        if int(number) >= 0
    ]
    return list(dict.fromkeys(found))


def version(root: Path, *words: str) -> str:
    command = ["chroot", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def record(root: Path) -> str:
    """The text of the table."""
    recorder = root / "tmp" / "recorder.so"
    build = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(recorder), str(HERE / "recorder.c")]
    subprocess.run(build, check=True)
    try:
        found = {
            group: rules(root, f"/tmp/{recorder.name}", setting)
            for group, setting in SETTINGS.items()
        }
    finally:
        recorder.unlink()
    always = found["DEFAULT"]
    (qemu,) = re.findall(r"version (\S+)", version(root, QEMU, "--version"))
    (library,) = {path.name for path in root.glob("usr/lib/*/libseccomp.so.*.*")}
    text = f"/* Made by `make sandbox-table`: what -sandbox of QEMU {qemu} asks {library} for.\n"
    text += "   CALL(group, system call, action, arguments that are looked at) */\n"
    for group, all_of_it in found.items():
        mine = [rule for rule in all_of_it if group == "DEFAULT" or rule not in always]
        for name, action, count in mine:
            text += f"CALL({group}, {name}, {ACTIONS[action]}, {count})\n"
    return text


if __name__ == "__main__":
    TABLE.write_text(record(Path(sys.argv[1])))
