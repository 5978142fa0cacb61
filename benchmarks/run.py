"""The subcommands that run VMs: what is measured, in which order, and where the results go."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import brownout, pause, rate, report, rounds, save, sections, virtio
from benchmarks.cases import RAM, Case, grid, parse_size, size_text
from benchmarks.observer import calibrate
from benchmarks.peer import Peer
from benchmarks.progress import Progress
from benchmarks.results import Document
from benchmarks.settings import restore_leftovers


def warn() -> None:
    """Of what an earlier run has left, and of what would be in the figures."""
    warnings = restore_leftovers()
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores / 4:
        warnings.append(f"the machine is busy (load {load:.1f}): the figures will be of that too")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def groups_of(options: argparse.Namespace, peer: Peer | None) -> list[list[Case]]:
    """The cases that the options choose; QEMU is among the modes where there is one."""
    modes = [mode for mode in options.modes if mode != "qemu"]
    if peer is not None:
        modes.insert(0, "qemu")
    return grid(modes, options.accel, options.ram, options.pages, options.backing, options.guest)


def open_document(kind: str, options: argparse.Namespace, peer: Peer | None) -> Document:
    """A new document, or with --resume the one that is there."""
    path = sections.path_of(kind, options.output)
    if getattr(options, "resume", False) and path.exists():
        document = Document.load(path)
        if peer is not None and document.header["versions"].get("qemu") not in (None, peer.version):
            raise ValueError(f"{path} is of QEMU {document.header['versions']['qemu']}")
        return document
    document = Document(kind, path, shown(options), peer)
    document.put_aside()
    return document


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON."""
    values = {k: v for k, v in vars(options).items() if k != "command"}
    if "ram" in values:
        values["ram"] = [size_text(size) for size in options.ram]
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}


def run_pauses(options: argparse.Namespace, peer: Peer | None) -> str:
    """`run`: the pauses of all the cases, group by group; returns the line that sums them up."""
    warn()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # to the observer, off the vCPU
    groups = groups_of(options, peer)
    document = open_document("run", options, peer)
    document.header.setdefault("observer", calibrate(options.poll))
    todo = [[case for case in group if not document.has(case)] for group in groups]
    total, missing = sum(map(len, groups)), sum(map(len, todo))
    with Progress(total, total - missing) as progress:
        for group in filter(None, todo):
            for result in pause.measure(group, options.updates, peer, progress.at, options.poll):
                document.put(result)
                progress.finish(report.line(result))
    return report.summary([result for result in document.results() if not result.skipped])


SUBJECTS: dict[str, tuple[type[rounds.Timed], Callable[[dict[str, Any]], str]]] = {
    "brownout": (brownout.Sweeper, brownout.line),
    "rate": (rate.Runner, rate.line),
}


def run_compared(kind: str, options: argparse.Namespace, peer: Peer | None) -> None:
    """`brownout` and `rate`."""
    warn()
    subject, line = SUBJECTS[kind]
    groups = groups_of(options, peer)
    document = open_document(kind, options, peer)
    with Progress(sum(map(len, groups))) as progress:
        for group in groups:
            for entry in rounds.measure(group, subject, options.rounds, peer, progress.at):
                document.entries.append(entry)
                document.save()
                progress.finish(line(entry))


def run_saves(options: argparse.Namespace, peer: Peer | None) -> None:
    """`save`."""
    warn()
    modes = ["qemu", "late"] if peer is not None else ["late"]
    document = open_document("save", options, peer)
    with Progress(len(modes) * len(save.KINDS)) as progress:
        arguments = (options.accel[0], options.ram[0], options.rounds, peer, progress.at)
        for entry in save.measure(modes, *arguments):
            document.entries.append(entry)
            document.save()
            progress.finish(save.line(entry))


def run_virtio(options: argparse.Namespace, peer: Peer | None) -> None:
    """`virtio`."""
    warn()
    modes = ["qemu", "cpr"] if peer is not None else ["cpr"]
    document = open_document("virtio", options, peer)
    with Progress(len(modes) * len(options.kinds)) as progress:
        arguments = (options.accel, options.kinds, options.rounds, peer, progress.at)
        for entry in virtio.measure(modes, *arguments):
            document.entries.append(entry)
            document.save()
            progress.finish(virtio.line(entry))


def finish(options: argparse.Namespace) -> None:
    """Writes report and plots, and prints the report."""
    text, paths = sections.write(options.output)
    print(text)
    print("written:", ", ".join(map(str, paths)), file=sys.stderr)


def sizes(text: str) -> list[int]:
    """For argparse: sizes with commas between, or all that --full has."""
    try:
        return [parse_size(each) for each in (RAM if text == "all" else text.split(","))]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def some_of(choices: tuple[str, ...]) -> Callable[[str], list[str]]:
    """For argparse: some of `choices` with commas between, or all."""

    def parse(text: str) -> list[str]:
        words = list(choices) if text == "all" else text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"'{word}' is none of {', '.join(choices)}")
        return words

    return parse
