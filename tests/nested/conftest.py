"""Options of the nested VM, and the plugin that reports its tests as this run's own."""

from __future__ import annotations

import os

import pytest

from .mirror import Mirror


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nested")
    group.addoption(
        "--nested",
        choices=("type1", "iommufd"),
        help="run all tests inside the VM with this kernel; without it a few, with type1's",
    )
    group.addoption(
        "--qemu-root", help="folder with a QEMU that has cpr-exec: the VM's, and compared"
    )


def pytest_configure(config: pytest.Config) -> None:
    if "CPR_NESTED" not in os.environ:  # outside
        config.pluginmanager.register(Mirror(config), "nested_mirror")
