"""systemd: what it is told (sd_notify(3)), and the descriptors that it passes and stores.

Without NOTIFY_SOCKET in the environment nothing is said.  A unit that is updated needs Type=notify
or notify-reload, NotifyAccess=all (the old program may go on in another process), and
FileDescriptorStoreMax= for sockets that a restart after a crash is to find.

    before an update     RELOADING=1, MONOTONIC_USEC=
    before its exec      MAINPID= of the guard: the PID may end and the service goes on
    after the commit     MAINPID= of the PID, READY=1
    where it has failed  MAINPID= of who goes on, READY=1
"""

from __future__ import annotations

import os
import socket as sockets
import time

from cpr.constants import NS_PER_US
from cpr.live.transaction import EXEC_PID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from cpr.live import preserved

FIRST_FD = 3  # SD_LISTEN_FDS_START
MOST_FD_NAME = 255  # characters; FDNAME= in sd_notify(3)
SEND_TIMEOUT = 1.0  # s; a manager that reads nothing is not to hold up the service

SOCKET = "NOTIFY_SOCKET"

_own_pid = ""
_passed: dict[str, list[int]] | None = None
_stored: set[str] = set()
_before: set[str] = set()
"""The names of which systemd has a descriptor from this program, and from those before it."""


def connect() -> sockets.socket | None:
    """A socket to the manager, the caller's; None where there is none.  Raises no OSError."""
    address = os.environ.get(SOCKET, "")
    if not address.startswith(("/", "@")):
        return None
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        sock = sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM | sockets.SOCK_CLOEXEC)
    except OSError:
        return None
    try:
        sock.settimeout(SEND_TIMEOUT)
        sock.connect(address)
    except OSError:
        sock.close()
        return None
    return sock


def send(*fields: str, fds: tuple[int, ...] = ()) -> bool:
    """Sends fields such as "STATUS=busy"; false where nobody listens.  Raises no OSError."""
    sock = connect()
    if sock is None:
        return False
    try:
        with sock:
            sockets.send_fds(sock, ["\n".join(fields).encode()], list(fds))
    except OSError:
        return False
    return True


def ready() -> bool:
    """The service is up."""
    return send("READY=1")


def reloading() -> bool:
    """An update begins; READY has to follow, whether it succeeds or not."""
    return send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // NS_PER_US}")


def main_pid(pid: int | None = None) -> bool:
    """The service's main process is this one, or `pid`."""
    return send(f"MAINPID={os.getpid() if pid is None else pid}")


def status(text: str) -> bool:
    """A line for systemctl status; `text` may be anybody's, and have several."""
    return send("STATUS=" + "; ".join(text.splitlines()))


def is_child() -> bool:
    """Whether this process is the manager's own child: systemd.exec(5), $SYSTEMD_EXEC_PID.

    A guard that is one too is a main process like any other: its end is waited for.
    """
    pid = os.getpid()
    return pid != 1 and str(pid) in (os.environ.get(EXEC_PID), _own_pid)


def became_child() -> None:
    """This process is a guard that is the manager's child."""
    global _own_pid
    _own_pid = str(os.getpid())


def handed_over(pid: int) -> None:
    """What a guard says before it ends: it is the main process until then."""
    send(f"MAINPID={pid}", "READY=1")


def stopping() -> bool:
    """The service ends."""
    return send("STOPPING=1")


def started(pid_changed: bool) -> None:
    """The service is up; after an update, which has made another process the main one."""
    if pid_changed:
        main_pid()
    ready()


def failed() -> None:
    """What a failed update says: the service goes on, here."""
    main_pid()
    ready()


def store(name: str) -> bool:
    """Stores the descriptor of a preserved name with systemd, for a restart after a crash.

    False where nobody listens, or the name is longer than systemd takes.
    """
    from cpr.live import image

    entry, fd_name = image.current().registry.find(name), _fd_name(name)
    if entry is None or name in _stored or len(fd_name) > MOST_FD_NAME:
        return False
    if not send("FDSTORE=1", f"FDNAME={fd_name}", fds=(entry.fd,)):
        return False
    _stored.add(name)
    return True


def remove(name: str) -> bool:
    """systemd forgets what `store` has given it, here or in a program before this one."""
    if name not in stored():
        return False
    _stored.discard(name)
    _before.discard(name)
    return send("FDSTOREREMOVE=1", f"FDNAME={_fd_name(name)}")


def stored() -> set[str]:
    """The names of which systemd has a descriptor."""
    return _stored | _before


def inherit(names: Iterable[str]) -> None:
    """What the previous program has said of `stored`."""
    _before.update(names)


def _fd_name(name: str) -> str:
    """`name` in ASCII and without a colon, as systemd takes it: other bytes are %XX, as is "%"."""
    if name.isascii() and not {":", "%"} & {*name}:
        return name
    return "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in ":%" else f"%{byte:02X}"
        for byte in name.encode()
    )


def passed() -> dict[str, list[int]]:
    """The descriptors that systemd has passed to this process, by name; the variables are unset."""
    global _passed
    if _passed is None:
        _passed = {}
        words = [os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")]
        if words[0] == str(os.getpid()) and words[1].isdigit():
            names = words[2].split(":") if words[2] else []
            for number in range(int(words[1])):
                fd = FIRST_FD + number
                try:
                    os.set_inheritable(fd, False)
                except OSError:
                    continue
                name = names[number] if number < len(names) else "unknown"
                _passed.setdefault(name, []).append(fd)
    return _passed


def take_listening(registry: preserved.Registry, name: str, kind: str) -> None:
    """Puts what systemd has passed under that name into the registry."""
    from cpr.live import preserved

    fds = passed().get(name) or passed().get(_fd_name(name))
    if not fds:
        return
    how: dict[str, Any] = {}
    if kind == preserved.FILE:
        how = {"mode": "r+b", "buffering": 0}
    registry.entries[name] = preserved.Entry(kind, fds.pop(0), None, how)
    _stored.add(name)
