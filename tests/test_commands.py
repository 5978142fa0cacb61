"""Every command of the table, through both monitors; answers are QEMU's, byte for byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_vmm import FakeVmm, ScriptedChardev

from cpr import runstate
from cpr.accel import x86
from cpr.chardev.null import NullChardev
from cpr.monitor import hmp
from cpr.monitor.commands import COMMANDS, find_hmp, find_qmp, hmp_commands
from cpr.monitor.qmp import QmpMonitor
from cpr.monitor.schema import AFTER_MIGRATION, NEVER, NOW, Command, Session

RAMBLOCK = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                    ram0    4 KiB  0x0000000000000000 0x0000000000100000 0x0000000000100000 0x00007f5086fff000  rw
                 pc.bios    4 KiB  0x0000000000100000 0x0000000000040000 0x0000000000040000 0x00007f5086fff000  ro
"""  # noqa: E501

MTREE = """\
address-space: memory
  0000000000000000-ffffffffffffffff (prio 0, container): system
    0000000000000000-00000000000fffff (prio 0, ram): ram0
    00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

address-space: I/O
  0000000000000000-000000000000ffff (prio 0, container): io
    00000000000003f8-00000000000003ff (prio 0, i/o): serial0

"""

MEMDEV = """\
memory backend: ram0
  size:  1048576
  merge: true
  dump: true
  prealloc: false
  share: true
  reserve: true
  policy: default
  host nodes: 

"""  # noqa: W291

GLOBALS = """\
Globals:
  store-global-state: on
  only-migratable: off
  send-configuration: on
  send-section-footer: on
  send-switchover-start: on
  clear-bitmap-shift: 18
"""

NIL_UUID = "00000000-0000-0000-0000-000000000000"

# HMP: each command's line and what it prints; None where only the start is known, see below.
HMP: dict[str, tuple[str, str | None]] = {
    "help|?": ("help stop", "stop|s  -- stop emulation\n"),
    "info": ("info", None),
    "info history": ("info history", ""),
    "info version": ("info version", "11.1.3 (cpr-vmm 0.1.0)\n"),
    "info status": ("info status", "VM status: paused (prelaunch)\n"),
    "stop|s": ("s", ""),
    "cont|c": ("c", ""),
    "quit|q": ("q", ""),
    "system_reset": ("system_reset", ""),
    "system_powerdown": ("system_powerdown", ""),
    "system_wakeup": ("system_wakeup", ""),
    "info name": ("info name", "guest\n"),
    "info uuid": ("info uuid", f"{NIL_UUID}\n"),
    "info kvm": ("info kvm", "kvm support: disabled\n"),
    "info accelerators": ("info accelerators", "kvm [tcg]\n"),
    "info chardev": ("info chardev", "null0: filename=null\n"),
    "info cpus": (
        "info cpus",
        "* CPU #0: thread_id=101 model=qemu64\n  CPU #1: thread_id=102 model=qemu64\n",
    ),
    "cpu": ("cpu 1", ""),
    "info registers": ("info registers", None),
    "info mtree": ("info mtree", MTREE),
    "info ramblock": ("info ramblock", RAMBLOCK),
    "info memdev": ("info memdev", MEMDEV),
    "info memory_size_summary": (
        "info memory_size_summary",
        "base memory: 1048576\nplugged memory: 0\n",
    ),
    "info balloon": ("info balloon", "balloon: actual=1\n"),
    "balloon": ("balloon 64", ""),
    "x": ("x /2xb 0x7c00", "0000000000007c00: 0x00 0x00\n"),
    "xp": ("xp 0x7c00", "00007c00: 0x00000000\n"),
    "print|p": ("p 1+2", "0x3\n"),
    "memsave": ('memsave 0x7c00 16 "saved"', ""),
    "pmemsave": ('pmemsave 0x7c00 16 "saved"', ""),
    "migrate": ("migrate -d file:/x", ""),
    "migrate_incoming": ("migrate_incoming file:/x", ""),
    "migrate_cancel": ("migrate_cancel", ""),
    "migrate_continue": (
        "migrate_continue pre-switchover",
        "Error: Migration not in expected state: none\n",
    ),
    "info migrate": ("info migrate -a", GLOBALS),
    "migrate_set_parameter": ("migrate_set_parameter mode cpr-exec", ""),
    "info migrate_parameters": ("info migrate_parameters", None),
    "migrate_set_capability": ("migrate_set_capability events on", ""),
    "info migrate_capabilities": ("info migrate_capabilities", None),
    "cpr-exec": ("cpr-exec -t", "cpr-exec would go ahead: the new program was ready in 12 ms\n"),
    "getfd": ("getfd a", "Error: No file descriptor supplied via SCM_RIGHTS\n"),
    "closefd": ("closefd a", "Error: File descriptor named 'a' not found\n"),
}
HMP_STARTS = {
    "info": "info accelerators  -- show present and enabled information\n",
    "info registers": "\nCPU#0\nEAX=00000000 EBX=00000000 ECX=00000000 EDX=00000600\n",
    "info migrate_parameters": "announce-initial: 50 ms\n",
    "info migrate_capabilities": "xbzrle: off\n",
}

SAVED = {"val": 0x7C00, "size": 16, "filename": "saved"}

# QMP: each command's arguments, and the return value or the error's text; None: not looked at.
QMP: dict[str, tuple[dict, Any]] = {
    "query-commands": ({}, None),
    "query-qmp-schema": ({}, None),
    "human-monitor-command": ({"command-line": "info name"}, "guest\r\n"),
    "query-version": (
        {},
        {"qemu": {"micro": 3, "minor": 1, "major": 11}, "package": "cpr-vmm 0.1.0"},
    ),
    "query-status": ({}, {"status": "prelaunch", "running": False}),
    "stop": ({}, {}),
    "cont": ({}, {}),
    "quit": ({}, {}),
    "system_reset": ({}, {}),
    "system_powerdown": ({}, {}),
    "system_wakeup": ({}, {}),
    "query-name": ({}, {"name": "guest"}),
    "query-uuid": ({}, {"UUID": NIL_UUID}),
    "query-kvm": ({}, {"enabled": False, "present": True}),
    "query-accelerators": ({}, {"enabled": "tcg", "present": ["kvm", "tcg"]}),
    "query-chardev": ({}, [{"label": "null0", "filename": "null", "frontend-open": False}]),
    "query-cpus-fast": (
        {},
        [
            {
                "cpu-index": index,
                "qom-path": f"/machine/unattached/device[{index}]",
                "qom-type": "qemu64-x86_64-cpu",
                "thread-id": 101 + index,
                "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
                "target": "x86_64",
            }
            for index in (0, 1)
        ],
    ),
    "query-memdev": (
        {},
        [
            {
                "id": "ram0",
                "size": 1048576,
                "merge": True,
                "dump": True,
                "prealloc": False,
                "share": True,
                "reserve": True,
                "host-nodes": [],
                "policy": "default",
            }
        ],
    ),
    "x-query-ramblock": ({}, {"human-readable-text": RAMBLOCK}),
    "query-balloon": ({}, {"actual": 1048576}),
    "balloon": ({"value": 64 << 20}, {}),
    "query-memory-size-summary": ({}, {"base-memory": 1048576, "plugged-memory": 0}),
    "memsave": (SAVED, {}),
    "pmemsave": (SAVED, {}),
    "migrate": ({"uri": "file:/x"}, {}),
    "migrate-incoming": ({"uri": "file:/x"}, {}),
    "migrate_cancel": ({}, {}),
    "migrate-continue": (
        {"state": "pre-switchover"},
        "Migration not in expected state: none",
    ),
    "query-migrate": ({}, {}),
    "migrate-set-parameters": ({"mode": "cpr-exec"}, {}),
    "query-migrate-parameters": ({}, None),
    "migrate-set-capabilities": ({"capabilities": [{"capability": "events", "state": True}]}, {}),
    "query-migrate-capabilities": ({}, None),
    "cpr-exec": ({"test": True}, {"refusals": [], "start-time": 12}),
    "getfd": ({"fdname": "a"}, "No file descriptor supplied via SCM_RIGHTS"),
    "closefd": ({"fdname": "a"}, "File descriptor named 'a' not found"),
    "add-fd": ({}, "No file descriptor supplied via SCM_RIGHTS"),
    "remove-fd": ({"fdset-id": 1}, "File descriptor named 'fdset-id:1' not found"),
    "query-fdsets": ({}, []),
}


@pytest.fixture
def vmm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVmm]:
    monkeypatch.chdir(tmp_path)
    vmm = FakeVmm()
    vmm.chardevs["null0"] = NullChardev("null0", vmm.loop)
    yield vmm
    vmm.close()


@pytest.fixture
def session() -> Session:
    return Session(lambda: -1)


def run(vmm: FakeVmm, session: Session, line: str) -> str:
    return hmp.execute(vmm, session, line)[0]


def execute(vmm: FakeVmm, name: str, arguments: dict) -> Any:
    chardev = ScriptedChardev(vmm.loop)
    monitor = QmpMonitor(chardev, vmm)
    chardev.type(b'{"execute":"qmp_capabilities"}')
    chardev.take_output()
    chardev.type(json.dumps({"execute": name, "arguments": arguments}).encode())
    answers = [json.loads(line) for line in chardev.take_output().splitlines()]
    monitor.close()
    (answer,) = (answer for answer in answers if "event" not in answer)
    return answer["error"]["desc"] if "error" in answer else answer["return"]


def identity(command: Command) -> str:
    return command.hmp or command.qmp


def test_every_command_is_tested_here() -> None:
    assert {command.hmp for command in COMMANDS if command.hmp} == set(HMP)
    assert {command.qmp for command in COMMANDS if command.qmp} == set(QMP)


@pytest.mark.parametrize("command", COMMANDS, ids=identity)
def test_command(command: Command, vmm: FakeVmm, session: Session) -> None:
    if command.qmp:
        arguments, expected = QMP[command.qmp]
        result = execute(vmm, command.qmp, arguments)
        assert expected is None or result == expected
        assert "internal error" not in str(result)
        assert execute(vmm, command.qmp, {**arguments, "bogus": 1}) == (
            "Parameter 'bogus' is unexpected"
        )
    if command.hmp:
        line, text = HMP[command.hmp]
        printed = run(vmm, session, line)
        if text is None:
            assert printed.startswith(HMP_STARTS[command.hmp])
        else:
            assert printed == text
        assert command.help and run(vmm, session, f"help {line.split()[0]}")
    if command.hmp and command.qmp and command.text:
        assert printed == command.text(result)


def takes_the_rest(command: Command) -> bool:
    return any(argument.kind.hmp in ("line", "words") for argument in command.arguments)


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.hmp and not takes_the_rest(c)], ids=identity
)
def test_a_line_that_goes_on_is_refused(command: Command, vmm: FakeVmm, session: Session) -> None:
    line = HMP[command.hmp][0]
    if command.hmp in ("info", "info registers"):
        line += " 0"
    typed = " ".join(line.split()[: 2 if command.is_info else 1])
    printed = run(vmm, session, line + " )")
    if command.hmp == "info":
        assert printed == "unknown command: 'info 0'\n"
    else:
        assert printed.endswith(
            f'extraneous characters at the end of line\nTry "help {typed}" for more information\n'
        )


def test_look_ups() -> None:
    assert find_hmp("c", False) is find_hmp("cont", False) is find_qmp("cont")
    assert find_hmp("status", False) is None
    assert find_hmp("status", True) is find_qmp("query-status")
    assert find_qmp("") is None
    names = [command.names for command in hmp_commands(True)]
    assert names == sorted(names)


def test_what_reaches_the_machine(vmm: FakeVmm, session: Session) -> None:
    for line in ("cont", "stop", "system_reset", "system_powerdown", "quit"):
        assert run(vmm, session, line) == ""
    assert vmm.machine.calls == ["cont", "stop", "reset", "powerdown"]
    assert vmm.quits == ["host-qmp-quit"]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (runstate.RUNNING, "running"),
        (runstate.PAUSED, "paused"),
        (runstate.PRELAUNCH, "paused (prelaunch)"),
        (runstate.INMIGRATE, "paused (inmigrate)"),
        (runstate.FINISH_MIGRATE, "paused (finish-migrate)"),
        (runstate.POSTMIGRATE, "paused (postmigrate)"),
    ],
)
def test_status(vmm: FakeVmm, session: Session, state: str, text: str) -> None:
    vmm.machine.runstate.current = state
    assert run(vmm, session, "info status") == f"VM status: {text}\n"


def test_cont_and_stop_of_a_guest_that_is_to_come_in(vmm: FakeVmm, session: Session) -> None:
    vmm.machine.runstate.current = runstate.INMIGRATE
    run(vmm, session, "stop")
    assert vmm.migration.incoming_side.start_paused is True
    run(vmm, session, "cont")
    assert vmm.migration.incoming_side.start_paused is False
    assert vmm.machine.calls == []


def test_refusals_of_the_callee_are_shown(vmm: FakeVmm, session: Session) -> None:
    vmm.migration.refusal = "Migration is not finalized yet"
    assert run(vmm, session, "cont") == "Error: Migration is not finalized yet\n"
    assert execute(vmm, "cont", {}) == "Migration is not finalized yet"


# Memory and registers.


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "xp /20db 0xf0000",
            "000f0000:  14   0 138  68  36  61 136  68\n"
            "000f0008:  36   1 102 139  68  36  62 102\n"
            "000f0010: 133 192 117   5\n",
        ),
        ("xp /4ob 0xf0000", "000f0000: 0 16 0  0 0212 0104\n"),
        ("xp /4cb 0xf0000", "000f0000: '\\x0e' '\\x00' '\\x8a' 'D'\n"),
        ("xp /4xh 0xf0000", "000f0000: 0x000e 0x448a 0x3d24 0x4488\n"),
        ("xp /2xg 0xf0000", "000f0000: 0x44883d24448a000e 0x663e24448b660124\n"),
        ("xp /2dg 0xf0000", "000f0000:  4938264217389760526  7367365917239804196\n"),
        ("xp /4uw 0xf0000", "000f0000: 1149894670 1149779236 2338717988 1715348548\n"),
        ("xp /2og 0xf0000", "000f0000: 0 422101722210442400016 0 630761104221331400444\n"),
        ("xp /1cw 0xf0000", "000f0000: '\\x0e' '\\x00' '\\x8a' 'D'\n"),
        ("xp /0x 0xf0000", ""),
        ("x /2xw $cs*16", "00000000000f0000: 0x448a000e 0x44883d24\n"),
        ("xp /4xb 0x1000000", "01000000: Cannot access memory\n"),
        ("xp /4xb -1", "ffffffffffffffff: Cannot access memory\n"),
        ("xp /xz 0", "invalid char in format: 'z'\nTry \"help xp\" for more information\n"),
        ("xp /999999999xg 0", "Error: dumps end at 128 KiB; use memsave or pmemsave\n"),
        (
            "xp /2i 0",
            "Error: disassembly (format i) is not supported; use x or d\n",
        ),
    ],
)
def test_dumps(vmm: FakeVmm, session: Session, line: str, text: str) -> None:
    vmm.machine.ram[0xF0000:0xF0014] = bytes(
        [14, 0, 138, 68, 36, 61, 136, 68, 36, 1, 102, 139, 68, 36, 62, 102, 133, 192, 117, 5]
    )
    assert run(vmm, session, line) == text


def test_dumps_remember_their_format(vmm: FakeVmm, session: Session) -> None:
    assert run(vmm, session, "xp 0") == "00000000: 0x00000000\n"
    run(vmm, session, "xp /ob 0")
    assert run(vmm, session, "x 0") == "0000000000000000: 0  0\n"
    assert run(vmm, session, "p 64") == "0100\n"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("p /x 100", "0x64\n"),
        ("p /d -1", "-1\n"),
        ("p /u -1", "18446744073709551615\n"),
        ("p /o 64", "0100\n"),
        ("p /c 65", "'A'\n"),
        ("p 0", "0\n"),
        ("p /d 7&3|8^1", "10\n"),
        ("p /d -5/2", "-2\n"),
        ("p /d -5%2", "-1\n"),
        ("p /d (2+3)*4", "20\n"),
        ("p /d 'a'", "97\n"),
        ("p /d 010", "8\n"),
        ("p 0x7fffffffffffffff+1", "0x8000000000000000\n"),
        ("p $rip", "0xfff0\n"),
        ("p $pc", "0xfff0\n"),
        ("p $cs", "0xf000\n"),
        ("p $eflags", "0x2\n"),
        ("p $cr0", "0x60000010\n"),
    ],
)
def test_print(vmm: FakeVmm, session: Session, line: str, text: str) -> None:
    assert run(vmm, session, line) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("p", "unexpected end of expression"),
        ("p 5-", "unexpected end of expression"),
        ("p (1", "')' expected"),
        ("p 1/0", "division by zero"),
        ("p !1", "invalid char '!' in expression"),
        ("p 99999999999999999999", "number too large"),
        ("p $eip", "unknown register"),
        ("p 'ab'", "missing terminating ' character"),
        ("p '", "character constant expected"),
        ("p 1 2", "print|p: extraneous characters at the end of line"),
        ("p 0x", "print|p: extraneous characters at the end of line"),
        ("p " + "9" * 5000, "number too large"),
        ("p " + "-" * 5000 + "1", "expression is nested too deeply"),
        ("p /" + "9" * 10 + " 1", "count too large: 9999999999"),
    ],
)
def test_expressions_that_are_wrong(vmm: FakeVmm, session: Session, line: str, text: str) -> None:
    assert run(vmm, session, line) == f'{text}\nTry "help p" for more information\n'


def test_saving_memory(vmm: FakeVmm, session: Session, tmp_path: Path) -> None:
    vmm.machine.ram[0x7C00:0x7C04] = b"\xfa\x31\xc0\x8e"
    for name in ("memsave", "pmemsave"):
        assert run(vmm, session, f'{name} 0x7c00 4 "a b"') == ""
        assert (tmp_path / "a b").read_bytes() == b"\xfa\x31\xc0\x8e"
    run(vmm, session, 'pmemsave 0xff000 0x3000 "edge"')  # after the RAM there are zeros
    assert (tmp_path / "edge").read_bytes() == bytes(0x3000)
    assert run(vmm, session, 'memsave 0x100000 16 "edge"') == (
        "Error: Invalid addr 0x0000000000100000/size 16 specified\n"
    )
    assert run(vmm, session, 'pmemsave 0 -1 "edge"').startswith("invalid char")
    assert execute(vmm, "pmemsave", {"val": 0, "size": -1, "filename": "x"}) == (
        "Invalid addr 0x0000000000000000/size 18446744073709551615 specified"
    )
    assert execute(vmm, "memsave", {"val": 0, "size": 1 << 33, "filename": "x"}) == (
        "Invalid addr 0x0000000000000000/size 8589934592 specified"
    )
    if os.path.exists("/dev/full"):
        assert run(vmm, session, 'pmemsave 0 16 "/dev/full"') == (
            "Error: writing memory to '/dev/full' failed: No space left on device\n"
        )


RESET_REGISTERS = """
CPU#1
EAX=00000000 EBX=00000000 ECX=00000000 EDX=00000600
ESI=00000000 EDI=00000000 EBP=00000000 ESP=00000000
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0000 00000000 0000ffff 00009300
CS =f000 ffff0000 0000ffff 00009b00
SS =0000 00000000 0000ffff 00009300
DS =0000 00000000 0000ffff 00009300
FS =0000 00000000 0000ffff 00009300
GS =0000 00000000 0000ffff 00009300
LDT=0000 00000000 0000ffff 00008200
TR =0000 00000000 0000ffff 00008b00
GDT=     00000000 0000ffff
IDT=     00000000 0000ffff
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000000
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80
FPR0=0000000000000000 0000 FPR1=0000000000000000 0000
FPR2=0000000000000000 0000 FPR3=0000000000000000 0000
FPR4=0000000000000000 0000 FPR5=0000000000000000 0000
FPR6=0000000000000000 0000 FPR7=0000000000000000 0000
XMM00=0000000000000000 0000000000000000 XMM01=0000000000000000 0000000000000000
XMM02=0000000000000000 0000000000000000 XMM03=0000000000000000 0000000000000000
XMM04=0000000000000000 0000000000000000 XMM05=0000000000000000 0000000000000000
XMM06=0000000000000000 0000000000000000 XMM07=0000000000000000 0000000000000000
"""  # noqa: W291

LONG_MODE_REGISTERS = """
CPU#0
RAX=ffffffffffffffff RBX=0000000000000000 RCX=00000000c0000080 RDX=0000000000000000
RSI=0000000000000000 RDI=0000000000008000 RBP=0000000000000000 RSP=0000000000007000
R8 =0000000000000000 R9 =0000000000000000 R10=0000000000000000 R11=0000000000000000
R12=0000000000000000 R13=0000000000000000 R14=0000000000000000 R15=1122334455667788
RIP=0000000000007cdd RFL=00000086 [--S--P-] CPL=0 II=0 A20=1 SMM=0 HLT=1
ES =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
CS =0008 0000000000000000 ffffffff 00af9a00 DPL=0 CS64 [-R-]
SS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
DS =0010 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]
FS =0000 0000000000000000 00000000 00000000
GS =0000 0000000000000000 0000ffff 00009300 DPL=0 DS   [-WA]
LDT=0000 0000000000000000 0000ffff 00008200 DPL=0 LDT
TR =0030 0000000000009000 00000067 00008900 DPL=0 TSS64-avl
GDT=     0000000000007ce0 0000003f
IDT=     0000000000005000 00000fff
CR0=80000013 CR2=0000000000000000 CR3=0000000000001000 CR4=00000620
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 
DR6=00000000ffff0ff0 DR7=0000000000000400
EFER=0000000000000500
FCW=037f FSW=3000 [ST=6] FTW=c0 MXCSR=00001f80
FPR0=0000000000000000 0000 FPR1=0000000000000000 0000
FPR2=0000000000000000 0000 FPR3=0000000000000000 0000
FPR4=0000000000000000 0000 FPR5=0000000000000000 0000
FPR6=c90fdaa22168c235 4000 FPR7=8000000000000000 3fff
XMM00=0000000000000000 0000000000000000 XMM01=0000000000000000 0000000000000000
XMM02=0000000000000000 0000000000000000 XMM03=0000000000000000 0000000000000000
XMM04=0000000000000000 0000000000000000 XMM05=0000000000000000 0000000000000000
XMM06=0000000000000000 0000000000000000 XMM07=0000000000000000 0000000000000000
XMM08=0000000000000000 0000000000000000 XMM09=0000000000000000 1122334455667788
XMM10=0000000000000000 0000000000000000 XMM11=0000000000000000 0000000000000000
XMM12=0000000000000000 0000000000000000 XMM13=0000000000000000 0000000000000000
XMM14=0000000000000000 0000000000000000 XMM15=0000000000000000 0000000000000000
"""  # noqa: W291


def long_mode_state() -> dict:
    """The state of a small 64-bit guest whose registers QEMU showed as above."""
    state = x86.reset_state(0)
    state["env.regs"] = [(1 << 64) - 1, 0xC0000080, 0, 0, 0x7000, 0, 0, 0x8000, *[0] * 7]
    state["env.regs"].append(0x1122334455667788)
    state["env.eip"] = 0x7CDD
    state["env.eflags"] = 0x86
    data = x86.segment(0x10, 0, 0xFFFFFFFF, 0xCF9300)
    state["env.segs"] = [
        data,
        x86.segment(8, 0, 0xFFFFFFFF, 0xAF9A00),
        data,
        data,
        x86.segment(0, 0, 0, 0),
        x86.segment(0, 0, 0xFFFF, 0x9300),
    ]
    state["env.ldt"] = x86.segment(0, 0, 0xFFFF, 0x8200)
    state["env.tr"] = x86.segment(0x30, 0x9000, 0x67, 0x8900)
    state["env.gdt"] = x86.segment(0, 0x7CE0, 0x3F)
    state["env.idt"] = x86.segment(0, 0x5000, 0xFFF)
    state["env.cr"] = [0x80000013, 0, 0, 0x1000, 0x620]
    state["env.efer"] = 0x500
    state["env.mp_state"] = x86.MP_HALTED
    area = bytearray(state["env.xsave_buf"])
    area[2:4] = (0x3000).to_bytes(2, "little")
    area[4] = 0xC0
    area[32:42] = bytes.fromhex("35c26821a2da0fc90040")  # st0, pi
    area[48:58] = bytes.fromhex("0000000000000080ff3f")  # st1, 1.0
    area[160 + 9 * 16 : 160 + 9 * 16 + 8] = (0x1122334455667788).to_bytes(8, "little")
    state["env.xsave_buf"] = bytes(area)
    return state


def test_registers(vmm: FakeVmm, session: Session) -> None:
    vmm.machine.states[0] = long_mode_state()
    assert run(vmm, session, "info registers") == LONG_MODE_REGISTERS
    assert run(vmm, session, "info registers 1") == RESET_REGISTERS
    assert run(vmm, session, "info registers -a") == LONG_MODE_REGISTERS + RESET_REGISTERS
    assert run(vmm, session, "info registers 3") == "CPU#3 not available\n"
    run(vmm, session, "cpu 1")
    assert run(vmm, session, "info registers") == RESET_REGISTERS
    assert run(vmm, session, "cpu 7") == "invalid CPU index\n"


def test_protected_mode_segments(vmm: FakeVmm, session: Session) -> None:
    state = x86.reset_state(0)
    state["env.cr"][0] = 0x11
    state["env.eflags"] = 0xED7
    state["env.segs"][x86.CS] = x86.segment(0x18, 0, 0xFFFFFFFF, 0xCF9A00)
    state["env.segs"][x86.ES] = x86.segment(0x28, 0, 0xFFFFF, 0xF9700)
    state["env.segs"][x86.SS] = x86.segment(0x13, 0, 0xFFFFFFFF, 0xCFF300)
    vmm.machine.states[0] = state
    printed = run(vmm, session, "info registers").splitlines()
    assert printed[4] == "EIP=0000fff0 EFL=00000ed7 [ODSZAPC] CPL=3 II=0 A20=1 SMM=0 HLT=0"
    assert printed[5] == "ES =0028 00000000 000fffff 000f9700 DPL=0 DS16 [EWA]"
    assert printed[6] == "CS =0018 00000000 ffffffff 00cf9a00 DPL=0 CS32 [-R-]"
    assert printed[7] == "SS =0013 00000000 ffffffff 00cff300 DPL=3 DS   [-WA]"
    assert printed[12] == "TR =0000 00000000 0000ffff 00008b00 DPL=0 TSS32-busy"


# Migration.

RAM = {
    "transferred": 348160,
    "remaining": 0,
    "total": 17301504,
    "duplicate": 4177,
    "normal": 49,
    "normal-bytes": 200704,
    "dirty-pages-rate": 0,
    "mbps": 463.912,
    "dirty-sync-count": 2,
    "postcopy-requests": 0,
    "page-size": 4096,
    "multifd-bytes": 0,
    "pages-per-second": 0,
    "precopy-bytes": 0,
    "downtime-bytes": 238781,
    "postcopy-bytes": 0,
    "dirty-sync-missed-zero-copy": 0,
}

COMPLETED = """\
Status: \t\tcompleted
Time (ms): \t\ttotal=7, setup=1, down=1
RAM info:
  Throughput (Mbps): \t463.91
  Sizes: \t\tpagesize=4 KiB, total=16.5 MiB
  Transfers: \t\ttransferred=340 KiB, remain=0 B
    Channels: \t\tprecopy=0 B, multifd=0 B, postcopy=0 B
    Page Types: \tnormal=49, zero=4177
  Page Rates (pps): \ttransfer=0
  Others: \t\tdirty_syncs=2, downtime_bytes=238781
"""


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({}, ""),
        ({"status": "completed"}, "Status: \t\tcompleted\n"),
        (
            {"status": "failed", "error-desc": "execvp /x failed: No such file or directory"},
            "Status: \t\tfailed (execvp /x failed: No such file or directory)\n",
        ),
        ({"status": "cancelled", "error-desc": "x"}, "Status: \t\tcancelled\n"),
        (
            {"blocked-reasons": ["one", "two"]},
            "Outgoing migration blocked:\n  one\n  two\n",
        ),
        (
            {"status": "completed", "total-time": 7, "setup-time": 1, "downtime": 1, "ram": RAM},
            COMPLETED,
        ),
        (
            {
                "status": "active",
                "total-time": 401,
                "setup-time": 1,
                "expected-downtime": 300,
                "remaining": 17301504,
            },
            "Status: \t\tactive\n"
            "Time (ms): \t\ttotal=401, setup=1, exp_down=300\n"
            "Remaining: \t\t16.5 MiB\n",
        ),
    ],
)
def test_info_migrate(vmm: FakeVmm, session: Session, info: dict, text: str) -> None:
    vmm.migration.info = info
    assert run(vmm, session, "info migrate") == text
    assert run(vmm, session, "info migrate -a") == text + GLOBALS


def test_what_reaches_migration(vmm: FakeVmm, session: Session) -> None:
    for line in (
        "migrate -d file:/x",
        "migrate -r exec:cat",
        'migrate "exec:cat >/dev/null"',
        "migrate_incoming unix:/x",
        "migrate_cancel",
        "cpr-exec",
        "cpr-exec /x 'a b' -incoming defer",
    ):
        assert run(vmm, session, line) == ""
    assert vmm.migration.calls == [
        ("migrate", "file:/x", None, False),
        ("migrate", "exec:cat", None, True),
        ("migrate", "exec:cat >/dev/null", None, False),
        ("incoming", "unix:/x", None, True),
        ("cancel",),
        ("cpr-exec", None),
        ("cpr-exec", ["/x", "a b", "-incoming", "defer"]),
    ]


def test_cpr_exec_test_says_what_would_refuse_it(vmm: FakeVmm, session: Session) -> None:
    vmm.migration.refusal = "Memory region ram0 is not compatible with CPR."
    text = f"Error: {vmm.migration.refusal}\n"
    assert run(vmm, session, "cpr-exec -t /x") == text
    assert run(vmm, session, "cpr-exec /x") == text
    assert execute(vmm, "cpr-exec", {"test": True, "command": ["/x"]}) == {
        "refusals": [vmm.migration.refusal]
    }
    assert execute(vmm, "cpr-exec", {}) == vmm.migration.refusal
    assert vmm.migration.calls == []


def test_which_commands_wait(vmm: FakeVmm, session: Session) -> None:
    for line, prompt in (
        ("migrate file:/x", AFTER_MIGRATION),
        ("migrate -d file:/x", NOW),
        ("cpr-exec", AFTER_MIGRATION),
        ("cpr-exec -t", NOW),
        ("quit", NEVER),
        ("info status", NOW),
    ):
        assert hmp.execute(vmm, session, line)[1] == prompt
    vmm.migration.refusal = "no"
    assert hmp.execute(vmm, session, "cpr-exec")[1] == NOW


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "migrate_set_parameter mode foo",
            "Error: Parameter 'mode' does not accept value 'foo'\n",
        ),
        ("migrate_set_parameter foo 1", "Error: invalid parameter value: foo\n"),
        ("migrate_set_capability foo on", "Error: invalid parameter value: foo\n"),
        (
            "migrate_set_capability events foo",
            "Expected 'on' or 'off'\nTry \"help migrate_set_capability\" for more information\n",
        ),
        ("migrate_continue foo", "Error: invalid parameter value: foo\n"),
        (
            "migrate -x",
            'migrate: unsupported option -x\nTry "help migrate" for more information\n',
        ),
        (
            "migrate -d",
            'migrate: string expected\nTry "help migrate" for more information\n',
        ),
        (
            "migrate_set_parameter mode",
            "migrate_set_parameter: string expected\n"
            'Try "help migrate_set_parameter" for more information\n',
        ),
        (
            "cpr-exec 'open",
            "Text ended before matching quote was found for '. (The text was “'open”)\n"
            'Try "help cpr-exec" for more information\n',
        ),
    ],
)
def test_migration_lines_that_are_wrong(
    vmm: FakeVmm, session: Session, line: str, text: str
) -> None:
    assert run(vmm, session, line) == text
    assert vmm.migration.calls == []


def test_query_commands_names_them_all(vmm: FakeVmm) -> None:
    names = [row["name"] for row in execute(vmm, "query-commands", {})]
    assert sorted(names) == sorted(QMP)


def test_prealloc_tells_how_far_it_is(vmm: FakeVmm, session: Session) -> None:
    block = vmm.machine.blocks[0]
    block.prealloc, block.populated = True, 0x80000
    header, row, other = run(vmm, session, "info ramblock").splitlines()
    assert header == RAMBLOCK.splitlines()[0] + "           Populated"
    assert row == RAMBLOCK.splitlines()[1] + "  0x0000000000080000"
    assert other == RAMBLOCK.splitlines()[2]
    (backend,) = execute(vmm, "query-memdev", {})
    assert (backend["prealloc"], backend["x-cpr-populated"]) == (True, 0x80000)
    assert run(vmm, session, "info memdev") == MEMDEV.replace("prealloc: false", "prealloc: true")


def test_human_monitor_command_has_its_own_cpu(vmm: FakeVmm) -> None:
    text = execute(vmm, "human-monitor-command", {"command-line": "info cpus", "cpu-index": 1})
    assert text.splitlines()[1].startswith("* CPU #1")
    assert execute(vmm, "human-monitor-command", {"command-line": "foo"}) == (
        "unknown command: 'foo'\r\n"
    )
    assert execute(vmm, "human-monitor-command", {"command-line": ""}) == ""


@pytest.mark.parametrize("name", ["memsave", "pmemsave"])
def test_files_that_memory_cannot_be_saved_to(vmm, tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    for path in (f"{tmp_path}/fifo", "a\0b", f"{tmp_path}/no/file", str(tmp_path)):
        answer = execute(vmm, name, {"val": 0x7C00, "size": 16, "filename": path})
        assert isinstance(answer, str) and answer.startswith("Could not open"), path


def test_what_is_no_ram_is_saved_as_a_hole(vmm: FakeVmm, tmp_path: Path) -> None:
    execute(vmm, "pmemsave", {"val": 0x1000, "size": 1 << 31, "filename": "saved"})
    status = (tmp_path / "saved").stat()
    assert status.st_size == 1 << 31
    assert status.st_blocks * 512 < 2 << 20


def test_balloons(vmm: FakeVmm, session: Session) -> None:
    execute(vmm, "balloon", {"value": 12345})
    run(vmm, session, "balloon 3")
    assert vmm.machine.calls == ["balloon 12345", f"balloon {3 << 20}"]
    vmm.machine.devices = []
    assert execute(vmm, "query-balloon", {}) == "No balloon device has been activated"
    assert run(vmm, session, "balloon 3") == "Error: No balloon device has been activated\n"
