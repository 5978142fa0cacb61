"""cpr-exec: the last step of an update, and its inverse for when execvp fails.

    persist    CPR state into a memfd          unpersist  closes it
    execute    variable set, CLOEXEC cleared, execvp; on failure both undone, MigrationError

Without a command of the user's the VMM runs its own command line again, with an -incoming that
reads the state from a private temporary directory; the new image removes that directory.
"""

from __future__ import annotations

import errno
import os
import sys

from cpr.errors import MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.state.fds import PreservedFds

STATE_VARIABLE = "QEMU_CPR_EXEC_STATE"
DIRECTORY_VARIABLE = "CPR_EXEC_TEMPORARY_DIRECTORY"
STATE_FILE = "vmstate"


class Exec:
    """One update's exec.  `directory` is a private temporary directory that it owns, or None."""

    def __init__(
        self, fds: PreservedFds, command: list[str], directory: str | None = None
    ) -> None:
        self.command = command
        self.directory = directory
        self.uri = f"file:{directory}/{STATE_FILE}" if directory else ""
        self._fds = fds
        self._state_fd = -1

    def persist(self) -> None:
        """Writes the CPR state to its memfd; `unpersist` is the inverse."""
        self._state_fd = self._fds.persist()

    def unpersist(self) -> None:
        """Closes the memfd; nothing happens where there is none."""
        if self._state_fd >= 0:
            self._fds.unpersist()
            self._state_fd = -1

    def execute(self) -> None:
        """Becomes the command under this PID.  Comes back only with MigrationError."""
        os.environ[STATE_VARIABLE] = str(self._state_fd)
        if self.directory is not None:
            os.environ[DIRECTORY_VARIABLE] = self.directory
        sys.stdout.flush()
        sys.stderr.flush()
        # Not earlier: a child forked by anything else in this process must not inherit them.
        self._fds.set_cloexec(False)
        os.set_inheritable(self._state_fd, True)
        try:
            if not self.command[0]:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            os.execvp(self.command[0], self.command)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise MigrationError(f"execvp {self.command[0]} failed: {text}") from None
        finally:
            os.set_inheritable(self._state_fd, False)
            self._fds.set_cloexec(True)
            os.environ.pop(STATE_VARIABLE, None)
            os.environ.pop(DIRECTORY_VARIABLE, None)

    def clean_up(self) -> None:
        """Removes the temporary directory, if this update has one."""
        if self.directory is not None:
            remove_directory(self.directory)
            self.directory = None


def plan(fds: PreservedFds, command: list[str] | None) -> Exec:
    """The exec of `command`, or of this VMM's own command line, with a directory for the state.

    The caller calls `clean_up` if the update does not happen.  Raises MigrationError where no
    temporary directory can be made.
    """
    directory = _create_directory()
    step = Exec(fds, [], directory)
    step.command = list(command) if command else own_command(step.uri)
    return step


def own_command(uri: str) -> list[str]:
    """The command line of this process, with its -incoming replaced by `uri`."""
    words = sys.orig_argv[1:]
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in ("-incoming", "--incoming"):
            skip = True
        else:
            kept.append(word)
    return [sys.executable, *kept, "-incoming", uri]


def check_command(command: list[str] | None) -> list[str]:
    """Why the first word of `command` could not be executed; empty where it could."""
    if not command:
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
        directory = os.path.join(base, f"cpr-exec-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            os.mkdir(directory, 0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise MigrationError(
                f"Could not create '{directory}': {error.strerror}; set TMPDIR to a writable folder"
            ) from None
        return directory


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
