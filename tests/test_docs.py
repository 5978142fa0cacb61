"""The documents: the guide's examples run as they are shown, the reference names what there is."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator

import doc_examples
import pytest
from conftest import MISSING, ROOT
from doc_tables import Document, words
from test_layers import LAYERS

from cpr import devices, runstate
from cpr.accel.kvm import state
from cpr.config import (
    blockdev_options,
    chardev_options,
    command_line,
    drive_options,
    machine_options,
    netdev_options,
    usage,
)
from cpr.config.device_table import DEVICES
from cpr.config.object_options import DEFAULT_ONLY, OBJECTS
from cpr.devices.base import Device
from cpr.errors import CommandError
from cpr.live import transaction
from cpr.migration import checks, parameters
from cpr.migration.capabilities import CAPABILITIES
from cpr.migration.globalstate import VMSTATE_GLOBALSTATE
from cpr.monitor.commands import COMMANDS
from cpr.monitor.qmp import NEGOTIATE
from cpr.state import stream
from cpr.state.cpr_state import STATE_NAME
from cpr.state.fields import Field, FixedField, StructField, VariableBuffer
from cpr.state.vmstate import VMStateDescription

DOCUMENTS = {path.name: path for path in sorted((ROOT / "docs").glob("*.md"))}
EXAMPLES = doc_examples.find(DOCUMENTS["guide.md"])
REFERENCE = Document(DOCUMENTS["reference.md"])
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "cpr").rglob("*.py")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(guests, name, tmp_path):
    blocks = EXAMPLES[name]
    needs_tcg = any("-accel tcg" in line for block in blocks for line in block.lines)
    if needs_tcg and (reason := MISSING["tcg"]()):
        pytest.skip(reason)
    doc_examples.run(blocks, tmp_path)


# Limits.

UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "ms": 10**6, "us": 10**3}


@pytest.mark.parametrize("row", REFERENCE.rows("Limits"), ids=lambda row: row[3])
def test_limits(row):
    module, _, name = row[3].strip("`").rpartition(".")
    value = getattr(importlib.import_module(module), name)
    number = re.search(r"(\d+) ?(bytes|KiB|MiB|GiB|ms|us)?", row[1])
    assert number is not None
    shown = int(number[1]) * UNITS.get(number[2], 1)
    if "2^63" in row[1]:
        shown = (1 << 63) - 1
    elif "years" in row[1]:
        value //= 365 * 86400 * 10**9
    assert shown == value, row


# The command line.


def test_options():
    options = {*command_line.OPTIONS, *command_line.HANDLERS, *command_line.FLAGS}
    assert sorted(REFERENCE.column("Options")) == sorted(f"-{option}" for option in options)


def test_machine_properties():
    acting = REFERENCE.column("Machine properties")
    checked = words(REFERENCE.paragraph("Machine properties", "These are checked"))
    fixed = words(REFERENCE.paragraph("Machine properties", "Of these only"))
    assert sorted(fixed) == sorted(machine_options.ONLY)
    assert sorted([*acting, *checked, *fixed]) == sorted(machine_options.PROPERTIES)
    accelerators = words(REFERENCE.paragraph("Machine properties", "The properties of accel"))[1:]
    properties = [name for kinds in machine_options.ACCELERATORS.values() for name in kinds]
    assert sorted(accelerators) == sorted(properties)


def test_memory_backends():
    types, properties = REFERENCE.tables("Memory backends")
    backends = [name for name in OBJECTS if name.startswith("memory-backend-")]
    assert sorted(row[0] for row in types) == sorted(backends)
    fixed = words(REFERENCE.paragraph("Memory backends", "Of these only"))
    assert sorted(fixed) == sorted(DEFAULT_ONLY)
    for name in backends:
        kind = name.removeprefix("memory-backend-")
        shown = [row[0] for row in properties if row[1] in ("all", kind)]
        assert sorted(shown) == sorted(set(OBJECTS[name]) - set(DEFAULT_ONLY))


def test_other_objects():
    shown = [(row[0], row[1]) for row in REFERENCE.rows("Other objects")]
    others = {name: keys for name, keys in OBJECTS.items() if not name.startswith("memory-")}
    assert shown == [(name, key) for name, keys in others.items() for key in keys]


def test_devices_and_their_properties():
    shown = [(row[0], row[1]) for row in REFERENCE.rows("Devices and their properties")]
    assert sorted(shown) == sorted(
        (name, key) for name, model in DEVICES.items() for key in model.properties
    )


def test_keys_of_drives_and_chardevs():
    assert sorted(REFERENCE.column("Keys of -drive")) == sorted(drive_options.KEYS)
    shown = [(row[0], row[1]) for row in REFERENCE.rows("Chardev backends")]
    backends = chardev_options.BACKENDS.items()
    assert sorted(shown) == sorted((name, key) for name, keys in backends for key in keys or [""])


def test_keys_of_blockdevs():
    shown = REFERENCE.column("Keys of -blockdev")
    assert sorted(shown) == sorted([*blockdev_options.FILE_KEYS, blockdev_options.CHILD])


def test_keys_of_netdevs():
    assert sorted(REFERENCE.column("Keys of -netdev")) == sorted(netdev_options.KEYS)


def test_inspect_options():
    source = (ROOT / "cpr" / "vmm" / "inspect" / "command.py").read_text()
    options = {*re.findall(r'add\(\s*"(--[\w-]+)"', source), "--help"}
    shown = " ".join(REFERENCE.column("inspect"))
    assert set(re.findall(r"--[\w-]+", shown)) == options


def test_help_names_every_option():
    options = {*command_line.OPTIONS, *command_line.HANDLERS, *command_line.FLAGS}
    for option in options:
        assert re.search(rf"-{option}\b", usage.USAGE), option


def test_environment():
    used = {STATE_NAME, *re.findall(r'environ(?:\.\w+)?[(\[]"([A-Z_]+)"', SOURCES)}
    assert used <= set(REFERENCE.column("Environment"))


# The monitors.


def test_hmp_commands():
    shown = REFERENCE.column("HMP commands")
    assert sorted(shown) == sorted(command.hmp for command in COMMANDS if command.hmp)


def test_qmp_commands():
    shown = {row[0]: words(row[1], ", ") for row in REFERENCE.rows("QMP commands")}
    del shown[NEGOTIATE]
    assert sorted(shown) == sorted(command.qmp for command in COMMANDS if command.qmp)
    for command in COMMANDS:
        if command.qmp and not command.whole:
            names = [f"{a.name}{'?' * a.optional}" for a in command.qmp_arguments()]
            assert [argument.split()[0] for argument in shown[command.qmp]] == names, command.qmp


def test_events_and_run_states():
    events = set(re.findall(r'emit\("([A-Z_]+)"', SOURCES))
    assert sorted(REFERENCE.column("Events")) == sorted(events)
    states = {*runstate.TRANSITIONS, runstate.RESTORE_VM}
    assert sorted(REFERENCE.column("Run states")) == sorted(states)


# Migration.


def test_parameters():
    rows = REFERENCE.rows("Migration parameters")
    table = [*parameters.PARAMETERS, *parameters.EXTENSIONS]
    assert [row[0] for row in rows] == [parameter.name for parameter in table]
    for row, parameter in zip(rows, table, strict=True):
        shown = "empty" if parameter.default == [] else parameter.show(parameter.default)
        unit = parameter.unit
        assert row[2] == shown.removeprefix(f"{parameter.name}: ").removesuffix(unit), row
        assert words(row[3], ", ") == list(parameter.values) or not parameter.values, row
        assert row[1].split(",")[0] in TYPES[parameter.kind], row


TYPES = {
    parameters.SIZE: ("size", "number", "ms", "MB/s"),
    parameters.MIB_SIZE: ("size in MiB",),
    parameters.UINT8: ("uint8",),
    parameters.UINT32: ("uint32",),
    parameters.BOOL: ("bool",),
    parameters.STRING: ("string",),
    parameters.ENUM: ("enum",),
    parameters.STRINGS: ("list of strings",),
}


def ranges() -> Iterator[tuple[str, int, bool]]:
    """(parameter, value, whether it is accepted) at the ends of every range that is shown."""
    for name, _, _, accepts, _ in REFERENCE.rows("Migration parameters"):
        powers = "powers of two" in accepts
        for is_upper, number in enumerate(re.findall(r"\d+", accepts)):
            end = int(number)
            step = (end if is_upper else end // 2) if powers else 1
            yield name, end, True
            if is_upper or end >= step:
                yield name, end + step if is_upper else end - step, False


@pytest.mark.parametrize(("name", "value", "accepted"), list(ranges()))
def test_range_of_a_parameter(name, value, accepted):
    values = parameters.Parameters()
    if accepted:
        values.set({name: value})
    else:
        with pytest.raises(CommandError):
            values.set({name: value})


def test_what_parameters_do():
    rows = {row[0]: row[4] for row in REFERENCE.rows("Migration parameters")}
    used = set(re.findall(r'parameters\.get\(\s*"([\w-]+)"', SOURCES))
    assert {name for name, here in rows.items() if re.match("acts|shown|checked", here)} == used


def test_capabilities():
    rows = dict(REFERENCE.rows("Migration capabilities"))
    assert list(rows) == list(CAPABILITIES)
    used = set(re.findall(r'capabilities\.enabled\("([\w-]+)"\)', SOURCES))
    assert {name for name, here in rows.items() if here.startswith("acts")} == used
    refused = {name for name, here in rows.items() if here.endswith("refused in CPR")}
    assert refused == {name for name, _ in checks.NOT_WITH_CPR}


# Formats.


def test_parts_of_the_stream():
    rows = dict(REFERENCE.rows("Migration stream"))
    for name in ("START", "PART", "END", "FULL", "COMMAND", "EOF", "VMDESCRIPTION"):
        assert rows[name].startswith(f"u8 {getattr(stream, name)}"), name
    assert rows["configuration"].startswith(f"u8 {stream.CONFIGURATION}")
    assert rows["footer"].startswith(f"u8 {stream.FOOTER:#x}")


def subclasses(base: type[Device]) -> Iterator[type[Device]]:
    for each in base.__subclasses__():
        yield each
        yield from subclasses(each)


def vmstates() -> dict[str, VMStateDescription]:
    """The description of every section but ram, by name."""
    for module in pkgutil.iter_modules(devices.__path__):
        importlib.import_module(f"cpr.devices.{module.name}")
    found = {"globalstate": VMSTATE_GLOBALSTATE}
    for each in subclasses(Device):
        if each.vmstate is not None and each.__module__.startswith("cpr."):
            found[each.idstr] = each.vmstate
    return found


def test_sections():
    shown = {title.removeprefix("Section ") for title in REFERENCE.titles("Section ")}
    assert shown == {"ram", *vmstates()}


@pytest.mark.parametrize("name", vmstates())
def test_fields_of_a_section(name):
    vmstate = vmstates()[name]
    title = f"Section {name}"
    assert [tuple(row) for row in REFERENCE.rows(title)] == list(layout(vmstate))
    assert f"\nVersion {vmstate.version_id}" in REFERENCE.text(title)


def layout(vmstate: VMStateDescription) -> Iterator[tuple[str, str]]:
    """The rows of a section's table: its fields and subsections, then the structs in it."""
    structs = [vmstate]
    for position, each in enumerate(structs):  # which grows meanwhile
        if position:
            yield f"struct {each.name}", ""
        for part in (each, *each.subsections):
            if part is not each:
                yield f"subsection {part.name}", ""
            for field in part.fields:
                yield field.name, field_type(field)
                if isinstance(field, StructField) and field.vmsd not in structs:
                    structs.append(field.vmsd)


def field_type(field: Field) -> str:
    if isinstance(field, StructField):
        count = field.count or field.count_name
        return f"struct {field.vmsd.name}" + (f"[{count}]" if count else "")
    if isinstance(field, VariableBuffer):
        return f"buffer[{field.size_name}]"
    assert isinstance(field, FixedField)
    if field.kind == "unused_buffer":
        return str(field.size)
    if field.kind == "buffer":
        return f"buffer {field.size}"
    return field.kind + (f"[{field.count}]" if field.count else "")


# The machine.


def test_memory_map_and_ports(start, accel):
    serials = ("-serial", "null") * 4
    device = ("-debugcon", "null", "-device", "isa-debug-exit")
    boot = ("-drive", "file=examples/build/heartbeat.img,format=raw,if=floppy")
    vm = start("-accel", accel, "-nodefaults", "-S", "-m", "4G", *serials, *device, *boot)
    found = re.findall(r"([0-9a-f]{16})-([0-9a-f]{16}) .*?: (\S+)", vm.qmp.hmp("info mtree"))
    spaces = ("system", "io")
    regions = {(int(a, 16), int(b, 16), name) for a, b, name in found if name not in spaces}
    rows = [*REFERENCE.rows("Memory map"), *REFERENCE.rows("Ports")]
    starts = {(int(row[0], 16), row[3]) for row in rows}
    ends = {(int(row[1], 16), row[3]) for row in rows if re.fullmatch("0x[0-9a-f]+", row[1])}
    seen = {(first, name) for first, _, name in regions}
    assert seen <= starts
    if accel == "tcg":
        assert seen == starts
    assert {end for end in ends if end[1] in {name for _, _, name in regions}} <= {
        (last, name) for _, last, name in regions
    }


# All documents.


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links(name):
    document = Document(DOCUMENTS[name])
    for target in document.links():
        path, _, anchor = target.partition("#")
        file = (DOCUMENTS[name].parent / path).resolve() if path else DOCUMENTS[name]
        assert file.exists(), target
        if anchor:
            assert anchor in Document(file).anchors(), target


def test_differences_are_complete():
    rows = Document(DOCUMENTS["differences.md"]).rows("Differences from QEMU")
    assert len({row[0] for row in rows}) == len(rows)
    for row in rows:
        assert len(row) == 4 and all(row), row


ARCHITECTURE = Document(DOCUMENTS["architecture.md"])


def test_layers_of_the_architecture():
    shown = [tuple(re.findall(r"cpr[\w.]+", row[0])) for row in ARCHITECTURE.rows("Layers")]
    assert shown == list(LAYERS)


def test_state_of_a_kvm_guest():
    steps = [(step.name, "vCPU") for step in state.VCPU_STEPS]
    steps += [(chip, "chip") for chip, _ in state.CHIP_STEPS]
    steps += [(step.name, "time") for step in state.TIME_STEPS]
    rows = ARCHITECTURE.rows("State of a KVM guest")
    assert [(row[0], row[1]) for row in rows] == steps


def test_states_of_an_update():
    shown = {
        row[0]: set(words(row[2], ", ")) - {""} for row in ARCHITECTURE.rows("States of an update")
    }
    assert shown == {name: set(after) for name, after in transaction.TRANSITIONS.items()}


def test_files_of_the_architecture():
    for row in ARCHITECTURE.rows("Reading order"):
        for name in re.findall(r"cpr/[\w./]+", row[0]):
            assert (ROOT / name).is_file(), name
