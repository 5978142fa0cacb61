"""The guard: who has the token, how the old image comes back, and that it is whole then."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from guarded import ROOT, ends, only, run
from harness.vm import ALL_CPUS

from cpr.live import guard
from cpr.live import token as tokens


def test_the_token_is_taken_once_by_many_racers():
    told = only(
        run("""
rounds = []
for number in range(50):
    token = tokens.create_token()
    gate, go = os.pipe()
    racers = []
    for racer in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(gate, 1)  # all of them at once: when the last writer is gone
            os._exit(int(tokens.take_token(token)))
        racers.append(pid)
    os.close(gate)
    os.close(go)
    rounds.append(sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in racers))
    os.close(token)
tell(rounds=rounds)
""")
    )
    assert told["rounds"] == [1] * 50


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("/nonexistent/program", "ENOENT"),
        ("no-such-program-anywhere", "ENOENT"),
        ("/", "EACCES"),
        ("/etc/passwd", "EACCES"),
        ("/bin/sh/program", "ENOTDIR"),
        ("", "ENOENT"),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_failing_exec_leaves_the_same_process(name, error, early):
    told = only(
        run(f"""
kept, _ = os.pipe()
before = descriptors()
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
try:
    execute({name!r}, keep=[kept], early={early}, drop=[kept])
except OSError as error:
    name = errno.errorcode[error.errno]
tell(error=name, same=os.getpid() == OLD, descriptors=descriptors() == before,
     children=guard.children(), inheritable=os.get_inheritable(kept),
     mask=list(signal.pthread_sigmask(signal.SIG_BLOCK, [])), token=tokens.take_token(token))
threading.Thread(target=lambda: bytes(1 << 20)).start()
""")
    )
    expected = {"ENOTDIR": "ENOENT"}.get(error, error)
    assert told["error"] == expected
    assert told["same"]
    assert told["descriptors"]
    assert told["children"] == []
    assert not told["inheritable"]
    assert told["mask"] == [signal.SIGUSR2]
    assert told["token"]


@pytest.mark.parametrize("early", [False, True])
def test_a_name_that_may_be_executed_nowhere_in_path(tmp_path, early):
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        (folder / "program").write_text("")
    told = only(
        run(f"""
os.environ["PATH"] = {":".join(map(str, folders))!r}
try:
    execute("program", early={early})
except OSError as error:
    tell(error=errno.errorcode[error.errno], token=tokens.take_token(token))
""")
    )
    assert told == {"error": "EACCES", "token": True}


@pytest.mark.parametrize(
    ("program", "status"),
    [(["false"], 1 << 8), (["sh", "-c", "exit 7"], 7 << 8), (["sh", "-c", "kill -9 $$"], 9)],
    ids=["false", "status", "killed"],
)
def test_a_new_image_that_ends_gives_back(program, status):
    told = run(f"""
returned = execute(*{program!r})
tell(outcome=NAMES[returned.outcome], old=returned.pid == OLD, other=os.getpid() != OLD,
     status=guard.exit_status(returned.pid, returned.pidfd), name=open("/proc/self/comm").read(),
     thread=threading.get_native_id() == os.getpid(), token=tokens.take_token(token))
os._exit(5)
""")
    found = only(told)
    assert found["status"] in (status, None)
    assert (found["outcome"], found["old"], found["other"]) == ("died", True, True)
    assert found["thread"], "Python knows the new thread id"
    assert not found["token"], "the guard has taken it"
    assert ends(told) == {"first": status, "other": 5 << 8}


def test_it_is_killed_at_its_deadline():
    told = run("""
returned = execute("sleep", "100", timeout_ns=50_000_000)
tell(outcome=NAMES[returned.outcome], there=os.path.exists(f"/proc/{OLD}/fd/0"))
""")
    assert only(told) == {"outcome": "killed", "there": False}
    assert ends(told) == {"first": signal.SIGKILL, "other": 0}


def test_one_that_a_security_module_protects_is_not_waited_for():
    told = run(f"""
sys.path.insert(0, {str(ROOT / "tests")!r})
from without_clone import SYS_PIDFD_SEND_SIGNAL, install, refusing
install(refusing(SYS_PIDFD_SEND_SIGNAL, errno.EACCES))
returned = execute("sleep", "10", timeout_ns=50_000_000)
tell(outcome=NAMES[returned.outcome], there=os.path.exists(f"/proc/{{OLD}}/fd/0"))
os.kill(OLD, signal.SIGKILL)
""")
    assert only(told) == {"outcome": "killed", "there": True}


def test_while_it_is_held_the_deadline_does_not_run():
    told = run("""
page.struct.hold = 1
returned = execute("sh", "-c", "sleep 0.5; exit 3", timeout_ns=50_000_000)
tell(outcome=NAMES[returned.outcome])
""")
    assert only(told) == {"outcome": "died"}
    assert ends(told)["first"] == 3 << 8


def test_an_early_one_returns_when_the_exec_is_done():
    told = run("""
returned = execute("sleep", "100", early=True, timeout_ns=1)
tell(outcome=NAMES[returned.outcome], other=os.getpid() != OLD, parent=os.getppid() == OLD,
     name=open(f"/proc/{OLD}/comm").read().strip(), token=tokens.take_token(token))
signal.pidfd_send_signal(returned.pidfd, signal.SIGTERM)
""")
    assert only(told) == {
        "outcome": "early",
        "other": True,
        "parent": True,
        "name": "sleep",
        "token": True,
    }
    assert ends(told) == {"first": signal.SIGTERM, "other": 0}


def test_a_message_brings_it_back_with_the_token_untouched():
    told = run("""
import socket
ours, theirs = socket.socketpair()
execute_it = f"echo hello >&{theirs.fileno()}; read line <&{theirs.fileno()}"
returned = execute("bash", "-c", execute_it, keep=[theirs.fileno()], socket=ours.fileno())
tell(outcome=NAMES[returned.outcome], said=ours.recv(10).decode(), token=tokens.take_token(token))
ours.send(b"end\\n")
""")
    assert only(told) == {"outcome": "message", "said": "hello\n", "token": True}


def test_a_new_image_that_commits_has_all_and_reaps_the_guard():
    told = run("""
successor = f'''
import json, os, sys
sys.path.insert(0, {sys.path[0]!r})
from cpr.live import guard
from cpr.live import token as tokens
page = guard.Page({page.fd})
assert tokens.take_token({token})
(child,) = guard.children()
assert child == page.struct.guard_pid
reader = {{reader}}
end = os.read(reader, 1)  # the guard had the other end
guard.reap(child)
print(json.dumps({{{{"end": len(end), "children": guard.children(), "pid": os.getpid()}}}}))
'''
reader, writer = os.pipe()
mapping = __import__("mmap").mmap(-1, 1 << 20)
address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
execute(sys.executable, "-c", successor.format(reader=reader), keep=[token, page.fd, reader],
        mappings=[(address, 1 << 20)])
tell(error="the guard came back")
""")
    found = only(told)
    assert (found["end"], found["children"]) == (0, [])
    assert ends(told) == {"first": 0}


@pytest.mark.parametrize("early", [False, True])
def test_what_is_to_be_dropped_is_closed_late_only(early):
    told = run(f"""
dropped, other = os.pipe()
returned = execute("false", early={early}, drop=[dropped])
try:
    os.fstat(dropped)
    closed = False
except OSError:
    closed = True
os.fstat(other)
tell(closed=closed, said=returned.dropped)
""")
    assert only(told) == {"closed": not early, "said": not early}


@pytest.mark.parametrize(
    ("script", "consumed", "outcome"),
    [
        ("exec {fd}<&-; sleep 0.5; exit 0", True, "died"),
        ("sleep 0.3; exit 0", False, "died"),
        ("bash -c 'exec {fd}<&-; sleep 0.5'; exit 0", False, "died"),
        ("bash -c 'bash -c \"exec {fd}<&-; sleep 0.5\"; exit 0'; exit 0", False, "died"),
        ("bash -c 'exec {fd}<&-; sleep 1' & sleep 0.3; exit 0", False, "died"),
        ("bash -c 'exec {fd}<&-; sleep 0.3'; sleep 2.2; exit 0", False, "died"),
        ("sleep 0.5 {fd}<&- {kept}<&-; exit 0", False, "died"),
        ("exec {fd}<&- {kept}<&-; sleep 2.5; exit 0", False, "died"),
        ("exec {fd}<&-; sleep 0.3; exec {kept}<&-; sleep 2.5; exit 0", False, "died"),
        ("(sleep 0.5); exit 0", False, "died"),
    ],
)
def test_a_program_that_knows_no_token(script, consumed, outcome):
    """It has what it was given when it has closed the state; one that it has started may fail."""
    told = run(f"""
state, kept = os.memfd_create("state"), os.memfd_create("ram")
script = {script!r}.format(fd=state, kept=kept)
keep = [state, kept]
returned = execute("bash", "-c", script, keep=keep, state_fd=state, kept_fd=kept, timeout_ns=10**11)
tell(outcome=NAMES[returned.outcome], consumed=returned.consumed)
""")
    assert only(told) == {"outcome": outcome, "consumed": consumed}


def test_a_child_from_before_has_taken_nothing():
    """Whatever it has open: a helper that an earlier program has left, say."""
    told = run("""
kept = os.memfd_create("ram")
os.set_inheritable(kept, True)
child = os.fork()
if child == 0:
    os.execvp("sleep", ["sleep", "3"])
state = os.memfd_create("state")
given = {"keep": [state, kept], "state_fd": state, "kept_fd": kept, "timeout_ns": 10**11}
returned = execute("bash", "-c", "sleep 2.2; exit 3", **given)
tell(outcome=NAMES[returned.outcome], consumed=returned.consumed)
""")
    assert only(told) == {"outcome": "died", "consumed": False}


def test_a_program_that_ends_slowly_has_taken_nothing():
    """Its descriptors are gone, and it has not ended: its other thread lives."""
    told = run("""
state = os.memfd_create("state")
script = (
    "import ctypes, os, threading, time\\n"
    "def end():\\n"
    "    time.sleep(2.5)\\n"
    "    os._exit(0)\\n"
    "threading.Thread(target=end).start()\\n"
    "ctypes.CDLL(None).syscall(60, 0)\\n"  # exit(2): of this thread only
)
returned = execute(sys.executable, "-c", script, keep=[state], state_fd=state, timeout_ns=10**11)
tell(outcome=NAMES[returned.outcome], consumed=returned.consumed)
""")
    assert only(told) == {"outcome": "died", "consumed": False}


def test_a_program_that_knows_no_token_and_lives_on_has_it():
    told = run("""
state = os.memfd_create("state")
script = f"exec {state}<&-; sleep 3; exit 6"
execute("bash", "-c", script, keep=[state], state_fd=state, timeout_ns=10**9)
tell(error="the guard came back")
""")
    assert ends(told) == {"first": 6 << 8, "other": 0}
    assert len(told) == 2


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("bash -c 'exec {fd}<&-; sleep 2.5; exit 6'; exit $?", 6),
        ("bash -c 'exec {fd}<&-; sleep 2.5' & sleep 0.5; exit 7", 7),
    ],
    ids=["waits", "ends"],
)
def test_a_program_that_has_started_the_one_that_has_it(script, status):
    """A script keeps all descriptors open, or ends before."""
    told = run(f"""
state, kept = os.memfd_create("state"), os.memfd_create("ram")
script = {script!r}.format(fd=state)
keep = [state, kept]
execute("bash", "-c", script, keep=keep, state_fd=state, kept_fd=kept, timeout_ns=10**9)
tell(error="the guard came back")
""")
    assert all("ended" in each for each in told), told
    assert ends(told)["first"] == status << 8


def test_exit_status_of_processes_that_are_there_and_that_are_not():
    for command, status in ((["sh", "-c", "exit 3"], 3 << 8), (["sh", "-c", "kill -15 $$"], 15)):
        process = subprocess.Popen(command)
        pidfd = os.pidfd_open(process.pid)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        assert guard.exit_status(process.pid, pidfd) == status
        process.wait()
        told = guard.exit_status(process.pid, pidfd)
        assert told in (None, status), "None: a kernel whose pidfd does not tell"
        os.close(pidfd)


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (None, "has ended"),
        (9, "was ended by signal 9"),
        (3 << 8, "has ended with exit status 3"),
    ],
)
def test_how_an_end_is_told(status, text):
    assert tokens.describe_status(status) == text


def test_a_thread_that_stays_is_named():
    told = only(
        run("""
gate = threading.Event()
thread = threading.Thread(target=gate.wait)
thread.start()
guard.ALONE_TIMEOUT_NS = 10_000_000
try:
    guard.wait_alone()
except guard.KernelError as error:
    text = str(error)
gate.set()
thread.join()
guard.wait_alone()
tell(text=text, thread=thread.native_id)
""")
    )
    assert f"the threads {told['thread']} (" in told["text"]


@pytest.mark.parametrize("fd", ["none", "small"])
def test_a_page_that_is_none(fd, tmp_path):
    if fd == "none":
        with pytest.raises(OSError):
            guard.Page(999999)
    else:
        number = os.memfd_create("small")
        with pytest.raises(OSError, match="too small"):
            guard.Page(number)
        os.close(number)


@pytest.mark.skipif(len(ALL_CPUS) < 2, reason="there is one CPU")
@pytest.mark.parametrize("early", [False, True])
def test_the_old_image_goes_on_on_the_cpus_that_it_is_given(early):
    first, *others = sorted(ALL_CPUS)
    told = only(
        run(f"""
os.sched_setaffinity(0, {others})
execute("/bin/false", early={early}, cpus=[{first}])
tell(pid=os.getpid(), cpus=sorted(os.sched_getaffinity(0)))
""")
    )
    assert told["cpus"] == [first]


def test_a_thread_that_a_listing_misses_is_waited_for(monkeypatch):
    """While threads end the kernel may leave others out of /proc/self/task."""
    counts = iter([2, 2, 1])
    monkeypatch.setattr(guard.os, "listdir", lambda path: [str(os.getpid())])
    monkeypatch.setattr(guard, "_thread_count", lambda: next(counts))
    guard.wait_alone()
    assert next(counts, None) is None
