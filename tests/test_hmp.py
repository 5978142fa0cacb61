"""The HMP monitor on a terminal: banner, prompt, echo, completion, and waiting for migrations."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest
from fake_vmm import FakeVmm, ScriptedChardev
from hypothesis import given
from hypothesis import strategies as st

from cpr import runstate
from cpr.chardev.base import create
from cpr.monitor.command_line import MAX_LINE_SIZE
from cpr.monitor.commands import COMMANDS
from cpr.monitor.control import MAX_UNREAD
from cpr.monitor.hmp import HmpMonitor, execute, run_line
from cpr.monitor.schema import Session

BANNER = b"QEMU 11.1.3 monitor - type 'help' for more information\r\n"
PROMPT = b"(qemu) "

# What a terminal showed for these keys with QEMU 11.1.3 (p3h_defer, without the exec).
SESSION = (
    "info status\n"
    "migrate_set_parameter mode cpr-exec\n"
    "migrate_set_parameter cpr-exec-command /bin/vmm -machine pc -incoming defer\n"
    "info migrate_parameters\n"
    "migrate -d file:/tmp/state\n"
    "info migrate\n"
    "bogus\n"
)
SCREEN = """\
QEMU 11.1.3 monitor - type 'help' for more information
(qemu) info status
VM status: running
(qemu) migrate_set_parameter mode cpr-exec
(qemu) migrate_set_parameter cpr-exec-command /bin/vmm -machine pc -incoming defer
(qemu) info migrate_parameters
announce-initial: 50 ms
announce-max: 550 ms
announce-rounds: 5
announce-step: 100 ms
throttle-trigger-threshold: 50
cpu-throttle-initial: 20
cpu-throttle-increment: 10
cpu-throttle-tailslow: off
max-cpu-throttle: 99
tls-creds: ''
tls-hostname: ''
tls-authz: ''
max-bandwidth: 134217728 bytes/second
avail-switchover-bandwidth: 0 bytes/second
max-postcopy-bandwidth: 0 bytes/second
downtime-limit: 300 ms
x-checkpoint-delay: 20000 ms
multifd-channels: 2
multifd-compression: none
zero-page-detection: multifd
xbzrle-cache-size: 67108864 bytes
x-vcpu-dirty-limit-period: 1000 ms
vcpu-dirty-limit: 1 MB/s
mode: cpr-exec
direct-io: off
x-rdma-chunk-size: 1048576 bytes
cpr-exec-command: /bin/vmm -machine pc -incoming defer
(qemu) migrate -d file:/tmp/state
(qemu) info migrate
(qemu) bogus
unknown command: 'bogus'
(qemu) """


def rendered(output: bytes) -> str:
    """What a terminal shows: cursor left and right, erase to the line's end, CR and LF."""
    rows, column = [""], 0
    for token in re.findall(rb"\x1b\[[CDK]|[^\x1b]", output):
        if token == b"\x1b[D":
            column -= 1
        elif token == b"\x1b[C":
            column += 1
        elif token == b"\x1b[K":
            rows[-1] = rows[-1][:column]
        elif token == b"\n":
            rows.append("")
        elif token == b"\r":
            column = 0
        else:
            rows[-1] = rows[-1][:column] + token.decode() + rows[-1][column + 1 :]
            column += 1
    return "\n".join(rows)


class Terminal:
    def __init__(self, vmm: FakeVmm, label: str = "mon0") -> None:
        self.chardev = ScriptedChardev(vmm.loop, label)
        self.monitor = HmpMonitor(self.chardev, vmm)

    def type(self, keys: bytes | str) -> bytes:
        self.chardev.type(keys.encode() if isinstance(keys, str) else keys)
        return self.chardev.take_output()

    def enter(self, line: str) -> str:
        """What a line prints before the next prompt."""
        output = self.type(line + "\n")
        return output.partition(b"\x1b[K\r\n")[2].removesuffix(PROMPT).decode()


@pytest.fixture
def vmm() -> Iterator[FakeVmm]:
    vmm = FakeVmm()
    yield vmm
    vmm.close()


@pytest.fixture
def terminal(vmm: FakeVmm) -> Terminal:
    terminal = Terminal(vmm)
    assert terminal.chardev.take_output() == BANNER + PROMPT
    return terminal


def test_a_session_as_qemu_showed_it(vmm: FakeVmm) -> None:
    vmm.machine.runstate.set(runstate.RUNNING)
    terminal = Terminal(vmm)
    assert rendered(terminal.type(SESSION)) == SCREEN


def test_echo_byte_for_byte(terminal: Terminal) -> None:
    assert terminal.type("in\n") == (b"i\x1b[K\x1b[Din\x1b[K\r\nunknown command: 'in'\r\n(qemu) ")


def test_empty_lines_and_blanks(terminal: Terminal) -> None:
    assert terminal.type("\n") == b"\r\n" + PROMPT
    assert terminal.type(" \n").endswith(b"\r\n" + PROMPT)
    assert "unknown command: '  foo'" in rendered(terminal.type("  foo\n"))


def test_errors(terminal: Terminal) -> None:
    assert terminal.enter("migrate_set_parameter foo 1") == (
        "Error: invalid parameter value: foo\r\n"
    )
    assert terminal.enter("stop foo") == (
        "stop|s: extraneous characters at the end of line\r\n"
        'Try "help stop" for more information\r\n'
    )
    assert terminal.enter("info foo") == "unknown command: 'info foo'\r\n"


def test_a_bug_in_a_command_does_not_end_the_monitor(
    vmm: FakeVmm, terminal: Terminal, capfd: pytest.CaptureFixture
) -> None:
    vmm.machine.stop = None  # type: ignore[method-assign, assignment]
    assert terminal.enter("stop").startswith("Error: internal error: ")
    assert "Traceback" in capfd.readouterr().err
    assert terminal.enter("info name") == "guest\r\n"


def test_help(terminal: Terminal) -> None:
    text = terminal.enter("help")
    assert "cont|c  -- resume emulation\r\n" in text
    assert "migrate [-d] [-r] uri -- migrate to URI (using -d to not wait" in text
    assert "info status" not in text
    assert terminal.enter("? info status") == (
        "info status  -- show the current VM status (running|paused)\r\n"
    )
    assert terminal.enter("help info foo") == "unknown command: 'info foo'\r\n"
    assert terminal.enter("help info") == terminal.enter("info")


def test_history(terminal: Terminal) -> None:
    terminal.type("info name\ninfo uuid\n")
    assert terminal.enter("info history") == (
        "0: 'info name'\r\n1: 'info uuid'\r\n2: 'info history'\r\n"
    )


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("inf", "info "),
        ("  inf", "  info "),
        ("info regi", "info registers "),
        ("help info regi", "help info registers "),
        ("? system_r", "? system_reset "),
        ("migrate_set_p", "migrate_set_parameter "),
        ("migrate_set_parameter cpr", "migrate_set_parameter cpr-exec-command "),
        ("migrate_set_capability ev", "migrate_set_capability events "),
        ("migrate_set_capability events of", "migrate_set_capability events off "),
        ("migrate_set_capability events o", "migrate_set_capability events o"),
        ("info migrate_", "info migrate_"),
        ("info status x", "info status x"),
        ("stop ", "stop "),
        ("help stop ", "help stop "),
        ('"open', '"open'),
        ("nothing", "nothing"),
    ],
)
def test_completion(terminal: Terminal, typed: str, line: str) -> None:
    shown = rendered(b"(qemu) " + terminal.type(typed + "\t"))
    assert shown.splitlines()[-1] == f"(qemu) {line}"


def test_completion_lists_candidates(terminal: Terminal) -> None:
    terminal.type("info migrate")
    assert terminal.type("\t") == (
        b"\r\nmigrate               migrate_capabilities  migrate_parameters    \r\n"
        b"(qemu) info migrate\x1b[K"
    )


def test_several_monitors_have_their_own_lines(vmm: FakeVmm) -> None:
    first, second = Terminal(vmm, "a"), Terminal(vmm, "b")
    first.type("info na")
    assert second.enter("info uuid").startswith("00000000-")
    assert "guest" in rendered(first.type("me\n"))


def test_a_new_client_gets_a_new_banner(terminal: Terminal) -> None:
    terminal.type("half a li")
    terminal.chardev.reconnect()
    assert terminal.chardev.take_output() == BANNER + PROMPT
    assert terminal.enter("info name") == "guest\r\n"


def test_migrate_waits_and_typed_ahead_lines_stay(vmm: FakeVmm, terminal: Terminal) -> None:
    screen = terminal.type("migrate file:/x\ninfo name\n")
    assert screen.endswith(b"migrate file:/x\x1b[K\r\n")
    assert terminal.chardev.typed == b"info name\n"  # for the new image, after an exec
    vmm.migration.finish()
    assert "guest" in rendered(terminal.chardev.take_output())
    assert terminal.chardev.typed == b""


def test_quit_shows_no_prompt_again(vmm: FakeVmm, terminal: Terminal) -> None:
    assert terminal.type("quit\n").endswith(b"quit\x1b[K\r\n")
    assert vmm.quits == ["host-qmp-quit"]
    assert terminal.type("x") == b""


def test_migrate_that_is_refused_does_not_wait(vmm: FakeVmm, terminal: Terminal) -> None:
    vmm.migration.refusal = "There's a migration process in progress"
    assert terminal.type("migrate file:/x\n").endswith(
        b"Error: There's a migration process in progress\r\n(qemu) "
    )


def test_the_prompt_comes_back_before_the_switchover(vmm: FakeVmm, terminal: Terminal) -> None:
    vmm.migration.status = "active"
    terminal.type("migrate file:/x\n")
    vmm.migration.status = "pre-switchover"
    deadline = time.monotonic() + 10
    output = b""
    while not output:
        assert time.monotonic() < deadline
        vmm.loop.iterate(10_000_000)
        output = terminal.chardev.take_output()
    assert output == PROMPT
    vmm.migration.finish()
    assert terminal.chardev.take_output() == b""


NAMES = sorted({name for command in COMMANDS for name in command.names} - {"memsave", "pmemsave"})


@given(st.sampled_from(["", *NAMES]), st.sampled_from(["", " ", "/"]), st.text(max_size=30))
def test_any_line_gets_an_answer(name: str, separator: str, rest: str) -> None:
    vmm = FakeVmm()
    for line in (name + separator + rest, f"info {name}{separator}{rest}"):
        text, _ = execute(vmm, Session(lambda: -1), line)
        assert "internal error" not in text
    vmm.close()


def test_close_detaches(vmm: FakeVmm, terminal: Terminal) -> None:
    terminal.monitor.close()
    assert terminal.type("info name\n") == b""
    assert not terminal.chardev.has_frontend


def test_on_a_pty(vmm: FakeVmm) -> None:
    class Config:
        id, backend = "pty0", "pty"
        options: dict[str, object] = {}

    chardev = create(Config, vmm.loop)
    monitor = HmpMonitor(chardev, vmm)
    slave = os.open(chardev.describe().removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
    os.set_blocking(slave, False)
    os.write(slave, b"info name\n")
    output = b""
    deadline = time.monotonic() + 10
    while not output.endswith(b"guest\r\n(qemu) "):
        assert time.monotonic() < deadline
        vmm.loop.iterate(10_000_000)
        try:
            output += os.read(slave, 1000)
        except BlockingIOError:
            pass
    assert output.startswith(BANNER + PROMPT)
    os.close(slave)
    monitor.close()
    chardev.close()


def test_lines_of_a_client_that_reads_nothing_wait(vmm: FakeVmm, terminal: Terminal) -> None:
    chardev = terminal.chardev
    chardev.stalled = True
    chardev.type(b"help\n" * 100)
    assert MAX_UNREAD < len(chardev.output) < 2 * MAX_UNREAD
    assert chardev.typed
    while chardev.typed:
        chardev.take_output()
        chardev.accept_input()


def test_a_line_that_is_too_long_is_refused(vmm: FakeVmm) -> None:
    for line in ("x" * MAX_LINE_SIZE, 'print "' + "x" * (1 << 20)):
        text = run_line(vmm, Session(lambda: -1), line, None)
        too_long = len(line) > MAX_LINE_SIZE
        assert text.startswith("command line of more than" if too_long else "unknown command")
