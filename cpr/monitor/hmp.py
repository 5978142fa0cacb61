"""The HMP monitor: command lines for people, in QEMU's syntax and with its answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpr import report
from cpr.chardev.base import OPENED, Chardev
from cpr.constants import NS_PER_MS, QEMU_VERSION
from cpr.errors import CommandError, CprError
from cpr.monitor import commands, registers
from cpr.monitor.command_line import ArgumentReader, Line, UsageError
from cpr.monitor.control import MAX_UNREAD
from cpr.monitor.readline import Readline
from cpr.monitor.schema import AFTER_MIGRATION, NOW, Command, Session

PROMPT = "(qemu) "
BANNER = f"QEMU {QEMU_VERSION} monitor - type 'help' for more information\r\n"
LOOK_NS = 100 * NS_PER_MS


class HmpMonitor:
    """One HMP monitor on `chardev`, which stays the caller's.

    `kept` is what another image's monitor has saved whose terminal is still there.
    """

    mode = "readline"

    def __init__(self, chardev: Chardev, vmm: Any, kept: dict[str, Any] | None = None) -> None:
        self._chardev = chardev
        self._vmm = vmm
        self._suspended = False
        self._executes = False
        self._held = False
        self._readline = Readline(chardev.write, self._on_line, self._complete, PROMPT)
        self._session = Session(chardev.take_fd)
        self._session.history = self._history
        if kept is not None:
            self._readline.restore(kept["readline"])
            self._session.cpu_index = min(kept["cpu-index"], len(vmm.machine.vcpus) - 1)
            self._session.dump_format = tuple(kept["dump-format"])
            if kept["busy"]:
                self._readline.show_prompt()
        chardev.set_handlers(
            self._can_receive, self._receive, self._on_event, knows_peer=kept is not None
        )

    def save(self) -> dict[str, Any]:
        """`busy`: the prompt is still to come, from whoever goes on."""
        return {
            "mode": self.mode,
            "readline": self._readline.save(),
            "cpu-index": self._session.cpu_index,
            "dump-format": list(self._session.dump_format),
            "busy": self._suspended or self._executes,
        }

    def close(self) -> None:
        self._chardev.clear_handlers()

    def _can_receive(self) -> int:
        """One byte at a time: what comes after a command that suspends stays in the chardev."""
        waits = (
            self._held or self._executes or self._suspended or self._chardev.waiting > MAX_UNREAD
        )
        return 0 if waits else 1

    def hold(self, on: bool) -> None:
        """While it is on nothing is read."""
        self._held = on
        self._chardev.accept_input()

    def _receive(self, data: bytes) -> None:
        for byte in data:
            self._readline.feed(byte)

    def _on_event(self, event: str) -> None:
        if event == OPENED:
            self._executes = False
            self._chardev.write(BANNER.encode())
            self._readline.restart()
            if not self._suspended:
                self._readline.show_prompt()

    def _history(self) -> list[str]:
        return [line.decode(errors="replace") for line in self._readline.history]

    def _on_line(self, line: str) -> None:
        self._executes = True
        text, prompt = execute(self._vmm, self._session, line)
        if not self._executes:
            return  # another client has come meanwhile
        self._executes = False
        self._chardev.write(encode(text))
        if prompt == NOW:
            self._readline.show_prompt()
            self._chardev.accept_input()
            return
        self._suspended = True
        if prompt == AFTER_MIGRATION:
            self._vmm.migration.add_finish_callback(self._resume)
            self._vmm.loop.call_later(LOOK_NS, self._look)

    def _look(self) -> None:
        """The prompt is needed, too, where the migration waits for migrate_continue."""
        if self._vmm.migration.status == "pre-switchover":
            self._resume()
        elif self._suspended:
            self._vmm.loop.call_later(LOOK_NS, self._look)

    def _resume(self) -> None:
        if self._suspended:
            self._suspended = False
            self._readline.show_prompt()
            self._chardev.accept_input()

    def _complete(self, text: str) -> tuple[list[str], int]:
        try:
            words = Line(text).words()
        except UsageError:
            return [], 0
        if not words or text[-1:].isspace():
            words.append("")
        typed = words[-1]
        names = sorted({name for name in self._candidates(words) if name.startswith(typed)})
        return names, len(typed)

    def _candidates(self, words: list[str]) -> list[str]:
        """What may stand in the place of the last of `words`."""
        info = False
        if len(words) > 1 and words[0] in ("help", "?"):
            words = words[1:]
            if len(words) > 1 and words[0] != "info":
                return []
        if len(words) > 1 and words[0] == "info":
            info = True
            words = words[1:]
        if len(words) == 1:
            return [name for command in commands.hmp_commands(info) for name in command.names]
        command = commands.find_hmp(words[0], info)
        arguments = command.hmp_arguments() if command else []
        if len(words) - 2 >= len(arguments):
            return []
        choices = arguments[len(words) - 2].choices
        return list(choices(self._vmm)) if choices else []


def execute(vmm: Any, session: Session, line: str) -> tuple[str, str]:
    """Runs one command line: (what to print, when the prompt comes back)."""
    try:
        command, arguments = _parse(vmm, session, line)
        if command is None:
            return "", NOW
        result = command.call(vmm, session, arguments)
        text = command.text(result) if command.text else result or ""
        return text, command.prompt(arguments)
    except UsageError as error:
        return f"{error}\n", NOW
    except CprError as error:
        return f"Error: {error}\n", NOW
    except Exception as error:  # a running guest must not be lost to a bug in a command
        return f"Error: {report.unexpected(error)}\n", NOW


def run_line(vmm: Any, session: Session, line: str, cpu_index: int | None) -> str:
    """human-monitor-command: the output of `line` in a monitor of its own."""
    if cpu_index is not None and not 0 <= cpu_index < len(vmm.machine.vcpus):
        raise CommandError("Parameter 'cpu-index' expects a CPU number")
    text, _ = execute(vmm, Session(session.take_fd, cpu_index or 0), line)
    return text.replace("\n", "\r\n")


def encode(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode(errors="surrogateescape")


def _parse(vmm: Any, session: Session, text: str) -> tuple[Command | None, dict[str, Any]]:
    """The command of `text`, None for an empty line, and its arguments by keyword."""
    line = Line(text)
    if line.at_end():
        return None, {}
    name = line.command_name()
    command = commands.find_hmp(name, False)
    if command is None:
        raise UsageError(f"unknown command: '{line.taken()}'")
    if name == "info" and not line.at_end():
        name = line.command_name()
        command = commands.find_hmp(name, True)
        if command is None:
            raise UsageError(f"unknown command: '{line.taken()}'")
    return command, ArgumentReader(line, command, _register_of(vmm, session)).read()


def _register_of(vmm: Any, session: Session) -> Callable[[str], int | None]:
    known: dict = {}  # read once: the vCPU is interrupted for it

    def value(name: str) -> int | None:
        if not known:
            known.update(vmm.machine.vcpu_state(session.cpu_index))
        return registers.value(known, name)

    return value
