"""cpr-exec: the update of this process by exec, and its inverse for when execvp fails.

    begin      CPR state into a memfd that the environment names
    finish     CLOEXEC cleared, execvp; on failure CLOEXEC set again and MigrationError
    walk_back  closes the memfd, removes the temporary directory

Without a command of the user's the VMM runs its own command line again, with an -incoming that
reads the state from a private temporary directory; the new image removes that directory.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os

from cpr.errors import MigrationError
from cpr.faults import point
from cpr.live.transaction import Update, UpdateError
from cpr.migration.mode import EXEC, Mode, cpr_blockers
from cpr.migration.program import check_own_command, incoming_uri, own_command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.machine import Machine
    from cpr.ram import RAMBlock
    from cpr.state.fds import PreservedFds

STATE_FILE = "vmstate"
NS_PER_MS = 1_000_000


class Exec(Mode):
    """One update's exec, whose new image reads its state from `uri`.

    `directory` is the private temporary directory that it owns, or None.  `knows_protocol`: the
    program takes the guest over by the token of the update, and can be given way to by it; one that
    has no idea of that has it when it has read its CPR state.  `stopped_ns` is when the guest
    stopped, `ended_by` the signal that ended the new image, and the VM with it.  `gives_back`: the
    new image has refused, and what becomes of that is told later.
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
        self.park: Callable[[], None] = lambda: None
        self.unpark: Callable[[], None] = lambda: None
        self.on_new_pid: Callable[[], None] = lambda: None
        self.exec_fds: Callable[[], list[int]] = list
        self.reopen: Callable[[], None] = lambda: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.timeout_ms = 0
        self.knows_protocol = False
        self._persists = False
        self.stopped_ns = 0
        self.ended_by = 0
        self.gives_back = False
        self.give_back: Callable[[Update, str], None] = lambda update, reason: None
        self._fds = fds

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Writes the CPR state to a memfd, which the environment names."""
        self._fds.persist()
        self._persists = True
        point("begin")
        return False

    def sends(self, block: RAMBlock, ignore_shared: bool) -> bool:
        return False

    def blockers(self, machine: Machine) -> list[str]:
        return cpr_blockers(machine, self)

    def finish(self, machine: Machine) -> None:
        """Becomes the command under this PID.  Comes back only with MigrationError.

        The guard waits: where the new program does not take over, this one goes on.
        """
        point("finish")
        self.before_exec()
        self._fds.refresh()
        update = Update([(block.host, block.max_length) for block in machine.blocks])
        # Python ignores it; the new program shall not.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        update.page.struct.stopped_ns = self.stopped_ns
        keep = [fd for _, _, fd in self._fds.entries()] + [self._fds.state_fd]
        try:
            reason = self._execute(update, keep)
        except UpdateError as error:
            update.close()
            raise self._failed(error) from None
        point("refused")
        self.on_new_pid()
        self.gives_back = True
        self.give_back(update, reason)
        raise MigrationError(f"the new program refused: {reason}")

    def _execute(self, update: Update, keep: list[int]) -> str:
        """Why the new program refuses.  Raises UpdateError where there is none any more.

        Either way this process has all its threads and sockets again.
        """
        self.park()
        try:
            update.execute(
                self.command,
                os.environ,
                early=False,
                timeout_ns=self.timeout_ms * NS_PER_MS,
                keep=keep,
                state_fd=-1 if self.knows_protocol else self._fds.state_fd,
                drop=self.exec_fds(),
                interrupted=self.interrupted,
                holds_signals=True,
            )
        finally:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            self.unpark()
            if update.dropped:
                self.reopen()
        try:
            message = update.receive()
        except UpdateError as error:  # it has said what nobody understands
            if not update.take_back():
                update.leave()
            raise UpdateError(str(error), pid_changed=True) from None
        message.close()
        return str(message.body.get("reason", ""))

    def _failed(self, error: UpdateError) -> MigrationError:
        """What is told of an update after which the guest goes on here."""
        if not error.pid_changed:
            return MigrationError(str(error))
        self.on_new_pid()
        self.ended_by = error.ended_by
        return MigrationError(f"{error}; the guest goes on in the old VMM, PID {os.getpid()}")

    def walk_back(self) -> None:
        if self._persists:  # one that was refused must not undo another's
            self._fds.unpersist()
            self._persists = False
        self.remove_directory()

    def remove_directory(self) -> None:
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
        check_own_command()
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
