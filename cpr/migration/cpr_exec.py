"""cpr-exec: the last step of an update, and its inverse for when execvp fails.

    hold       starts the mm holder, while the guest still runs    unhold     ends it
    persist    CPR state into a memfd that the environment names    unpersist  closes it
    execute    CLOEXEC cleared, execvp; on failure CLOEXEC set again and MigrationError

Without a command of the user's the VMM runs its own command line again, with an -incoming that
reads the state from a private temporary directory; the new image removes that directory.
"""

from __future__ import annotations

import errno
import os
import sys

from cpr import launcher
from cpr.config import strip_options
from cpr.errors import KernelError, MigrationError
from cpr.uapi.mm_holder import MmHolder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.state.fds import PreservedFds

DIRECTORY_VARIABLE = "CPR_EXEC_TEMPORARY_DIRECTORY"
STATE_FILE = "vmstate"
INCOMING = frozenset({"-incoming", "--incoming"})


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
        self.holder_problem = ""
        self._fds = fds
        self._holder: MmHolder | None = None

    def hold(self) -> None:
        """Starts the mm holder; without one the exec only takes longer (`holder_problem`)."""
        try:
            self._holder = MmHolder()
        except KernelError as error:
            self.holder_problem = str(error)

    def unhold(self) -> None:
        """The inverse of `hold`."""
        if self._holder is not None:
            self._holder.release()
            self._holder = None

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
        if self._holder is not None:
            self._holder.announce()
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
            if self._holder is not None:
                self._holder.conceal()
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
    """The command line of this VMM, without -incoming, and without -S: the state says it.

    Python starts without its `site` module, which takes a third of its start, where the packages
    are found without it too.
    """
    arguments = sys.argv[1:2] + strip_options(sys.argv[2:], ("incoming", "S"))
    if launcher.finds_packages():
        return [sys.executable, "-I", "-S", launcher.SCRIPT, *arguments]
    return [sys.executable, "-m", "cpr.vmm", *arguments]


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
