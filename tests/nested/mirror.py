"""Outside the VM: each test inside is an item of this run, and its reports are the inner ones."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.vm import ROOT

from .initramfs import RESULTS, build, init_script
from .kernels import KERNELS
from .packages import PROGRAMS, Unavailable, install, run
from .vm import Ended, NestedVm

HERE = Path(__file__).parent
INSIDE = HERE / "inside"
LOGS = ROOT / "build" / "nested"  # of the last run with each kernel
SECONDS_OF_A_TEST = 1500


def is_roots(item: pytest.Item) -> bool:
    """Whether it is not the variant of a test in which another user than root has the VMM."""
    callspec = getattr(item, "callspec", None)
    return callspec is None or callspec.params.get("user") != "user"


class Mirror:
    """Plugin that boots the VM at the first inner item and reports what it reports."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.vm: NestedVm | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.unavailable = ""
        self.ended = ""
        self.facts: list[str] = []

    # -- collection

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leaves the smoke alone where no kernel was asked for, and what the kernel can run."""
        asked: str | None = self.config.getoption("--nested", default=None)
        dropped = []
        for item in items:
            if not item.path.is_relative_to(HERE):
                continue
            if INSIDE in item.path.parents:
                item.add_marker(pytest.mark.timeout(0))  # the VM has limits of its own
            smoke = item.get_closest_marker("nested_smoke") is not None and is_roots(item)
            iommufd = item.get_closest_marker("iommufd") is not None
            if (asked is None and not smoke) or (iommufd and asked != "iommufd"):
                dropped.append(item)
        if dropped:
            self.config.hook.pytest_deselected(items=dropped)
            items[:] = [item for item in items if item not in dropped]

    @staticmethod
    def inner(items: list[pytest.Item]) -> list[pytest.Item]:
        return [item for item in items if INSIDE in item.path.parents]

    # -- running

    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        if not self.inner([item]):
            return None
        if self.vm is None and not self.unavailable and not self.ended:
            try:
                self._boot([each.nodeid for each in self.inner(item.session.items)])
            except Unavailable as error:
                self.unavailable = str(error)
        if self.unavailable:
            item.add_marker(pytest.mark.skip(reason=f"no nested VM: {self.unavailable}"))
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports(item):
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if nextitem is None or not self.inner([nextitem]):
            self._close()
            self.ended = self.ended or "the VM is not started twice in one run"
        return True

    def _boot(self, nodeids: list[str]) -> None:
        name: str = self.config.getoption("--nested", default=None) or "type1"
        install(PROGRAMS)
        run("make", "-s", "-C", HERE / "guests")  # inside, the tree is read-only
        kernel = KERNELS[name](self.say)
        command = [sys.executable, "-m", "pytest", "-p", "tests.nested.inner"]
        command += ["-p", "no:cacheprovider", "-p", "no:terminal", "-o", "addopts="]
        command += [
            f"--rootdir={ROOT}",
            f"--timeout={SECONDS_OF_A_TEST}",
            "--timeout-method=signal",
        ]
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/dev/shm",
            "TMPDIR": "/dev/shm",
            "PYTHONDONTWRITEBYTECODE": "1",
            "CPR_NESTED": name,
            "CPR_NESTED_RESULTS": RESULTS,
        }
        root: str | None = self.config.getoption("--qemu-root", default=None)
        if root is not None:
            environment["CPR_QEMU_ROOT"] = root
        needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        init = init_script(kernel, command + nodeids, ROOT, environment, needed)
        self.folder = tempfile.TemporaryDirectory(prefix="cpr-nested-")
        archive = build(kernel, init, Path(self.folder.name))
        LOGS.mkdir(parents=True, exist_ok=True)
        console, log = (LOGS / f"{name}.{kind}" for kind in ("console", "jsonl"))
        self.facts.append(f"kernel {kernel.release}; console and events are in {LOGS}/{name}.*")
        self.say(f"booting kernel {kernel.release} with {len(nodeids)} tests")
        self.vm = NestedVm(kernel, archive, console, log, root)

    def _reports(self, item: pytest.Item) -> Iterator[pytest.TestReport]:
        """The inner reports of one item; of a VM that has ended, one failure."""
        while True:
            try:
                event = self._event(item.nodeid)
            except Ended as error:
                self.ended = self.ended or str(error)
                self._close()
                yield self._failure(item, str(error))
                return
            if event["event"] == "finished" and event["nodeid"] == item.nodeid:
                return
            if event["event"] == "report" and event["report"]["nodeid"] == item.nodeid:
                data = event["report"]
                if isinstance(data["longrepr"], list):  # where a test was skipped: pytest's tuple
                    data["longrepr"] = tuple(data["longrepr"])
                hook = self.config.hook
                yield hook.pytest_report_from_serializable(config=self.config, data=data)
            elif event["event"] in ("failed", "exit"):
                text = event.get(
                    "text", f"the inner pytest ended with status {event.get('status')}"
                )
                self.ended = self.ended or text
                yield self._failure(item, text)
                return

    def _event(self, waiting_for: str) -> dict[str, Any]:
        """The next event but those that only tell of progress.  Raises Ended."""
        if self.vm is None:
            raise Ended(f"not run: {self.ended.splitlines()[0]}")
        while True:
            event = self.vm.event(1.0)
            if event is None:
                self.progress(f"nested VM: {self.vm.seconds:.0f} s, waiting for {waiting_for}")
            elif event["event"] == "init":
                self.say(f"/init after {self.vm.seconds:.1f} s")
            elif event["event"] == "session":
                self.say(f"pytest inside after {self.vm.seconds:.1f} s")
            elif event["event"] == "fact":
                self.facts.append(event["text"])
            elif event["event"] != "alive":
                return event

    @staticmethod
    def _failure(item: pytest.Item, text: str) -> pytest.TestReport:
        return pytest.TestReport(
            item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call"
        )

    # -- the terminal

    def _terminal(self) -> Any:
        return self.config.pluginmanager.get_plugin("terminalreporter")

    def say(self, text: str) -> None:
        if terminal := self._terminal():
            terminal.ensure_newline()
            terminal.write_line(f"nested VM: {text}")

    def progress(self, text: str) -> None:
        """Writes over the line before, where the terminal is one."""
        terminal = self._terminal()
        if terminal is not None and terminal.isatty:
            terminal.rewrite(text[: terminal._tw.fullwidth - 1], erase=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> Any:
        """The seconds of each inner test beside its result."""
        if INSIDE.name not in report.nodeid.split("/") or report.when != "call":
            return None
        if not report.passed or hasattr(report, "wasxfail"):
            return None
        return "passed", ".", f"PASSED ({report.duration:.1f} s)"

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.facts:
            terminalreporter.section("nested VM")
            for fact in self.facts:
                terminalreporter.write_line(fact)

    # -- the end

    def _close(self) -> None:
        if self.vm is not None:
            self.vm.close()
            self.vm = None
        if self.folder is not None:
            self.folder.cleanup()
            self.folder = None

    def pytest_unconfigure(self) -> None:
        self._close()
