"""A package whose files go away while a VMM of it runs: an upgrade in place, at its worst."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from failing import Failing, bad, words
from test_layers import MODULES, module_name
from waiting import wait_for

from cpr.config.device_table import DEVICES

AT_START = (
    "cpr.accel.",  # one of them, and its parts
    "cpr.chardev.",
    "cpr.devices.",
    "cpr.uapi.process",
    "cpr.uapi.seccomp",
    "cpr.migration.arrival",
    "cpr.vmm.process",
    "cpr.config.blockdev_options",
    "cpr.vmm.inspect.command",  # another verb
    "cpr.vmm.exec_verb",
    "cpr.live.aio",  # for other programs than the VMM
    "cpr.live.image",
    "cpr.live.preserved",
)
"""What is imported in a function because the command line asks for it, when the VMM starts."""


ASKED_FOR = {"datetime"}
"""Of Python's library what the command line asks for: `-rtc base=`."""


def imports_in_functions(path: Path) -> set[str]:
    found: set[str] = set()
    for function in ast.walk(ast.parse(path.read_text())):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Import):
                    found.update(alias.name for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module:
                    found.add(node.module)
                    found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def loaded_at_start() -> set[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import cpr.vmm.process\nfrom cpr.vmm.preload import preload\n"
    code += "preload()\nprint(*sys.modules)"
    run = [sys.executable, "-c", code]
    return set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())


def test_a_guest_has_nothing_imported_of_pythons_library() -> None:
    """Which may be another version's, or not there any more: its vCPU would stop for good."""
    paths = [path for path in MODULES if path.relative_to(ROOT).parts[1] in ("accel", "devices")]
    wanted = set().union(*map(imports_in_functions, [*paths, ROOT / "cpr/lifecycle.py"]))
    standard = {name for name in wanted if name.partition(".")[0] in sys.stdlib_module_names}
    assert standard - loaded_at_start() <= ASKED_FOR


def test_all_that_is_imported_late_is_on_the_list() -> None:
    loaded = loaded_at_start()
    wanted = set().union(*map(imports_in_functions, MODULES))
    wanted &= {module_name(path) for path in MODULES}
    assert {name for name in wanted - loaded if not name.startswith(AT_START)} == set()
    assert {model.module for model in DEVICES.values()} - loaded  # these are asked for


def install(folder: Path) -> Path:
    shutil.copytree(ROOT / "cpr", folder / "cpr")
    return folder / "cpr"


def program(package: Path) -> list[str]:
    return [sys.executable, "-I", "-S", str(package / "vmm" / "__main__.py"), "run"]


def test_a_vmm_whose_files_are_gone_is_updated_all_the_same(start, accel, tmp_path) -> None:
    """By what has started afresh, by an early update, and by a late one."""
    options = [word.replace("examples/", f"{ROOT}/examples/") for word in words(accel)]
    package = install(tmp_path / "first")
    vm = start(*options, command=program(package))
    options = vm.words[len(program(package)) :]
    for number, overlap in enumerate(("auto", "off", "auto")):
        shutil.rmtree(package)
        failing = Failing(vm)
        vm.qmp.command("migrate-set-parameters", **{"x-cpr-exec-overlap": overlap})
        package = install(tmp_path / f"next{number}")
        command = [*program(package), *options]
        assert vm.qmp.command("cpr-exec", test=True, command=command)["refusals"] == []
        failing.update(bad("refuse"), overlap == "off", tmp_path / "state")
        failing.check("it does not feel like it", same_pid=False)
        vm.qmp.command("cpr-exec", command=command)
        vm.reconnect()
        told = vm.qmp.command("query-migrate")["x-cpr-update"]
        assert told == ("late" if overlap == "off" else "early")
        failing.check_counter()
        wait_for(lambda: not vm.children(), "the old image has ended")
