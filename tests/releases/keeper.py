"""A new program that keeps what an update gives it, in a folder, and then does not take over.

`keeper.py FOLDER run …` knows the protocol and keeps a hand-over; without `run` it is a program of
a late update, and keeps the CPR state.  Either way the contents of the descriptors are kept too.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cpr.live import sealed
from cpr.live.messages import Message
from cpr.live.new_image import find_predecessor
from cpr.live.transaction import HAND_OVER, PROTOCOL, READY, STATE
from cpr.state.cpr_state import STATE_NAME, CprState

LEVEL = 9


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def is_sealed(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & sealed.SEALS == sealed.SEALS


def keep(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data, LEVEL, mtime=0))


def keep_hand_over(folder: Path) -> None:
    predecessor = find_predecessor()
    assert predecessor is not None
    predecessor.hello("keeper")
    state = predecessor.receive(STATE)
    predecessor.send(READY)
    hand_over = predecessor.receive(HAND_OVER)
    for message in (state, hand_over):
        text: dict[str, Any] = {"body": message.body, "descriptors": len(message.fds)}
        text["sealed"] = [is_sealed(fd) for fd in message.fds]
        (folder / f"{message.kind}.json").write_text(json.dumps(text, indent=1) + "\n")
        keep(folder / f"{message.kind}.stream.gz", message.data)
        keep_descriptors(folder, message)  # now that the guest stands still
    predecessor.refuse("everything is kept")


def keep_descriptors(folder: Path, message: Message) -> None:
    for number, fd in enumerate(message.fds):
        keep(folder / f"{message.kind}.{number}.gz", content(fd))


def keep_cpr_state(folder: Path) -> None:
    fd = int(os.environ[STATE_NAME])
    data = content(fd)
    (folder / "late.cprstate").write_bytes(data)
    for name, id, preserved in CprState.decode(data).fds:
        keep(folder / f"late.{name}.{id}.gz", content(preserved))


if __name__ == "__main__":
    if sys.argv[-1] == "protocol":
        print(PROTOCOL)
    elif "run" in sys.argv:
        keep_hand_over(Path(sys.argv[1]))
    else:
        keep_cpr_state(Path(sys.argv[1]))
