"""`python -m cpr.vmm cpr-exec SOCKET [-t] [COMMAND…]`: the monitor's command, for scripts.

It is sent to the QMP monitor at SOCKET, a unix socket; then the VMM is asked what has become of it,
on a new connection where the update has closed the old one.  Done: exit status 0, and what it has
cost on stdout.  Refused or failed: 1, and the reason on stderr.
"""

from __future__ import annotations

import json
import socket
import time

from cpr.constants import NS_PER_MS
from cpr.errors import CprError
from cpr.live import notify
from cpr.migration.state import ENDED
from cpr.monitor.migrate import rehearsal_text
from cpr.report import error_report, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = """usage: python -m cpr.vmm cpr-exec SOCKET [-t] [COMMAND...]
Has the VMM whose QMP monitor is at SOCKET execute COMMAND, or its own command line, and waits until
the update is over.  -t: a rehearsal, which changes nothing.
"""
MOST_LINE = 16 << 20  # bytes of an answer
GREETING_SECONDS = 10.0  # a monitor has one client at a time, and lets the next one wait
ANSWER_SECONDS = 120.0  # longer than the time that a new program has, x-cpr-exec-timeout
RECONNECT_SECONDS = 30.0  # without a monitor, in the middle of an update
ASK_SECONDS = 0.05
RETRY_SECONDS = 0.02


class VerbError(CprError):
    """What the verb has not done; the text says why, and the remedy."""


class Gone(Exception):
    """The connection has ended, or there is none: an update may be under way."""


class Client:
    """A connection to a QMP monitor, which this owns until `close`."""

    def __init__(self, path: str) -> None:
        """Raises Gone where nobody answers there, VerbError where another client is connected."""
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._read = b""
        try:
            self._socket.settimeout(GREETING_SECONDS)
            self._socket.connect(path)
            if "QMP" not in self._line():
                raise VerbError(f"{path}: this is no QMP monitor; name one of -qmp")
            self._socket.settimeout(ANSWER_SECONDS)
            self.execute("qmp_capabilities")
        except TimeoutError:
            self.close()
            raise VerbError(
                f"{path}: no greeting within {GREETING_SECONDS:.0f} s: is another client there? "
                "Give the VMM a second -qmp"
            ) from None
        except OSError as error:
            self.close()
            raise Gone(f"{path}: {error.strerror or error}") from None
        except BaseException:
            self.close()
            raise

    def _line(self) -> dict[str, Any]:
        pieces, data = [], self._read
        while b"\n" not in data:
            pieces.append(data)
            if sum(map(len, pieces)) > MOST_LINE:
                raise VerbError(f"{self._path}: this is no QMP monitor; name one of -qmp")
            data = self._socket.recv(65536)
            if not data:
                raise Gone(f"{self._path}: the monitor has closed the connection")
        end, _, self._read = data.partition(b"\n")
        line = b"".join([*pieces, end])
        try:
            message = json.loads(line)
        except ValueError:
            message = {}
        return message if isinstance(message, dict) else {}

    def execute(self, name: str, **arguments: Any) -> Any:
        """What the command returns.  Raises VerbError for one that is refused, Gone, OSError."""
        self._socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            message = self._line()
            if "error" in message:
                raise VerbError(str(message["error"].get("desc", message["error"])))
            if "return" in message:
                return message["return"]

    def close(self) -> None:
        self._socket.close()


def run(arguments: list[str]) -> int:
    """The exit status.  Raises VerbError, and says it to a service's manager too."""
    try:
        return _run(arguments)
    except VerbError as error:
        notify.status(f"no update: {error}")
        raise


def _run(arguments: list[str]) -> int:
    if arguments[:1] in (["-h"], ["-help"], ["--help"]):
        output(USAGE)
        return 0
    if not arguments or arguments[0].startswith("-"):
        error_report(f"cpr-exec: no SOCKET\n{USAGE}")
        return 1
    path, words = arguments[0], arguments[1:]
    test = words[:1] == ["-t"]
    words = words[1:] if test else words
    how: dict[str, Any] = {"command": words} if words else {}
    try:
        client = Client(path)
        answer = client.execute("cpr-exec", **how, **({"test": True} if test else {}))
    except (Gone, OSError) as error:
        raise VerbError(f"{error}: the VMM has to run with -qmp unix:{path},server=on") from None
    if not test:
        return _wait(path, client)
    client.close()
    if answer["refusals"]:
        raise VerbError("; ".join(answer["refusals"]))
    output(rehearsal_text(answer))
    return 0


def _wait(path: str, client: Client | None) -> int:
    """Waits until the update that has begun is over."""
    deadline = 0.0
    while True:
        try:
            client = client or Client(path)
            found = client.execute("query-migrate")
        except (Gone, OSError) as error:
            if client is not None:
                client.close()
                client = None
            now = time.monotonic()
            deadline = deadline or now + RECONNECT_SECONDS
            if now > deadline:
                raise VerbError(f"{error}: what has become of the update is not known") from None
            time.sleep(RETRY_SECONDS)
            continue
        deadline = 0.0
        if found.get("status") in ENDED:
            client.close()
            return _tell(found)
        time.sleep(ASK_SECONDS)


def _tell(found: dict[str, Any]) -> int:
    if found["status"] != "completed":
        raise VerbError(str(found.get("error-desc", found["status"])))
    stood = found.get("x-cpr-downtime-ns", 0) / NS_PER_MS
    mode = found.get("x-cpr-update")
    cost = f"{mode} update: the guest stood still for {stood:.2f} ms" if mode else "updated"
    output(f"{cost}\n")
    return 0
