"""Files that are a guest's RAM: an update takes them along, and no two VMMs have a guest in one."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from pathlib import Path

import pytest
from failing import own
from harness.qmp import QmpError
from harness.vm import HEARTBEAT, VMM, Vm
from waiting import TIMEOUT, wait_for, wait_for_change

from cpr.constants import PAGE_SIZE
from cpr.errors import CommandError
from cpr.migration import holder
from cpr.ram import RAMBlock

SIZE = 16 << 20
LOCKED = 'Failed to get "write" lock'


class Guest:
    """A VM with its RAM in a file, as whoever has the first file mapped sees it."""

    def __init__(self, start, accel: str, folder: Path) -> None:
        self.path = folder / "ram"
        self.words = words(accel, self.path)
        self.vm: Vm = start(*self.words)
        wait_for_change(lambda: self.path.read_bytes()[HEARTBEAT], "the guest counts")
        with self.path.open("rb") as file:
            self.ram = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    def counts(self) -> None:
        wait_for_change(lambda: self.ram[HEARTBEAT], "the guest counts there")

    def lose(self, how: str) -> None:
        self.path.unlink()
        if how == "replaced":
            self.path.write_bytes(b"\0" * SIZE)

    def failed(self) -> str:
        wait_for(lambda: "goes on in the old VMM" in self.vm.stderr, "it has failed")
        self.vm.follow()
        self.vm.qmp.close()
        self.vm.qmp = self.vm.connect()
        return str(self.vm.ask("query-migrate")["error-desc"])


def words(accel: str, path: Path) -> list[str]:
    return words_with(accel, f"memory-backend-file,id=ram0,size=16M,share=on,mem-path={path}")


def words_with(accel: str, backend: str) -> list[str]:
    return [
        *("-nodefaults", "-display", "none", "-accel", accel, "-m", "16M", "-object", backend),
        *("-machine", "pc,memory-backend=ram0"),
        *("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy"),
    ]


@pytest.mark.parametrize("how", ["removed", "replaced"])
@pytest.mark.parametrize("overlap", ["on", "off"])
def test_an_update_takes_the_file_that_it_is(start, accel, tmp_path, overlap, how):
    """Not the one that is at its path by then, which it does not make anew either."""
    guest = Guest(start, accel, tmp_path)
    guest.lose(how)
    guest.vm.ask("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    for _ in range(2):
        guest.vm.update()
        guest.counts()
    assert guest.path.exists() == (how == "replaced")
    assert guest.vm.complaints == ""


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_the_way_back_takes_it_too(start, accel, tmp_path, overlap):
    guest = Guest(start, accel, tmp_path)
    old = guest.vm.pid
    guest.lose("removed")
    guest.vm.ask("migrate-set-parameters", x_cpr_exec_overlap=overlap)
    guest.vm.qmp.send("cpr-exec", command=own(*guest.words, "-bogus"))
    assert "-bogus: invalid option" in guest.failed()
    assert guest.vm.pid == old, "the old command has the PID"
    guest.counts()
    assert not guest.path.exists()


def test_a_rehearsal_takes_it_too(start, tmp_path):
    guest = Guest(start, "tcg", tmp_path)
    guest.lose("removed")
    for command in (None, own(*guest.words)):
        arguments = {"command": command} if command else {}
        assert guest.vm.ask("cpr-exec", test=True, **arguments)["refusals"] == []
    assert not guest.path.exists()
    guest.counts()


@pytest.mark.parametrize("versions", ["", "1 2 3 $CPR_QUESTION"])
def test_a_program_that_would_open_another_file_is_refused(start, tmp_path, versions):
    guest = Guest(start, "tcg", tmp_path)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nfor word in {versions or 'none'}; do echo $word; done\n")
    program.chmod(0o755)
    command = [str(program), "run"]
    guest.lose("removed")
    with pytest.raises(QmpError, match="the file of RAM block 'ram0' is not at"):
        guest.vm.qmp.command("cpr-exec", command=command)
    (refusal,) = guest.vm.ask("cpr-exec", test=True, command=command)["refusals"]
    assert Path(refusal.split()[-1]).samefile(f"/proc/{guest.vm.pid}/fd/{refusal.split('/')[-1]}")
    guest.counts()


def ignore_shared(vm: Vm, ignored: bool) -> None:
    capability = {"capability": "x-ignore-shared", "state": ignored}
    vm.ask("migrate-set-capabilities", capabilities=[capability])


def migrate(guest: Guest, tmp_path: Path, ignored: bool = True) -> list[str]:
    """To a file; the words of a VM that loads it."""
    vm = guest.vm
    ignore_shared(vm, ignored)
    vm.ask("migrate-set-parameters", mode="cpr-reboot")
    vm.ask("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: vm.ask("query-migrate")["status"] == "completed", "it is written")
    return [*guest.words, "-incoming", "defer"]


def load(vm: Vm, tmp_path: Path, ignored: bool = False) -> None:
    ignore_shared(vm, ignored)
    vm.qmp.command("migrate-incoming", uri=f"file:{tmp_path}/state")


@pytest.mark.parametrize("how", ["removed", "hole"])
def test_a_file_without_a_guest_is_not_run(start, tmp_path, how):
    guest = Guest(start, "tcg", tmp_path)
    target_words = migrate(guest, tmp_path)
    guest.vm.ask("quit")
    guest.vm.process.wait(TIMEOUT)
    guest.path.unlink()
    if how == "hole":
        with guest.path.open("wb") as file:
            file.truncate(SIZE)
    target = start(*target_words)
    load(target, tmp_path, ignored=True)
    assert target.process.wait(TIMEOUT) == 1
    assert "Memory region ram0 is empty" in target.stderr


def test_a_guest_that_runs_is_not_written_over_by_another(start, tmp_path):
    """Whose RAM was no file, so that its pages are in the stream."""
    guest = Guest(start, "tcg", tmp_path)
    source = start(*words_with("tcg", "memory-backend-ram,id=ram0,size=16M"))
    ignore_shared(source, True)
    source.ask("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: source.ask("query-migrate")["status"] == "completed", "it is written")
    guest.vm.ask("stop")
    before = guest.path.read_bytes()
    target = start(*guest.words, "-incoming", "defer")
    load(target, tmp_path, ignored=True)
    assert target.process.wait(TIMEOUT) == 1
    assert "block ram0 should not be migrated !" in target.stderr
    assert guest.path.read_bytes() == before
    guest.vm.ask("cont")
    guest.counts()


def test_ram_that_is_no_file_at_the_target_is_not_run_empty(start, tmp_path):
    """The pages of the ROMs are in the stream; those of RAM are in the source's file."""
    guest = Guest(start, "tcg", tmp_path)
    migrate(guest, tmp_path)
    words = words_with("tcg", "memory-backend-ram,id=ram0,size=16M")
    target = start(*words, "-incoming", "defer")
    load(target, tmp_path, ignored=True)
    assert target.process.wait(TIMEOUT) == 1
    assert "Memory region ram0 is empty" in target.stderr
    guest.vm.ask("cont")
    guest.counts()


def test_ram_is_not_cut_by_a_descriptor_of_it(start, tmp_path):
    guest = Guest(start, "tcg", tmp_path)
    with open(guest.path, "r+b") as file:
        guest.vm.qmp.execute("add-fd", fds=(file.fileno(),), fdset_id=1)
    with pytest.raises(QmpError, match="is RAM block 'ram0' of this guest"):
        guest.vm.qmp.command("migrate", uri="file:/dev/fdset/1")
    assert guest.path.stat().st_size == SIZE
    guest.counts()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_guest_that_runs_is_not_loaded_beside_itself(start, tmp_path, ignored):
    """Nor is its RAM written over.  It can be when its source has given it up."""
    guest = Guest(start, "tcg", tmp_path)
    target_words = migrate(guest, tmp_path, ignored)
    guest.vm.ask("cont")
    target = start(*target_words)
    load(target, tmp_path, ignored)
    assert target.process.wait(TIMEOUT) == 1
    assert LOCKED in target.stderr
    guest.counts()
    migrate(guest, tmp_path, ignored)
    target = start(*target_words)
    load(target, tmp_path, ignored)
    wait_for(lambda: target.ask("query-status")["running"], "it is this one's now")
    guest.counts()
    with pytest.raises(QmpError, match=LOCKED):
        guest.vm.qmp.command("cont")
    third = start(*target_words)
    load(third, tmp_path, ignored)
    assert third.process.wait(TIMEOUT) == 1
    assert LOCKED in third.stderr
    target.ask("quit")
    target.process.wait(TIMEOUT)
    guest.vm.ask("cont")
    guest.counts()


@pytest.mark.parametrize("paused", [False, True])
def test_a_guest_whose_late_update_fails_keeps_its_file(start, accel, tmp_path, paused):
    """Also one that stands still after that, as QEMU's does."""
    guest = Guest(start, accel, tmp_path)
    if paused:
        guest.vm.ask("stop")
    guest.vm.qmp.send("cpr-exec", command=["/bin/false"])
    guest.failed()
    assert guest.vm.ask("query-status")["status"] == ("postmigrate" if paused else "running")
    second = [*VMM, *guest.words, "-monitor", "none"]
    done = subprocess.run(second, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 1 and LOCKED in done.stderr
    guest.vm.ask("cont")
    guest.counts()


def test_a_deferred_load_of_a_program_that_knows_no_token_has_the_file(start, accel, tmp_path):
    guest = Guest(start, accel, tmp_path)
    program = [*VMM, *guest.vm.words[len(VMM) :], "-incoming", "defer"]
    hidden = ["/bin/sh", "-c", 'exec "$@" 1>&-', "sh", *program]
    guest.vm.ask("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=hidden)
    guest.vm.qmp.send("migrate", uri=f"file:{tmp_path}/state")
    with pytest.raises(ConnectionError):
        while True:
            guest.vm.qmp.command("query-status")
    guest.vm.qmp = guest.vm.connect()
    guest.vm.ask("migrate-incoming", uri=f"file:{tmp_path}/state")
    guest.counts()
    second = [*VMM, *guest.words, "-monitor", "none"]
    done = subprocess.run(second, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 1 and LOCKED in done.stderr


def test_a_disk_of_a_vm_that_runs_fails_the_load(start, tmp_path):
    disk = tmp_path / "disk"
    disk.write_bytes(b"\0" * (1 << 20))
    guest = ["examples/heartbeat.cfg", "-accel", "tcg", "-monitor", "none"]
    guest += ["-drive", f"file={disk},format=raw,if=virtio"]
    source = start(*guest)
    source.ask("migrate", uri=f"file:{tmp_path}/state")
    wait_for(lambda: source.ask("query-migrate")["status"] == "completed", "it is written")
    source.ask("cont")
    target = start(*guest, "-incoming", "defer")
    load(target, tmp_path)
    assert target.process.wait(TIMEOUT) == 1
    assert f"{LOCKED}\nIs another process using the image [{disk}]?" in target.stderr
    wait_for_change(lambda: source.u32(HEARTBEAT), "the source runs")


def test_nothing_is_written_over_the_guest(start, tmp_path):
    """Also by another name; another VMM's file is nothing that this one knows of."""
    guest = Guest(start, "tcg", tmp_path)
    (tmp_path / "link").symlink_to(guest.path)
    for name in ("ram", "link"):
        with pytest.raises(QmpError, match="is RAM block 'ram0' of this guest"):
            guest.vm.qmp.command("pmemsave", val=0, size=4096, filename=str(tmp_path / name))
        with pytest.raises(QmpError, match="is RAM block 'ram0' of this guest"):
            guest.vm.qmp.command("migrate", uri=f"file:{tmp_path / name}")
    assert guest.path.stat().st_size == SIZE
    guest.counts()
    saved = tmp_path / "saved"
    saved.write_bytes(b"x" * 10000)
    guest.vm.ask("pmemsave", val=0x7C00, size=512, filename=str(saved))
    assert saved.read_bytes() == guest.path.read_bytes()[0x7C00:0x7E00]


def test_a_page_for_which_there_is_no_room_is_read(start, tmp_path):
    """Not through the mapping, which would end the VMM by SIGBUS."""
    guest = Guest(start, "tcg", tmp_path)
    os.truncate(guest.path, SIZE // 2)
    assert "0x0000000000000000" in guest.vm.qmp.hmp(f"xp /1xg {SIZE - 4096:#x}")
    guest.counts()


def test_a_file_that_cannot_be_written_at_its_offset_is_not_left(start, tmp_path):
    vm: Vm = start(*words("tcg", tmp_path / "ram"))
    with pytest.raises(QmpError, match="failed to truncate"):
        vm.qmp.command("migrate", uri=f"file:{tmp_path}/state,offset=0x7fffffffffffffff")
    assert not (tmp_path / "state").exists()


def test_a_file_system_without_locks_has_none(monkeypatch, tmp_path):
    """Lustre answers so, and NFS without its lock daemon."""
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE_SIZE))
    block = RAMBlock("ram0", PAGE_SIZE, "memory-backend-file")
    block.reopened = True
    block.fd = os.open(path, os.O_RDWR)

    def refuse(error: int) -> None:
        def lockf(*arguments: object) -> None:
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr(holder.fcntl, "lockf", lockf)

    try:
        refuse(errno.ENOLCK)
        holder.take_guest([block])
        holder.give_guest_away([block])
        refuse(errno.EAGAIN)
        with pytest.raises(CommandError, match=LOCKED):
            holder.take_guest([block])
    finally:
        block.close()
