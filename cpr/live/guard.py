"""The guard: an exec from which the old image comes back where the new one does not commit.

`execute` makes a process that shares this address space, and execs.  The old image then goes on in
that process, the guard: at once (`early`), or only where the new image fails (late).  `forked` is
the same by fork(), without the C part.
"""

from __future__ import annotations

import errno
import os
import time

from cpr._native._cpr import ffi, lib
from cpr.constants import NS_PER_S
from cpr.errors import KernelError
from cpr.live import sealed
from cpr.live.token import (
    THREADS_FIELD,
    Returned,
    candidates,
    is_worker,
    read_stat,
    tasks,
    wait_status,
)
from cpr.uapi.affinity import cpu_mask
from cpr.uapi.fd import Fd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from typing import Any

EARLY = lib.CPR_GUARD_EARLY
DIED = lib.CPR_GUARD_DIED
KILLED = lib.CPR_GUARD_KILLED
MESSAGE = lib.CPR_GUARD_MESSAGE

SIBLINGS = True  # it can be a child of this process's parent

ALONE_TIMEOUT_NS = 2 * NS_PER_S
ALONE_STEP = 0.0001  # s
YIELD_NS = 500_000
"""For so long a thread that ends is waited for by yielding: a guest may stand still too."""


class Page:
    """The page that both images see; owns its descriptor and its mapping until `close`."""

    def __init__(self, fd: int = -1) -> None:
        """A new one, or the one of `fd`, which becomes this object's.  Raises OSError."""
        size = ffi.sizeof("struct cpr_live_page")
        self.fd = sealed.create_sized("cpr-live", size) if fd < 0 else fd
        if os.fstat(self.fd).st_size < lib.CPR_LIVE_PAGE_FIRST:
            raise OSError(errno.EINVAL, "the page of the update is too small")
        address = lib.mmap(
            ffi.NULL, size, lib.PROT_READ | lib.PROT_WRITE, lib.MAP_SHARED, self.fd, 0
        )
        if address == ffi.cast("void *", -1):
            number = ffi.errno
            if fd < 0:
                os.close(self.fd)
            raise OSError(number, os.strerror(number))
        self._size = size
        self.struct: Any = ffi.cast("struct cpr_live_page *", address)
        if fd < 0:
            self.struct.version = lib.CPR_LIVE_VERSION

    @property
    def score_before(self) -> str:
        """`oom_score_adj` as it was before the update, "" where it is as it was."""
        return ffi.string(self.struct.oom_score_adj).decode()

    def close(self) -> None:
        lib.munmap(self.struct, self._size)
        self.struct = None
        os.close(self.fd)


def wait_alone(known: frozenset[str] = frozenset()) -> None:
    """Waits until the caller is the only thread of this process; all others have been ended.

    `known` are workers of the kernel's (token.workers), which it takes a while to tell from others:
    a guest stands still.  Raises KernelError naming one that stays.
    """
    begin = time.monotonic_ns()
    known |= {str(os.getpid())}
    while True:
        found = tasks()
        others = found - known
        if not others and len(found) == _thread_count():
            return
        waited_ns = time.monotonic_ns() - begin
        if waited_ns < YIELD_NS:
            lib.sched_yield()
            continue
        known |= {task for task in others if is_worker(task)}
        if waited_ns > ALONE_TIMEOUT_NS:
            names = [_task_name(task) for task in others - known]
            text = f"an update with the threads {', '.join(names)}"
            raise KernelError(text, errno.EBUSY, "they have to be ended before")
        time.sleep(ALONE_STEP)


def _thread_count() -> int:
    """Also of those that a listing misses while others end (proc_task_readdir of the kernel)."""
    return int(read_stat("/proc/self/stat")[1][THREADS_FIELD])


def _task_name(task: str) -> str:
    try:
        with open(f"/proc/self/task/{task}/comm") as file:
            return f"{task} ({file.read().strip()})"
    except OSError:
        return task


def execute(
    argv: Sequence[str],
    environment: Mapping[str, str],
    keep: Sequence[int],
    token: int,
    page: Page,
    *,
    mask: Iterable[int],
    early: bool = False,
    socket: int = -1,
    timeout_ns: int = 0,
    mappings: Sequence[tuple[int, int]] = (),
    state_fd: int = -1,
    kept_fd: int = -1,
    drop: Sequence[int] = (),
    unblock: Sequence[int] = (),
    ending: Sequence[int] = (),
    notify_fd: int = -1,
    sibling: bool = False,
    cpus: Collection[int] = (),
    ready: Callable[[], None] = lambda: None,
) -> Returned:
    """Executes `argv`, looked up in PATH, with the descriptors `keep` and a guard.

    `ready()` is called when all is prepared; from then on the caller is this process's only thread.
    `mappings` are (address, bytes) of memory that is freed piece by piece after a commit.
    `state_fd`, one of `keep`, is for a program that knows no token: it has taken over when it has
    closed that, still has `kept_fd`, if there is one that such a program keeps, and lives on.
    `drop` are descriptors that a late exec is to close for good, in the old image as in the new
    one.  `mask` are the signals that the program has blocked;
    `unblock` those whose handlers are not to run any more, which the caller blocks and the program
    is not to; `ending` those that the program blocks until it can take them: one that does not for
    a while is killed.  `notify_fd` is a socket to the service's manager: it hears that the
    guard is the main process before the exec, and that the PID is at a commit.  With `sibling` the
    guard is a child of this process's parent, which has to be that manager and reaps it.  `cpus`
    are those that it goes on on, if they are not the caller's.

    Comes back in the old image only.  Raises OSError of execve where it is the same process as
    before, and nothing has changed.
    """
    if any("\0" in text for pair in environment.items() for text in (*argv, *pair)):
        raise ValueError("embedded null byte")
    request: Any = ffi.new("struct cpr_guard *")
    words = [ffi.new("char[]", os.fsencode(word)) for word in argv]
    variables = [ffi.new("char[]", os.fsencode(f"{k}={v}")) for k, v in environment.items()]
    memory = [  # the guard reads all of it
        request,
        *words,
        *variables,
        argv_array := ffi.new("char *[]", [*words, ffi.NULL]),
        envp_array := ffi.new("char *[]", [*variables, ffi.NULL]),
        keep_array := ffi.new("int32_t[]", list(keep)),
        mapping_array := ffi.new("struct cpr_mapping[]", list(mappings)),
        drop_array := ffi.new("int32_t[]", list(drop)),
    ]
    request.argv, request.envp = argv_array, envp_array
    request.keep, request.keep_count = keep_array, len(keep)
    request.mappings, request.mapping_count = mapping_array, len(mappings)
    request.drop, request.drop_count = drop_array, len(drop)
    request.token_fd, request.socket_fd, request.notify_fd = token, socket, notify_fd
    request.early, request.timeout_ns, request.sibling = early, timeout_ns, sibling
    if cpus:
        bits = cpu_mask(cpus)
        memory.append(ffi.new("char[]", bits))
        request.cpus, request.cpus_size = memory[-1], len(bits)
    request.mask = sum(1 << (number - 1) for number in mask)
    request.unblock = sum(1 << (number - 1) for number in unblock)
    request.ending = sum(1 << (number - 1) for number in ending)
    request.page = page.struct
    request.state_fd = request.kept_fd = -1
    if state_fd >= 0:
        memory += [state_text := _link_text(state_fd), kept_text := _link_text(kept_fd)]
        request.state_fd, request.state_text = state_fd, state_text
        request.kept_fd, request.kept_text = kept_fd, kept_text
    error = -errno.ENOENT
    ready()
    for path in candidates(argv[0], environment):
        memory.append(ffi.new("char[]", os.fsencode(path)))
        request.path = memory[-1]
        page.struct.exec_ns = time.monotonic_ns()
        outcome = lib.cpr_guard_exec(request)
        if outcome > 0:
            return Returned(
                outcome,
                request.old_pid,
                request.pid_fd,
                bool(request.consumed),
                bool(request.dropped),
                frozenset(number for number in ending if request.signalled >> (number - 1) & 1),
            )
        if outcome not in (-errno.ENOENT, -errno.ENOTDIR):
            error = outcome
            if outcome != -errno.EACCES:
                break
    raise OSError(-error, os.strerror(-error))


def _link_text(fd: int) -> Any:
    """What /proc/self/fd/FD says, for C; nothing where there is none."""
    return ffi.new("char[]", os.fsencode(os.readlink(f"/proc/self/fd/{fd}")) if fd >= 0 else b"")


def end(mappings: Sequence[tuple[int, int]]) -> None:
    """The new image has committed: closes all descriptors, frees the memory and ends.

    Nothing comes after this, no exit handler and no exit status that anybody sees.
    """
    try:
        found = tasks()
    except OSError:  # no descriptor for it, and none is worth that this one stays
        found = frozenset()
    for task in found:  # whichever ends last frees what is left
        if int(task) != os.getpid():
            try:
                os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
            except OSError:  # it has ended meanwhile
                pass
    lib.cpr_guard_end(ffi.new("struct cpr_mapping[]", list(mappings)), len(mappings))


def adopted() -> None:
    """The new image has ended: the signal at the parent's death is about the next parent's.

    For a caller that came back while the new image lived.
    """
    lib.cpr_guard_adopted()


def children() -> list[int]:
    """The PIDs of this process's children: right after an exec, those of the images before it."""
    pid = os.getpid()
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN: they stay zombies
        return []


def reap(pid: int) -> None:
    """Waits for the guard, a child that was cloned and not forked."""
    lib.cpr_guard_reap(pid)


def exit_status(pid: int, pidfd: int) -> int | None:
    """As token.wait_status; when its parent has reaped it the pidfd tells it (Linux 6.15)."""
    return wait_status(pid, lambda: pidfd_status(pidfd))


def pidfd_status(pidfd: int) -> int | None:
    """The wait status of the process of a pidfd, where it has been reaped and the kernel tells."""
    info: Any = ffi.new("struct cpr_pidfd_info *")
    info.mask = lib.CPR_PIDFD_INFO_EXIT
    try:
        Fd(pidfd, "pidfd").ioctl(lib.CPR_PIDFD_GET_INFO, "PIDFD_GET_INFO", info)
    except KernelError:
        return None
    return int(info.exit_code) if info.mask & lib.CPR_PIDFD_INFO_EXIT else None
