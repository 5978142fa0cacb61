"""Part 1: what an exec leaves to the program that it starts, and how the new image has it again.

The program is `sleep`, which leaves everything as it got it.
"""

from __future__ import annotations

import fcntl
import os
import signal

from ..capture import SLEEP, exec_into_sleep, read_state, state_number
from ..cpr_state import decode
from ..lab import STATE_VARIABLE, Lab
from ..match import Mismatch, expect
from ..process import Descriptor, Process
from ..row import Row, Step, Steps, step
from ..steps import (
    DEFER,
    FILE,
    boot,
    comes_to,
    counting,
    guest,
    look_at_process,
    new_command,
    qmp,
    refused,
    running,
    survives,
    until,
    update,
)
from .failed_exec import STATE_MEMFD, state_memfds
from .migrate import incompatible

NO_AUX = "-machine pc,memory-backend=ram0"
STANDARD = {0, 1, 2}
SEAL_SEAL = fcntl.F_SEAL_SEAL
SEALED = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
BLOCKED = {signal.SIGBUS, signal.SIGUSR1, signal.SIGALRM, signal.SIGIO}
IGNORED = {signal.SIGPIPE}


@step
def into_sleep(lab: Lab, command: list[str] = SLEEP) -> None:
    """Updates the VMM to `sleep`."""
    lab.look_at_process()
    exec_into_sleep(lab, command=command)


@step
def same_parent_and_folder(lab: Lab) -> None:
    process = lab.vm.process
    expect("parent", str(os.getpid()), process.field("PPid"), lab.names)
    expect("working directory", lab.before.cwd, process.cwd(), lab.names)


@step
def command_line(lab: Lab, *words: str) -> None:
    expect("command line", list(words), lab.vm.process.command_line(), lab.names)


@step
def one_variable_more(lab: Lab) -> None:
    """The environment is that of before, and the number of the state's memfd."""
    now = set(lab.vm.process.environment())
    variable = f"{STATE_VARIABLE}={state_number(lab.vm.process)}"
    consumed = (f"{STATE_VARIABLE}=", "CPR_LIVE=")  # by an image that was updated itself
    old = {word for word in lab.before.environment if not word.startswith(consumed)}
    if now != old | {variable}:
        raise Mismatch(f"environment: {sorted(now ^ old)}")


@step
def descriptors_are_the_listed_ones(lab: Lab) -> None:
    """stdin, stdout, stderr, those of the list at the same numbers, the state; none is cloexec."""
    process = lab.vm.process
    now = process.descriptors()
    listed = {fd for _, _, fd in decode(read_state(process))}
    expect("descriptors", sorted(STANDARD | listed | {state_number(process)}), sorted(now), {})
    for fd in STANDARD | listed:
        old = lab.before.descriptors[fd]
        if (old.target, old.inode) != (now[fd].target, now[fd].inode):
            raise Mismatch(f"descriptor {fd} was {old} and is {now[fd]}")
    kept = {fd: each for fd, each in now.items() if each.cloexec}
    if kept:
        raise Mismatch(f"close-on-exec: {kept}")


@step
def all_were_close_on_exec(lab: Lab) -> None:
    """While the VMM runs, whatever it starts would inherit none of its descriptors."""
    process = lab.vm.process
    open_ones = {
        fd: each
        for fd, each in process.descriptors().items()
        if fd not in STANDARD and not each.cloexec
    }
    if open_ones:
        raise Mismatch(f"not close-on-exec: {open_ones}")


@step
def state_is_a_memfd(lab: Lab) -> None:
    """Its name, its offset at its end, and that nobody can seal it any more."""
    process = lab.vm.process
    number = state_number(process)
    expect("state", STATE_MEMFD, process.descriptors()[number].target, lab.names)
    size = len(read_state(process))
    expect("offset", size, process.offset(number), lab.names)
    expect("seals", SEAL_SEAL, seals(process, number) & SEAL_SEAL, lab.names)


def seals(process: Process, number: int) -> int:
    fd = process.open_descriptor(number, os.O_RDONLY)
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    finally:
        os.close(fd)


@step
def list_has(lab: Lab, *names: str, aux: bool) -> None:
    """The list has these entries, each with id 0, and with `aux` the machine's own blocks too."""
    entries = decode(read_state(lab.vm.process))
    own = {"pc.bios", "pc.rom"}
    mine = sorted(name for name, _, _ in entries if name.startswith("ram"))
    expect("entries of RAM", sorted(names), mine, lab.names)
    expect("ids", {0} if entries else set(), {id for _, id, _ in entries}, lab.names)
    others = {name for name, _, _ in entries} - set(mine)
    if aux != (own <= others) or (others and not aux):
        raise Mismatch(f"entries of the machine: {others}")


@step
def ram_memfd(lab: Lab, target: str, expected_seals: int) -> None:
    """The RAM is this file, sealed thus; a block of the machine is a memfd with its own name."""
    process = lab.vm.process
    for name, _, fd in decode(read_state(process)):
        link = process.descriptors()[fd].target
        if name == "ram0":
            expect("RAM", target, link, lab.names)
            expect("seals of the RAM", expected_seals, seals(process, fd), lab.names)
        else:
            expect(f"block {name}", f"/memfd:{name} (deleted)", link, lab.names)
            expect(f"seals of {name}", SEAL_SEAL, seals(process, fd), lab.names)


@step
def signals(lab: Lab, blocked: set[int], ignored: set[int]) -> None:
    process = lab.vm.process
    expect("blocked signals", blocked, signal_set(process.field("SigBlk")), lab.names)
    expect("ignored signals", ignored, signal_set(process.field("SigIgn")), lab.names)


def signal_set(mask: str) -> set[int]:
    """The signals of a mask, without those that libc keeps for itself."""
    return {number for number in signal.valid_signals() if int(mask, 16) >> (number - 1) & 1}


@step
def inherits_file(lab: Lab, name: str, inherited: bool) -> None:
    """Whether the exec'd program has got the file, though the list does not have it."""
    links = [each.target for each in lab.vm.process.descriptors().values()]
    expect(f"{name} is open", inherited, str(lab.path(name)) in links, lab.names)


@step
def same_memory_again(lab: Lab) -> None:
    """The new image has the memfds at their numbers, close-on-exec again, and no other ones."""

    def memfds(descriptors: dict[int, Descriptor]) -> dict[int, Descriptor]:
        return {n: each for n, each in descriptors.items() if each.target.startswith("/memfd:")}

    before = memfds(lab.before.descriptors)
    until(lambda: memfds(lab.vm.process.descriptors()) == before, seconds=1)
    expect("memfds", before, memfds(lab.vm.process.descriptors()), lab.names)


@step
def variable_is_gone(lab: Lab) -> None:
    """A program started by the new image has the variable once, with its own number."""
    words = [each for each in lab.vm.process.environment() if each.startswith(f"{STATE_VARIABLE}=")]
    expect("variables", [f"{STATE_VARIABLE}={state_number(lab.vm.process)}"], words, lab.names)


def exec_row(id: str, source: str, *checks: Step, options: str = guest(), **own: Steps) -> Row:
    """An update to `sleep`, and what it finds."""
    return Row(
        f"exec-{id}", f"1: {source}", boot(options), counting(), into_sleep(), *checks, **own
    )


def backend(kind: str, more: str = "share=on") -> str:
    return f"-m 16M -object memory-backend-{kind},id=ram0,size=16M,{more}"


FILE_BACKEND = backend("file", "mem-path=$dir/ram,share=on")
SHELL = ["/bin/sh", "-c", 'exec sleep "$0"', "600"]
IN_PROCESS = "In the exec'd process"
ENTRIES = "Which entries"


ROWS = [
    exec_row("parent-and-folder", IN_PROCESS, same_parent_and_folder()),
    exec_row("command-line", IN_PROCESS, command_line(*SLEEP)),
    exec_row("environment", IN_PROCESS, one_variable_more()),
    exec_row("descriptors", IN_PROCESS, descriptors_are_the_listed_ones()),
    exec_row("state-memfd", "The state memfd", state_is_a_memfd()),
    Row(
        "exec-path-searched",
        f"1: {IN_PROCESS}: PATH is searched",
        boot(),
        counting(),
        into_sleep(SHELL),
        command_line("sleep", "600"),
        descriptors_are_the_listed_ones(),
    ),
    exec_row(
        "signals",
        "Signals",
        qemu=[signals(BLOCKED, IGNORED)],
        cpr=[signals(set(), IGNORED)],
    ),
    Row("running-close-on-exec", "1: CLOEXEC handling", boot(), all_were_close_on_exec()),
    Row(
        "updated-close-on-exec",
        "1: CLOEXEC handling",
        boot(),
        look_at_process(),
        update(),
        comes_to("running"),
        same_memory_again(),
        all_were_close_on_exec(),
        state_memfds(0),
    ),
    Row(
        "updated-defer-close-on-exec",
        "1: CLOEXEC handling",
        boot(),
        look_at_process(),
        update(more=DEFER),
        qmp("migrate-incoming", {"uri": FILE}, {}),
        survives(),
        same_memory_again(),
        all_were_close_on_exec(),
        state_memfds(0),
    ),
    Row(
        "updated-environment",
        "1: The new QEMU unsets the variable",
        boot(),
        update(),
        survives(),
        into_sleep(),
        variable_is_gone(),
        one_variable_more(),
        descriptors_are_the_listed_ones(),
    ),
    exec_row("list-memfd", ENTRIES, list_has("ram0", aux=True)),
    exec_row("list-no-aux", ENTRIES, list_has("ram0", aux=False), options=guest(machine=NO_AUX)),
    exec_row("list-shm", ENTRIES, list_has("ram0", aux=True), options=guest(ram=backend("shm"))),
    exec_row("list-ram", ENTRIES, list_has("ram0", aux=True), options=guest(ram=backend("ram"))),
    exec_row("list-file", ENTRIES, list_has(aux=True), options=guest(ram=FILE_BACKEND)),
    *(
        Row(
            f"exec-list-default-ram{name}",
            f"1: {ENTRIES}",
            boot(guest(ram="-m 16M", machine=f"-machine pc{more}")),
            counting(),
            qemu=[into_sleep(), list_has(aux=bool(more))],
            cpr=[
                new_command(),
                refused("migrate", {"uri": FILE}, incompatible("pc.ram")),
                running(),
            ],
        )
        for name, more in (("", ",aux-ram-share=on"), ("-no-aux", ""))
    ),
    exec_row(
        "memfds", "aux blocks on `pc`", ram_memfd("/memfd:memory-backend-memfd (deleted)", SEALED)
    ),
    exec_row(
        "memfds-of-memory-backend-ram",
        "aux blocks on `pc`",
        ram_memfd("/memfd:ram0 (deleted)", SEAL_SEAL),
        options=guest(ram=backend("ram")),
    ),
    Row(
        "exec-file-backend-leak",
        "1: memory-backend-file,share=on: not saved; its fd is NOT close-on-exec",
        boot(guest(ram=FILE_BACKEND)),
        counting(),
        into_sleep(),
        qemu=[inherits_file("$dir/ram", True)],
        cpr=[inherits_file("$dir/ram", False)],
    ),
]
