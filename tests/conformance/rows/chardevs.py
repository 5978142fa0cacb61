"""Part 1: an exec keeps no character device; the new image opens each of them anew."""

from __future__ import annotations

import socket

from ..lab import Lab
from ..match import Mismatch
from ..peer import listen_unix
from ..process import DEADLINE
from ..row import Row, step
from ..steps import (
    boot,
    guest,
    survives,
    until,
    update,
)

SERVER = "-serial unix:$dir/serial.sock,server=on,wait=off"
CLIENT = "-serial unix:$dir/serial.sock"


@step
def dial(lab: Lab) -> None:
    """Connects to the serial port."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    path = str(lab.path("$dir/serial.sock"))
    if not until(lambda: client.connect_ex(path) == 0):
        raise Mismatch("nobody listens on the serial port's socket")
    lab.sockets.append(client)


@step
def listen(lab: Lab) -> None:
    """Listens for the VMM's serial port."""
    listener = listen_unix(lab.path("$dir/serial.sock"))
    listener.settimeout(DEADLINE)
    lab.sockets.append(listener)


@step
def called(lab: Lab) -> None:
    """The VMM's serial port has connected."""
    connection = lab.sockets[0].accept()[0]
    connection.settimeout(DEADLINE)
    lab.sockets.append(connection)


@step
def hung_up(lab: Lab) -> None:
    """The last connection has been closed by the VMM."""
    if lab.sockets[-1].recv(1):
        raise Mismatch("the serial port has sent something")


ROWS = [
    Row(
        "chardev-server",
        "1: chardevs: server sockets are made anew at the same path",
        boot(guest(SERVER)),
        dial(),
        update(),
        hung_up(),
        dial(),
        survives(),
    ),
    Row(
        "chardev-client",
        "1: chardevs: client sockets connect again",
        listen(),
        boot(guest(CLIENT)),
        called(),
        update(),
        hung_up(),
        called(),
        survives(),
    ),
]
