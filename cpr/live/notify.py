"""systemd: what it is told (sd_notify(3)), and the descriptors that it passes and stores.

Without NOTIFY_SOCKET in the environment nothing is said.  A unit that is updated needs Type=notify
or notify-reload, NotifyAccess=all (the old program may go on in another process), and
FileDescriptorStoreMax= for sockets that a restart after a crash is to find.
"""

from __future__ import annotations

import os
import socket as sockets
import time
from typing import Any

from cpr.constants import NS_PER_US
from cpr.live import image, preserved

FIRST_FD = 3  # SD_LISTEN_FDS_START
SEND_TIMEOUT = 1.0  # s; a manager that reads nothing is not to hold up the service

_passed: dict[str, list[int]] | None = None
_stored: set[str] = set()


def send(*fields: str, fds: tuple[int, ...] = ()) -> bool:
    """Sends fields such as "STATUS=busy"; false where nobody listens.  Never raises OSError."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM | sockets.SOCK_CLOEXEC) as sock:
            sock.settimeout(SEND_TIMEOUT)
            sock.connect(address)
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
    """A line for systemctl status."""
    return send(f"STATUS={text}")


def stopping() -> bool:
    """The service ends."""
    return send("STOPPING=1")


def started(updated: bool) -> None:
    """What `live.ready` says."""
    if updated:
        main_pid()
    ready()


def failed(pid_changed: bool) -> None:
    """What a failed update says: the service goes on."""
    if pid_changed:
        main_pid()
    ready()


def store(name: str) -> bool:
    """Stores the descriptor of a preserved name with systemd, for a restart after a crash."""
    entry = image.current().registry.find(name)
    if entry is None or name in _stored or not _is_fd_name(name):
        return False
    if not send("FDSTORE=1", f"FDNAME={name}", fds=(entry.fd,)):
        return False
    _stored.add(name)
    return True


def remove(name: str) -> bool:
    """systemd forgets what `store` has given it."""
    if name not in _stored:
        return False
    _stored.discard(name)
    return send("FDSTOREREMOVE=1", f"FDNAME={name}")


def _is_fd_name(name: str) -> bool:
    return name.isascii() and name.isprintable() and ":" not in name


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
    fds = passed().get(name)
    if not fds:
        return
    how: dict[str, Any] = {}
    if kind == preserved.FILE:
        how = {"mode": "r+b", "buffering": 0}
    registry.entries[name] = preserved.Entry(kind, fds.pop(0), None, how)
    _stored.add(name)
