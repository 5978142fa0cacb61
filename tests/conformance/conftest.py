"""Options of the conformance suite; without --vmm or --qemu there is nothing to collect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .options import OPTIONS, targets
from .target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    for name, help_text in OPTIONS.items():
        group.addoption(name, help=help_text)


def _given(config: pytest.Config) -> list[str]:
    named = {"qemu": "--qemu", "cpr": "--vmm"}
    return [name for name, option in named.items() if config.getoption(option, default=None)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if _given(config) else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _given(metafunc.config), indirect=True, scope="session")


@pytest.fixture(scope="session")
def all_targets(pytestconfig: pytest.Config) -> Iterator[dict[str, Target]]:
    given = [pytestconfig.getoption(name) for name in ("--vmm", "--qemu", "--root")]
    with targets(*given) as found:
        yield {target.name: target for target in found}


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest, all_targets: dict[str, Target]) -> Target:
    return all_targets[request.param]
