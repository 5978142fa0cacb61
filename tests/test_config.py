"""The command line.  The texts of errors and warnings are QEMU 11.1.3's unless said."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr.config import (
    ChardevConfig,
    Config,
    DeviceConfig,
    DriveConfig,
    MonitorConfig,
    ObjectConfig,
    parse_command_line,
    strip_options,
)
from cpr.config.command_line import FLAGS, HANDLERS, OPTIONS
from cpr.config.usage import QEMU_ONLY, USAGE, VERSION
from cpr.constants import MIB
from cpr.errors import ConfigError

PROJECT = Path(__file__).parent.parent
MEMFD = "-object memory-backend-memfd,id=ram0,size=16M"


def parse(line: str) -> Config:
    return parse_command_line(shlex.split(line))


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    return str(caught.value)


def recorded_errors() -> list[tuple[str, str]]:
    text = (PROJECT / "tests/data/command_line_errors.txt").read_text()
    entries = [entry.partition("\n") for entry in text.split("\n\n$ ")[1:]]
    return [(line, message.rstrip("\n")) for line, _, message in entries]


@pytest.fixture
def guest_cfg(tmp_path: Path) -> Path:
    path = tmp_path / "guest.cfg"
    path.write_text(
        """
[machine]
accel = "kvm:tcg"
memory-backend = "ram0"
aux-ram-share = "on"
[memory]
size = "16M"
[smp-opts]
cpus = "2"
[object "ram0"]
qom-type = "memory-backend-memfd"
size = "16M"
[drive]
file = "a.img"
if = "floppy"
[chardev "hmp"]
backend = "stdio"
[mon]
chardev = "hmp"
[chardev "qmp"]
backend = "socket"
path = "qmp.sock"
server = "on"
[mon "control"]
chardev = "qmp"
mode = "control"
[name]
guest = "file"
process = "file"
"""
    )
    return path


# Errors.


@pytest.mark.parametrize(("line", "message"), recorded_errors())
def test_recorded_errors(line: str, message: str) -> None:
    """Each message was recorded from QEMU 11.1.3; it is its text word for word."""
    assert refusal(line) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-M pc,usb=on", "machine property 'usb=on' is not supported; leave it out"),
        ("-M pc,dtb=x", "machine property 'dtb' is not supported; leave it out"),
        (f"{MEMFD},policy=bind", "property 'policy' of memory-backend-memfd is not supported"),
        ("-chardev null,id=a,mux=on", "chardev: null: 'mux' is not supported; leave it out"),
        (
            "-chardev socket,id=a,path=x,server=on,telnet=on",
            "chardev: socket: 'telnet' is not supported; leave it out",
        ),
        ("-chardev socket,id=a", "chardev: socket: no path or host given"),
        ("-serial mon:stdio", "give the monitor a device of its own with -monitor"),
        ("-drive file=x,format=raw,snapshot=on", "snapshot=on is not supported; leave it out"),
        ("-drive file=x,format=qcow2", "Unknown driver 'qcow2'\nOnly raw images can be used"),
        ("-display gtk", "Parameter 'type' does not accept value 'gtk'\nThere is no display"),
        ("-nic user", "There are no network cards: use -nic none."),
        ("-vga std", "unknown vga type: std\nThere is no display: use -vga none."),
        ("-kernel ''", "could not open kernel file ''"),
    ],
)
def test_what_qemu_can_and_this_cannot_is_named(line: str, message: str) -> None:
    assert message in refusal(line)


def test_only_one_guest_cfg() -> None:
    assert refusal("a.cfg b.img") == (
        "b.img: there is one guest.cfg already, 'a.cfg'; "
        "a disk image is given with -drive file=b.img,format=raw"
    )


def test_options_are_looked_up_before_any_is_read() -> None:
    assert refusal("-m foo missing.cfg -bogus") == "-bogus: invalid option"


def test_options_of_qemu_alone_are_not_options_here() -> None:
    assert not QEMU_ONLY & (OPTIONS.keys() | HANDLERS.keys() | FLAGS.keys())


# What one option says.


def test_defaults() -> None:
    config = parse("")
    assert config.argv == ()
    assert config.machine_type == "pc"
    assert config.machine == {}
    assert config.accels == ("kvm", "tcg")
    assert (config.ram_size, config.ram_size_given) == (128 * MIB, False)
    assert config.smp == 1
    assert config.boot_order == "cad"
    assert config.chardevs == (
        ChardevConfig("serial0", "null", {}),
        ChardevConfig("compat_monitor0", "stdio", {}),
    )
    assert config.serials == ("serial0",)
    assert config.monitors == (MonitorConfig("compat_monitor0", "readline", False),)
    assert config.actions == {
        "reboot": "reset",
        "shutdown": "poweroff",
        "panic": "shutdown",
        "watchdog": "reset",
    }
    assert not (config.objects or config.drives or config.devices or config.incoming)
    assert not (config.globals or config.sandbox or config.warnings or config.start_paused)
    assert not (config.daemonize or config.no_reboot or config.no_shutdown or config.nodefaults)
    assert config.kernel is config.append is config.name is config.uuid is config.pidfile is None
    assert (config.action, config.action_text) == (None, "")


def test_everything_at_once() -> None:
    line = (
        "--machine pc,memory-backend=ram0,aux-ram-share=on -accel kvm -accel tcg -cpu host "
        "-m 16,maxmem=1G,slots=2 -smp 2,maxcpus=4 -object memory-backend-memfd,id=ram0,"
        "size=0x1000000,share=on -kernel k -append 'a,b c' -S -name guest=g,,h,process=p "
        "-uuid 550E8400-E29B-41D4-A716-446655440000 -pidfile pid -nodefaults -no-user-config "
        "-nographic -display none -vga none -net none -nic none -parallel none -no-reboot "
        "-no-shutdown -sandbox on,spawn=deny -only-migratable -global migration.x-a=1,2 "
        "-rtc base=utc -boot once=a -msg timestamp=on -incoming defer -incoming file:x,offset=1"
    )
    config = parse(line)
    assert config.machine == {"memory-backend": "ram0", "aux-ram-share": True}
    assert config.accels == ("kvm", "tcg")
    assert config.cpu_model == "host"
    assert (config.ram_size, config.ram_size_given) == (16 * MIB, True)
    assert config.smp == 2
    assert config.objects == (
        ObjectConfig("memory-backend-memfd", "ram0", {"size": 16 * MIB, "share": True}),
    )
    assert (config.kernel, config.append) == ("k", "a,b c")
    assert (config.name, config.process_name) == ("g,h", "p")
    assert config.uuid == "550e8400-e29b-41d4-a716-446655440000"
    assert config.pidfile == "pid"
    assert config.chardevs == config.serials == config.monitors == ()
    assert config.no_reboot and config.no_shutdown and config.nodefaults and config.start_paused
    assert config.sandbox == {"enable": True, "spawn": "deny"}
    assert config.only_migratable and config.timestamps
    assert config.globals == (("migration", "x-a", "1,2"),)
    assert config.boot_order == "a"
    assert config.incoming == ("defer", "file:x,offset=1")
    assert config.argv == tuple(shlex.split(line))
    assert config.warnings == ()


@pytest.mark.parametrize("name", ["pc", "mini", "pc-i440fx-11.1"])
def test_machine_names(name: str) -> None:
    assert parse(f"-M {name}").machine_type == "pc"


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("-m 16", 16 * MIB),
        ("-m 1.5G", 1536 * MIB),
        ("-m size=16M", 16 * MIB),
        ("-m 16,size=48", 48 * MIB),
        ("-m 16 -m 32", 32 * MIB),
        ("-m 16 -m maxmem=1G", 16 * MIB),
        ("-m 1b", 8192),
        ("-m 5000k", 5120000),
        ("-m 0", 128 * MIB),
        ("-m ''", 128 * MIB),
        ("-M memory.size=64M", 64 * MIB),
        ("-m 32 -M memory.size=64M", 32 * MIB),
        (f"-M memory-backend=ram0 {MEMFD}", 16 * MIB),
        (f"-m 16 -M memory-backend=ram0 {MEMFD}", 16 * MIB),
    ],
)
def test_ram_size(line: str, size: int) -> None:
    assert parse(line).ram_size == size


@pytest.mark.parametrize(
    ("line", "cpus"),
    [
        ("-smp 0x2", 2),
        ("-smp cores=2", 2),
        ("-smp sockets=2,cores=2,threads=2", 8),
        ("-smp maxcpus=4", 4),
        ("-smp 4,cores=2", 4),
        ("-smp 1,maxcpus=2,cores=2", 1),
        ("-M smp.cpus=3", 3),
        ("-M smp.cpus=3 -smp 2", 2),
        ("-smp ''", 1),
    ],
)
def test_smp(line: str, cpus: int) -> None:
    assert parse(line).smp == cpus


@pytest.mark.parametrize(
    ("line", "accels"),
    [
        ("-accel tcg", ("tcg",)),
        ("-accel kvm:tcg", ("kvm", "tcg")),
        ("-accel tcg,thread=single -accel kvm", ("tcg", "kvm")),
        ("-M accel=tcg:kvm", ("tcg", "kvm")),
        ("-M accel=kvm -M accel=tcg", ("tcg",)),
        ("-enable-kvm", ("kvm",)),
    ],
)
def test_accels(line: str, accels: tuple[str, ...]) -> None:
    assert parse(line).accels == accels


def test_an_unknown_accelerator_is_passed_over() -> None:
    config = parse("-accel hvf -accel tcg")
    assert config.accels == ("tcg",)
    assert config.warnings == ("-accel hvf: invalid accelerator hvf",)


def test_object_in_json() -> None:
    text = (
        '{"qom-type": "memory-backend-file", "id": "r", "size": 4096, "mem-path": "a,b",'
        ' "share": true}'
    )
    assert parse_command_line(["-object", text]).objects == (
        ObjectConfig("memory-backend-file", "r", {"size": 4096, "share": True, "mem-path": "a,b"}),
    )


def test_drives() -> None:
    config = parse(
        "-fda a,b -hdb c -drive file=d,format=raw -drive file=e,if=none -drive file=f,if=none,id=x "
        "-drive if=floppy -drive file=g,bus=1,unit=1 -drive file=h,index=2,readonly=off"
    )
    assert [
        (drive.file, drive.interface, drive.index, drive.readonly, drive.id)
        for drive in config.drives
    ] == [
        ("a,b", "floppy", 0, False, "floppy0"),
        ("c", "ide", 1, False, "ide0-hd1"),
        ("d", "ide", 0, False, "ide0-hd0"),
        ("e", "none", 0, False, "none0"),
        ("f", "none", 1, False, "x"),
        (None, "floppy", 1, False, "floppy1"),
        ("g", "ide", 3, False, "ide1-hd1"),
        ("h", "ide", 2, False, "ide1-hd0"),
    ]
    assert parse("-drive file=a,if=floppy,read-only=on").drives == (
        DriveConfig(
            "a", "raw", "floppy", 0, True, "floppy0", "-drive file=a,if=floppy,read-only=on"
        ),
    )


def test_chardevs() -> None:
    line = (
        "-nodefaults -chardev stdio,id=a,signal=off -chardev file,id=b,path=x,,y,append=on "
        "-chardev pty,id=c -chardev socket,id=d,path=s,server=on,wait=off "
        "-chardev socket,id=e,host=::1,port=4,reconnect-ms=100,nodelay=on,telnet=off"
    )
    assert [(one.id, one.backend, one.options) for one in parse(line).chardevs] == [
        ("a", "stdio", {"signal": False}),
        ("b", "file", {"path": "x,y", "append": True}),
        ("c", "pty", {}),
        ("d", "socket", {"path": "s", "server": True, "wait": False}),
        ("e", "socket", {"host": "::1", "port": "4", "nodelay": True, "reconnect-ms": 100}),
    ]


@pytest.mark.parametrize(
    ("short", "backend", "options"),
    [
        ("null", "null", {}),
        ("stdio", "stdio", {}),
        ("pty", "pty", {}),
        ("file:a,b=c", "file", {"path": "a,b=c"}),
        ("unix:s", "socket", {"path": "s"}),
        ("unix:s,server=on,wait=off", "socket", {"path": "s", "server": True, "wait": False}),
        ("tcp:h:1", "socket", {"host": "h", "port": "1"}),
        ("tcp::1,server=on", "socket", {"host": "", "port": "1", "server": True}),
        ("tcp:[::1]:1", "socket", {"host": "::1", "port": "1"}),
    ],
)
def test_short_forms(short: str, backend: str, options: dict) -> None:
    location = f"-serial {short}"
    config = parse(f"-nodefaults {location}")
    assert config.chardevs == (ChardevConfig("serial0", backend, options, location),)
    assert config.serials == ("serial0",)


def test_serials_count_ports() -> None:
    config = parse("-nodefaults -serial none -serial null -serial chardev:a -chardev null,id=a")
    assert config.serials == (None, "serial1", "a")


def test_monitors_are_numbered_as_they_are_made() -> None:
    config = parse(
        "-nodefaults -chardev null,id=a -chardev null,id=b -monitor null -monitor chardev:a "
        "-qmp null -qmp-pretty null -mon b,mode=control,pretty=on -monitor none"
    )
    assert config.monitors == (
        MonitorConfig("compat_monitor0"),
        MonitorConfig("a"),
        MonitorConfig("compat_monitor1", "control"),
        MonitorConfig("compat_monitor2", "control", True),
        MonitorConfig("b", "control", True),
    )


def test_devices() -> None:
    config = parse(
        "-nodefaults -chardev null,id=a -device isa-serial,chardev=a,index=1,id=com2 "
        "-device isa-debug-exit,iobase=0xf4 -device vfio-pci,host=01:00.0 -debugcon null "
        """-device '{"driver":"isa-debug-exit","iosize":4}' -global isa-debug-exit.iosize=8"""
    )
    assert [(one.driver, one.id, one.properties) for one in config.devices] == [
        ("isa-debugcon", None, {"iobase": 0xE9, "chardev": "debugcon"}),
        ("isa-serial", "com2", {"chardev": "a", "index": 1}),
        ("isa-debug-exit", None, {"iosize": 8, "iobase": 0xF4}),
        ("vfio-pci", None, {"host": "01:00.0"}),
        ("isa-debug-exit", None, {"iosize": 4}),
    ]
    assert config.devices[2].location == "-device isa-debug-exit,iobase=0xf4"
    assert config.globals == (("isa-debug-exit", "iosize", "8"),)


def test_globals() -> None:
    config = parse("-global migration.a=b=c -global driver=e1000,property=x,value=1")
    assert config.globals == (("migration", "a", "b=c"), ("e1000", "x", "1"))
    assert config.warnings == ("warning: global e1000.x=1 not used",)


def test_short_booleans_work_and_warn() -> None:
    config = parse("-nodefaults -qmp unix:q,server,nowait")
    assert config.chardevs[0].options == {"path": "q", "server": True, "wait": False}
    assert len(config.warnings) == 2
    assert config.warnings[1] == (
        "-qmp unix:q,server,nowait: warning: short-form boolean option 'nowait' deprecated\n"
        "Please use wait=off instead"
    )


def test_connections_that_late_updates_keep() -> None:
    config = parse(
        "-nodefaults -serial unix:s,server=on,cpr=on -chardev pty,id=a,cpr=off -mon a,cpr=on"
    )
    assert [chardev.options["cpr"] for chardev in config.chardevs] == [False, True]
    assert config.monitors[0].cpr is True
    assert parse("-nodefaults -netdev tap,id=n,cpr=on").netdevs[0].id == "n"


def test_actions() -> None:
    config = parse("-action reboot=shutdown,panic=none -action shutdown=pause")
    assert config.no_reboot and config.no_shutdown
    assert config.actions["panic"] == "none"
    assert not parse("-no-reboot -action reboot=reset").no_reboot


# Defaults.


@pytest.mark.parametrize(
    "line",
    ["-monitor none", "-qmp null", "-serial stdio", "-chardev stdio,id=a", "-daemonize"]
    + ["-mon a -chardev null,id=a", "-nodefaults"],
)
def test_no_default_monitor(line: str) -> None:
    assert "compat_monitor0" not in [
        monitor.chardev for monitor in parse(line).monitors if monitor.mode == "readline"
    ]


@pytest.mark.parametrize("line", ["-nodefaults", "-device isa-serial"])
def test_no_default_serial_port(line: str) -> None:
    assert parse(line).serials == ()


# guest.cfg and options.


def test_guest_cfg_alone(guest_cfg: Path) -> None:
    config = parse_command_line([str(guest_cfg)])
    assert config.accels == ("kvm", "tcg")
    assert config.machine == {"memory-backend": "ram0", "aux-ram-share": True}
    assert [(one.chardev, one.mode) for one in config.monitors] == [
        ("hmp", "readline"),
        ("qmp", "control"),
    ]
    assert config.serials == ("serial0",)


def test_options_win_key_by_key(guest_cfg: Path) -> None:
    config = parse(f"-M aux-ram-share=off -smp cores=2 -name process=option {guest_cfg}")
    assert config.machine == {"memory-backend": "ram0", "aux-ram-share": False}
    assert config.smp == 2
    assert (config.name, config.process_name) == ("file", "option")


@pytest.mark.parametrize("option", ["-accel tcg", "-M accel=tcg"])
def test_options_replace_the_accelerators(guest_cfg: Path, option: str) -> None:
    assert parse(f"{guest_cfg} {option}").accels == ("tcg",)


def test_options_replace_what_has_the_same_id(guest_cfg: Path) -> None:
    config = parse(
        f"{guest_cfg} -m 32 -object memory-backend-memfd,id=ram0,size=32M "
        "-chardev null,id=hmp -fda b.img -drive file=c.img,if=floppy"
    )
    assert config.ram_size == 32 * MIB
    assert len(config.objects) == 1
    assert [one.backend for one in config.chardevs] == ["null", "socket", "null"]
    assert [(drive.file, drive.index) for drive in config.drives] == [("b.img", 0), ("c.img", 1)]


def test_a_readconfig_does_not_give_way(guest_cfg: Path) -> None:
    line = f"-readconfig {guest_cfg} -chardev null,id=hmp"
    assert refusal(line) == "-chardev null,id=hmp: Duplicate ID 'hmp' for chardev"
    config = parse(f"-m 32 -readconfig {guest_cfg}")
    assert config.ram_size == 16 * MIB


@pytest.mark.parametrize(
    ("option", "monitors", "chardevs"),
    [
        ("-monitor none", ["qmp"], ["qmp", "serial0"]),
        ("-monitor null", ["qmp", "compat_monitor0"], ["qmp", "compat_monitor0", "serial0"]),
        ("-monitor stdio", ["qmp", "compat_monitor0"], ["qmp", "compat_monitor0", "serial0"]),
        ("-monitor chardev:hmp", ["qmp", "hmp"], ["hmp", "qmp", "serial0"]),
        ("-qmp null", ["hmp", "compat_monitor0"], ["hmp", "compat_monitor0", "serial0"]),
        ("-monitor none -serial stdio", ["qmp"], ["qmp", "serial0"]),
        ("-monitor none -serial chardev:hmp", ["qmp"], ["hmp", "qmp"]),
        ("-monitor none -device isa-serial,chardev=hmp", ["qmp"], ["hmp", "qmp"]),
    ],
)
def test_options_replace_monitors_of_the_same_mode(
    guest_cfg: Path, option: str, monitors: list[str], chardevs: list[str]
) -> None:
    config = parse(f"{guest_cfg} {option}")
    assert [monitor.chardev for monitor in config.monitors] == monitors
    assert [chardev.id for chardev in config.chardevs] == chardevs


# Texts, records, side effects.


def test_version() -> None:
    config = parse("-version -m foo")
    assert config.action == "version"
    assert config.action_text == "cpr-vmm version 0.1.0 (compatible with QEMU 11.1.3)\n"
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


@pytest.mark.parametrize("option", ["-h", "-help", "--help"])
def test_help(option: str) -> None:
    config = parse(option)
    assert config.action == "help"
    assert config.action_text.endswith(USAGE)


def test_help_names_every_option() -> None:
    words = set(USAGE.replace(",", " ").split())
    named = {word.lstrip("-") for word in words if word.startswith("-")}
    assert (OPTIONS.keys() | HANDLERS.keys() | FLAGS.keys()) <= named


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("-machine help", "mini"),
        ("-M pc,help", "mini"),
        ("-accel help", "tcg"),
        ("-object memory-backend-memfd,help", "hugetlbsize"),
        ("-chardev help", "socket"),
        ("-device help", "isa-debugcon: chardev, iobase, readback"),
        ("-cpu help", "CPU model"),
    ],
)
def test_help_of_one_option(line: str, word: str) -> None:
    config = parse(line)
    assert config.action == "help"
    assert word in config.action_text


def test_strip_options() -> None:
    arguments = shlex.split("guest.cfg -incoming file:x -S -name -S --incoming defer -m 16")
    assert strip_options(arguments, ("incoming", "S")) == ["guest.cfg", "-name", "-S", "-m", "16"]


def test_records_cannot_be_changed() -> None:
    config = parse("-device isa-debug-exit,id=a")
    with pytest.raises(AttributeError, match=r"Config\.smp cannot be changed"):
        config.smp = 2
    with pytest.raises(AttributeError):
        del config.smp
    with pytest.raises(AttributeError):
        config.bogus = 1
    device = DeviceConfig("isa-debug-exit", "a", {}, "-device isa-debug-exit,id=a")
    assert config.devices[0] == device
    assert repr(device) == (
        "DeviceConfig(driver='isa-debug-exit', id='a', properties={}, "
        "location='-device isa-debug-exit,id=a')"
    )
    assert device != DeviceConfig("isa-debug-exit", "b", {}, device.location)
    assert device != MonitorConfig("a")


def test_imports_are_few() -> None:
    """The modules are on the way to the resumed guest: nothing slow is imported to parse."""
    program = (
        "import sys; before = set(sys.modules); from cpr.config import parse_command_line; "
        "parse_command_line(sys.argv[1:]); print(*sorted(set(sys.modules) - before))"
    )
    arguments = ["-m", "16", *shlex.split(MEMFD), "-incoming", "file:x", "-serial", "stdio"]
    output = subprocess.run(
        [sys.executable, "-S", "-c", program, *arguments],
        check=True,
        capture_output=True,
        text=True,
        cwd=PROJECT,
    ).stdout
    foreign = {name for name in output.split() if name.partition(".")[0] != "cpr"}
    of_os = {"_abc", "_collections_abc", "_stat", "abc", "genericpath", "os.path", "posixpath"}
    assert foreign <= {"__future__", "os", "stat", *of_os}
    assert "cpr.config.usage" not in output and "cpr.config.readconfig" not in output


WORDS = st.sampled_from(
    [f"-{name}" for name in (*OPTIONS, *HANDLERS, *FLAGS) if name != "readconfig"]
    + [word for line, _ in recorded_errors() for word in shlex.split(line)]
    + ["pc", "tcg", "16M", "null", "none", "null,id=a", "chardev:a", "isa-serial,chardev=a"]
).filter(lambda word: not word.startswith("/"))
NOISE = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=8)


@given(st.lists(WORDS | NOISE, max_size=8))
def test_any_words_parse_or_give_one_error(words: list[str]) -> None:
    try:
        config = parse_command_line(words)
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert config.argv == tuple(words)
        known = {chardev.id for chardev in config.chardevs}
        assert {monitor.chardev for monitor in config.monitors} <= known
        assert {chardev for chardev in config.serials if chardev is not None} <= known
