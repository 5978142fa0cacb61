"""The command line of `inspect`, and its exit status."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from cpr.constants import PROGRAM
from cpr.errors import CprError
from cpr.vmm.inspect import diff, text
from cpr.vmm.inspect.source import Found, NoState, Source, inspect, open_source

ALL = "*"
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
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):  # names of any bytes, terminals of any encoding
            output.reconfigure(errors="backslashreplace")
    try:
        status = _compare(options) if options.diff else _show(options)
        sys.stdout.flush()
    except BrokenPipeError:  # what comes after it in a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
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
        default=ALL,
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


def _show(options: argparse.Namespace) -> int:
    try:
        source = open_source(options.operands[0])
    except NoState as error:
        _show_process(error, options.json)
        return 1
    found = inspect(source, options.offset)
    _select(source, found, options.section)
    if options.json:
        flaws = [flaw._asdict() for flaw in found.flaws]
        content = found.to_json(options.fields)
        _print_json({"source": source.label, **content, "flaws": flaws})
    else:
        _print_lines(text.show(source.label, found, options.fields))
    _complain(source, found)
    return 1 if found.flaws else 0


def _show_process(error: NoState, as_json: bool) -> None:
    descriptors = error.process.shared_memory()
    if as_json:
        entries = [descriptor.to_json() for descriptor in descriptors]
        _print_json({"source": f"process {error.process.pid}", "kind": None, "memory": entries})
    elif descriptors:
        _print_lines(text.show_descriptors(descriptors))
    else:
        print(f"process {error.process.pid} has no memfds and no shared memory files open")
    _print_error(str(error))


def _compare(options: argparse.Namespace) -> int:
    try:
        sources = [open_source(operand) for operand in options.operands]
        a, b = (inspect(source, options.offset, keep_places=True) for source in sources)
        for source, found in zip(sources, (a, b), strict=True):
            _complain(source, found)
            _select(source, found, options.section)
        differences = diff.compare(a, b)
    except CprError as error:
        _print_error(str(error))
        return 2
    labels = [source.label for source in sources]
    if options.json:
        heads = [
            {"source": label, "flaws": [flaw._asdict() for flaw in found.flaws]}
            for label, found in zip(labels, (a, b), strict=True)
        ]
        entries = [difference._asdict() for difference in differences]
        _print_json({"a": heads[0], "b": heads[1], "differences": entries})
    else:
        _print_lines([f"A: {labels[0]}", f"B: {labels[1]}"])
        _print_lines([each.text for each in differences] or ["no difference"])
    if a.flaws or b.flaws:
        return 2
    return 1 if differences else 0


def _select(source: Source, found: Found, pattern: str) -> None:
    """Leaves out of `found` what has another name.  Raises CprError where nothing is left."""
    left = found.select(lambda name: fnmatchcase(name, pattern))
    if not left and pattern != ALL and not found.flaws:
        raise CprError(f"{source.label}: there is no section or entry '{pattern}'")


def _complain(source: Source, found: Found) -> None:
    sys.stdout.flush()
    for flaw in found.flaws:
        _print_error(f"{source.label}: {flaw}")


def _print_error(line: str) -> None:
    sys.stdout.flush()
    print(f"{PROGRAM}: {text.safe(line)}", file=sys.stderr)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(text.safe(line))


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(content, indent=2))
