"""A program that knows the protocol of an update and does not keep to it.

`bad_program.py KIND run` is started by a VMM under test, never imported by one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cpr.live.messages import MORE
from cpr.live.new_image import Predecessor, find_predecessor
from cpr.live.transaction import (
    HAND_OVER,
    HELLO,
    PROTOCOL,
    READY,
    REFUSE,
    STATE,
)


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def hang() -> NoReturn:
    while True:
        time.sleep(1000)


def leave_child() -> None:
    if os.fork() == 0:
        os.setsid()
        hang()


def after_hello(predecessor: Predecessor, then: str) -> None:
    """Goes on in the protocol, and misbehaves at the moment that `then` names."""
    predecessor.hello("bad program")
    predecessor.receive(STATE)
    if then == "fork":
        leave_child()
        sys.exit(1)
    if then == "die-after-hello":
        die()
    if then == "hang-after-hello":
        hang()
    if then == "garbage":
        os.write(predecessor._socket.fileno(), b"garbage")
        hang()
    if then == "part":
        os.write(predecessor._socket.fileno(), MORE)
        hang()
    if then == "hello-twice":
        predecessor.hello("bad program")
        hang()
    if then == "hang-up":
        predecessor.close()
        hang()
    predecessor.send(READY)
    if then == "die-after-ready":
        die()
    predecessor.receive(HAND_OVER)
    if then == "die-before-commit":
        die()
    if then == "hang-before-commit":
        hang()
    if then == "refuse-before-commit":
        predecessor.refuse("it was just before")


def main(kind: str) -> None:
    if kind == "import":
        import no_such_module  # type: ignore[import-not-found]  # noqa: F401
    if kind == "exit":
        sys.exit(1)
    if kind == "die":
        die()
    if kind == "hang":
        hang()
    if kind == "fork-first":
        leave_child()
        sys.exit(1)
    predecessor = find_predecessor()
    if predecessor is None:
        sys.exit("there is no old image")
    if kind == "refuse":
        predecessor.refuse("it does not feel like it")
    elif kind == "fork-refuse":
        leave_child()
        predecessor.refuse("it has a child")
    elif kind == "talk":
        predecessor.refuse("\x1b[31mred\n" * 100_000)
    elif kind == "protocol":
        predecessor.send(HELLO, {"protocol": PROTOCOL + 1, "program": "a later one"})
        hang()
    elif kind == "refuse-and-die":
        predecessor.send(REFUSE, {"reason": "it dies"})
        die()
    else:
        after_hello(predecessor, kind)


if __name__ == "__main__":
    if sys.argv[-1] == "protocol":
        print(PROTOCOL)
    else:
        main(sys.argv[1])
