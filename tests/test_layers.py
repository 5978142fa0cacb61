"""The import rule: down only, and the kernel's ABI in one place."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness.vm import ROOT

PACKAGE = ROOT / "cpr"
MODULES = sorted(PACKAGE.rglob("*.py"))

# From the top down; a module imports only from its own layer or a lower one.
LAYERS = (
    ("cpr.vmm",),
    ("cpr.monitor",),
    ("cpr.migration",),
    ("cpr.pc",),
    ("cpr.machine", "cpr.lifecycle", "cpr.boot", "cpr.linux_boot", "cpr.vcpus", "cpr.reserve"),
    ("cpr.devices", "cpr.bus"),
    ("cpr.chardev",),
    ("cpr.accel",),
    ("cpr.pages",),
    ("cpr.memory",),
    ("cpr.ram", "cpr.ram_backend"),
    ("cpr.config",),
    ("cpr.page_bitmap",),
    ("cpr.live",),
    ("cpr.state", "cpr.acpi"),
    ("cpr.uapi", "cpr.runstate", "cpr.events", "cpr.mainloop", "cpr.clock"),
    ("cpr.launcher", "cpr.mapped", "cpr.phases", "cpr.process_group", "cpr.free_memory"),
    ("cpr.faults",),
    ("cpr.errors", "cpr.report", "cpr.terminal", "cpr.constants", "cpr._native"),
)
ONLY = {
    "cpr._native._tcg": ("cpr.accel.tcg",),
    "cpr._native": (
        *("cpr.uapi", "cpr.live", "cpr.ram", "cpr.page", "cpr.accel", "cpr._native"),
        *("cpr.devices.virtio.native", "cpr.devices.virtio.disk", "cpr.devices.virtio.net"),
    ),
    "cpr.uapi.kvm": ("cpr.accel",),
    "cpr.uapi.seccomp": ("cpr.vmm",),
    "cpr.uapi.vfio": ("cpr.devices.vfio",),
    "cpr.uapi.vfio_info": ("cpr.uapi",),
    "cpr.uapi.vfio_sysfs": ("cpr.devices.vfio", "cpr.uapi"),
    "cpr.uapi.iommufd": ("cpr.devices.iommufd",),
    "cpr.accel.kvm": ("cpr.pc",),
    "cpr.accel.kvm.interrupts": ("cpr.accel",),
    "cpr.accel.tcg": ("cpr.pc",),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def layer(module: str) -> int:
    for number, names in enumerate(LAYERS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return number
    raise AssertionError(f"{module} is in no layer")


def run_time_imports(path: Path) -> set[str]:
    """The cpr modules that a file imports, but not those for type checking only."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    names = {module_name(each) for each in MODULES} | {"cpr._native._cpr", "cpr._native._tcg"}
    return found & names - {"cpr"}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    name = module_name(path)
    if name == "cpr":
        return
    for imported in run_time_imports(path):
        assert layer(name) <= layer(imported), f"{name} imports {imported}"
        for target, allowed in ONLY.items():
            if imported == target or imported.startswith(target + "."):
                assert name.startswith((*allowed, target)), f"{name} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_kernel_abi_is_in_one_place(path: Path) -> None:
    text = path.read_text()
    assert "fcntl.ioctl" not in text
    assert not re.search(r"0x[4-9c][0-9a-f]{3}ae[0-9a-f]{2}\b", text, re.I), "an ioctl number"
    if not module_name(path).startswith("cpr.state"):
        assert "struct.pack" not in text
        assert "struct.unpack" not in text
    if module_name(path) not in ("cpr.ram_backend", "cpr.live.memfd"):
        assert "MFD_HUGETLB" not in text


OWN_OUTPUT = ("cpr.vmm.inspect",)  # a program of its own, without a guest


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_is_said_but_by_report(path: Path) -> None:
    if module_name(path).startswith(OWN_OUTPUT):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        assert ast.unparse(node) not in ("print", "sys.stdout", "sys.stderr", "sys.excepthook")


RESTORE_PATH = ["cpr.pc", "cpr.config", "cpr.migration.migration", "cpr.state.fds", "cpr.accel.kvm"]
TOO_SLOW = {
    "argparse",
    "asyncio",
    "dataclasses",
    "enum",
    "inspect",
    "json",
    "logging",
    "pathlib",
    "psutil",
    "re",
    "selectors",
    "socket",
    "subprocess",
    "threading",
    "typing",
}


def test_restore_path_imports_nothing_slow() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    site = [path for path in sys.path if path.endswith("site-packages")]
    code += f"sys.path += {site!r}\nimport {', '.join(RESTORE_PATH)}\nprint(*sys.modules)"
    run = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & TOO_SLOW
    unused = (
        "cpr.monitor",
        "cpr.chardev.",
        "cpr.devices.pci.",
        "cpr.devices.vfio",
        "cpr.devices.iommufd",
        "cpr.uapi.vfio",
        "cpr.uapi.iommufd",
        "cpr._native._tcg",
    )
    assert not {name for name in loaded if name.startswith(unused) or name == "cpr.devices.pci"}


def test_a_guest_with_a_passed_through_device_imports_nothing_slow_either() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    site = [path for path in sys.path if path.endswith("site-packages")]
    names = ["cpr.devices.vfio_options", "cpr.accel.kvm.interrupts"]
    code += f"sys.path += {site!r}\nimport {', '.join(RESTORE_PATH + names)}\nprint(*sys.modules)"
    run = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & TOO_SLOW


@pytest.mark.parametrize("names", ["update", "socket, aio, testing, notify"])
def test_the_library_imports_nothing_of_the_vmm(names: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"from cpr.live import {names}\nprint(*sys.modules)"
    run = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    known = (
        "cpr.live",
        "cpr.constants",
        "cpr.errors",
        "cpr.phases",
        "cpr.faults",
        "cpr.mapped",
        "cpr.process_group",
    )
    assert not {name for name in loaded if name.startswith("cpr.") and not name.startswith(known)}


def test_importing_the_library_costs_nothing() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from cpr import live\nprint(*sys.modules)"
    run = [sys.executable, "-I", "-S", "-c", code]
    loaded = set(subprocess.run(run, check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & TOO_SLOW
    assert not {name for name in loaded if name.startswith("cpr.")} - {"cpr.live"}
