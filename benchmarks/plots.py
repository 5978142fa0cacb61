"""Results as SVG: the pause against RAM, and the phases of an update."""

from __future__ import annotations

from itertools import product
from pathlib import Path

from benchmarks.cases import ACCELS, BACKINGS, GIB, GUESTS, MODES, PAGES, size_text
from benchmarks.pause import Result
from cpr.phases import NAMES

STYLES = {"4K": "-", "THP": "--", "2M": "-.", "1G": ":"}
MARKERS = {"heartbeat": "o", "ports": "s"}
BARS = 16  # more cannot be read


def draw(results: list[Result], folder: Path) -> list[Path]:
    """Writes the plots that the results have data for; returns their paths.

    Raises ValueError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'cpr-vmm[bench]'") from None
    matplotlib.use("Agg")
    measured = [result for result in results if not result.skipped]
    paths = []
    for accel in ACCELS:
        for backing in BACKINGS:
            wanted = (accel, backing)
            chosen = [r for r in measured if (r.case.accel, r.case.backing) == wanted]
            if chosen:
                path = folder / f"pause-{accel}-{backing}.svg"
                _draw_pauses(chosen, f"{accel}, {backing}", path)
                paths.append(path)
    if with_phases := [result for result in measured if result.phase_medians()]:
        path = folder / "phases.svg"
        _draw_phases(with_phases, path)
        paths.append(path)
    return paths


def _draw_pauses(results: list[Result], title: str, path: Path) -> None:
    """Median pauses by RAM on log axes, up to the longest one; a line for each mode and page."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, mode in enumerate(MODES):
        for pages, guest in product(PAGES, GUESTS):
            wanted = (mode, pages, guest)
            line = [r for r in results if (r.case.mode, r.case.pages, r.case.guest) == wanted]
            line.sort(key=lambda result: result.case.ram)
            if line:
                medians = [result.median for result in line]
                above = [max(r.pauses) - r.median for r in line]
                axes.errorbar(
                    [result.case.ram / GIB for result in line],
                    medians,
                    yerr=[[0.0] * len(line), above],
                    label=f"{mode}, {pages}, {guest}",
                    color=f"C{number}",
                    linestyle=STYLES[pages],
                    marker=MARKERS[guest],
                    markersize=4,
                    capsize=3,
                )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({result.case.ram for result in results})
    axes.set_xticks([size / GIB for size in sizes], [size_text(size) for size in sizes])
    axes.set_xticks([], minor=True)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain if _within_a_decade(results) else NullFormatter())
    axes.set_xlabel("guest RAM")
    axes.set_ylabel("pause in ms: median, to the longest")
    axes.set_title(f"Pause of an update: {title}")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize="small", handlelength=3.5)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _within_a_decade(results: list[Result]) -> bool:
    """Whether there is at most one power of ten to be labelled."""
    medians = [result.median for result in results]
    return max(medians) < 10 * min(medians)


def _draw_phases(results: list[Result], path: Path) -> None:
    """A bar for each case, of the phases in the order in which they came."""
    from matplotlib import pyplot

    chosen = results[:BARS]
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(chosen)), layout="constrained")
    labels = [result.case.label for result in chosen]
    colours = pyplot.get_cmap("tab20")
    named: set[str] = set()
    for place, result in enumerate(chosen):
        left = 0.0
        for name, length in result.phase_medians().items():
            axes.barh(
                place,
                length,
                left=left,
                color=colours(NAMES.index(name) if name in NAMES else len(NAMES)),
                label=None if name in named else name,
            )
            named.add(name)
            left += length
        axes.plot([result.median], [place], "k|", markersize=14)
    axes.set_yticks(range(len(labels)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("ms, medians as the VMM reports them; black line: the pause that was observed")
    figure.legend(fontsize="small", loc="outside upper center", ncols=6)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
