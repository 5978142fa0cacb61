"""The benchmarks' arithmetic and files: statistics, model, cases, QEMU's version, results."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import pytest

from benchmarks import cases, model, pause, report, run, sections, virtio
from benchmarks.cases import GIB, MIB, Case
from benchmarks.pause import Result
from benchmarks.peer import parse_peer
from benchmarks.quantiles import percentile
from benchmarks.results import Document

HEARTBEAT = Case("early", "kvm", GIB, "4K", "lazy")


def result(ram: int, pauses: list[float], mode: str = "early") -> Result:
    case = Case(mode, "kvm", ram, "4K", "lazy")
    return Result(case, pauses, [0.1] * len(pauses), [0.5] * len(pauses))


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, 1.0), (0.5, 5.0), (0.9, 9.0), (0.91, 10.0), (0.99, 10.0)]
)
def test_percentile_is_a_measured_value(share, expected):
    assert percentile([float(n) for n in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4)], share) == expected


def test_model_of_points_on_a_line_is_that_line():
    fitted = model.fit({size * GIB: [5.0 + 2.0 * size] for size in (1, 2, 4, 8)})
    assert fitted.line == pytest.approx((5.0, 2.0))
    assert fitted.predict(16 * GIB) == pytest.approx((37.0, 37.0, 37.0))


def test_model_goes_through_medians_whatever_the_outliers():
    pauses = {size * GIB: [size + 9.0, size + 10.0, size + 500.0] for size in (1, 4, 8)}
    assert model.fit(pauses).line == pytest.approx((10.0, 1.0))


def test_model_knows_how_uncertain_it_is():
    pauses = {
        size * GIB: [10.0 + size + error / 10 for error in range(-10, 11)] for size in (1, 4, 8)
    }
    fitted = model.fit(pauses)
    assert fitted.line == pytest.approx((10.0, 1.0))
    pause, low, high = fitted.predict(4 * GIB)
    assert pause == pytest.approx(14.0)
    for size, measured in pauses.items():
        _, low, high = fitted.predict(size)
        assert sum(low <= each <= high for each in measured) >= 0.9 * len(measured)
    _, far_low, far_high = fitted.predict(256 * GIB)
    assert far_high - far_low > 3 * (high - low) > 0
    assert fitted.predict(256 * GIB) == fitted.predict(256 * GIB)


def test_model_of_one_size_is_flat():
    fitted = model.fit({GIB: [9.0, 10.0, 11.0]})
    assert fitted.line == (10.0, 0.0)
    assert "whether the pause grows with RAM is unknown" in fitted.caution(2 * GIB)
    with pytest.raises(ValueError, match="2 pauses are too few"):
        model.fit({GIB: [1.0, 2.0]})


def test_prediction_says_what_it_rests_on():
    results = [result(size * GIB, [9.0 + size, 10.0 + size, 11.0 + size]) for size in (1, 8)]
    results.append(Result(Case("late", "kvm", GIB, "4K", "lazy"), skipped="no"))
    models = model.fit_all(results)
    text = model.answer(models, 4 * GIB, (None, "kvm", "4K", None, None))
    assert "guest with 4G of RAM" in text
    assert "early, kvm, 4K pages, lazy, heartbeat: 14.00 ms; 95 % of updates between 1" in text
    assert "10.00 ms + 1.000 ms per GiB, from 6 updates at 1G, 8G" in text
    assert "extrapolated" not in text
    text = model.answer(models, 32 * GIB, (None,) * 5)
    assert "extrapolated to 4.0 times the largest RAM measured, 8G" in text
    assert "below the smallest" in model.answer(models, 64 * MIB, (None,) * 5)
    with pytest.raises(ValueError, match="there is: early kvm 4K lazy heartbeat"):
        model.answer(models, GIB, ("qemu", None, None, None, None))


# Cases.


def test_sizes():
    assert cases.parse_size("256M") == 256 * MIB
    assert cases.parse_size("16g") == 16 * GIB
    assert [cases.size_text(size) for size in (64 * MIB, GIB, 1536 * MIB)] == ["64M", "1G", "1536M"]
    for text in ("", "M", "12", "1.5G", "-1G", "0M", "4K"):
        with pytest.raises(ValueError, match="is no size"):
            cases.parse_size(text)
    with pytest.raises(argparse.ArgumentTypeError):
        run.sizes("64M,x")


def test_groups_differ_in_the_mode_alone():
    groups = cases.grid(
        ["qemu", "late"], ["kvm", "tcg"], [MIB, GIB], ["4K"], ["lazy"], ["heartbeat"]
    )
    assert len(groups) == 4
    for group in groups:
        assert [case.mode for case in group] == ["qemu", "late"]
        assert len({(case.series[1:], case.ram) for case in group}) == 1


def test_batches_fit_into_memory():
    big = [Case(mode, "kvm", 8 * GIB, "4K", "prealloc") for mode in cases.MODES]
    sizes = [len(batch) for batch in cases.batches(big, 20 * GIB)]
    assert sizes == [2, 1]
    lazy = [Case(mode, "kvm", 8 * GIB, "4K", "lazy") for mode in cases.MODES]
    assert [len(batch) for batch in cases.batches(lazy, 20 * GIB)] == [3]
    assert [len(batch) for batch in cases.batches(lazy, 20 * GIB, touched=True)] == [2, 1]


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case("late", "tcg", 64 * MIB, "1G", "lazy"), "RAM is no multiple of 1G pages"),
        (Case("late", "tcg", 1 << 50, "4K", "prealloc"), "GiB of memory"),
    ],
)
def test_what_cannot_run_says_why(case, why):
    assert why in (cases.obstacle(case) or "")
    (left_out,) = pause.measure([case], 1, None)
    assert why in left_out.skipped
    assert why in report.line(left_out)
    assert not left_out.pauses


def test_missing_kvm_is_a_reason(monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != "/dev/kvm")
    assert "/dev/kvm" in (cases.obstacle(HEARTBEAT) or "")


# QEMU.


def fake_qemu(folder: Path, text: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("version", ["10.2.0", "11.1.3 (Debian 1:11.1.3+ds-1)", "12.0.50"])
def test_qemu_that_has_cpr_exec(tmp_path, version):
    peer = parse_peer(fake_qemu(tmp_path, f"QEMU emulator version {version}"))
    assert (peer.version, peer.root) == (version.split()[0], "")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("QEMU emulator version 10.1.2", "QEMU 10.1.2 has no cpr-exec: give one of 10.2 or later"),
        ("QEMU emulator version 7.2.22", "QEMU 7.2.22 has no cpr-exec"),
        ("something else", "is not QEMU's: something else"),
    ],
)
def test_qemu_that_has_not(tmp_path, text, problem):
    with pytest.raises(ValueError, match="--qemu") as caught:
        parse_peer(fake_qemu(tmp_path, text))
    assert problem in str(caught.value)


def test_qemu_that_is_not_there():
    with pytest.raises(ValueError, match="--qemu: cannot run '/none'"):
        parse_peer("/none")
    with pytest.raises(ValueError, match="--qemu: name a"):
        parse_peer("")


def test_paths_and_command_inside_a_chroot(tmp_path):
    peer = parse_peer(fake_qemu(tmp_path, "QEMU emulator version 11.0.0"))
    inside = type(peer)(["chroot", "/root", "qemu"], "/root", "11.0.0")
    assert inside.inside("/root/tmp/x") == "/tmp/x"
    assert inside.own_words(["chroot", "/root", "qemu", "-m", "1G"]) == ["qemu", "-m", "1G"]


# Results.


def document(path: Path, results: list[Result]) -> Document:
    found = Document("run", path, {}, None)
    for each in results:
        found.put(each)
    return found


def test_results_come_back_from_the_file(tmp_path):
    path = tmp_path / "run.json"
    written = [result(GIB, [1.0, 2.0]), Result(HEARTBEAT, skipped="no")]
    written[0].phases = [{"stop": 1.0}, {"stop": 3.0}]
    saved = document(path, [Result(HEARTBEAT, [5.0], [0.1], [0.1]), written[0]])
    assert len(saved.results()) == 1  # the same case: the later one
    loaded = Document.load(path)
    assert loaded.results() == [written[0]]
    assert loaded.results()[0].phase_medians() == {"stop": 2.0}
    assert {"cpu", "cores", "memory", "kernel", "load"} <= set(loaded.header["machine"])
    assert {"cpr", "python"} <= set(loaded.header["versions"])
    assert not list(tmp_path.glob("*.new"))


@pytest.mark.parametrize("text", ["", "{}", '{"format": 99}', "[1]"])
def test_file_that_holds_no_results_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    with pytest.raises(ValueError, match=r"run\.json: No such file"):
        Document.load(path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: no results"):
        Document.load(path)


def options(folder: Path, **more: object) -> argparse.Namespace:
    values: dict = {"modes": ["late", "early"], "accel": ["tcg"], "ram": [GIB, 2 * GIB]}
    values |= {
        "guest": ["heartbeat"],
        "pages": ["4K"],
        "backing": ["lazy"],
        "updates": 3,
        "poll": 10,
        "resume": False,
    }
    return argparse.Namespace(**(values | {"output": folder} | more))


class Interruption(Exception):
    pass


def test_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    measured: list[Case] = []

    def measure(group, updates, peer, progress, poll_us):
        if len(measured) == 2 and not resumed:
            raise Interruption
        measured.extend(group)
        return [Result(case, [1.0] * updates, [0.1], [0.1]) for case in group]

    monkeypatch.setattr(pause, "measure", measure)
    monkeypatch.setattr(run, "restore_leftovers", list)
    resumed = False
    with pytest.raises(Interruption):
        run.run_pauses(options(tmp_path), None)
    assert [case.ram for case in measured] == [GIB, GIB]
    resumed = True
    run.run_pauses(options(tmp_path, resume=True), None)
    assert [case.ram for case in measured] == [GIB, GIB, 2 * GIB, 2 * GIB]
    assert len(Document.load(tmp_path / "run.json").results()) == 4


def test_new_run_keeps_the_file_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(pause, "measure", lambda group, *_: [Result(c, [1.0]) for c in group])
    monkeypatch.setattr(run, "restore_leftovers", list)
    document(tmp_path / "run.json", [result(4 * GIB, [1.0])])
    monkeypatch.setattr(report, "line", lambda each: "")
    monkeypatch.setattr(report, "summary", lambda each: "")
    run.run_pauses(options(tmp_path), None)
    (kept,) = tmp_path.glob("run-*.json")
    assert Document.load(kept).results()[0].case.ram == 4 * GIB
    assert {r.case.ram for r in Document.load(tmp_path / "run.json").results()} == {GIB, 2 * GIB}


def test_report_has_the_ratio_to_qemu_of_the_same_case(tmp_path):
    results = [
        result(GIB, [30.0, 60.0, 90.0], "qemu"),
        result(GIB, [2.0, 3.0, 4.0]),
        result(2 * GIB, [5.0, 5.0, 5.0]),
        Result(Case("late", "kvm", GIB, "4K", "lazy"), skipped="refused"),
    ]
    found = document(tmp_path / "run.json", results)
    text = report.markdown(found)
    same = "| kvm | 1G | 4K | lazy | heartbeat"
    assert f"{same} | qemu | 60.0 | 90.0 | 90.0 | 0.50 | 0.50 | 59.5 |  | 0.10 |  | 3 |  |" in text
    assert (
        f"{same} | early | 3.00 | 4.00 | 4.00 | 0.50 | 0.50 | 2.50 |  | 0.10 |  | 3 | 20.0 |"
        in text
    )
    assert "- kvm 1G 4K lazy heartbeat late: left out: refused" in text
    assert "QEMU's pause is 20.0 to 20.0 times as long" in text
    assert "| early | kvm | 4K | lazy | heartbeat | 1.000 | 2.000 | 6 |" in text


def test_virtio_beside_qemu(tmp_path):
    def entry(kind: str, mode: str, rates: list[float], skipped: str = "") -> dict:
        return {"kind": kind, "mode": mode, "accel": "tcg", "rates": rates, "skipped": skipped}

    entries = [
        entry("read", "qemu", [1000.0, 800.0, 900.0]),
        entry("read", "cpr", [600.0, 450.0, 100.0]),
        entry("random-1", "cpr", [4000.0]),
        entry("send", "cpr", [], "no /dev/net/tun"),
    ]
    text = virtio.markdown(entries)
    assert "1 MiB blocks | tcg | MiB/s | 450 | 100 to 600 | 900 | 0.50 | 3 |" in text
    assert "one at a time | tcg | 4 KiB reads/s | 4000 | 4000 to 4000 |  |  | 1 |" in text
    assert "TCP" not in text
    assert virtio.line(entries[3]) == "TCP, guest to host, cpr: left out: no /dev/net/tun"
    document = Document("virtio", sections.path_of("virtio", tmp_path), {}, None)
    document.entries = entries
    document.save()
    assert "- cpr, tcg: no /dev/net/tun" in sections.markdown(sections.documents(tmp_path))


def test_tables_go_between_the_lines_of_a_document(tmp_path):
    path = tmp_path / "doc.md"
    path.write_text(f"one\n{sections.BEGIN}\nold\n{sections.END}\ntwo\n")
    for text in ("new\n", "newer\n"):
        sections.put_into(path, text)
        assert path.read_text() == f"one\n{sections.BEGIN}\n\n{text}\n{sections.END}\ntwo\n"
    path.write_text("nothing")
    with pytest.raises(ValueError, match=r"doc\.md: no lines"):
        sections.put_into(path, "new")
    assert path.read_text() == "nothing"


def test_json_is_for_everybody(tmp_path):
    document(tmp_path / "run.json", [result(GIB, [1.0])])
    values = json.loads((tmp_path / "run.json").read_text())
    (entry,) = values["entries"]
    assert (entry["mode"], entry["ram"], entry["pauses"]) == ("early", GIB, [1.0])
