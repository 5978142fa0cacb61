"""Part 4: an exec that fails, and the rollback; the guest goes on in the old image."""

from __future__ import annotations

import stat

from ..lab import Lab
from ..match import Mismatch, expect, has, like
from ..messages import maybe
from ..row import Row, Steps, step
from ..steps import (
    EXEC,
    FILE,
    STARTED,
    boot,
    capabilities,
    comes_to,
    counting,
    forget_events,
    guest,
    hmp,
    look_at_process,
    migration,
    migration_comes_to,
    no_events,
    parameters,
    qmp,
    refused,
    running,
    status,
    stderr,
    still,
    survives,
    talk,
    until,
    update,
)
from .migrate import POSTMIGRATE

MISSING = "/nonexistent/command"
NO_SUCH_FILE = f"execvp {MISSING} failed: No such file or directory"
STATE_MEMFD = "/memfd:QEMU_CPR_EXEC_STATE (deleted)"
BACK = (*STARTED, "completed", "failed", "RESUME")
PAUSED = ("setup", "{}", "active", maybe("pass:2"), "device", "completed", "failed")


@step
def make_file(lab: Lab, name: str, content: str, mode: int) -> None:
    path = lab.path(name)
    path.write_text(content)
    path.chmod(mode)


@step
def make_directory(lab: Lab, name: str) -> None:
    lab.path(name).mkdir()


@step
def same_descriptors(lab: Lab) -> None:
    """The state's memfd is closed, and close-on-exec is set again on all the others."""
    before, process = lab.before.descriptors, lab.vm.process
    if not until(lambda: process.descriptors() == before, seconds=1):
        raise Mismatch(f"descriptors\n    before {before}\n    after  {process.descriptors()}")


@step
def state_memfds(lab: Lab, count: int) -> None:
    """The process has this many memfds with a CPR state, which an exec would pass on."""
    open_ones = [
        each for each in lab.vm.process.descriptors().values() if each.target == STATE_MEMFD
    ]
    expect("memfds with a CPR state", count, len(open_ones), lab.names)


def fails(id: str, source: str, command: list[str], text: str, *before: Steps) -> Row:
    """The command cannot be executed: the guest resumes, and query-migrate says why."""
    return Row(
        id,
        f"4: {source}",
        boot(),
        before,
        counting(),
        capabilities("events"),
        parameters(mode="cpr-exec", cpr_exec_command=command),
        look_at_process(),
        talk("migrate", {"uri": FILE}, *BACK),
        status("running"),
        migration({"status": "failed", "error-desc": text}),
        hmp("info migrate", f"Status: \t\tfailed ({text})"),
        stderr(text),
        same_descriptors(),
        counting(),
    )


@step
def tried(lab: Lab, uri: str) -> None:
    """A `migrate` that fails sooner or later."""
    lab.vm.qmp.execute("migrate", {"uri": lab.fill(uri)})
    until(lambda: lab.vm.query("query-migrate").get("status") == "failed")
    lab.vm.qmp.events.clear()


EXEC_FAILS = "Failed execvp"

SHELL_FALLBACK = [
    boot(),
    make_file("$dir/script", "exec sleep 600\n", stat.S_IRWXU),
    counting(),
    capabilities("events"),
    parameters(mode="cpr-exec", cpr_exec_command=["$dir/script"]),
]


@step
def has_become(lab: Lab, *words: str) -> None:
    """The process has this command line sooner or later."""
    wanted = list(words)
    until(lambda: lab.vm.process.command_line() == wanted)
    expect("command line", wanted, lab.vm.process.command_line(), lab.names)


def without_guest(id: str, source: str, options: str, before: Steps, *after: Steps) -> Row:
    """The guest did not run: it does not resume, and is in postmigrate afterwards."""
    return Row(
        id,
        f"4: {source}",
        boot(options),
        before,
        capabilities("events"),
        parameters(mode="cpr-exec", cpr_exec_command=[MISSING]),
        forget_events(),
        talk("migrate", {"uri": FILE}, *PAUSED),
        status("postmigrate"),
        hmp("info status", "VM status: paused (postmigrate)"),
        migration({"status": "failed", "error-desc": NO_SUCH_FILE}),
        no_events(),
        still(),
        refused("migrate", {"uri": FILE}, POSTMIGRATE),
        talk("cont", None, "RESUME", "{}"),
        status("running"),
        after,
    )


ROWS = [
    fails("exec-missing", f"{EXEC_FAILS}: not existing", [MISSING], NO_SUCH_FILE),
    fails(
        "exec-not-in-path",
        f"{EXEC_FAILS}: not existing",
        ["no-such-command-in-path"],
        "execvp no-such-command-in-path failed: No such file or directory",
    ),
    fails(
        "exec-empty-word",
        'command [""]',
        [""],
        "execvp  failed: No such file or directory",
    ),
    fails(
        "exec-not-executable",
        f"{EXEC_FAILS}: EACCES for a non-executable file or a directory",
        ["$dir/file"],
        "execvp $dir/file failed: Permission denied",
        make_file("$dir/file", "", stat.S_IRUSR),
    ),
    fails(
        "exec-directory",
        f"{EXEC_FAILS}: EACCES for a non-executable file or a directory",
        ["$dir/folder"],
        "execvp $dir/folder failed: Permission denied",
        make_directory("$dir/folder"),
    ),
    fails(
        "exec-too-big",
        f"{EXEC_FAILS}: E2BIG",
        ["/bin/true", "x" * (1 << 17)],
        "execvp /bin/true failed: Argument list too long",
    ),
    Row(
        "exec-sandbox",
        f"4: {EXEC_FAILS}: EPERM under -sandbox on,spawn=deny",
        boot(guest("-sandbox on,spawn=deny")),
        counting(),
        parameters(mode="cpr-exec", cpr_exec_command=["/bin/true"]),
        qemu=[
            qmp("migrate", {"uri": FILE}, {}),
            migration_comes_to(
                {
                    "status": "failed",
                    "error-desc": "execvp /bin/true failed: Operation not permitted",
                }
            ),
            comes_to("running"),
            counting(),
        ],
        cpr=[
            refused("migrate", {"uri": FILE}, like("-sandbox spawn=deny forbids execve.*")),
            running(),
            counting(),
        ],
    ),
    *(
        Row(
            f"exec-{name}-sandbox",
            "4: -sandbox on alone, spawn=allow, elevateprivileges=children: exec works",
            boot(guest(f"-sandbox on{more}")),
            update(),
            survives(),
        )
        for name, more in (
            ("plain", ""),
            ("spawning", ",spawn=allow"),
            ("children", ",elevateprivileges=children"),
        )
    ),
    Row(
        "exec-many-tries",
        f"4: {EXEC_FAILS}: any number of tries; a good command afterwards works",
        boot(),
        counting(),
        capabilities("events"),
        parameters(mode="cpr-exec", cpr_exec_command=[MISSING]),
        [[talk("migrate", {"uri": FILE}, *BACK), status("running"), counting()]] * 3,
        state_memfds(0),
        update(),
        comes_to("running"),
        migration({"status": "completed"}),
        counting(),
    ),
    without_guest(
        "exec-missing-paused",
        "Failed execvp: guest paused or prelaunch before",
        guest(),
        [counting(), qmp("stop")],
        counting(),
    ),
    without_guest(
        "exec-missing-prelaunch",
        "Failed execvp: guest paused or prelaunch before",
        guest("-S"),
        [],
        counting(afresh=True),
    ),
    Row(
        "exec-text-file",
        "4: a non-ELF executable text does NOT fail",
        SHELL_FALLBACK,
        qemu=[
            talk("migrate", {"uri": FILE}, *EXEC),
            has_become("sleep", "600"),
        ],
        cpr=[
            talk("migrate", {"uri": FILE}, *BACK),
            migration(
                {"status": "failed", "error-desc": "execvp $dir/script failed: Exec format error"}
            ),
            counting(),
        ],
    ),
    *(
        Row(
            f"leak-{name}",
            "4: Failures BEFORE the thread runs: the state memfd stays open",
            boot(),
            capabilities("events"),
            parameters(mode="cpr-exec", cpr_exec_command=[MISSING]),
            tried(uri),
            tried(uri),
            migration(has({"status": "failed"})),
            running(),
            qemu=[state_memfds(2)],
            cpr=[state_memfds(0)],
        )
        for name, uri in (
            ("no-directory", "file:/nonexistent/x"),
            ("nobody-listens", "unix:$dir/nobody.sock"),
        )
    ),
]
