"""The programs of an update: this one's command line and files, what another one knows.

A program says what it knows when its verb `run` is replaced: `python -m cpr.vmm protocol` prints
the versions of what old and new image say to each other, one a line, and a number that it is given
in the environment.  What is not asked, because its command has no such verb, or ends without an
answer, is updated in QEMU's way.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import errno
import os
import stat
import sys
import time

from cpr import launcher
from cpr.config import parse_command_line, strip_options
from cpr.errors import CprError, MigrationError
from cpr.live import oom
from cpr.live.token import is_readable
from cpr.live.transaction import HEARS, PROTOCOL, VERSIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from subprocess import Popen

    from cpr.live.program_files import ProgramFiles

VERB = "run"
PROTOCOL_VERB = "protocol"
ANSWER_TIMEOUT = 10.0  # s
MOST_ANSWER = 200  # bytes
NO_PROGRAM = (
    *(errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EACCES, errno.ENOEXEC),
)
BY_SIGNAL = 128  # the exit status of a shell whose command the signal N has ended, less N
QUESTION = "CPR_QUESTION"
"""In the environment of a program that is asked: the number that it is to repeat."""
LEAST_NUMBER = 1 << 32  # of QUESTION; no version
END_MS = 2000
INCOMING = frozenset({"-incoming", "--incoming"})


def own_command() -> list[str]:
    """The command line of this VMM, without -incoming, and without -S: the state says it.

    Python starts without its `site` module, which takes a third of its start, where the packages
    are found without it too.
    """
    arguments = sys.argv[1:2] + strip_options(sys.argv[2:], ("incoming", "S"))
    if launcher.finds_packages():
        return [sys.executable, "-I", "-S", launcher.SCRIPT, *arguments]
    return [sys.executable, "-m", "cpr.vmm", *arguments]


def check_own_command() -> None:
    """Parses it again: guest.cfg may have become unreadable since.  Raises MigrationError."""
    words = own_command()
    for word in words[words.index(VERB) + 1 :]:
        if _is_pipe(word):
            raise MigrationError(f"'{word}' is a pipe, and cannot be read again: give a file")
    try:
        parse_command_line(words[words.index(VERB) + 1 :])
    except CprError as error:
        raise MigrationError(f"the new VMM would refuse its command line: {error}") from None


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def incoming_uri(command: Sequence[str]) -> str | None:
    """The URI of the last -incoming of a command line."""
    uri = None
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word in INCOMING:
            uri = following
    return uri


def check_command(command: list[str] | None) -> list[str]:
    """Why the first word of `command` could not be executed; empty where it could."""
    if not command:
        try:
            check_own_command()
        except MigrationError as error:
            return [str(error)]
        return []
    name = command[0]
    if "/" in name:
        candidates = [name]
    else:
        candidates = [os.path.join(folder, name) for folder in os.get_exec_path()]
    problem = errno.ENOENT
    for path in candidates:
        try:
            found = os.stat(path)
        except PermissionError:
            problem = errno.EACCES
        except (OSError, ValueError):
            continue
        else:
            if stat.S_ISREG(found.st_mode) and os.access(path, os.X_OK):
                return []
            problem = errno.EACCES
    return [f"execvp {name} failed: {os.strerror(problem)}"]


def spoken_versions(
    command: Sequence[str], files: ProgramFiles, serve: Callable[[], str]
) -> list[int]:
    """The versions of the hand-over that the program of `command` speaks; none where it has no
    idea of that, or there is none.  Takes a program's start, unless it is this very one.

    `serve()` is called again and again meanwhile: the guest runs on.  What it says ends that.
    Raises MigrationError with that, for a program that cannot be asked, which may speak any, and
    for one that does not get this process's environment: it would not know of the update, and start
    another guest.
    """
    words = list(command)
    if VERB not in words:
        return []
    program = words[: words.index(VERB)]
    own = own_command()
    if program == own[: own.index(VERB)] and not files.changed():
        return list(VERSIONS)
    import subprocess

    from cpr.migration import channel
    from cpr.migration.child import starting, waited_for
    from cpr.process_group import end_group, own_group

    number = LEAST_NUMBER + int.from_bytes(os.urandom(4), "little")
    question = [*program, PROTOCOL_VERB]
    try:
        with starting:
            process = subprocess.Popen(
                question,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, QUESTION: str(number)},
                process_group=own_group(),
            )
            waited_for.add(process.pid)
    except OSError as error:
        if error.filename == question[0] and error.errno in NO_PROGRAM:
            return []
        what = "" if error.filename in (None, question[0]) else f"{error.filename}: "
        raise _unasked(f"it could not be started: {what}{error.strerror}") from None
    except ValueError:
        return []
    except subprocess.SubprocessError as error:
        raise _unasked(f"it could not be started: {error}") from None
    oom.offer(process.pid)
    try:
        said = _read_answer(process, serve)
    finally:  # also one that does not end, or has started others
        end_group(process, channel.reap_later)
        waited_for.discard(process.pid)
    words_of_it = said.split()
    if not all(word.isdigit() for word in words_of_it):
        return []
    versions = [int(word) for word in words_of_it]
    if HEARS in versions and number not in versions:
        raise MigrationError(
            f"'{' '.join(program)}' does not hand its environment to the new program, in which an "
            "update tells of itself: without env -i, sudo or the like it does"
        )
    return versions


def answer() -> str:
    """What this program says when it is asked."""
    number = os.environ.get(QUESTION, "")
    numbers = [*VERSIONS, number] if number.isdigit() else VERSIONS
    return "".join(f"{each}\n" for each in numbers)


def _read_answer(process: Popen[bytes], serve: Callable[[], str]) -> bytes:
    """What a program says until it ends well; nothing where it has another exit status.

    Raises MigrationError with what `serve` says against waiting for it, and for one that takes too
    long, or that a signal ends: what it knows is not known.
    """
    assert process.stdout is not None
    fd, answer = process.stdout.fileno(), b""
    os.set_blocking(fd, False)
    deadline = time.monotonic() + ANSWER_TIMEOUT
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise _unasked(f"it has not answered within {ANSWER_TIMEOUT:.0f} s")
        if reason := serve():
            raise MigrationError(reason)
    status = process.returncode
    signo = -status if status < 0 else status - BY_SIGNAL
    if 0 < signo < signal.NSIG:
        raise _unasked(f"it was ended by signal {signo}")
    try:
        answer = os.read(fd, MOST_ANSWER)
    except BlockingIOError:  # nothing, and something that it has started is still there
        return b""
    return answer if status == 0 else b""


def _unasked(reason: str) -> MigrationError:
    return MigrationError(
        f"the new program could not be asked what it knows: {reason}. Try again; a command without "
        f"the word '{VERB}', as that of a script, is not asked, and is updated in QEMU's way"
    )


class Held:
    """A descriptor that only an update's new program has got, under the same number as here."""

    def __init__(self, fd: int) -> None:
        """Raises OSError; the descriptor may be closed after that."""
        self._fd = fd
        self._file = os.fstat(fd)
        self._target = os.readlink(f"/proc/self/fd/{fd}")

    def has(self, pid: str) -> bool:
        """Whether this process has it too.  Raises OSError where that cannot be seen."""
        path = f"/proc/{pid}/fd/{self._fd}"
        # A file system that hangs, on which that one may be, is asked by stat(2), not by readlink.
        return os.readlink(path) == self._target and os.path.samestat(os.stat(path), self._file)


def end_started(held: Held, spared: int = 0) -> None:
    """Kills what the program of an update has started, which has ended itself, as a script has, or
    been killed, or become the process `spared`: who still has what it got.  The guest's RAM and
    disks may be among that, with the locks on them.
    """
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in (os.getpid(), spared):
            continue
        try:
            if not held.has(name):
                continue
            pidfd = os.pidfd_open(int(name))
        except OSError:
            continue
        try:
            if held.has(name):  # it is still that process
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                is_readable(pidfd, END_MS)
        except OSError:
            pass
        finally:
            os.close(pidfd)


def check_versions(versions: Sequence[int]) -> None:
    """Raises MigrationError for a program that has a hand-over too, but not this one's."""
    if versions and PROTOCOL not in versions:
        theirs = ", ".join(map(str, versions))
        raise MigrationError(
            f"the new program speaks version {theirs} of the hand-over, this one {PROTOCOL}: "
            "x-cpr-exec-overlap=off updates it in QEMU's way"
        )
