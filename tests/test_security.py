"""What others may try: descriptors of a hand-over that are not what was sent, and what is found."""

from __future__ import annotations

import ctypes
import ctypes.util
import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from descriptors import open_fds
from doc_tables import Document
from failing import words
from harness.vm import VMM
from waiting import wait_for

from cpr.errors import StateError
from cpr.live import messages, sealed
from cpr.live.messages import Message
from cpr.migration.hand_over import decode_state, identify
from cpr.state import cpr_channel
from cpr.state.cpr_state import STATE_NAME, CprState


def memfd(size: int) -> int:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    return fd


def handed(fd: int, recorded: list[list[int]]) -> Message:
    data = b"".join(piece for piece, _ in cpr_channel.messages(CprState([("ram0", 0, fd)], [])))
    body = {"cpr": data.hex(), "descriptors": recorded}
    return Message("state", body, [os.dup(fd)])


@pytest.mark.parametrize("what", ["device", "inode", "type", "size"])
def test_a_descriptor_that_is_another_one_is_refused_by_name(what):
    fd = memfd(8192)
    good = identify(fd)
    before = len(open_fds())
    (name, _, number) = decode_state(handed(fd, [good])).fds[0]
    os.close(number)
    bad = list(good)
    bad[["device", "inode", "type", "size"].index(what)] += 1
    with pytest.raises(StateError, match=f"'{name}' id 0 is not what was handed over: its {what}"):
        decode_state(handed(fd, [bad]))
    with pytest.raises(StateError, match="has 1 descriptors, and says what 0 are"):
        decode_state(handed(fd, []))
    assert len(open_fds()) == before
    os.close(fd)


def test_a_memfd_that_somebody_could_still_change_is_refused():
    fd = sealed.create("x")
    os.write(fd, b"0123")
    with pytest.raises(ValueError, match="not sealed"):
        sealed.check(fd, 100)
    sealed.seal(fd)
    assert sealed.check(fd, 100) == 4
    with pytest.raises(ValueError, match="has 4 bytes, more than 3"):
        sealed.check(fd, 3)
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    os.close(fd)


def test_a_long_message_is_sealed_and_one_that_is_not_is_none():
    ours, theirs = messages.pair()
    with ours, theirs:
        messages.send(ours, "state", {"text": "x" * messages.MOST_INLINE}, [])
        fds = socket.recv_fds(theirs, 100, 4)[1]
        assert fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & sealed.SEALS == sealed.SEALS
        os.close(fds[0])
        loose = memfd(10)
        socket.send_fds(ours, [messages.MEMFD], [loose])
        with pytest.raises(messages.Ended, match="is no message: a memfd of the hand-over is not"):
            messages.receive(theirs)
        os.close(loose)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_every_descriptor_of_a_new_image_is_known_by_name(start, accel, overlap):
    """Nothing came over that no owner has: what there is, a VMM that never was updated has too."""
    words = ["-global", f"migration.x-cpr-exec-overlap={overlap}"]
    vm = start.guest("heartbeat", accel, *words)
    pattern = re.compile(r"\[\d+\]|:\d+$")
    before = sorted(pattern.sub("", name) for name in vm.descriptors().values())
    for _ in range(2):
        vm.ask("cpr-exec")
        vm.reconnect()
        wait_for(lambda: not vm.children(), "the guard has ended")
        now = vm.descriptors()
        assert sorted(pattern.sub("", name) for name in now.values()) == before
        assert not any(STATE_NAME in name or "cpr-live" in name for name in now.values())
        for number in now:
            with open(f"/proc/{vm.pid}/fdinfo/{number}") as file:
                values = dict(line.split(":", 1) for line in file)
            flags = int(values["flags"], 8)
            assert number <= 2 or flags & os.O_CLOEXEC, now[number]


def test_sockets_are_for_their_owner_from_the_beginning(start, accel):
    path = "cpr.sock"
    old = os.umask(0)
    try:
        vm = start.guest("heartbeat", accel, "-serial", f"unix:{path},server=on,wait=off")
    finally:
        os.umask(old)
    try:
        for name in (vm.socket, str(ROOT / path)):
            assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    finally:
        vm.qmp.command("quit")


def libseccomp() -> ctypes.CDLL:
    name = ctypes.util.find_library("seccomp")
    if name is None:
        pytest.skip("libseccomp is not installed")
    return ctypes.CDLL(name)


def test_the_sandbox_names_system_calls_as_libseccomp_does():
    library = libseccomp()
    source = (ROOT / "cpr" / "_native" / "sandbox_calls.h").read_text()
    names = re.findall(r"^CALL\(\w+, (\w+), [A-Z_| ]+, [01]\)$", source, re.M)
    assert len(names) == source.count("\nCALL(") > 30
    for name in names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        assert number >= 0, f"libseccomp knows no {name}"


SANDBOXED = """
import ctypes, os, sys, threading
from cpr.uapi import seccomp
seccomp.apply({"enable": True, **dict(word.split("=") for word in sys.argv[1:])}, False)
thread = threading.Thread(target=lambda: None)
thread.start()
thread.join()
libc = ctypes.CDLL(None, use_errno=True)

def denied(function, *arguments):
    try:
        return bool(function(*arguments) == -1 and ctypes.get_errno() == 1)
    except PermissionError:
        return True

print(denied(lambda: os.fork() or os._exit(0)), denied(os.execv, "/bin/true", ["true"]),
      denied(libc.unshare, 0), denied(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0)),
      denied(os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0)), flush=True)
libc.syscall(136, 0, 0)  # ustat, which is obsolete
os.write(1, b"alive")
os.setgid(os.getgid())
os.write(1, b" and with another group")
"""
ALIVE = "alive and with another group"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("spawn=deny obsolete=allow", f"True True True False False\n{ALIVE}"),
        ("spawn=deny", "True True True False False\n"),
        (
            "spawn=deny resourcecontrol=deny elevateprivileges=deny obsolete=allow",
            "True True True True False\nalive",
        ),
    ],
)
def test_the_sandbox_denies_what_it_says(words, said):
    command = [sys.executable, "-c", SANDBOXED, *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.stdout, done.returncode) == (said, 0 if said.endswith(ALIVE) else -signal.SIGSYS)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_the_sandbox_is_put_up_once(start, accel, overlap):
    """The kernel takes some hundreds of filters, and each costs time."""
    vm = start(*words(accel), "-sandbox", "on")

    def filters():
        return re.findall(r"^Seccomp_filters:\t(\d+)$", status_of(vm.pid), re.M)

    before = filters()
    if not before:
        pytest.skip("this kernel does not count filters")
    vm.qmp.command("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    for _ in range(2):
        vm.update()
        assert filters() == before
    vm.qmp.command("cpr-exec", command=[*VMM, *vm.words[len(VMM) :], "-bogus"])
    wait_for(lambda: vm.ask("query-migrate").get("status") == "failed", "it is refused")
    assert filters() == before, "nor by the old command, which has the PID again"


def status_of(pid):
    return Path(f"/proc/{pid}/status").read_text()


DOCUMENT = Document(ROOT / "docs" / "security.md")


@pytest.mark.parametrize("title", ["Guest", "Client", "Peer", "File", "Local user"])
def test_the_document_names_tests_that_there_are(title):
    rows = DOCUMENT.rows(title)
    assert rows
    for row in rows:
        for each in re.findall(r"test_\w+\.py::\w+", row[-1]):
            path, function = each.split("::")
            (found,) = [*(ROOT / "tests").rglob(path)]
            assert re.search(rf"def {function}\b", found.read_text()), each
        assert "test_" in row[-1], row
