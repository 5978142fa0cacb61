"""Results as Markdown: the machine, a table, and one line that says what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.cases import GIB, MODES, PAGES, Case, size_text
from benchmarks.model import fit_all
from benchmarks.pause import Result
from benchmarks.results import Document
from cpr.phases import NAMES

CASE_COLUMNS = ("accel", "RAM", "pages", "backing", "guest", "mode")
COLUMNS = (
    *(*CASE_COLUMNS, "median ms", "p99 ms", "max ms"),
    *("no update ms", "its p99 ms", "cost ms", "reported ms", "± ms", "populating ms", "updates"),
    "QEMU / this",
)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(value: float) -> str:
    """Three significant digits or so: pauses go from a tenth to thousands of ms."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def place(case: Case) -> tuple:
    """Where a case stands in a table: beside those that it is compared with."""
    pages, mode = PAGES.index(case.pages), MODES.index(case.mode)
    return case.accel, case.backing, pages, case.ram, case.guest, mode


def ratio_to_qemu(result: Result, results: list[Result]) -> float | None:
    """QEMU's median pause of the same case, divided by this one's."""
    for other in results:
        same = other.case.series[1:] == result.case.series[1:] and other.case.ram == result.case.ram
        if same and other.case.mode == "qemu" and not other.skipped and not result.skipped:
            return other.median / result.median
    return None


def case_cells(case: Case) -> list[str]:
    """The cells under CASE_COLUMNS."""
    return [
        case.accel,
        size_text(case.ram),
        case.pages,
        case.backing,
        case.guest,
        case.mode,
    ]


def row(result: Result, results: list[Result]) -> list[str]:
    ratio = ratio_to_qemu(result, results) if result.case.mode != "qemu" else None
    return [
        *case_cells(result.case),
        *map(milliseconds, (result.median, result.p99, max(result.pauses), result.baseline)),
        milliseconds(result.baseline_p99),
        milliseconds(result.cost),
        milliseconds(median(result.reported)) if result.reported else "",
        milliseconds(median(result.errors)),
        milliseconds(median(result.populating)) if result.populating else "",
        str(len(result.pauses)),
        f"{ratio:.1f}" if ratio else "",
    ]


def line(result: Result) -> str:
    """One case in one line, for whoever watches."""
    if result.skipped:
        return f"{result.case.label}: left out: {result.skipped}"
    return (
        f"{result.case.label}: median {milliseconds(result.median)} ms, p99 "
        f"{milliseconds(result.p99)}, max {milliseconds(max(result.pauses))}, without an update "
        f"{milliseconds(result.baseline)}"
    )


def heading(document: Document) -> str:
    """When, where and with what it was measured."""
    machine, versions = document.header["machine"], document.header["versions"]
    names = {"cpr": "cpr", "python": "Python", "qemu": "QEMU"}
    shown = ", ".join(f"{names[name]} {version}" for name, version in versions.items())
    text = (
        f"{document.header['date']}: {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['memory'] / GIB:.0f} GiB, Linux {machine['kernel']}; {shown}; "
        f"load at the start {machine['load']:.1f}."
    )
    if observer := document.header.get("observer"):
        text += (
            f" The observer looks every {observer['interval_us']:.0f} µs and takes "
            f"{observer['cpu_share']:.0%} of a CPU, "
            f"{'under' if observer['realtime'] else 'not under'} SCHED_FIFO."
        )
    return text


def phase_table(results: list[Result]) -> str:
    """Medians in ms of the phases that the VMMs reported themselves; "" where none did."""
    shown = [r for r in results if not r.skipped and r.phase_medians()]
    if not shown:
        return ""
    names = [name for name in NAMES if any(name in r.phase_medians() for r in shown)]
    rows = []
    for result in shown:
        medians = result.phase_medians()
        cells = [milliseconds(medians[name]) if name in medians else "" for name in names]
        head = [result.case.label, milliseconds(result.median)]
        rows.append([*head, *cells])
    return table(["case", "pause (observer)", *names], rows)


def model_table(results: list[Result]) -> str:
    rows = []
    for (mode, accel, pages, backing, guest), model in fit_all(results).items():
        if len(model.sizes) > 1:
            cells = [f"{part:.3f}" for part in model.line]
            rows.append([mode, accel, pages, backing, guest, *cells, str(model.count)])
    if not rows:
        return ""
    columns = ("mode", "accel", "pages", "backing", "guest", "a ms", "b ms/GiB", "updates")
    return table(columns, rows)


def summary(results: list[Result]) -> str:
    """The longest median of each mode, and by what factor QEMU's pauses are longer."""
    parts = []
    for mode in MODES:
        measured = [r for r in results if r.case.mode == mode and not r.skipped]
        if not measured:
            continue
        worst = max(measured, key=lambda result: result.median)
        place = " ".join((*worst.case.series[1:], size_text(worst.case.ram)))
        text = f"{mode}: at most {milliseconds(worst.median)} ms ({place})"
        ratios = [ratio for r in measured if (ratio := ratio_to_qemu(r, results))]
        if mode != "qemu" and ratios:
            text += f", QEMU's pause is {min(ratios):.1f} to {max(ratios):.1f} times as long"
        parts.append(text)
    return "; ".join(parts) + "." if parts else "Nothing was measured."


def markdown(document: Document) -> str:
    """The whole report of a run."""
    results = sorted(document.results(), key=lambda result: place(result.case))
    measured = [result for result in results if not result.skipped]
    parts = [heading(document), table(COLUMNS, [row(result, results) for result in measured])]
    if phases := phase_table(measured):
        parts += ["Phases in ms, as the VMM reports them (medians):", phases]
    if models := model_table(measured):
        parts += ["Pause = a + b * RAM, through the medians:", models]
    if left_out := [line(result) for result in results if result.skipped]:
        parts += ["Left out:", "\n".join(f"- {each}" for each in left_out)]
    return "\n\n".join([*parts, summary(measured)]) + "\n"
