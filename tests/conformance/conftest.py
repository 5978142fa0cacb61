"""Options of the conformance suite; without --vmm or --qemu it is this checkout's VMM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .options import OPTIONS, OWN_VMM, targets
from .target import Target


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    for name, help_text in OPTIONS.items():
        group.addoption(name, help=help_text)


def _given(config: pytest.Config) -> list[str]:
    named = {"qemu": "--qemu", "cpr": "--vmm"}
    return [name for name, option in named.items() if config.getoption(option, default=None)]


def _vmms(config: pytest.Config) -> list[str]:
    return _given(config) or ["cpr"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", _vmms(metafunc.config), indirect=True, scope="package")


@pytest.fixture(scope="package")
def all_targets(pytestconfig: pytest.Config) -> Iterator[dict[str, Target]]:
    names = ("--vmm", "--qemu", "--root")
    given = [pytestconfig.getoption(name, default=None) for name in names]
    if not _given(pytestconfig):
        given[0] = OWN_VMM
    with targets(*given) as found:
        yield {target.name: target for target in found}


@pytest.fixture(scope="package")
def target(request: pytest.FixtureRequest, all_targets: dict[str, Target]) -> Target:
    return all_targets[request.param]
