"""What a migration asks of the devices: to get ready, to be saved or not, to roll back."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from conftest import missing_kvm
from waiting import TIMEOUT

from cpr import pc, runstate, vcpus
from cpr.config import parse_command_line
from cpr.devices.base import Device
from cpr.devices.serial import Serial
from cpr.errors import MigrationError
from cpr.events import EventBus
from cpr.live import guard
from cpr.mainloop import MainLoop
from cpr.migration import hand_over, loadvm, savevm
from cpr.migration.capabilities import Capabilities
from cpr.migration.channel import Channel
from cpr.migration.migration import Migration
from cpr.migration.mode import KeepsRam
from cpr.monitor.passed_fds import PassedFds
from cpr.state.cpr_state import CprState
from cpr.state.fds import PreservedFds
from cpr.state.reader import StreamError
from cpr.state.vmstate import VMStateDescription

WORDS = (
    "-nodefaults -m 16M -object memory-backend-memfd,id=ram0,size=16M "
    "-machine pc,memory-backend=ram0,aux-ram-share=on"
)


class Recorder(Device):
    """Records what it is asked; `problem` is raised by `cpr_prepare`."""

    idstr = "recorder"
    vmstate = VMStateDescription("recorder", 0, 0, ())
    saved_last = True

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.problem: MigrationError | None = None
        self.blocker: str | None = None
        self.is_needed = True

    def needed(self) -> bool:
        return self.is_needed

    def cpr_blocker(self, mode: str) -> str | None:
        return self.blocker

    def cpr_prepare(self, mode: str) -> None:
        self.calls.append(f"prepare {mode}")
        if self.problem is not None:
            raise self.problem

    def cpr_rollback(self) -> None:
        self.calls.append("rollback")

    def restore(self, state: dict) -> None:
        self.calls.append("restore")

    def take_over(self) -> None:
        self.calls.append("take over")

    def save(self) -> dict:
        self.calls.append("save")
        return {}

    def on_run(self) -> None:
        self.calls.append("run")

    def on_stop(self) -> None:
        self.calls.append("stop")


class Source:
    """A whole VM of this process with a Recorder; its guest runs once `boot` is called."""

    def __init__(self, image: str) -> None:
        accel = "tcg" if missing_kvm() else "kvm"
        words = [*WORDS.split(), "-accel", accel, "-drive", f"file={image},format=raw,if=floppy"]
        self.fds = PreservedFds()
        self.loop = MainLoop()
        events = EventBus()
        self.machine = pc.build(parse_command_line(words), self.fds, self.loop, events)
        self.device = Recorder()
        self.machine.add_device(self.device)
        self.machine.add_device(Serial(0))
        self.migration = Migration(self.machine, self.fds, self.loop, events, PassedFds())

    def boot(self) -> None:
        self.machine.load_boot_image()
        self.machine.cont()
        self.device.calls.clear()

    def run_to_the_end(self) -> None:
        ended: list[bool] = []
        self.migration.add_finish_callback(lambda: ended.append(True))
        for _ in range(int(TIMEOUT * 10)):
            self.loop.iterate(100_000_000)
            if ended:
                return
        raise AssertionError(f"the migration does not end: {self.migration.status}")

    def close(self) -> None:
        self.machine.pause_vcpus()
        self.machine.close()
        self.loop.close()


@pytest.fixture
def source(guests) -> Iterator[Source]:
    source = Source(str(guests / "heartbeat.img"))
    source.boot()
    yield source
    source.close()


def test_order_where_the_exec_fails(source: Source, monkeypatch) -> None:
    monkeypatch.setattr(guard, "wait_alone", lambda known: None)  # what runs the tests has threads
    source.migration.start_cpr_exec(["/nonexistent"])
    source.run_to_the_end()
    assert source.migration.error == "execvp /nonexistent failed: No such file or directory"
    assert source.device.calls == ["stop", "prepare cpr-exec", "save", "rollback", "run"]
    assert source.machine.runstate.current == runstate.RUNNING


@pytest.mark.parametrize(
    ("version", "minimum", "text"),
    [
        (3, 0, "unsupported version 3 for 'recorder' v2"),
        (0, 1, "version 0 of 'recorder' is too old: this VMM loads 1 to 2"),
        (1, 1, ""),
    ],
)
def test_versions_of_a_device_that_the_new_vmm_has_not(source, version, minimum, text) -> None:
    wanted = hand_over.describe(source.machine)
    (entry,) = [entry for entry in wanted["sections"] if entry[0] == "recorder"]
    entry[2] = version
    source.device.vmstate = VMStateDescription("recorder", 2, minimum, ())
    assert hand_over.differences(source.machine, wanted) == ([text] if text else [])


def test_a_vm_that_is_told_to_end_does_not_wait_for_its_threads(source, monkeypatch) -> None:
    """After an update that has failed, where no thread can be started for the guest."""

    def no_thread(*arguments: object) -> int:
        raise RuntimeError("can't start new thread")

    machine = source.machine
    machine.park()
    monkeypatch.setattr(vcpus, "start_new_thread", no_thread)
    asked: list[bool] = []
    machine.interrupted = lambda: asked.append(True) or len(asked) > 2
    machine.unpark()
    assert len(asked) == 3
    machine.shutdown(False, "host-signal")
    assert machine.ended


def test_device_that_refuses_when_it_is_asked(source: Source, tmp_path) -> None:
    source.device.problem = MigrationError("not now")
    source.migration.parameters.set({"mode": "cpr-reboot"})
    source.migration.migrate(f"file:{tmp_path}/stream")
    source.run_to_the_end()
    assert (source.migration.status, source.migration.error) == ("failed", "not now")
    assert source.device.calls == ["stop", "prepare cpr-reboot", "rollback", "run"]
    assert source.machine.runstate.current == runstate.RUNNING


def test_device_that_blocks_is_never_asked(source: Source) -> None:
    source.device.blocker = "no"
    assert source.migration.query() == {"blocked-reasons": ["no"]}
    with pytest.raises(MigrationError, match="no"):
        source.migration.start_cpr_exec(["/nonexistent"])
    assert source.device.calls == []


@pytest.mark.parametrize("needed", [True, False])
def test_section_that_is_not_needed_is_not_there(source: Source, tmp_path, needed: bool) -> None:
    source.device.is_needed = needed
    source.migration.migrate(f"file:{tmp_path}/stream")
    source.run_to_the_end()
    assert source.migration.status == "completed"
    stream = (tmp_path / "stream").read_bytes()
    assert (b"\x08recorder" in stream) == needed
    if needed:
        assert stream.index(b"\x08recorder") > stream.index(b"\x06serial")


def test_state_has_what_was_opened_after_the_migration_began(source: Source, monkeypatch) -> None:
    """A guest that unmasks a vector while the migration is being set up."""
    seen: list[CprState] = []
    opened = os.eventfd(0, os.EFD_CLOEXEC)

    def prepare(mode: str) -> None:
        source.fds.save("0000:00:04.0_interrupt", 1, opened)

    def execute(*arguments: object, **options: object) -> None:
        data = os.pread(source.fds.state_fd, 1 << 16, 0)
        seen.append(CprState.decode(data))
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(source.device, "cpr_prepare", prepare)
    monkeypatch.setattr(guard, "execute", execute)
    source.migration.start_cpr_exec(["/nonexistent"])
    source.run_to_the_end()
    assert ("0000:00:04.0_interrupt", 1, opened) in seen[0].fds
    os.close(opened)


def test_device_takes_over_once_the_guest_is_this_vmms(source: Source, tmp_path, guests) -> None:
    source.migration.migrate(f"file:{tmp_path}/stream")
    source.run_to_the_end()
    target = Source(str(guests / "heartbeat.img"))
    try:
        incoming = target.migration.incoming_side
        incoming.commit = lambda: target.device.calls.append("commit")
        incoming.expect(False)
        incoming.load_now({"transport": "file", "filename": f"{tmp_path}/stream", "offset": 0})
        assert target.device.calls == ["restore", "commit", "take over", "run"]
    finally:
        target.close()


def saved(source: Source, known: dict | None = None) -> tuple[int, dict]:
    """A stream of the stopped machine's devices, in a memfd, and the bodies of their sections."""
    fd = os.memfd_create("test-stream")
    channel = Channel(os.dup(fd), "file")
    saver = savevm.Saver(source.machine, Capabilities(), KeepsRam("cpr-exec"), channel)
    saver.ram()
    bodies = saver.devices(runstate.RUNNING, known=known)
    saver.end(described=False)
    channel.finish()
    os.lseek(fd, 0, os.SEEK_SET)
    return fd, bodies


def test_a_section_that_is_known_is_there_where_it_is_not_needed_any_more(source: Source) -> None:
    """What the other side has loaded before would stay there else."""
    source.machine.stop()
    known = {("recorder", 0): b"another"}
    source.device.is_needed = False
    fd, bodies = saved(source, known)
    assert bodies["recorder", 0] == b""
    assert b"\x08recorder" in os.pread(fd, 1 << 20, 0)
    os.close(fd)


def test_a_section_that_is_known_is_left_out_and_not_missed(source: Source, guests) -> None:
    source.machine.stop()
    whole, bodies = saved(source)
    known = {key: body for key, body in bodies.items() if key[0] != "serial"}
    rest, again = saved(source, known)
    assert again == bodies
    assert b"\x06serial" in os.pread(rest, 1 << 20, 0)
    assert b"\x08recorder" not in os.pread(rest, 1 << 20, 0)
    target = Source(str(guests / "heartbeat.img"))
    target.device.required = True
    for block in target.machine.blocks:
        block.kept = True
    try:
        loader = loadvm.Loader(target.machine, Capabilities())
        loader.load(Channel(whole, "file"), described=False)
        assert target.device.calls == ["restore"]
        with pytest.raises(StreamError, match="no section 'recorder'"):
            loader.load(Channel(os.dup(rest), "file"), described=False)
        os.lseek(rest, loader.devices_offset, os.SEEK_SET)  # what comes before has been checked
        loader.load(Channel(os.dup(rest), "file"), described=False, loaded=known, begun=True)
        os.lseek(rest, 0, os.SEEK_SET)
        loader.load(Channel(rest, "file"), described=False, loaded=known)
        assert target.device.calls == ["restore"]
    finally:
        target.close()
