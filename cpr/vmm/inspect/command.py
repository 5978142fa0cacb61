"""The command line of `inspect`, and its exit status."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase

from cpr.errors import CprError
from cpr.vmm.inspect import diff, text
from cpr.vmm.inspect.cpr_state import State
from cpr.vmm.inspect.source import NoState, Source, Unknown, inspect, open_source
from cpr.vmm.inspect.stream import Stream

PROGRAM = "cpr-vmm"
DESCRIPTION = """\
Shows a CPR state or a migration stream, and what is wrong in it and where.

FILE is either of them, told apart by its magic. PID is a process with a CPR
state in a memfd, a real QEMU too: from 'migrate' until the new image has loaded
it. A file whose name is a number is ./NUMBER; stdin is '-'.
"""
EPILOG = """\
exit status: 0 for a good file, 1 for a bad one or a process without a state;
with --diff 0 for no difference, 1 for some, 2 for a file that is bad or cannot
be read. Wrong usage: 2."""


def run(arguments: list[str]) -> int:
    """Inspects what `arguments` name; returns the exit status.

    Raises CprError for what cannot be read.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    wanted = 2 if options.diff else 1
    if len(options.operands) != wanted:
        parser.error("--diff takes two files or PIDs" if options.diff else "give one FILE or PID")
    if options.operands == ["-", "-"]:
        parser.error("stdin cannot be both of them")
    try:
        status = _compare(options) if options.diff else _show(options)
        sys.stdout.flush()
    except BrokenPipeError:  # what comes after it in a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m cpr.vmm inspect",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("operands", nargs="+", metavar="FILE|PID|-")
    add("--diff", action="store_true", help="say what differs between two")
    add("--fields", action="store_true", help="show the values of the sections' fields")
    add(
        "--section",
        metavar="NAME",
        default="*",
        help="only sections, or entries of a CPR state, of this name (shell pattern)",
    )
    add("--json", action="store_true", help="for programs: sizes and offsets as numbers")
    add(
        "--offset",
        metavar="BYTES",
        type=_offset,
        default=0,
        help="where it begins in the file, as in file:PATH,offset=BYTES",
    )
    return parser


def _offset(word: str) -> int:
    value = int(word, 0)
    if value < 0:
        raise ValueError(word)
    return value


def _selector(pattern: str) -> Callable[[str], bool]:
    return lambda name: fnmatchcase(name, pattern)


def _show(options: argparse.Namespace) -> int:
    try:
        source = open_source(options.operands[0])
    except NoState as error:
        _show_process(error, options.json)
        return 1
    found = inspect(source, options.offset)
    selected = _selector(options.section)
    if isinstance(found, State):
        found.entries = [each for each in found.entries if selected(each.name)]
        found.devices = [each for each in found.devices if selected(each.name)]
    elif isinstance(found, Stream):
        found.items = [each for each in found.items if selected(each.name)]
    if options.json:
        flaws = [flaw._asdict() for flaw in found.flaws]
        _print_json({"source": source.label, **_json(found, options), "flaws": flaws})
    else:
        for line in _text(found, options):
            print(line)
    _complain(source, found)
    return 1 if found.flaws else 0


def _compare(options: argparse.Namespace) -> int:
    try:
        sources = [open_source(operand) for operand in options.operands]
        a, b = [inspect(source, options.offset, keep_places=True) for source in sources]
        differences = diff.compare(a, b, _selector(options.section))
    except CprError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    if options.json:
        labels = [source.label for source in sources]
        entries = [difference._asdict() for difference in differences]
        _print_json({"a": labels[0], "b": labels[1], "differences": entries})
    else:
        for name, source in zip("AB", sources, strict=True):
            print(f"{name}: {source.label}")
        for difference in differences:
            print(difference.text)
        if not differences:
            print("no difference")
    return 2 if a.flaws or b.flaws else 1 if differences else 0
