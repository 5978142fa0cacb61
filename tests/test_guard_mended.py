"""The old image after its guard came back: what the clone and the exec take away is put right."""

from __future__ import annotations

import signal

import pytest
from guarded import ends, only, run

RETURNS = pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
# An early one returns while the new image lives; that is ended when all has been looked at.
EXECUTE = """
returned = execute("sleep", "100", early={early}, timeout_ns=20_000_000)
if {early}:
    signal.pidfd_send_signal(returned.pidfd, signal.SIGKILL)
    while os.getppid() == OLD:
        time.sleep(0.001)
"""


def script(before: str, after: str, early: bool) -> str:
    return before + EXECUTE.format(early=early) + after


@RETURNS
def test_signal_mask_timers_and_alternate_stack(early):
    told = only(
        run(
            script(
                """
class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
def altstack():
    stack = Stack()
    libc.sigaltstack(None, ctypes.byref(stack))
    return [stack.sp, stack.flags, stack.size]
faulthandler.enable()
memory = ctypes.create_string_buffer(1 << 16)
libc.sigaltstack(ctypes.byref(Stack(ctypes.addressof(memory), 0, 1 << 16)), None)
stack = altstack()
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1, signal.SIGALRM])
for timer in (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF):
    signal.setitimer(timer, 1000, 500)
""",
                """
tell(mask=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])), stack=altstack() == stack,
     sp=stack[0] is not None,
     timers=[[int(value) for value in signal.getitimer(timer)] for timer in range(3)])
""",
                early,
            )
        )
    )
    assert told["mask"] == [signal.SIGUSR1, signal.SIGALRM]
    assert told["stack"] and told["sp"]
    for left, interval in told["timers"]:
        assert 900 <= left <= 1000
        assert interval == 500


def test_the_new_image_has_the_mask_that_was():
    told = only(
        run("""
signal.pthread_sigmask(signal.SIG_SETMASK, [signal.SIGUSR1])
program = "import json, signal; print(json.dumps({'mask': list(signal.pthread_sigmask(0, []))}))"
execute(sys.executable, "-c", program)
""")
    )
    assert told["mask"] == [signal.SIGUSR1]


@RETURNS
def test_death_signal_and_subreaper(early):
    told = run(
        script(
            """
def prctl(option):
    value = ctypes.c_int()
    libc.prctl(option, ctypes.byref(value), 0, 0, 0)
    return value.value
libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
""",
            """
guard.adopted()
tell(death=prctl(2), subreaper=prctl(37))
""",
            early,
        )
    )
    assert only(told) == {"death": signal.SIGTERM, "subreaper": 1}
    assert ends(told)["other"] == 0, "the new image's death is not the supervisor's"


@RETURNS
def test_locks_know_who_holds_them(early):
    told = only(
        run(
            script(
                """
PTHREAD_MUTEX_RECURSIVE, PTHREAD_MUTEX_ERRORCHECK = 1, 2
def mutex(kind):
    attribute, lock = ctypes.create_string_buffer(16), ctypes.create_string_buffer(64)
    libc.pthread_mutexattr_init(attribute)
    libc.pthread_mutexattr_settype(attribute, kind)
    libc.pthread_mutex_init(lock, attribute)
    return lock
recursive, checked = mutex(PTHREAD_MUTEX_RECURSIVE), mutex(PTHREAD_MUTEX_ERRORCHECK)
rlock = threading.RLock()
rlock.acquire()
""",
                """
steps = [libc.pthread_mutex_lock(recursive) for _ in range(3)]
other = []
thread = threading.Thread(target=lambda: other.append(libc.pthread_mutex_trylock(recursive)))
thread.start()
thread.join()
steps += [libc.pthread_mutex_unlock(recursive) for _ in range(3)]
steps.append(libc.pthread_mutex_lock(checked))
again = libc.pthread_mutex_lock(checked)
steps.append(libc.pthread_mutex_unlock(checked))
rlock.release()
free = []
thread = threading.Thread(target=lambda: free.append(rlock.acquire(blocking=False)))
thread.start()
thread.join()
tell(steps=steps, other=other, again=again, free=free)
""",
                early,
            )
        )
    )
    busy, deadlock = 16, 35  # EBUSY, EDEADLK
    assert told == {"steps": [0] * 8, "other": [busy], "again": deadlock, "free": [True]}


@RETURNS
def test_memory_threads_and_children_work_in_many_rounds(early):
    """Ten failing execs in a row, with threads that allocate before and after each."""
    told = only(
        run(
            f"""
def allocate():
    kept = [bytearray(1 << (number % 18)) for number in range(2000)]
    del kept[::2]
    return kept
import subprocess
pids, sizes = set(), []
for number in range(10):
    threads = [threading.Thread(target=allocate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    guard.wait_alone()
    os.close(token)
    token = tokens.create_token()
    returned = execute("sleep", "100", early={early}, timeout_ns=5_000_000)
    if {early}:
        signal.pidfd_send_signal(returned.pidfd, signal.SIGKILL)
    pids.add(os.getpid())
    os.close(returned.pidfd)
    assert subprocess.run(["true"]).returncode == 0
    sizes.append((len(descriptors()), len(os.listdir("/proc/self/task"))))
tell(pids=len(pids), flat=len(set(sizes)) == 1, threads=sizes[0][1])
"""
        )
    )
    assert told == {"pids": 10, "flat": True, "threads": 1}


# struct sock_filter: a prctl(2) of PR_GET_TID_ADDRESS fails with EINVAL, as in a kernel without it.
NOT_TOLD = """
import struct
steps = [
    (0x20, 0, 0, 0),           # load the number of the call
    (0x15, 0, 3, 157),         # __NR_prctl, else allow
    (0x20, 0, 0, 16),          # load the low half of its first argument
    (0x15, 0, 1, 40),          # PR_GET_TID_ADDRESS, else allow
    (0x06, 0, 0, 0x00050016),  # SECCOMP_RET_ERRNO of EINVAL
    (0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(filters))
told = ctypes.c_void_p()
assert libc.prctl(40, ctypes.byref(told), 0, 0, 0) == 0
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
assert libc.prctl(40, ctypes.byref(ctypes.c_void_p()), 0, 0, 0) == -1
from cpr._native._cpr import ffi, lib
address = lib.cpr_tid_address()
assert int(ffi.cast("uintptr_t", address)) == told.value, (address, told)
taken = []
signal.signal(signal.SIGUSR1, lambda *arguments: taken.append(1))
"""


@RETURNS
def test_a_kernel_that_does_not_tell_where_the_thread_id_is(early):
    """Without CONFIG_CHECKPOINT_RESTORE: the guard ended at once, and the guest with it."""
    told = run(
        NOT_TOLD
        + EXECUTE.format(early=early)
        + """
signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # libc looks the ID up
tell(same=address[0] == os.getpid() == threading.get_native_id(), taken=len(taken))
"""
    )
    assert only(told) == {"same": True, "taken": 1}
