"""Bad input: one clear error that names it and the remedy, and a running guest loses nothing."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from harness.qmp import QmpError
from harness.vm import HEARTBEAT, VMM
from waiting import wait_for, wait_for_change

BASE = ("-nodefaults", "-display", "none", "-accel", "tcg")
FLOPPY = ("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy")


def run(*arguments, **options):
    """Runs a VMM that ends at once; returns the exit status and stderr."""
    done = subprocess.run(
        [*VMM, *arguments], capture_output=True, text=True, timeout=30, check=False, **options
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-bogus"], "-bogus: invalid option"),
        (["-m", "banana"], "-m banana: Parameter 'size' expects a non-negative number"),
        (["-m", "100000000G", *FLOPPY], "cannot set up guest memory 'pc.ram'"),
        (["nonexistent.cfg"], "Could not open 'nonexistent.cfg': No such file or directory"),
        ([*BASE], "nothing to boot: give -drive file=IMAGE,format=raw,if=floppy or -kernel FILE"),
        (
            [*BASE, "-drive", "file=/nonexistent.img,format=raw,if=floppy"],
            "Could not open '/nonexistent.img': No such file or directory",
        ),
        (
            [*BASE, "-drive", "file=Makefile,format=raw,if=floppy"],
            "'Makefile' is not bootable: its first sector does not end in 55 aa",
        ),
        ([*BASE, "-kernel", "/nonexistent"], "could not open kernel file '/nonexistent'"),
        ([*BASE, *FLOPPY, "-m", "64T"], "give this one less RAM with -m"),
        (
            [*BASE, *FLOPPY, "-m", "64M", "-object", "memory-backend-memfd,id=r,size=32M"]
            + ["-machine", "pc,memory-backend=r"],
            "Machine memory size does not match the size of the memory backend",
        ),
        (
            [*BASE, *FLOPPY, "-machine", "pc,memory-backend=nosuch"],
            "Memory backend 'nosuch' not found",
        ),
        ([*BASE, *FLOPPY, "-device", "nosuch"], "'nosuch' is not a valid device model name"),
        ([*BASE, *FLOPPY, "-smp", "300"], "The max CPUs supported by machine"),
        ([*FLOPPY, "-accel", "nosuch"], "-accel nosuch: invalid accelerator nosuch"),
        ([*BASE, *FLOPPY, "-incoming", "bogus:x"], "unknown migration protocol: bogus:x"),
        (
            [*BASE, *FLOPPY, "-incoming", "file:/nonexistent"],
            "Could not open '/nonexistent': No such file or directory",
        ),
        (
            [*BASE, *FLOPPY, "-qmp", "unix:/nonexistent/s,server=on,wait=off"],
            "Failed to bind socket to /nonexistent/s: No such file or directory",
        ),
        (
            [*BASE, *FLOPPY, "-pidfile", "/nonexistent/pid"],
            "cannot create PID file: Could not create '/nonexistent/pid'",
        ),
        (
            [*BASE, *FLOPPY, "-global", "migration.nosuch=1"],
            "can't apply global migration.nosuch=1: Property 'migration.nosuch' not found",
        ),
    ],
)
def test_refused_at_the_start(guests, arguments, text):
    status, stderr = run(*arguments)
    assert status == 1
    assert stderr.startswith("cpr-vmm: ")
    assert text in stderr
    assert "Traceback" not in stderr


def test_port_in_use(guests):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, stderr = run(*BASE, *FLOPPY, "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off")
    assert status == 1
    assert "Address already in use" in stderr
    assert str(port) in stderr


def test_no_such_verb():
    done = subprocess.run(
        [*VMM[:-1], "fly"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("cpr-vmm: no such verb: 'fly'\nusage: ")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user without /dev/kvm")
def test_kvm_denied_names_the_group(guests, usable, tmp_path):
    if not os.path.exists("/dev/kvm"):
        pytest.skip("there is no /dev/kvm to be denied")
    code = (
        "import os\n"
        "from cpr.uapi import kvm\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: kvm.open_device()\n"
        "except kvm.KernelError as error: print(error)\n"
    )
    done = subprocess.run([VMM[0], "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == (
        "Could not access KVM kernel module /dev/kvm: Permission denied; add yourself to group "
        "kvm (usermod -aG kvm $USER), or use -accel tcg\n"
    )


def test_no_kvm_falls_back_where_asked(guests, tmp_path, monkeypatch):
    """In a mount namespace without /dev/kvm: kvm:tcg says so and runs, kvm alone is refused."""
    unshare = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /dev && exec "$@"', "sh"]
    probe = subprocess.run([*unshare, "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no mount namespaces here: {probe.stderr.strip()}")

    def without_kvm(accel):
        arguments = ["-nodefaults", "-display", "none", "-machine", f"accel={accel}"]
        exit_guest = ["-drive", "file=examples/build/exit.img,format=raw,if=floppy"]
        device = ["-device", "isa-debug-exit,iobase=0x501,iosize=2"]
        command = [*unshare, *VMM, *arguments, *exit_guest, *device]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    missing = "-accel kvm: Could not access KVM kernel module /dev/kvm: No such file or directory"
    status, stderr = without_kvm("kvm")
    assert status == 1
    assert missing in stderr
    status, stderr = without_kvm("kvm:tcg")
    assert status == 33
    assert missing in stderr
    assert "cpr-vmm: falling back to tcg" in stderr


def raw_qmp(vm, data):
    """Sends bytes as they are and returns the first message that comes back."""
    vm.qmp.send_raw(data)
    return vm.qmp.read()


@pytest.mark.parametrize(
    "data", [b"{'execute': \n]", b"\xff\xfe\n", b'"text"\n', b'{"execute": 5}\n', b"{}\n"]
)
def test_malformed_qmp_is_answered_and_the_monitor_goes_on(start, accel, data):
    vm = start.guest("heartbeat", accel)
    assert raw_qmp(vm, data)["error"]["class"] == "GenericError"
    vm.qmp.send_raw(b"\n")
    while True:
        try:
            status = vm.qmp.command("query-status")
        except QmpError:
            continue
        break
    assert status["running"]


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["/nonexistent/vmm"], "execvp /nonexistent/vmm failed: No such file or directory"),
        (["no-such-program-anywhere"], "No such file or directory"),
        (["/etc/passwd"], "execvp /etc/passwd failed: Permission denied"),
        (["/tmp"], "execvp /tmp failed: Permission denied"),
        (["/bin/true", "x" * 300_000], "execvp /bin/true failed: Argument list too long"),
        ([""], "execvp  failed: No such file or directory"),
    ],
)
def test_a_command_that_cannot_be_executed(start, accel, command, text):
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("cpr-exec", command=command)
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "the exec fails")
    assert text in vm.qmp.command("query-migrate")["error-desc"]
    assert vm.qmp.command("query-status")["running"]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")
    assert not list(vm.directory.glob("cpr-exec-*")), "the temporary directory is removed"


def test_text_with_an_x_bit_does_not_cost_the_guest(start, accel, tmp_path):
    script = tmp_path / "garbage"
    script.write_text("not a program\n")
    script.chmod(0o755)
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("cpr-exec", command=[str(script)])
    wait_for(lambda: vm.qmp.command("query-migrate")["status"] == "failed", "the exec fails")
    assert "Exec format error" in vm.qmp.command("query-migrate")["error-desc"]
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


def test_spawn_denied_by_the_sandbox(start, accel):
    """Refused before anything stops: there is no other way to become another program."""
    text = "-sandbox spawn=deny forbids execve, with which this VMM is updated"
    vm = start.guest("heartbeat", accel, "-sandbox", "on,spawn=deny")
    for command in (None, ["/nonexistent"], [*vm.words]):
        with pytest.raises(QmpError, match=text):
            vm.qmp.command("cpr-exec", **({"command": command} if command else {}))
    assert vm.qmp.command("cpr-exec", test=True)["refusals"] == [text]
    assert not vm.qmp.events
    wait_for_change(lambda: vm.u32(HEARTBEAT), "the guest counts on")


def test_a_full_or_missing_temporary_directory(start, accel):
    vm = start.guest("heartbeat", accel)
    vm.qmp.command("migrate-set-parameters", mode="cpr-exec", cpr_exec_command=["/bin/true"])
    for uri, text in (
        ("file:/nonexistent/x", "Could not create '/nonexistent/x': No such file or directory"),
        ("file:/dev/full", "failed to truncate migration file to offset 0: Invalid argument"),
    ):
        with pytest.raises(QmpError, match=text):
            vm.qmp.command("migrate", uri=uri)
        assert vm.qmp.command("query-migrate") == {"status": "failed", "error-desc": text}
    assert vm.qmp.command("query-status")["running"]
    assert "STOP" not in [event["event"] for event in vm.qmp.events]
