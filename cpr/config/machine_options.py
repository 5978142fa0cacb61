"""-machine, -m, -smp, -boot, -accel: the board, its memory, its CPUs.

All of them are properties of QEMU's machine, so that `-m 1G` and `-machine memory.size=1G` are the
same; where both are given, the short option wins.
"""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, KEYVAL, SIZE, STRING, error, parse_property
from cpr.constants import MAX_CPUS
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.object_options import ObjectConfig
    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

MACHINE_TYPE = "pc"
MACHINE_NAMES = ("pc", "mini", "pc-i440fx-11.1")
QEMU_MACHINE = "pc-i440fx-11.1"  # what QEMU 11.1 calls its `pc` in messages

DEFAULT_RAM_SIZE = 128 << 20
RAM_ALIGNMENT = 8192
MAX_MEMORY_SLOTS = 256
DEFAULT_BOOT_ORDER = "cad"
BOOT_DEVICES = "abcdefghijklmnop"

ON_OFF_AUTO = ("on", "off", "auto")

PROPERTIES: dict[str, Kind] = {
    "acpi": ON_OFF_AUTO,
    "append": STRING,
    "aux-ram-share": BOOL,
    "bus-lock-ratelimit": INT,
    "default-bus-bypass-iommu": BOOL,
    "dump-guest-core": BOOL,
    "fd-bootchk": BOOL,
    "graphics": BOOL,
    "hmat": BOOL,
    "hpet": BOOL,
    "i8042": BOOL,
    "initrd": STRING,
    "kernel": STRING,
    "kernel-irqchip": STRING,
    "max-ram-below-4g": SIZE,
    "mem-merge": BOOL,
    "memory-backend": STRING,
    "nvdimm": BOOL,
    "phandle-start": INT,
    "pic": ON_OFF_AUTO,
    "pit": ON_OFF_AUTO,
    "sata": BOOL,
    "smbios-entry-point-type": ("32", "64", "auto"),
    "smbus": BOOL,
    "smm": ON_OFF_AUTO,
    "suppress-vmdesc": BOOL,
    "usb": BOOL,
    "vmport": ON_OFF_AUTO,
    "x-change-vmfd-on-reset": BOOL,
    "x-oem-id": STRING,
    "x-oem-table-id": STRING,
}

DEFAULT_ACCELS = ("kvm", "tcg")

# Their properties, none of which has an effect here beyond being checked.
ACCELERATORS: dict[str, dict[str, Kind]] = {
    "kvm": {"kernel-irqchip": ("on",)},
    "tcg": {
        "one-insn-per-tb": BOOL,
        "split-wx": BOOL,
        "tb-size": INT,
        "thread": ("single", "multi"),
    },
}

# What QEMU's pc can do and this one cannot.
ONLY: dict[str, object] = {
    "hmat": False,
    "kernel-irqchip": "on",
    "max-ram-below-4g": None,
    "nvdimm": False,
    "suppress-vmdesc": False,
    "usb": False,
    "x-change-vmfd-on-reset": False,
}
UNSUPPORTED = (
    "confidential-guest-support",
    "dt-compatible",
    "dtb",
    "dumpdtb",
    "firmware",
    "max-fw-size",
    "memory-encryption",
    "pcspk-audiodev",
    "pflash0",
    "pflash1",
    "sgx-epc",
    "shim",
    "smp-cache",
    "x-south-bridge",
)

MEMORY_KEYS: dict[str, Kind] = {"size": SIZE, "slots": INT, "maxmem": SIZE}
MEMORY_PROPERTIES: dict[str, Kind] = {"size": SIZE, "slots": INT, "max-size": SIZE}
BOOT_PROPERTIES: dict[str, Kind] = {
    "order": STRING,
    "once": STRING,
    "menu": BOOL,
    "splash": STRING,
    "splash-time": INT,
    "reboot-timeout": INT,
    "strict": BOOL,
}
# From the outermost level of the topology to the innermost; a PC has four of them and `threads`.
LEVELS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
PC_LEVELS = ("sockets", "dies", "modules", "cores", "threads")
SMP_PROPERTIES: dict[str, Kind] = dict.fromkeys(("cpus", "maxcpus", *LEVELS), INT)
SUBTREES = ("memory", "smp", "boot")


def parse_machine(values: dict[str, str]) -> dict[str, Any]:
    """The machine's own properties, those of SUBTREES, `type` and `accel` left out.

    Raises ConfigError.
    """
    machine_type = values.get("type", MACHINE_TYPE)
    if machine_type not in MACHINE_NAMES:
        raise ConfigError(
            f'unsupported machine type: "{machine_type}"\n'
            "Use -machine help to list supported machines"
        )
    properties = {}
    for name, value in values.items():
        head, dot, _ = name.partition(".")
        if name in ("type", "accel") or (dot and head in SUBTREES):
            continue
        if head in SUBTREES:
            raise ConfigError(f"Parameter '{head}' used inconsistently")
        if head in UNSUPPORTED:
            raise ConfigError(f"machine property '{head}' is not supported; leave it out")
        if name not in PROPERTIES:
            raise ConfigError(f"Property '{QEMU_MACHINE}-machine.{head}' not found")
        properties[name] = parse_property(PROPERTIES[name], name, value, KEYVAL, "")
        if properties[name] != ONLY.get(name, properties[name]):
            raise ConfigError(f"machine property '{name}={value}' is not supported; leave it out")
    return properties


def subtree(machine: dict[str, str], name: str, values: dict[str, str]) -> dict[str, str]:
    """The keys below `name` in the machine's values, overridden by those of the short option."""
    prefix = f"{name}."
    below = {key[len(prefix) :]: machine[key] for key in machine if key.startswith(prefix)}
    return below | values


def _parse_subtree(name: str, kinds: dict[str, Kind], values: dict[str, str]) -> dict[str, Any]:
    properties = {}
    for key, value in values.items():
        head = key.partition(".")[0]
        if key not in kinds:
            raise ConfigError(f"Parameter '{name}.{head}' is unexpected")
        properties[key] = parse_property(kinds[key], f"{name}.{key}", value, KEYVAL, "")
    return properties


def with_megabytes(memory: dict[str, str]) -> dict[str, str]:
    """The values of -m as properties of the machine: a size that ends in a digit is in MiB."""
    values = {"max-size" if key == "maxmem" else key: value for key, value in memory.items()}
    size = values.get("size", "")
    if size[-1:].isdigit():
        values["size"] = size + "M"
    return values


def parse_memory(values: dict[str, str]) -> int:
    """The size of RAM in bytes; 0 where none is given.  Raises ConfigError."""
    properties = _parse_subtree("memory", MEMORY_PROPERTIES, values)
    size = int(properties.get("size", 0))
    maximum, slots = properties.get("max-size", 0), properties.get("slots", 0)
    if slots and not maximum:
        raise ConfigError("slots specified but no max-size")
    if maximum and maximum < (size or DEFAULT_RAM_SIZE):
        raise ConfigError(
            f"invalid value of maxmem: maximum memory size ({maximum:#x}) must be at least the "
            f"initial memory size ({size or DEFAULT_RAM_SIZE:#x})"
        )
    if not 0 <= slots <= MAX_MEMORY_SLOTS:
        raise ConfigError(f"unsupported amount of memory slots: {slots}")
    return -(-size // RAM_ALIGNMENT) * RAM_ALIGNMENT


def check_backend(properties: dict[str, Any], size: int, objects: dict[str, ObjectConfig]) -> int:
    """The size of RAM, where a memory backend decides on it too.  Raises ConfigError."""
    name = properties.get("memory-backend")
    if name is None:
        return size or DEFAULT_RAM_SIZE
    if name not in objects:
        raise ConfigError(f"Memory backend '{name}' not found")
    backend_size = int(objects[name].properties["size"])
    if size not in (0, backend_size):
        raise ConfigError("Machine memory size does not match the size of the memory backend")
    return backend_size


def parse_smp(values: dict[str, str]) -> int:
    """The number of vCPUs; the topology is checked and then left aside.  Raises ConfigError."""
    given = _parse_subtree("smp", SMP_PROPERTIES, values)
    if 0 in given.values():
        raise ConfigError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    for level in LEVELS:
        if level not in PC_LEVELS and given.get(level, 1) > 1:
            raise ConfigError(f"{level} > 1 not supported by this machine's CPU topology")
    counts = {level: given.get(level, 1) for level in PC_LEVELS}
    maximum = given.get("maxcpus", given.get("cpus", 0))
    if maximum:
        _fill_topology(counts, given, maximum)
    total = _product(counts)
    maximum = maximum or total
    cpus = int(given.get("cpus", maximum))
    topology = " * ".join(f"{level} ({count})" for level, count in counts.items())
    if not 0 < maximum <= MAX_CPUS:
        raise ConfigError(
            f"Invalid SMP CPUs {maximum}. The max CPUs supported by machine '{QEMU_MACHINE}' "
            f"is {MAX_CPUS}"
        )
    if total != maximum:
        raise ConfigError(
            "Invalid CPU topology: product of the hierarchy must match maxcpus: "
            f"{topology} != maxcpus ({maximum})"
        )
    if maximum < cpus:
        raise ConfigError(
            "Invalid CPU topology: maxcpus must be equal to or greater than smp: "
            f"{topology} == maxcpus ({maximum}) < smp_cpus ({cpus})"
        )
    return cpus


def _fill_topology(counts: dict[str, int], given: dict[str, int], maximum: int) -> None:
    """Gives all CPUs to the first level that was left out: cores, else sockets, else threads."""
    for level in ("cores", "sockets", "threads"):
        if level not in given:
            counts[level] = 1
            counts[level] = maximum // _product(counts)
            return


def _product(counts: dict[str, int]) -> int:
    product = 1
    for count in counts.values():
        product *= count
    return product


def parse_boot(values: dict[str, str]) -> str:
    """The order of boot devices: QEMU's letters, a and b floppies, c the first disk.

    `once` goes before `order`.  Raises ConfigError.
    """
    properties = _parse_subtree("boot", BOOT_PROPERTIES, values)
    for name in ("order", "once"):
        order = properties.get(name, "")
        for position, letter in enumerate(order):
            if letter not in BOOT_DEVICES:
                raise ConfigError(f"Invalid boot device '{letter}'")
            if letter in order[:position]:
                raise ConfigError(f"Boot device '{letter}' was given twice")
    return str(properties.get("once") or properties.get("order") or DEFAULT_BOOT_ORDER)


def parse_accels(
    machine_accel: str | None, groups: list[OptionGroup], warnings: list[str]
) -> tuple[str, ...]:
    """The names of the accelerators to try, in order; none where neither option is given.

    Both separate several names by colons.

    An unknown name is passed over with a warning where a known one is left, as QEMU falls back.
    Raises ConfigError.
    """
    if machine_accel is not None and groups:
        raise ConfigError('The -accel and "-machine accel=" options are incompatible')
    if machine_accel == "":
        raise ConfigError("no accelerator found")
    named = [(name, "") for name in (machine_accel or "").split(":") if machine_accel]
    for group in groups:
        named += [(name, group.location) for name in group.values.get("accel", "").split(":")]
    names: list[str] = []
    problems = []
    for name, location in named:
        if name in ACCELERATORS:
            names.append(name)
        else:
            problems.append(error(location, f"invalid accelerator {name}"))
    if problems and not names:
        raise problems[0]
    warnings += [str(problem) for problem in problems]
    for group in groups:
        _check_properties(group)
    return tuple(names)


def _check_properties(group: OptionGroup) -> None:
    name = group.values.get("accel", "").partition(":")[0]
    kinds = ACCELERATORS.get(name)
    if kinds is None:
        return
    for key, value in group.values.items():
        if key in ("accel", "id"):
            continue
        if key not in kinds:
            raise group.error(f"Property '{name}-accel.{key}' not found")
        if key == "thread" and value not in kinds[key]:
            raise group.error(f"Invalid 'thread' setting {value}")
        parse_property(kinds[key], key, value, KEYVAL, group.location)
