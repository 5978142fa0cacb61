"""Inside the VM: pytest's reports as JSON lines on a serial port, for mirror.py outside."""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import pytest

ALIVE_SECONDS = 5.0


class Reporter:
    """Plugin that writes one JSON object a line: {"event": NAME, …}."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self.config = config
        self._fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._over = threading.Event()
        threading.Thread(target=self._say_alive, daemon=True).start()

    def send(self, event: str, **values: Any) -> None:
        line = (json.dumps({"event": event, **values}) + "\n").encode()
        with self._lock:
            while line:
                line = line[os.write(self._fd, line) :]

    def _say_alive(self) -> None:
        while not self._over.wait(ALIVE_SECONDS):
            self.send("alive")

    def pytest_sessionstart(self) -> None:
        self.send("session")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.send("failed", text=f"collection inside failed: {report.longreprtext}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self.config.hook
        data = hook.pytest_report_to_serializable(config=self.config, report=report)
        self.send("report", report=data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.send("finished", nodeid=nodeid)

    def pytest_unconfigure(self) -> None:
        self._over.set()


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ["CPR_NESTED_RESULTS"]
    config.pluginmanager.register(Reporter(config, path), "nested_reporter")
