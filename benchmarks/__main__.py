"""`python -m benchmarks [COMMAND]`: what an update costs a guest here, and QEMU's guest.

Every pause is what a process outside the VMM saw (benchmarks/observer.c).  Results are JSON,
Markdown and plots in build/benchmarks; docs/performance.md says how to read them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import cases, model, ram_copy, run, sections, virtio
from benchmarks.observer import POLL_US
from benchmarks.peer import Peer, parse_peer
from benchmarks.results import FOLDER, Document
from benchmarks.settings import Interrupted, interruptible

OWN_MODES = cases.MODES[1:]
EXAMPLES = """examples:
  python -m benchmarks --quick
  python -m benchmarks --qemu /usr/bin/qemu-system-x86_64
  python -m benchmarks --ram 256M,4G --pages 2M --accel kvm --modes late,early
  python -m benchmarks brownout --ram 2G --backing prealloc
  python -m benchmarks predict --ram 32G --pages 4K
"""
BEST_ACCEL = "kvm" if cases.kvm_is_usable() else "tcg"
# --quick, neither, --full: what is measured where no option says otherwise.
PRESETS = {
    "quick": {"ram": "64M,1G", "pages": "4K", "accel": BEST_ACCEL, "backing": "prealloc"},
    "default": {"ram": "64M,1G,8G", "pages": "4K,2M", "accel": "all", "backing": "prealloc"},
    "full": {"ram": ",".join(cases.RAM), "pages": "all", "accel": "all", "backing": "all"},
}


def add_qemu(parser: argparse.ArgumentParser) -> None:
    text = "a QEMU 10.2 or later to measure beside: its path, or 'chroot FOLDER QEMU'"
    parser.add_argument("--qemu", metavar="COMMAND", help=text)


def add_output(parser: argparse.ArgumentParser) -> None:
    text = "the folder of the results (default build/benchmarks)"
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="FOLDER", help=text)


def add_grid(parser: argparse.ArgumentParser, **defaults: str) -> None:
    """The options that choose cases; those without a default are filled in from a preset."""
    kinds: dict[str, tuple[Callable, str]] = {
        "ram": (run.sizes, "RAM sizes such as 256M,4G"),
        "pages": (run.some_of(cases.PAGES), f"page sizes: {', '.join(cases.PAGES)}"),
        "accel": (run.some_of(cases.ACCELS), f"accelerators: {', '.join(cases.ACCELS)}"),
        "backing": (run.some_of(cases.BACKINGS), f"RAM: {', '.join(cases.BACKINGS)}"),
        "guest": (run.some_of(cases.GUESTS), f"guests: {', '.join(cases.GUESTS)}"),
        "modes": (run.some_of(OWN_MODES), f"ways to update: {', '.join(OWN_MODES)}"),
    }
    for name, (kind, text) in kinds.items():
        default = defaults.get(name)
        shown = f"; default {default}" if default else ""
        metavar = name.upper()
        parser.add_argument(
            f"--{name}", type=kind, default=default, metavar=metavar, help=f"{text}, or all{shown}"
        )


def add_run(commands: argparse._SubParsersAction) -> None:
    text = "pauses by RAM, pages, accelerator, backing and VMM mode (the default command)"
    parser = commands.add_parser("run", help=text, description=text)
    add_grid(parser, modes="all", guest="all")
    presets = parser.add_mutually_exclusive_group()
    presets.add_argument("--quick", action="store_true", help="a few cases: under 2 minutes")
    presets.add_argument("--full", action="store_true", help="the whole grid: an hour or two")
    parser.add_argument("--updates", type=int, default=10, help="updates of each case (10)")
    parser.add_argument(
        "--poll",
        type=int,
        default=POLL_US,
        metavar="US",
        help=f"the observer's poll interval ({POLL_US})",
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    add_qemu(parser)
    add_output(parser)


def add_others(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("brownout", help="time to write every page after an update")
    add_grid(
        parser, ram="1G", pages="4K", accel="all", backing="all", modes="all", guest="heartbeat"
    )
    parser.add_argument("--rounds", type=int, default=5, help="updates of each case (5)")
    add_qemu(parser)
    add_output(parser)
    parser = commands.add_parser("rate", help="updates a second, one right after the other")
    add_grid(
        parser, ram="256M", pages="4K", accel="all", backing="lazy", modes="all", guest="heartbeat"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of 20 updates (3)")
    add_qemu(parser)
    add_output(parser)
    parser = commands.add_parser("save", help="time to save RAM to a tmpfs with cpr-reboot")
    parser.add_argument("--ram", type=run.sizes, default="4G", help="size of the RAM (4G)")
    parser.add_argument(
        "--accel", type=run.some_of(cases.ACCELS), default=BEST_ACCEL, help=f"({BEST_ACCEL})"
    )
    parser.add_argument("--rounds", type=int, default=3, help="saves of each kind (3)")
    add_qemu(parser)
    add_output(parser)
    parser = commands.add_parser("virtio", help="disk and network of a Linux guest")
    kinds = tuple(virtio.KINDS)
    parser.add_argument(
        "--kinds", type=run.some_of(kinds), default="all", help=f"{', '.join(kinds)}, or all"
    )
    parser.add_argument("--accel", choices=cases.ACCELS, default="tcg", help="(tcg)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (5)")
    add_qemu(parser)
    add_output(parser)
    parser = commands.add_parser("all", help="all of these, as by default")
    add_qemu(parser)
    add_output(parser)
    parser = commands.add_parser("ram-copy", help="copying RAM against memcpy and write(2)")
    ram_copy.add_arguments(parser)
    add_output(parser)


def add_readers(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("predict", help="what an update of a guest will cost here")
    parser.add_argument("--ram", required=True, type=run.sizes, help="its RAM, such as 32G")
    parser.add_argument("--pages", choices=cases.PAGES, help="its pages; default: all measured")
    parser.add_argument("--mode", choices=cases.MODES)
    parser.add_argument("--accel", choices=cases.ACCELS)
    parser.add_argument("--backing", choices=cases.BACKINGS)
    parser.add_argument("--guest", choices=cases.GUESTS)
    parser.add_argument("--results", type=Path, default=sections.path_of("run", FOLDER))
    parser = commands.add_parser("report", help="tables and plots again, from the results")
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="of the results")
    outputs = parser.add_mutually_exclusive_group()
    outputs.add_argument("--markdown", action="store_true", help="print, but write no file")
    text = "put the tables into this document, between its lines that say so"
    outputs.add_argument("--into", type=Path, metavar="DOCUMENT", help=text)


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    add_run(commands)
    add_others(commands)
    add_readers(commands)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["run", *words]
    options = parser.parse_args(words)
    if options.command == "run":
        name = "quick" if options.quick else "full" if options.full else "default"
        chosen = commands.choices["run"].parse_args(
            [f"--{key}={value}" for key, value in PRESETS[name].items()]
        )
        for key in PRESETS[name]:
            if getattr(options, key) is None:
                setattr(options, key, getattr(chosen, key))
        if options.updates < 1:
            parser.error("--updates: at least 1")
    return options


def measure(options: argparse.Namespace) -> None:
    """Any command that measures, and the report of what is there then."""
    peer: Peer | None = parse_peer(options.qemu) if getattr(options, "qemu", None) else None
    summary = ""
    if options.command == "all":
        for kind in sections.TITLES:
            print(f"{kind}:", file=sys.stderr)
            each = parse_arguments([kind, f"--output={options.output}"])
            summary = measure_kind(each, peer) or summary
    else:
        summary = measure_kind(options, peer)
    run.finish(options)
    if summary:
        print(summary, file=sys.stderr)


def measure_kind(options: argparse.Namespace, peer: Peer | None) -> str:
    """Measures one kind of results; returns the line that sums it up, if it has one."""
    if options.command == "run":
        return run.run_pauses(options, peer)
    if options.command == "save":
        run.run_saves(options, peer)
    elif options.command == "virtio":
        run.run_virtio(options, peer)
    elif options.command == "ram-copy":
        document = run.open_document("ram-copy", options, None)
        document.entries = ram_copy.measure(options)
        document.save()
    else:
        run.run_compared(options.command, options, peer)
    return ""


def read(options: argparse.Namespace) -> None:
    """`predict` and `report`."""
    if options.command == "predict":
        models = model.fit_all(Document.load(options.results).results())
        wanted = (
            options.mode,
            options.accel,
            options.pages,
            options.backing,
            options.guest,
        )
        for ram in options.ram:
            print(model.answer(models, ram, wanted))
    elif options.into is not None:
        text = sections.markdown(sections.documents(options.folder), level=3)
        sections.put_into(options.into, text)
    elif options.markdown:
        print(sections.markdown(sections.documents(options.folder)))
    else:
        options.output = options.folder
        run.finish(options)


def main(words: list[str] | None = None) -> int:
    """Returns the exit status: 1 where there is nothing to measure or read, with the reason."""
    options = parse_arguments(sys.argv[1:] if words is None else words)
    try:
        if options.command in ("predict", "report"):
            read(options)
        else:
            with interruptible():
                measure(options)
    except Interrupted as error:
        hint = "; go on with --resume" if options.command == "run" else ""
        print(f"{error}; all settings are as they were{hint}", file=sys.stderr)
        return error.status
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
