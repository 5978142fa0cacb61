"""What an update would lose or leak: descriptors, threads, children, POSIX locks."""

from __future__ import annotations

import fcntl
import gc
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

from cpr.live.image import Image
from cpr.live.token import is_kernels, read_stat

DESCRIPTOR, THREAD, CHILD, LOCK = "descriptor", "thread", "child", "lock"
WORDS = {
    DESCRIPTOR: ("descriptor", "descriptors"),
    THREAD: ("thread", "threads", "executor", "executors"),
    CHILD: ("child", "children", "popen"),
    LOCK: ("lock", "locks"),
}
FOREIGN = " of a library"
END_TIME, STEP = 0.1, 0.001  # s
FIRST = 3  # below are the standard streams, which go over
OURS = "cpr-live"


class Finding(NamedTuple):
    """One thing: its `kind`, its `name`, what becomes of it, and whether it survives an update."""

    kind: str
    name: str
    fate: str
    survives: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.fate}"

    def is_allowed(self, allowed: Iterable[str]) -> bool:
        """Whether `allowed` has its name, or one of WORDS for its kind."""
        return any(str(word) in (*WORDS[self.kind], self.name) for word in allowed)


def audit(image: Image) -> list[Finding]:
    """Everything that is neither preserved nor the same after an update."""
    return [*_descriptors(image), *_threads(), *_children(), *_locks()]


def blocking(image: Image, allowed: Iterable[str]) -> list[Finding]:
    """What an update is refused for."""
    found = [*_threads(), *_children(), *_locks()]
    return [each for each in found if not each.survives and not each.is_allowed(allowed)]


def _descriptors(image: Image) -> list[Finding]:
    kept = {entry.fd for entry in image.registry.entries.values()}
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        try:
            flags = fcntl.fcntl(fd, fcntl.F_GETFD)
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # the listing's own
            continue
        if fd >= FIRST and fd not in kept and not flags & fcntl.FD_CLOEXEC:
            fate = f"{target} leaks: the new program has it open, and no name for it"
            found.append(Finding(DESCRIPTOR, str(fd), fate, True))
    return found


def _threads() -> list[Finding]:
    """All but the one that asks; one of Python that was joined may take a moment to end."""
    deadline = time.monotonic() + END_TIME
    while True:
        found = _list_threads()
        if time.monotonic() > deadline or not any(each.name.endswith(FOREIGN) for each in found):
            return found
        time.sleep(STEP)


def _list_threads() -> list[Finding]:
    names = {thread.native_id: thread.name for thread in threading.enumerate()}
    own, found = threading.get_native_id(), []
    for task in sorted(map(int, os.listdir("/proc/self/task"))):
        try:
            name, fields = read_stat(f"/proc/self/task/{task}/stat")
        except OSError:  # it has ended meanwhile
            continue
        if task == own or is_kernels(fields):
            continue
        text = names.get(task) or f"{task} ({name}){FOREIGN}"
        if not text.startswith(OURS):
            found.append(Finding(THREAD, text, "ends, here too if the update fails", False))
    return found


def _awaited() -> set[int]:
    """The PIDs that a Popen or a multiprocessing.Process of this program waits for."""
    pids: set[int] = set()
    if (module := sys.modules.get("subprocess")) is not None:
        for each in gc.get_objects():
            if issubclass(type(each), module.Popen) and each.returncode is None:
                pids.add(each.pid)
    if (module := sys.modules.get("multiprocessing.process")) is not None:
        pids.update(child.pid for child in module._children if child.pid)
    return pids


def _children() -> list[Finding]:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # none: an update does not wait for an import
        return []
    import psutil

    states = {}
    for child in psutil.Process().children():
        try:
            states[child.pid] = child.status()
        except psutil.NoSuchProcess:  # a thread has waited for it
            continue
    awaited, tracker, server = _awaited(), _resource_tracker(), _fork_server()
    if server in states:  # its children are this program's too, which waits for them
        states.update({pid: states[server] for pid in awaited - states.keys()})
    found = []
    for pid, state in states.items():
        fate = "has ended" if state == psutil.STATUS_ZOMBIE else "lives on"
        if pid in awaited:
            fate += ", and nobody waits for it: the Popen is lost"
        elif pid == tracker:
            fate = (
                "ends, and removes the shared memory and semaphores of multiprocessing that it "
                "knows: live.memory stays"
            )
        else:
            fate += " as a child of the new program; nobody's if the update fails"
        found.append(Finding(CHILD, str(pid), fate, pid not in awaited and pid != tracker))
    return found


def _resource_tracker() -> int | None:
    """The PID of multiprocessing's resource tracker, if there is one."""
    module = sys.modules.get("multiprocessing.resource_tracker")
    return module._resource_tracker._pid if module is not None else None


def _fork_server() -> int | None:
    """The same for the process that forks those of multiprocessing (its default since 3.14)."""
    module = sys.modules.get("multiprocessing.forkserver")
    return module._forkserver._forkserver_pid if module is not None else None


def _locks() -> list[Finding]:
    try:
        with open("/proc/locks") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split()
        if "->" in fields or fields[1] != "POSIX" or int(fields[4]) != os.getpid():
            continue
        fate = "is released when the exec closes a descriptor of the file, and not held here after"
        found.append(Finding(LOCK, _path_of(fields[5]), fate, False))
    return list(dict.fromkeys(found))  # there may be several on one file


def _path_of(place: str) -> str:
    """The file of "MAJOR:MINOR:INODE" in hexadecimal, on which this process has a lock.

    It is not looked for with stat(2): others may be on a file system that hangs.
    """
    for fd in os.listdir("/proc/self/fdinfo"):
        try:
            with open(f"/proc/self/fdinfo/{fd}", errors="replace") as file:
                if any(line.startswith("lock:") and place in line.split() for line in file):
                    return os.readlink(f"/proc/self/fd/{fd}")
        except OSError:  # it has been closed meanwhile
            continue
    return place
