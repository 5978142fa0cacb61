"""The QMP monitor: JSON commands, answers and events, as QEMU's clients expect them."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from cpr import report
from cpr.chardev.base import OPENED, Chardev
from cpr.constants import NS_PER_MS
from cpr.errors import CommandError, CommandNotFound, CprError
from cpr.monitor import commands
from cpr.monitor.control import MAX_UNREAD, VERSION
from cpr.monitor.json_stream import JsonStream
from cpr.monitor.schema import Argument, Command, Enum, ListOf, Session

ROOM = 4096
# Group 1 stays as it is: backslashes, and surrogates in pairs. Others are bytes that are no UTF-8.
SURROGATES = re.compile(r"(\\\\|\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2})|\\ud[89a-f][0-9a-f]{2}")
LONE = re.compile("[\ud800-\udfff]")
MOST_SPREAD = 64 << 10  # bytes of an answer that is spread over lines
NO_TEXT = "\\ufffd"  # as QEMU writes them
TURN_NS = 2 * NS_PER_MS
CAPABILITIES = ("oob",)
NEGOTIATE = "qmp_capabilities"
ENABLE = Argument("enable", ListOf(Enum(*CAPABILITIES)), optional=True)


class QmpMonitor:
    """One QMP monitor on `chardev`, which stays the caller's.

    Commands are executed in the order in which they come, each before the next is read: there is
    none that could run out of band.  `pretty` spreads answers over lines.  Where a client leaves
    too many answers unread, its commands wait, and what comes after them is not even read.
    `kept` is what another image's monitor has saved whose client is still there.
    """

    mode = "control"

    def __init__(
        self,
        chardev: Chardev,
        vmm: Any,
        pretty: bool = False,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self._chardev = chardev
        self._vmm = vmm
        self._indent = 4 if pretty else None
        self._session = Session(chardev.take_fd)
        self._held = self._goes_on = False
        self._start()
        if kept is not None:
            self._restore(kept)
        vmm.events.subscribe(self._on_vm_event, from_start=kept is not None)
        chardev.set_handlers(
            *(self._can_receive, self._receive, self._on_event, self._go_on),
            knows_peer=kept is not None,
        )
        if self._requests:
            self._go_on_later()

    def save(self) -> dict[str, Any]:
        """A command in which an update ends is among those that are still to be answered."""
        requests = [*([self._current] if self._executes else []), *self._requests]
        return {
            "mode": self.mode,
            "negotiated": self._negotiated,
            "oob": self._oob,
            "last-event": self._vmm.events.last_us,
            "stream": self._stream.save(),
            "requests": [
                {"error": str(each)} if isinstance(each, CprError) else {"request": each}
                for each in requests
            ],
        }

    def _restore(self, kept: dict[str, Any]) -> None:
        self._negotiated, self._oob = kept["negotiated"], kept["oob"]
        self._vmm.events.not_before(kept["last-event"])
        self._stream.restore(kept["stream"])
        for each in kept["requests"]:
            error = each.get("error")
            self._requests.append(each["request"] if error is None else CommandError(error))

    def close(self) -> None:
        self._vmm.events.unsubscribe(self._on_vm_event)
        self._chardev.clear_handlers()

    def _start(self) -> None:
        """Before a client's negotiation."""
        self._stream = JsonStream()
        self._requests: deque[Any] = deque()
        self._negotiated = False
        self._oob = False
        self._current: Any = None
        self._executes = False

    def _on_event(self, event: str) -> None:
        if event == OPENED:  # until then what a client that has gone has said is done
            self._start()
            self._send({"QMP": {"version": VERSION, "capabilities": list(CAPABILITIES)}})

    def _on_vm_event(self, event: dict) -> None:
        if self._negotiated:
            self._send(event)

    def _send(self, message: dict) -> None:
        text = json.dumps(message)
        if self._indent and len(text) < MOST_SPREAD:  # by depth, which is a client's to choose
            text = json.dumps(message, indent=self._indent)
        if "\\ud" in text and LONE.search(json.dumps(message, ensure_ascii=False)):
            text = SURROGATES.sub(lambda found: found[1] or NO_TEXT, text)
        self._chardev.write(text.encode() + b"\r\n")

    def _can_receive(self) -> int:
        waits = self._held or self._executes or self._requests or self._chardev.waiting > MAX_UNREAD
        return 0 if waits else ROOM

    def hold(self, on: bool) -> None:
        """While it is on no further command is read or executed."""
        self._held = on
        if not on:
            self._go_on_later()  # a command of this client may be the reason

    def _receive(self, data: bytes) -> None:
        self._requests += self._stream.feed(data)
        self._go_on()

    def _go_on(self) -> None:
        """Executes what has come, as long as the client reads the answers, and for no longer than
        a turn of the loop's: others are to have theirs."""
        if self._executes:  # a command that waits, and has the loop go on
            return
        requests, end = self._requests, time.monotonic_ns() + TURN_NS
        while requests and not self._held and self._chardev.waiting <= MAX_UNREAD:
            self._current, self._executes = requests.popleft(), True
            answer = self._answer(self._current)
            if requests is not self._requests:
                return  # another client has come meanwhile
            self._executes = False
            self._send(answer)
            if requests and time.monotonic_ns() > end:
                self._go_on_later()
                return
        self._chardev.accept_input()

    def _go_on_later(self) -> None:
        if not self._goes_on:
            self._goes_on = True
            self._vmm.loop.call_soon(self._go_on_now)

    def _go_on_now(self) -> None:
        self._goes_on = False
        self._go_on()

    def _answer(self, request: Any) -> dict:
        error: CprError
        try:
            if isinstance(request, CprError):
                raise request
            result = self._dispatch(request)
        except CprError as problem:
            error = problem
        except Exception as problem:  # a running guest must not be lost to a bug in a command
            error = CommandError(report.unexpected(problem))
        else:
            answer = {"return": {} if result is None else result}
            return answer | {"id": request["id"]} if "id" in request else answer
        identity = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        return identity | {"error": {"class": error.qmp_class, "desc": str(error)}}

    def _dispatch(self, request: Any) -> Any:
        name, arguments = self._parse(request)
        if name == NEGOTIATE:
            return self._negotiate(arguments)
        if not self._negotiated:
            raise CommandNotFound(f"Expecting capabilities negotiation with '{NEGOTIATE}'")
        command = commands.find_qmp(name)
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        if "exec-oob" in request:
            raise CommandError(f"The command {name} does not support OOB")
        keywords = {"arguments": arguments} if command.whole else check(command, arguments)
        return command.call(self._vmm, self._session, keywords)

    def _parse(self, request: Any) -> tuple[str, dict]:
        """The command's name and its arguments.  Raises CommandError for a wrong shape."""
        if not isinstance(request, dict):
            raise CommandError("QMP input must be a JSON object")
        name: str | None = None
        for member, value in request.items():
            if member == "execute" or (member == "exec-oob" and self._oob):
                if not isinstance(value, str):
                    raise CommandError(f"QMP input member '{member}' must be a string")
                if name is not None:
                    raise CommandError("QMP input member 'execute' clashes with 'exec-oob'")
                name = value
            elif member == "arguments":
                if not isinstance(value, dict):
                    raise CommandError("QMP input member 'arguments' must be an object")
            elif member != "id":
                raise CommandError(f"QMP input member '{member}' is unexpected")
        if name is None:
            raise CommandError("QMP input lacks member 'execute'")
        return name, request.get("arguments", {})

    def _negotiate(self, arguments: Mapping[str, Any]) -> None:
        enabled = check_arguments([ENABLE], arguments).get("enable", [])
        if self._negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self._oob = "oob" in enabled
        self._negotiated = True


def check(command: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `command` by keyword.  Raises CommandError in QEMU's words."""
    return check_arguments(command.qmp_arguments(), values)


def check_arguments(arguments: list[Argument], values: Mapping[str, Any]) -> dict[str, Any]:
    result = {}
    for argument in arguments:
        if argument.name in values:
            result[argument.keyword] = argument.kind.check(argument.name, values[argument.name])
        elif not argument.optional:
            raise CommandError(f"Parameter '{argument.name}' is missing")
    for name in values:
        if all(name != argument.name for argument in arguments):
            raise CommandError(f"Parameter '{name}' is unexpected")
    return result
