"""What an earlier release has kept, put back: descriptors with their contents, and a guard."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

from harness.vm import Vm

from cpr.live import sealed
from cpr.live.old_image import Update
from cpr.live.transaction import EARLY, HAND_OVER, HELLO, READY, STATE
from cpr.migration.hand_over import identify
from cpr.state.cpr_state import STATE_NAME, CprState

RAM = "memory-backend-memfd"  # what a memfd of a backend's is called


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def memfd(name: str, data: bytes, is_sealed: bool = False) -> int:
    fd = sealed.create(name)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    if is_sealed:
        sealed.seal(fd)
    return fd


class LateUpdate:
    """The environment and the descriptors that a late update's new program would have.

    The descriptors have other numbers than those in the state, which says theirs.
    """

    def __init__(self, folder: Path) -> None:
        state = CprState.decode((folder / "late.cprstate").read_bytes())
        self.fds: list[int] = []
        fds = []
        for name, id, _ in state.fds:
            fd = memfd(RAM, content(folder / f"late.{name}.{id}.gz"))
            self.fds.append(fd)
            fds.append((name, id, fd))
        state_fd = memfd(STATE_NAME, CprState(fds, state.vfio_devices).encode())
        self.fds.append(state_fd)
        self.environment = {**os.environ, STATE_NAME: str(state_fd)}

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class HandOver:
    """The old program of an early update: says what was said, when the new one asks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._update = Update()
        self.environment = self._update.environment(EARLY, os.environ)
        self.fds = self._update.handed_fds
        self.program = ""
        self.ram = b""
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._converse)

    def start(self, vm: Any, *words: str) -> Vm:
        """A VMM that takes the guest over; `vm` starts one."""
        self._thread.start()
        started: Vm = vm(*words, env=self.environment, pass_fds=self.fds)
        self._thread.join()
        if self.failure is not None:
            raise self.failure
        return started

    def _converse(self) -> None:
        update = self._update
        try:
            for expected, answer in ((HELLO, STATE), (READY, HAND_OVER)):
                message = update.receive()
                assert message.kind == expected, (message.kind, message.body)
                self.program = self.program or str(message.body["program"])
                self._send(answer)
        except Exception as error:
            self.failure = error
        finally:
            update._theirs.close()
            update._theirs = None
            update.close()

    def _send(self, kind: str) -> None:
        kept = json.loads((self._folder / f"{kind}.json").read_text())
        body, count = kept["body"], kept["descriptors"]
        first = count - len(body.get("descriptors", []))  # of the CPR state, whose first is RAM
        fds = []
        for number, is_sealed in enumerate(kept["sealed"]):
            data = content(self._folder / f"{kind}.{number}.gz")
            fds.append(memfd(RAM if number == first else kind, data, is_sealed))
            if number == first:
                self.ram = data
        if "descriptors" in body:
            body["descriptors"] = [identify(fd) for fd in fds[first:]]
        stream = content(self._folder / f"{kind}.stream.gz")
        self._update.send(body.pop("kind", kind), body, fds, stream)
        for fd in fds:
            os.close(fd)
