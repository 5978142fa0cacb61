"""-object: the objects that can be made, and the types of their properties."""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, OPTS, SIZE, STRING, parse_property
from cpr.config.record import Record
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

POLICIES = ("default", "preferred", "bind", "interleave")

MEMORY_BACKEND: dict[str, Kind] = {
    "size": SIZE,
    "share": BOOL,
    "prealloc": BOOL,
    "prealloc-threads": INT,
    "prealloc-context": STRING,
    "merge": BOOL,
    "dump": BOOL,
    "reserve": BOOL,
    "policy": POLICIES,
    "host-nodes": STRING,
    "x-use-canonical-path-for-ramblock-id": BOOL,
}

OBJECTS: dict[str, dict[str, Kind]] = {
    "iommufd": {"fd": STRING},
    "memory-backend-file": {
        **MEMORY_BACKEND,
        "mem-path": STRING,
        "align": SIZE,
        "offset": SIZE,
        "discard-data": BOOL,
        "pmem": BOOL,
        "readonly": BOOL,
        "rom": ("on", "off", "auto"),
    },
    "memory-backend-memfd": {
        **MEMORY_BACKEND,
        "hugetlb": BOOL,
        "hugetlbsize": SIZE,
        "seal": BOOL,
    },
    "memory-backend-ram": MEMORY_BACKEND,
    "memory-backend-shm": MEMORY_BACKEND,
}

REQUIRED = ("size", "mem-path")

# QEMU has these properties, and there they do something; here only QEMU's default is possible.
DEFAULT_ONLY = {
    "prealloc-context": None,
    "policy": "default",
    "host-nodes": None,
    "x-use-canonical-path-for-ramblock-id": False,
    "offset": 0,
    "discard-data": False,
    "pmem": False,
    "readonly": False,
    "rom": "auto",
}


class ObjectConfig(Record):
    """One -object.  `properties` holds what was given: sizes (bytes) and integers as int, on|off
    as bool, the rest as str.  Of a memory backend `size` is always there, and `mem-path` of
    memory-backend-file.
    """

    __slots__ = ("qom_type", "id", "properties")  # noqa: RUF023 - the order of the constructor
    qom_type: str
    id: str
    properties: dict[str, Any]

    def __init__(self, qom_type: str, id: str, properties: dict[str, Any]) -> None:
        self._fill(qom_type, id, properties)


def parse_object(group: OptionGroup) -> ObjectConfig:
    """Raises ConfigError."""
    values = dict(group.values)
    qom_type = values.pop("qom-type", None)
    if qom_type is None:
        raise group.error("Parameter 'qom-type' is missing")
    kinds = OBJECTS.get(str(qom_type))
    if kinds is None:
        raise group.error(f"Parameter 'qom-type' does not accept value '{qom_type}'")
    if "id" not in values:
        raise group.error("Parameter 'id' is missing")
    group.check_id()
    identifier = values.pop("id")
    properties = {
        name: parse_property(kind, name, values[name], group.dialect, group.location)
        for name, kind in kinds.items()
        if name in values
    }
    for name in REQUIRED:
        if name in kinds and name not in values:
            raise group.error(f"Parameter '{name}' is missing")
    for name in values:
        if name not in kinds:
            if group.dialect == OPTS:
                raise group.error(f"Invalid parameter '{name}'")
            raise group.error(f"Parameter '{name}' is unexpected")
    _check_values(group, qom_type, properties)
    return ObjectConfig(qom_type, identifier, properties)


def _check_values(group: OptionGroup, qom_type: str, properties: dict[str, Any]) -> None:
    for name in ("size", "prealloc-threads"):
        if properties.get(name) == 0:
            raise ConfigError(f"property '{name}' of {qom_type} doesn't take value '0'")
    if properties.get("hugetlbsize") == 0:
        raise ConfigError(f"Property '{qom_type}.hugetlbsize' doesn't take value '0'")
    for name, default in DEFAULT_ONLY.items():
        if name in properties and properties[name] != default:
            raise group.error(f"property '{name}' of {qom_type} is not supported; leave it out")
