"""The file behind a disk: what a flush that has failed means, and whose its locks are."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from failing import words
from harness.qmp import QmpError
from harness.vm import Vm
from test_virtio_blk import (
    DATA,
    F_CONFIG_WCE,
    F_FLUSH,
    F_VERSION_1,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    STATUS,
    WRITE_ZEROES,
    Rig,
    image,  # noqa: F401
    sector,
)
from waiting import TIMEOUT

from cpr.config import DriveConfig
from cpr.constants import MIB
from cpr.devices.virtio.image import Image
from cpr.errors import ConfigError
from cpr.state.cpr_state import CprState
from cpr.state.fds import PreservedFds
from cpr.uapi import file_lock

LOOP_SET_FD, LOOP_CLR_FD, LOOP_CTL_GET_FREE = 0x4C00, 0x4C01, 0x4C82  # linux/loop.h
PLACE, PLACES = 0x20000, 32  # of the headers and status bytes of many flushes
F_ADD_SEALS, F_SEAL_WRITE = 1033, 8


class Unsynced:
    """Puts a file that takes all and cannot be synced in the place of a disk's."""

    def __init__(self, rig: Rig) -> None:
        self._fd = rig.blk._image.fd
        self._saved = os.dup(self._fd)

    def __enter__(self) -> None:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, self._fd)
        os.close(null)

    def __exit__(self, *exc: object) -> None:
        os.dup2(self._saved, self._fd)
        os.close(self._saved)


def set_write_cache(rig: Rig, on: bool) -> None:
    rig.platform.bus.mmio_write(rig.capabilities[4] + 32, 1, on)


def check_fails_for_good(rig: Rig) -> None:
    """Whatever needs a sync fails, and nothing else."""
    set_write_cache(rig, True)
    assert rig.do(FLUSH) == IOERR
    assert rig.do(OUT, 3, 512) == OK
    assert rig.do(IN, 3, 512) == OK
    set_write_cache(rig, False)
    assert rig.do(OUT, 3, 512) == IOERR
    rig.write(DATA, struct.pack("<QII", 10, 2, 0))
    assert rig.do(WRITE_ZEROES, 0, 16) == IOERR


@pytest.mark.parametrize("policy", ["report", "ignore", "enospc"])
def test_a_failed_flush_is_told_for_good(image: Path, policy: str) -> None:  # noqa: F811
    rig = Rig(image, policies=("report", policy))
    rig.start(F_VERSION_1 | F_FLUSH | F_CONFIG_WCE)
    with Unsynced(rig):
        assert rig.do(FLUSH) == IOERR
    check_fails_for_good(rig)
    rig.function.on_stop()
    rig.function.on_run()
    check_fails_for_good(rig)
    rig.start(F_VERSION_1 | F_FLUSH | F_CONFIG_WCE)  # the guest has reset the device
    check_fails_for_good(rig)
    rig.close()
    rig = Rig(image)
    rig.start()
    assert rig.do(FLUSH) == OK
    rig.close()


@pytest.mark.parametrize("write_cache", [True, False])
def test_a_failed_flush_stops_the_guest_once(image: Path, write_cache: bool) -> None:  # noqa: F811
    """When the guest goes on it is told."""
    rig = Rig(image, policies=("report", "stop"))
    rig.start(F_VERSION_1 | F_FLUSH | F_CONFIG_WCE)
    set_write_cache(rig, write_cache)
    with Unsynced(rig):
        head = rig.submit(FLUSH, 0, 0) if write_cache else rig.submit(OUT, 3, 512)
        rig.ring.kick()
        rig.platform.wait(lambda: rig.platform.stops)
    assert rig.platform.stops == ["io-error"]
    rig.function.on_stop()
    assert rig.function.save()["device"]["kept"] == [{"queue": 0, "head": head}]
    rig.function.on_run()
    assert rig.ring.wait_used()[0] == head
    assert rig.read(STATUS, 1)[0] == IOERR
    check_fails_for_good(rig)
    assert rig.platform.stops == ["io-error"]
    rig.close()


def test_a_failed_flush_goes_over_an_update(image: Path) -> None:  # noqa: F811
    """Also one that is kept; and where none has failed the stream has nothing of it."""
    rig = Rig(image, policies=("report", "stop"))
    rig.start(F_VERSION_1 | F_FLUSH | F_CONFIG_WCE)
    assert rig.do(FLUSH) == OK
    rig.function.on_stop()
    assert b"sync_error" not in rig.function.vmstate.encode(rig.function.save())
    rig.function.on_run()
    with Unsynced(rig):
        head = rig.submit(FLUSH, 0, 0)
        rig.ring.kick()
        rig.platform.wait(lambda: rig.platform.stops)
    rig.function.on_stop()
    encoded = rig.function.vmstate.encode(rig.function.save())
    second = rig.go_over(policies=("report", "stop"))
    driver = second.driver
    assert second.function.vmstate.encode(second.function.save()) == encoded
    second.function.on_run()
    assert driver.queues[0].wait_used()[0] == head
    assert driver.read(STATUS, 1)[0] == IOERR
    check_fails_for_good(second)
    second.close()


@pytest.fixture
def loop_device() -> Iterator[tuple[Path, int]]:
    """A block device, and the memfd behind it."""
    memory = os.memfd_create("disk", os.MFD_ALLOW_SEALING)
    os.truncate(memory, SECTORS * 512)
    device = -1
    try:
        control = os.open("/dev/loop-control", os.O_RDWR)
        for _ in range(10):  # another test may be faster
            path = Path(f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}")
            device = os.open(path, os.O_RDWR)
            try:
                fcntl.ioctl(device, LOOP_SET_FD, memory)
                break
            except OSError as error:
                os.close(device)
                device = -1
                if error.errno != errno.EBUSY:
                    raise
        os.close(control)
    except OSError as error:
        os.close(memory)
        pytest.skip(f"no loop device: {error}")
    if device < 0:
        os.close(memory)
        pytest.skip("no loop device is free")
    yield path, memory
    fcntl.ioctl(device, LOOP_CLR_FD)
    os.close(device)
    os.close(memory)


def flush_often(rig: Rig) -> set[int]:
    """The status of many flushes that are offered at once."""
    for number in range(PLACES):
        place = PLACE + number * 0x100
        rig.write(place, struct.pack("<IIQ", FLUSH, 0, 0) + b"\xff")
        rig.ring.add([(place, 16, False), (place + 16, 1, True)])
    rig.ring.kick()
    for _ in range(PLACES):
        rig.ring.wait_used()
    return {rig.read(PLACE + number * 0x100 + 16, 1)[0] for number in range(PLACES)}


def test_writeback_that_fails_once(loop_device: tuple[Path, int]) -> None:
    """The kernel tells one flush of it; the threads tell every one."""
    path, memory = loop_device
    rig = Rig(path)
    rig.start(F_VERSION_1 | F_FLUSH, sizes=(128,))
    rig.write(DATA, sector(7))
    assert rig.do(OUT, 7, 512) == OK
    assert flush_often(rig) == {OK}
    rig.write(DATA, sector(8))
    assert rig.do(OUT, 7, 512) == OK
    fcntl.fcntl(memory, F_ADD_SEALS, F_SEAL_WRITE)  # its pages cannot be written back any more
    assert flush_often(rig) == {IOERR}
    os.posix_fadvise(rig.blk._image.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(memory, 512, 7 * 512) == sector(7)
    assert flush_often(rig) == {IOERR}
    rig.close()


ALL_LOCKS = {100, 101, 201, 203}


class Other:
    """Another program, which uses an image so that nobody else may."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR)
        for byte in (100, 200, 201):
            file_lock.share(self._fd, byte)

    def close(self) -> None:
        os.close(self._fd)


def open_image(path: Path, came: int = -1, locking: bool = True) -> Image:
    """As a VMM to which a guest comes; `came` is the descriptor that the old one has."""
    fds = PreservedFds()
    if came >= 0:
        fds.take_over(CprState([("drive:d0", 0, os.dup(came))], []))
    return Image(DriveConfig(str(path), id="d0", locking=locking), fds, True)


@pytest.fixture(params=["told", "not told"])
def has_proc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "not told":
        monkeypatch.setattr("cpr.devices.virtio.image.file_lock.held", lambda fd: None)


def locks(image: Image) -> set[int]:  # noqa: F811
    """Those of its description, as another one finds them."""
    fd = os.open(f"/proc/self/fd/{image.fd}", os.O_RDWR)
    try:
        return {byte for byte in range(100, 204) if file_lock.is_locked(fd, byte)}
    finally:
        os.close(fd)


def test_locks_that_came_are_left_alone(image: Path, has_proc: None) -> None:  # noqa: F811
    """Whoever looks at the image meanwhile, and whatever becomes of the new VMM."""
    old = open_image(image)
    old.lock()
    assert locks(old) == ALL_LOCKS
    for _ in range(2):  # a chain of updates
        new = open_image(image, old.fd)
        other = Other(image)
        new.lock()
        new.lock(keeps=True)
        new.undo_lock()
        other.close()
        assert locks(old) == ALL_LOCKS
        new.close()
        assert locks(old) == ALL_LOCKS
        new = open_image(image, old.fd)
        old.close()
        old = new
    old.unlock()  # a migration in mode normal gives them up, for whoever comes next
    assert not locks(old)
    old.lock()
    assert locks(old) == ALL_LOCKS
    old.close()


def test_locks_that_did_not_come_are_taken(image: Path) -> None:  # noqa: F811
    """And are given back where the guest does not come."""
    old = open_image(image, locking=False)
    old.lock()
    assert not locks(old)
    new = open_image(image, old.fd)
    new.lock()
    assert locks(new) == ALL_LOCKS
    new.undo_lock()
    assert not locks(old)
    other = Other(image)
    with pytest.raises(ConfigError, match='Failed to get "consistent read" lock'):
        new.lock()
    other.close()
    assert not locks(old)
    new.close()
    old.close()


def test_a_guest_that_has_come_keeps_its_locks(image: Path) -> None:  # noqa: F811
    """What another program has is said, and no reason to go on without."""
    new = open_image(image)
    other = Other(image)
    with pytest.raises(ConfigError):
        new.lock(keeps=True)
    other.close()
    assert locks(new) == ALL_LOCKS
    new.close()


def test_who_gave_the_locks_up_by_another_description(image: Path) -> None:  # noqa: F811
    """A guest does not go on where it is that of a third VMM by now."""
    rig = Rig(image)
    target = open_image(image, rig.blk._image.fd)
    target.unlock()  # it has given the guest to a third one
    target.close()
    third = Rig(image)
    with pytest.raises(ConfigError, match='Failed to get "write" lock'):
        rig.function.cpr_rollback()
    third.close()
    rig.function.cpr_rollback()
    assert locks(rig.blk._image) == ALL_LOCKS
    rig.close()


def test_it_is_not_written_over_by_a_command(start, tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(b"content " * (MIB // 8))
    before = path.read_bytes()
    vm: Vm = start(*words("tcg"), "-drive", f"file={path},format=raw,if=virtio,id=d0")
    with path.open("r+b") as file:
        vm.qmp.execute("add-fd", fds=(file.fileno(),), fdset_id=1)
    for uri in (f"file:{path}", "file:/dev/fdset/1"):
        with pytest.raises(QmpError, match="is drive 'd0' of this guest: name another file"):
            vm.qmp.command("migrate", uri=uri)
    with pytest.raises(QmpError, match="is drive 'd0' of this guest"):
        vm.qmp.command("pmemsave", val=0, size=4096, filename=str(path))
    vm.ask("quit")
    vm.process.wait(TIMEOUT)
    assert path.read_bytes() == before
