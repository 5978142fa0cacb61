"""cpr-exec: the update of this process by exec, and its inverse for when execvp fails.

    begin      CPR state into a memfd that the environment names
    finish     CLOEXEC cleared, execvp; on failure CLOEXEC set again and MigrationError
    walk_back  closes the memfd, removes the temporary directory

Without a command of the user's the VMM runs its own command line again, with an -incoming that
reads the state from a private temporary directory; the new image removes that directory.
"""

from __future__ import annotations

import errno
import os
import sys

from cpr import launcher
from cpr.config import parse_command_line, strip_options
from cpr.errors import CprError, MigrationError
from cpr.migration.mode import EXEC, Mode, cpr_blockers
from cpr.phases import mark

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.ram import RAMBlock
    from cpr.state.fds import PreservedFds

STATE_FILE = "vmstate"
INCOMING = frozenset({"-incoming", "--incoming"})


class Exec(Mode):
    """One update's exec, whose new image reads its state from `uri`.

    `directory` is the private temporary directory that it owns, or None.
    """

    ends_process = True

    def __init__(
        self, fds: PreservedFds, command: list[str], uri: str = "", directory: str | None = None
    ) -> None:
        super().__init__(EXEC)
        self.command = command
        self.uri = uri
        self.directory = directory
        self.before_exec: Callable[[], None] = lambda: None
        self._fds = fds

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Writes the CPR state to a memfd, which the environment names."""
        self._fds.persist()
        return False

    def sends(self, block: RAMBlock, ignore_shared: bool) -> bool:
        return False

    def blockers(self, machine: Machine) -> list[str]:
        return cpr_blockers(machine, self)

    def finish(self, machine: Machine) -> None:
        """Becomes the command under this PID.  Comes back only with MigrationError."""
        import signal

        self.before_exec()
        self._fds.refresh()
        sys.stdout.flush()
        sys.stderr.flush()
        # Python ignores it; the new program shall not.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        # Not earlier: a child forked by anything else in this process must not inherit them.
        self._fds.set_cloexec(False)
        try:
            if not self.command[0]:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            mark("exec")
            os.execvp(self.command[0], self.command)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise MigrationError(f"execvp {self.command[0]} failed: {text}") from None
        finally:
            self._fds.set_cloexec(True)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def walk_back(self) -> None:
        if self._fds.state_fd >= 0:
            self._fds.unpersist()
        if self.directory is not None:
            remove_directory(self.directory)
            self.directory = None


def plan(fds: PreservedFds, command: list[str] | None) -> Exec:
    """The exec of `command`, or of this VMM's own command line, with the URI for its state.

    A command that names no -incoming gets one that reads from a private temporary directory,
    which `walk_back` removes.  Raises MigrationError for
    -incoming defer, where nobody would say what to load, and where no directory can be made.
    """
    words = list(command) if command else own_command()
    if not command:
        _rehearse(words)
    uri = incoming_uri(words)
    if uri == "defer":
        raise MigrationError(
            "cpr-exec cannot use a command with '-incoming defer': give it '-incoming URI' or no "
            "-incoming, or set cpr-exec-command and use migrate"
        )
    if uri is not None:
        return Exec(fds, words, uri)
    directory = _create_directory()
    uri = f"file:{directory}/{STATE_FILE}"
    return Exec(fds, [*words, "-incoming", uri], uri, directory)


def own_command() -> list[str]:
    """The command line of this VMM, without -incoming, and without -S: the state says it.

    Python starts without its `site` module, which takes a third of its start, where the packages
    are found without it too.
    """
    arguments = sys.argv[1:2] + strip_options(sys.argv[2:], ("incoming", "S"))
    if launcher.finds_packages():
        return [sys.executable, "-I", "-S", launcher.SCRIPT, *arguments]
    return [sys.executable, "-m", "cpr.vmm", *arguments]


def _rehearse(words: list[str]) -> None:
    """Parses our own command line again: guest.cfg may have become unreadable since the start."""
    try:
        parse_command_line(words[words.index("run") + 1 :])
    except CprError as error:
        raise MigrationError(f"the new VMM would refuse its command line: {error}") from None


def incoming_uri(command: list[str]) -> str | None:
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
            _rehearse(own_command())
        except MigrationError as error:
            return [str(error)]
        return []
    name = command[0]
    if "/" in name:
        candidates = [name]
    else:
        candidates = [os.path.join(folder, name) for folder in os.get_exec_path()]
    existing = [path for path in candidates if os.path.isfile(path)]
    if not existing:
        return [f"execvp {name} failed: {os.strerror(errno.ENOENT)}"]
    if not any(os.access(path, os.X_OK) for path in existing):
        return [f"execvp {name} failed: {os.strerror(errno.EACCES)}"]
    return []


def _create_directory() -> str:
    base = os.environ.get("TMPDIR") or "/tmp"
    while True:
        directory = os.path.join(base, f"{_own_prefix()}{os.urandom(4).hex()}")
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise MigrationError(
                f"Could not create '{directory}': {error.strerror}; set TMPDIR to a writable folder"
            ) from None
        return directory


def _own_prefix() -> str:
    """What the names of this process's temporary directories begin with, before and after exec."""
    return f"cpr-exec-{os.getpid()}-"


def remove_own_directory(source: dict) -> None:
    """Removes the temporary directory that `source`, which has just been loaded, is in, if any."""
    directory = os.path.dirname(source.get("filename", ""))
    if os.path.basename(directory).startswith(_own_prefix()):
        remove_directory(directory)


def remove_directory(directory: str) -> None:
    """Removes the directory and the state file in it; what is gone already is no error."""
    try:
        os.unlink(os.path.join(directory, STATE_FILE))
    except OSError:
        pass
    try:
        os.rmdir(directory)
    except OSError:
        pass
