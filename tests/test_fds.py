"""fds.py: the registry with real descriptors, and through a real exec."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys

import pytest
from descriptors import open_fds

from cpr import mapped
from cpr.errors import KernelError, StateError
from cpr.state.cpr_state import REMEDY, STATE_NAME, CprState, VfioDevice
from cpr.state.fds import PreservedFds


@pytest.fixture
def memfd():
    """Makes memfds that are closed after the test, if it has not closed them."""
    opened = []

    def make(content: bytes = b"") -> int:
        fd = os.memfd_create("test")
        os.write(fd, content)
        opened.append((fd, os.fstat(fd).st_ino))
        return fd

    yield make
    for fd, inode in opened:
        try:
            ours = os.fstat(fd).st_ino == inode
        except OSError:
            continue
        if ours:
            os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_save_find_delete(memfd):
    fds, first, second = PreservedFds(), memfd(), memfd()
    fds.save("ram0", 0, first)
    fds.save("ram0", 1, second)
    assert (fds.find("ram0", 0), fds.find("ram0", 1)) == (first, second)
    assert (fds.find("ram1", 0), fds.find("ram0", 2)) == (None, None)
    assert fds.entries() == [("ram0", 0, first), ("ram0", 1, second)]
    fds.delete("ram0", 0)
    fds.delete("ram0", 0)
    assert fds.entries() == [("ram0", 1, second)]
    assert is_open(first)


def test_what_is_saved_is_not_saved_again(memfd):
    fds, fd = PreservedFds(), memfd()
    fds.save("ram0", 0, fd)
    with pytest.raises(ValueError, match="cpr fd 'ram0' id 0 is already saved"):
        fds.save("ram0", 0, fd)
    assert fds.entries() == [("ram0", 0, fd)]


def test_what_came_with_a_state_is_known_until_it_is_deleted_or_all_is_taken_over(memfd):
    fds, group, ram = PreservedFds(), memfd(), memfd()
    fds.require("vfio_group", 12, "never asked of a VMM that starts")
    fds.take_over(CprState([("vfio_group", 12, group), ("ram0", 0, ram)], []))
    fds.require("vfio_group", 12, "")
    with pytest.raises(StateError) as caught:
        fds.require("vfio_group", 13, "give the same devices")
    text = "the CPR state has no descriptor 'vfio_group' id 13: give the same devices"
    assert str(caught.value) == text
    assert fds.open("vfio_group", 12, memfd) == group
    fds.open("vfio_group", 13, memfd)
    came = [fds.came(*each) for each in (("vfio_group", 12), ("vfio_group", 13), ("ram0", 0))]
    assert came == [True, False, True]
    fds.delete("ram0", 0)
    assert not fds.came("ram0", 0)
    fds.incoming = False
    assert not fds.came("vfio_group", 12)


def test_open_opens_once(memfd):
    fds, opened = PreservedFds(), []

    def opener() -> int:
        opened.append(memfd())
        return opened[-1]

    fd = fds.open("vfio_group", 12, opener)
    assert fds.open("vfio_group", 12, opener) == fd
    assert opened == [fd]


def test_open_saves_nothing_when_the_opener_fails():
    fds = PreservedFds()

    def opener() -> int:
        raise PermissionError

    with pytest.raises(PermissionError):
        fds.open("vfio_group", 12, opener)
    assert fds.entries() == []


def test_persist_and_unpersist(memfd):
    fds, environ = PreservedFds(), {"PATH": "/bin"}
    fds.save("ram0", 0, memfd())
    fds.vfio_devices.append(VfioDevice("0000:3a:10.1", 1, 2, 3))
    fd = fds.persist(environ)
    assert fds.state_fd == fd
    assert environ == {"PATH": "/bin", STATE_NAME: str(fd)}
    assert os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:{STATE_NAME} (deleted)"
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
    assert not os.get_inheritable(fd)
    size = os.fstat(fd).st_size
    assert os.lseek(fd, 0, os.SEEK_CUR) == size
    state = CprState.decode(os.pread(fd, size, 0))
    assert (state.fds, state.vfio_devices) == (fds.entries(), fds.vfio_devices)
    with pytest.raises(ValueError, match="persisted already"):
        fds.persist(environ)
    fds.unpersist(environ)
    assert (environ, fds.state_fd, is_open(fd)) == ({"PATH": "/bin"}, -1, False)
    fds.unpersist(environ)


def test_a_state_that_has_changed_is_another_memfd_with_the_same_number(memfd):
    fds = PreservedFds()
    fds.save("ram0", 0, memfd())
    fd = fds.persist({})
    for number in (1, 2):
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == fcntl.F_SEAL_SEAL
        before = os.fstat(fd).st_ino
        assert not os.get_inheritable(fd)
        fds.save("ram0", number, memfd())
        fds.refresh()
        assert fds.state_fd == fd
        assert os.fstat(fd).st_ino != before
        assert CprState.decode(os.pread(fd, 4096, 0)).fds == fds.entries()
    fds.unpersist({})


def test_refresh_writes_what_has_changed_since(memfd):
    fds = PreservedFds()
    fds.save("ram0", 0, memfd())
    fds.save("a longer name", 1, memfd())
    state_fd = fds.persist({})

    def written() -> list[tuple[str, int, int]]:
        size = os.fstat(state_fd).st_size
        assert os.lseek(state_fd, 0, os.SEEK_CUR) == size
        return CprState.decode(os.pread(state_fd, size, 0)).fds

    fds.refresh()
    assert written() == fds.entries()
    fds.delete("a longer name", 1)
    fds.refresh()
    assert written() == fds.entries() != []
    fds.unpersist({})


def test_persist_leaves_nothing_behind_when_it_fails(monkeypatch):
    environ: dict[str, str] = {}
    fds, before = PreservedFds(), open_fds()

    def full(fd: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(KernelError, match=f"write to memfd {STATE_NAME}: No space left"):
        fds.persist(environ)
    assert (environ, fds.state_fd, open_fds()) == ({}, -1, before)


def test_memory_that_is_not_there_is_an_error_and_no_signal(memfd):
    fd = memfd()
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    with mmap.mmap(fd, 2 * mmap.PAGESIZE) as view:
        mapped.populate(view, fd)
        os.ftruncate(fd, mmap.PAGESIZE)
        with pytest.raises(OSError, match="Cannot allocate memory"):
            mapped.populate(view, fd)


def test_load_reads_from_the_start_and_takes_over(memfd):
    ram = memfd()
    os.set_inheritable(ram, True)
    device = VfioDevice("0000:3a:10.1", 1, 2, 3)
    fd = memfd(CprState([("ram0", 0, ram)], [device]).encode())
    fds = PreservedFds()
    assert not fds.incoming
    fds.load(fd)
    assert fds.incoming
    assert fds.entries() == [("ram0", 0, ram)]
    assert fds.vfio_devices == [device]
    assert not os.get_inheritable(ram)
    assert not is_open(fd)


def test_of_two_with_one_name_the_first_is_found_and_both_are_deleted(memfd):
    first, second = memfd(), memfd()
    fds = PreservedFds()
    fds.load(memfd(CprState([("ram0", 0, first), ("ram0", 0, second)], []).encode()))
    assert fds.find("ram0", 0) == first
    assert not os.get_inheritable(second)
    fds.delete("ram0", 0)
    assert fds.find("ram0", 0) is None


def test_load_names_an_fd_that_is_not_open(memfd):
    gone = 1000
    assert not is_open(gone)
    fd = memfd(CprState([("ram0", 0, gone)], []).encode())
    fds = PreservedFds()
    with pytest.raises(StateError) as caught:
        fds.load(fd)
    assert str(caught.value) == f"CPR fd 'ram0' id 0: descriptor {gone} is not open; {REMEDY}"
    assert (fds.entries(), fds.incoming, is_open(fd)) == ([], False, False)


def test_a_state_that_names_itself_is_refused(memfd):
    fd = memfd()
    os.write(fd, CprState([("ram0", 0, fd)], []).encode())
    with pytest.raises(StateError, match=f"descriptor {fd} is not open"):
        PreservedFds().load(fd)


def test_the_environment_without_the_variable():
    fds = PreservedFds()
    assert fds.load_from_environment({"PATH": "/bin"}) is False
    assert not fds.incoming


def test_the_environment_with_the_variable(memfd):
    ram = memfd()
    environ = {STATE_NAME: str(memfd(CprState([("ram0", 0, ram)], []).encode()))}
    fds = PreservedFds()
    assert fds.load_from_environment(environ) is True
    assert (environ, fds.entries()) == ({}, [("ram0", 0, ram)])


NO_STATE = "Not a migration stream (bad magic 0)"
NOT_A_NUMBER = f"{STATE_NAME}='{{}}' is not the number of a descriptor; {REMEDY}"
VALUES = {
    "": NOT_A_NUMBER,
    "garbage": NOT_A_NUMBER,
    "12x": NOT_A_NUMBER,
    "99999999999": NOT_A_NUMBER,
    "-99999999999": NOT_A_NUMBER,
    "9" * 5000: NOT_A_NUMBER,
    "-1": NO_STATE,
    "2147483647": NO_STATE,
}


@pytest.mark.parametrize(("value", "text"), VALUES.items(), ids=[v[:12] for v in VALUES])
def test_variables_that_name_no_state(value, text):
    environ = {STATE_NAME: value}
    fds = PreservedFds()
    with pytest.raises(StateError) as caught:
        fds.load_from_environment(environ)
    assert str(caught.value) == text.format(value)
    assert (environ, fds.incoming) == ({}, False)


def test_a_standard_stream_is_no_state_and_stays_open():
    with pytest.raises(StateError, match="Not a migration stream"):
        PreservedFds().load_from_environment({STATE_NAME: "2"})
    assert is_open(2)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "/proc/self/status"])
def test_a_file_that_is_no_state_is_refused_and_closed(path):
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(StateError, match="Not a migration stream"):
        PreservedFds().load(fd)
    assert not is_open(fd)


def test_a_wrong_number_does_not_read_all_of_guest_ram(memfd):
    fd = memfd()
    os.truncate(fd, 1 << 40)
    with pytest.raises(StateError, match="Not a migration stream"):
        PreservedFds().load(fd)


# Runs three times in one process: the first image saves, the others find.
IMAGE = """
import os, sys
from cpr.state.cpr_state import VfioDevice
from cpr.state.fds import PreservedFds

fds = PreservedFds()
incoming = fds.load_from_environment()
generation = int(sys.argv[1])
assert incoming == fds.incoming == (generation > 0)
counter = fds.open("counter", 0, lambda: os.eventfd(30, os.EFD_CLOEXEC))
ram = fds.open("ram0", 0, lambda: os.memfd_create("ram0"))
private = os.memfd_create("private")
assert not os.get_inheritable(counter) and not os.get_inheritable(ram)
os.eventfd_write(counter, 30)
os.write(ram, b"%d" % generation)
if generation == 0:
    fds.vfio_devices.append(VfioDevice("0000:3a:10.1", 1, 2, 3))
if generation == 2:
    names = sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                   if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{fd}"))
    memfds = [name for name in names if "memfd" in name]
    print(os.getpid(), os.eventfd_read(counter), os.pread(ram, 9, 0), fds.vfio_devices, memfds)
    sys.exit()
fds.persist()
try:
    os.execv("/nonexistent", ["x"])
except OSError:
    fds.unpersist()
for fd in (counter, ram, fds.persist()):
    os.set_inheritable(fd, True)
os.execv(sys.executable, [sys.executable, "-c", sys.orig_argv[2], str(generation + 1)])
"""


def test_descriptors_survive_two_execs_with_their_content():
    environment = {name: os.environ[name] for name in os.environ if name != STATE_NAME}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with subprocess.Popen(
        [sys.executable, "-c", IMAGE, "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"PYTHONPATH": root},
    ) as process:
        output, _ = process.communicate(timeout=60)
    devices = [VfioDevice("0000:3a:10.1", 1, 2, 3)]
    memfds = ["/memfd:private (deleted)", "/memfd:ram0 (deleted)"]
    assert process.returncode == 0
    assert output.strip() == f"{process.pid} {30 + 3 * 30} {b'012'!r} {devices} {memfds}"


def test_a_later_version_of_a_state_names_anew_what_came(memfd):
    fds, ram, copy, late = PreservedFds(), memfd(), memfd(), memfd()
    fds.take_over(CprState([("ram0", 0, ram)], []))
    fds.replace(CprState([("ram0", 0, copy), ("irq", 1, late)], []))
    assert fds.entries() == [("ram0", 0, ram), ("irq", 1, late)]
    assert fds.came("ram0", 0) and fds.came("irq", 1)
    assert not is_open(copy)


def test_a_later_version_of_a_state_brings_what_has_another_descriptor_now(memfd):
    """A guest that switches its interrupts off and on again has others under the same names."""
    fds, old, new = PreservedFds(), memfd(), memfd()
    fds.take_over(CprState([("irq", 1, old)], []))
    fds.replace(CprState([("irq", 1, new)], []), {("irq", 1)})
    assert fds.entries() == [("irq", 1, new)]
    assert not is_open(old)


def test_a_name_that_was_saved_again_has_another_serial(memfd):
    fds = PreservedFds()
    fds.take_over(CprState([("ram0", 0, memfd())], []))
    fds.save("irq", 1, number := memfd())
    before = fds.serials()
    fds.delete("irq", 1)
    fds.save("irq", 1, number)
    assert fds.serials() == before | {("irq", 1): before["irq", 1] + 1}
