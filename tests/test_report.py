"""cpr.report: whatever stderr and stdout are, saying something neither raises nor blocks."""

from __future__ import annotations

import os
import pty
import resource
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cpr import report

DEADLINE_S = 20
FLOOD = 300  # of these lines together are more than any pipe, socket or terminal holds
LINE = "x" * 4000


@pytest.fixture(autouse=True)
def no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpr.report._limits", {})


@contextmanager
def standing_for(fd: int, other: int) -> Iterator[None]:
    """`fd` is what `other` is; other < 0: closed."""
    saved = os.dup(fd)
    if other >= 0:
        os.dup2(other, fd)
    else:
        os.close(fd)
    try:
        yield
    finally:
        os.dup2(saved, fd)
        os.close(saved)


def flood() -> None:
    """All ways to say something, often; a blocked one is ended by the alarm."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(DEADLINE_S)
    try:
        for _ in range(FLOOD):
            report.error_report(LINE)
        report.warn_report(LINE)
        report.info_report(LINE)
        report.announce(LINE)
        report.exception_report(ValueError(LINE))
    finally:
        signal.alarm(0)


def _too_long(number: int, frame: object) -> None:
    raise AssertionError("it blocks")


def closed() -> list[int]:
    return [-1]


def unread_pipe() -> list[int]:
    return list(reversed(os.pipe()))


def broken_pipe() -> list[int]:
    reader, writer = os.pipe()
    os.close(reader)
    return [writer]


def read_only() -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY)]


def full_disk() -> list[int]:
    return [os.open("/dev/full", os.O_WRONLY)]


def unread_socket() -> list[int]:
    return [end.detach() for end in socket.socketpair()]


def unread_terminal() -> list[int]:
    return list(reversed(pty.openpty()))


def stopped_terminal() -> list[int]:
    master, slave = pty.openpty()
    termios.tcflow(slave, termios.TCOOFF)  # as Ctrl-S does
    return [slave, master]


def hung_up_terminal() -> list[int]:
    master, slave = pty.openpty()
    os.close(master)
    return [slave]


BAD = [
    closed,
    unread_pipe,
    broken_pipe,
    read_only,
    full_disk,
    unread_socket,
    unread_terminal,
    stopped_terminal,
    hung_up_terminal,
]


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
def test_what_cannot_be_written_is_dropped(kind: Callable[[], list[int]]) -> None:
    fds = kind()
    try:
        with standing_for(1, fds[0]), standing_for(2, fds[0]):
            flood()
    finally:
        for fd in fds:
            if fd >= 0:
                os.close(fd)


def test_without_proc_a_pipe_is_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise FileNotFoundError

    monkeypatch.setattr("cpr.report.os.open", refuse)
    for kind in (unread_pipe, broken_pipe, stopped_terminal):
        fds = kind()
        with standing_for(1, fds[0]), standing_for(2, fds[0]):
            flood()
        for fd in fds:
            os.close(fd)


def test_a_file_that_may_not_grow() -> None:
    code = (
        "import resource; from cpr import report\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "report.error_report('longer than ten bytes'); report.error_report('nothing of this')"
    )
    with open("/dev/null") as null, open(os.memfd_create("stderr"), "w+b") as file:
        run = [sys.executable, "-c", code]
        subprocess.run(run, stdin=null, stderr=file, check=True, timeout=DEADLINE_S)
        file.seek(0)
        assert file.read() == b"cpr-vmm: l"


def test_no_descriptor_left(capfd: pytest.CaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader, writer = os.pipe()
    with standing_for(2, writer):
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            report.error_report("dropped or not")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    os.close(reader)
    os.close(writer)


def test_what_is_said_again_and_again_is_counted(
    capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cpr.report.REPORTS_PER_S", 0)
    for _ in range(report.MOST_REPORTS + 5):
        report.warn_report("a guest's mistake")
    assert len(capfd.readouterr().err.splitlines()) == report.MOST_REPORTS
    monkeypatch.setattr("cpr.report.REPORTS_PER_S", 1e9)
    report.error_report("something else")
    assert capfd.readouterr().err == "cpr-vmm: something else\n"
    report.warn_report("a guest's mistake")
    assert capfd.readouterr().err == (
        "cpr-vmm: warning: 5 reports were left out\ncpr-vmm: warning: a guest's mistake\n"
    )


def test_texts(capfd: pytest.CaptureFixture) -> None:
    report.error_report("the disk is gone")
    report.warn_report(ValueError("odd"))
    report.info_report("waiting")
    report.error_report("a name of \x1b[2J\udc80 bytes\n  and a second line")
    report.announce("here it is")
    report.output("usage: …\n")
    shown = capfd.readouterr()
    assert shown.err == (
        "cpr-vmm: the disk is gone\n"
        "cpr-vmm: warning: odd\n"
        "cpr-vmm: info: waiting\n"
        "cpr-vmm: a name of \\x1b[2J\\udc80 bytes\n  and a second line\n"
    )
    assert shown.out == "here it is\nusage: …\n"


def test_a_traceback_is_shown(capfd: pytest.CaptureFixture) -> None:
    try:
        [][1]
    except IndexError as error:
        report.exception_report(error)
    shown = capfd.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("IndexError: list index out of range\n")


def test_the_users_descriptors_stay_as_they_were() -> None:
    for fds in (unread_pipe(), unread_socket(), unread_terminal()):
        with standing_for(2, fds[0]):
            report.error_report("short")
            assert os.get_blocking(2)
        assert os.read(fds[1], 100).rstrip() == b"cpr-vmm: short"
        for fd in fds:
            os.close(fd)


def test_output_waits_for_a_slow_reader() -> None:
    text = LINE * FLOOD
    code = f"from cpr import report; report.output({text!r})"
    for nonblocking in (False, True):
        reader, writer = os.pipe()
        os.set_blocking(writer, not nonblocking)
        process = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=writer)
        os.close(writer)
        assert process.stdin is not None
        process.stdin.write(code.encode())
        process.stdin.close()
        with open(reader) as file:
            assert file.read() == text
        assert process.wait(DEADLINE_S) == 0


def test_output_that_nobody_takes() -> None:
    for kind in (closed, broken_pipe, full_disk, hung_up_terminal):
        fds = kind()
        with standing_for(1, fds[0]):
            report.output("usage")
        if fds[0] >= 0:
            os.close(fds[0])


def test_closed_standard_descriptors_are_taken_before_a_file_gets_their_number() -> None:
    code = (
        "import os; from cpr import report; report.open_standard_descriptors()\n"
        "fd = os.memfd_create('disk'); report.error_report('not into a disk'); "
        "report.announce('no')\n"
        "import sys; print('no', file=sys.stderr, flush=True); sys.stdout.flush()\n"
        "os._exit(not (fd > 2 and os.fstat(fd).st_size == 0 and os.get_inheritable(2)))"
    )
    command = f'exec {sys.executable} -c "$0" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, code], timeout=DEADLINE_S).returncode == 0
