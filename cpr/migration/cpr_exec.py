"""cpr-exec: the update of this process by exec, and its inverse for when execvp fails.

    begin     CPR state into a memfd that the environment names
    finish    the exec, guarded; MigrationError where the guest goes on here
    rollback  closes the memfd, removes the temporary directory

Without a command of the user's the VMM runs its own command line again, with an -incoming that
reads the state from a private temporary directory; the new image removes that directory.
"""

from __future__ import annotations

import _signal as signal  # `signal` itself makes enums, which a late update would wait for
import os

from cpr.constants import NS_PER_MS
from cpr.errors import MigrationError
from cpr.faults import point
from cpr.live.old_image import Update
from cpr.live.transaction import KEEPS, PROTOCOL, RAM_FILES, REFUSE, UpdateError
from cpr.migration.mode import EXEC, KeepsRam
from cpr.migration.parameters import Parameters
from cpr.migration.process import Process
from cpr.migration.program import (
    Held,
    check_own_command,
    check_versions,
    end_started,
    incoming_uri,
    own_command,
    spoken_versions,
)
from cpr.migration.run_with import obstacles
from cpr.report import carefully

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from cpr.live.program_files import ProgramFiles
    from cpr.machine import Machine
    from cpr.state.fds import PreservedFds

STATE_FILE = "vmstate"
TEMPORARY = ("/tmp", "/var/tmp")


class Exec(KeepsRam):
    """One update's exec of `command`.

    `process` is what executes, `files` are its program's, and `park()` ends all its threads but the
    caller's.  `directory` is the private temporary directory with the new image's state, which this
    owns, or None.  `give_back(self, update, reason)` makes what goes on after a new image has
    refused; the update is its own.  `serve()` is called while a program is asked what it knows, and
    true where nobody waits for that any more.
    """

    ends_process = True

    def __init__(
        self,
        fds: PreservedFds,
        command: list[str],
        process: Process,
        parameters: Parameters,
        files: ProgramFiles,
        park: Callable[[], None],
        give_back: Callable[[Exec, Update, str], Callable[[], None]],
        serve: Callable[[], str],
        directory: str | None = None,
    ) -> None:
        super().__init__(EXEC, bool(parameters.get("x-cpr-ram-staging")))
        self.command = command
        self.timeout_ms = int(parameters.get("x-cpr-exec-timeout"))
        self._overlap = parameters.get("x-cpr-exec-overlap")
        self._page_size = parameters.get("x-cpr-ram-pagesize")
        self._fds = fds
        self._process = process
        self._files = files
        self._park = park
        self._give_back = give_back
        self._serve = serve
        self._directory = directory
        self._versions: list[int] | None = None
        self._persists = False

    def check(self) -> None:
        if not self.command:
            raise MigrationError("cpr-exec mode requires setting cpr-exec-command")

    def blockers(self, machine: Machine) -> list[str]:
        reasons = super().blockers(machine)
        sandbox = machine.config.sandbox
        if sandbox.get("enable") and sandbox.get("spawn") == "deny":
            reasons.append("-sandbox spawn=deny forbids execve, with which this VMM is updated")
        return reasons + obstacles(self.command, machine.accel.name)

    def early_exec(self, *settings: str) -> Exec | None:
        """Not with RAM that is staged, nor with a program that knows no hand-over.

        Raises MigrationError for one that knows another version of it.
        """
        if self.stages or self._page_size or self._overlap not in settings:
            return None
        return self if self.is_early() else None

    def is_early(self) -> bool:
        """Whether the program knows an early update; with RAM that is staged there is none.

        Raises MigrationError for one that knows another version of it.
        """
        self.ask()
        versions = self._versions or []
        check_versions(versions)
        return bool(versions) and not self.stages

    def ask(self) -> None:
        """Asks once whether the program takes the guest over by the token of an update.

        One that has no idea of that has the guest when it has read its CPR state.
        """
        if self._versions is None:
            self._versions = spoken_versions(self.command, self._files, self._serve)

    @property
    def reopens_files(self) -> bool:
        return self._versions is not None and not self._speaks(RAM_FILES)

    def _speaks(self, version: int) -> bool:
        return version in (self._versions or [])

    def begin(self, go_on: Callable[[], None]) -> bool:
        """Writes the CPR state to a memfd, which the environment names."""
        self._fds.persist()
        self._persists = True
        point("begin")
        return False

    def finish(self, machine: Machine) -> None:
        """Becomes the command under this PID.  Comes back only with MigrationError.

        The guard waits: where the new program does not take over, this one goes on.
        """
        point("finish")
        self._process.before_exec()
        try:
            if self._speaks(KEEPS):
                self._process.keep_connections(self._fds)
            self._fds.refresh(self._speaks(RAM_FILES))
            reason, update = self._become(machine)
        finally:
            self._process.take_connections_back(self._fds)
        try:
            point("refused")
            self._process.on_new_pid()
            give_back = self._give_back(self, update, reason)
        except Exception:
            if not update.take_back():
                update.leave()
            update.close()
            raise
        self.gives_back = give_back
        raise MigrationError(f"the new program refused: {reason}")

    def _become(self, machine: Machine) -> tuple[str, Update]:
        """Why the new program has refused, and the update, which is the caller's.

        Raises MigrationError where the update has failed otherwise.
        """
        update = Update([(block.host, block.max_length) for block in machine.blocks])
        # Python ignores it; the new program shall not.
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        update.page.struct.stopped_ns = self.stopped_ns
        entries = self._fds.entries(self._speaks(RAM_FILES))
        keep = [fd for _, _, fd in entries] + [self._fds.state_fd]
        ram = [block.outgoing_fd for block in machine.blocks if not block.reopened]
        try:
            return self._execute(update, keep, next((fd for fd in ram if fd in keep), -1)), update
        except UpdateError as error:
            held = Held(update.page.fd if self._speaks(PROTOCOL) else self._fds.state_fd)
            update.close()
            raise self._failed(error, held, update.pid) from None
        except Exception:
            update.close()
            raise

    def _execute(self, update: Update, keep: list[int], ram_fd: int) -> str:
        """Why the new program refuses.  Raises UpdateError where there is none any more.

        `ram_fd` is one of `keep` that is RAM, which a QEMU has for as long as its guest, or -1.
        Either way this process has all its threads and sockets again.
        """
        try:
            update.execute(
                self.command,
                os.environ,
                early=False,
                timeout_ns=self.timeout_ms * NS_PER_MS,
                keep=keep,
                state_fd=-1 if self._speaks(PROTOCOL) else self._fds.state_fd,
                kept_fd=ram_fd,
                drop=self._process.exec_fds(),
                interrupted=self._process.interrupted,
                holds_signals=True,
                park=self._park,
                unpark=self._process.unpark,
            )
        finally:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            if update.dropped:
                self._process.reopen()
        try:
            message = update.receive()
        except UpdateError as error:  # it has said what nobody understands
            if not update.take_back():
                update.leave()
            raise UpdateError(str(error), pid_changed=True) from None
        message.close()
        if message.kind != REFUSE:
            return f"it has said '{message.kind}', which has no place in a late update"
        return message.reason

    def _failed(self, error: UpdateError, held: Held, new_image: int) -> MigrationError:
        """What is told of an update after which the guest goes on here; `held` is what the new
        program had from it."""
        if not error.pid_changed:
            return MigrationError(str(error))
        carefully(lambda: end_started(held, new_image))
        self._process.on_new_pid()
        self.ended_by = error.ended_by
        return MigrationError(f"{error}; the guest goes on in the old VMM, PID {os.getpid()}")

    def rollback(self) -> None:
        if self._persists:  # one that was refused must not undo another's
            self._fds.unpersist()
            self._persists = False
        self.remove_directory()

    def remove_directory(self) -> None:
        if self._directory is not None:
            remove_directory(self._directory)
            self._directory = None


def plan(command: list[str] | None) -> tuple[list[str], str, str | None]:
    """What is executed for `command`, or for this VMM's own command line, and how it is loaded.

    The command, the URI from which it reads its state, and the directory of that, if it is private.

    A command that names no -incoming gets one that reads from a private temporary directory,
    which is the caller's to remove.  Raises MigrationError for -incoming defer, where nobody would
    say what to load, and where no directory can be made.
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
        return words, uri, None
    directory = _create_directory()
    uri = f"file:{directory}/{STATE_FILE}"
    return [*words, "-incoming", uri], uri, directory


def _create_directory() -> str:
    """In $TMPDIR; where there is no such folder any more, or no room in it, in another one."""
    reason = ""
    for base in filter(None, (os.environ.get("TMPDIR"), *TEMPORARY)):
        directory = os.path.join(base, f"cpr-exec-{os.getpid()}-{os.urandom(4).hex()}")
        try:
            os.mkdir(directory, 0o700)
        except OSError as error:
            reason = reason or f"Could not create '{directory}': {error.strerror}"
        else:
            return directory
    raise MigrationError(f"{reason}; set TMPDIR to a writable folder")


def remove_own_directory(source: dict) -> None:
    """Removes the temporary directory that `source`, which has just been loaded, is in, if any.

    It may be of another PID: where a script that waits for it has started this process.
    """
    import re

    directory, file = os.path.split(source.get("filename", ""))
    name = os.path.basename(directory)
    if file == STATE_FILE and re.fullmatch(r"cpr-exec-\d+-[0-9a-f]{8}", name):
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
