"""cpr-exec: the last step of an update, and its inverse for when execvp fails.

    persist    CPR state into a memfd that the environment names    unpersist  closes it
    execute    CLOEXEC cleared, execvp; on failure CLOEXEC set again and MigrationError

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

DIRECTORY_VARIABLE = "CPR_EXEC_TEMPORARY_DIRECTORY"
STATE_FILE = "vmstate"
INCOMING = frozenset({"-incoming", "--incoming"})
START_PAUSED = frozenset({"-S", "--S"})


class Exec:
    """One update's exec, whose new image reads its state from `uri`.

    `directory` is the private temporary directory that it owns, or None.
    """

    def __init__(
        self, fds: PreservedFds, command: list[str], uri: str = "", directory: str | None = None
    ) -> None:
        self.command = command
        self.uri = uri
        self.directory = directory
        self._fds = fds

    def persist(self) -> None:
        """Writes the CPR state to its memfd; `unpersist` is the inverse."""
        self._fds.persist()

    def unpersist(self) -> None:
        """Closes the memfd; nothing happens where there is none."""
        if self._fds.state_fd >= 0:
            self._fds.unpersist()

    def execute(self) -> None:
        """Becomes the command under this PID.  Comes back only with MigrationError."""
        if self.directory is not None:
            os.environ[DIRECTORY_VARIABLE] = self.directory
        sys.stdout.flush()
        sys.stderr.flush()
        # Not earlier: a child forked by anything else in this process must not inherit them.
        self._fds.set_cloexec(False)
        try:
            if not self.command[0]:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            os.execvp(self.command[0], self.command)
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else str(error)
            raise MigrationError(f"execvp {self.command[0]} failed: {text}") from None
        finally:
            self._fds.set_cloexec(True)
            os.environ.pop(DIRECTORY_VARIABLE, None)

    def clean_up(self) -> None:
        """Removes the temporary directory, if this update has one."""
        if self.directory is not None:
            remove_directory(self.directory)
            self.directory = None


def plan(fds: PreservedFds, command: list[str] | None) -> Exec:
    """The exec of `command`, or of this VMM's own command line, with the URI for its state.

    A command that names no -incoming gets one that reads from a private temporary directory,
    which the caller has cleaned up if the update does not happen.  Raises MigrationError for
    -incoming defer, where nobody would say what to load, and where no directory can be made.
    """
    words = list(command) if command else own_command()
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
    """The command line of this process, without -incoming, and without -S: the state says it."""
    kept: list[str] = []
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word in INCOMING:
            next(words, None)
        elif word not in START_PAUSED:
            kept.append(word)
    return [sys.executable, *kept]


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
