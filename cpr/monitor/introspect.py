"""query-qmp-schema: the commands of the one table as QEMU's list of SchemaInfo.

    command  name, arg-type, ret-type         event  name, arg-type
    object   members [, tag, variants]        enum   members, values
    array    element-type                     alternate  members: the types that it may have
    builtin  json-type

A type's name is a number, as QEMU's; equal types are one.  What a command returns is described no
further than its outermost type.
"""

from __future__ import annotations

import json

from cpr.migration import parameter as parameters
from cpr.migration.parameters import EXTENSIONS, PARAMETERS, Parameter
from cpr.monitor.migrate import STATUSES
from cpr.monitor.schema import (
    BOOLEAN,
    INTEGER,
    STRING,
    STRINGS,
    Enum,
    Flag,
    Integer,
    Kind,
    ListOf,
    Simple,
    Struct,
    Union,
    Unsigned,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from cpr.monitor.schema import Command

BUILTINS = {
    "str": "string",
    "any": "value",
    "bool": "boolean",
    "int": "int",
    "null": "null",
    "number": "number",
}
JSON_TYPES = {"string": "str", "boolean": "bool"}

EVENTS: dict[str, dict[str, Kind]] = {
    "BALLOON_CHANGE": {"actual": INTEGER},
    "BLOCK_IO_ERROR": {
        "device": STRING,
        "operation": Enum("read", "write"),
        "action": Enum("ignore", "report", "stop"),
        "reason": STRING,
        "nospace?": BOOLEAN,
    },
    "MIGRATION": {"status": STATUSES},
    "MIGRATION_PASS": {"pass": INTEGER},
    "POWERDOWN": {},
    "RESET": {"guest": BOOLEAN, "reason": STRING},
    "RESUME": {},
    "SHUTDOWN": {"guest": BOOLEAN, "reason": STRING},
    "STOP": {},
    "SUSPEND": {},
    "WAKEUP": {},
}
"""What the monitors' clients are told, and with which data; ? is a member that may be missing."""


def qmp_schema(commands: Iterable[Command]) -> list[dict[str, Any]]:
    """The whole list: commands, events, and the types that they have."""
    types = Types()
    entries = [_command(types, command) for command in commands if command.qmp]
    for name, data in EVENTS.items():
        members = [
            _member(types, key.rstrip("?"), kind, key[-1:] == "?") for key, kind in data.items()
        ]
        entries.append({"name": name, "meta-type": "event", "arg-type": types.object(members)})
    return entries + types.entries


class Types:
    """The types that were needed so far, each once."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}

    def name(self, kind: Kind) -> str:
        """The name of `kind`, which is added where it is new."""
        if isinstance(kind, Simple):
            return self.builtin(JSON_TYPES.get(kind.expected, "any"))
        if isinstance(kind, Flag):
            return self.builtin("bool")
        if isinstance(kind, Integer | Unsigned):
            return self.builtin("int")
        if isinstance(kind, Enum):
            members = [{"name": value} for value in kind.values]
            return self._add("enum", {"members": members, "values": list(kind.values)})
        if isinstance(kind, ListOf):
            return self.array(self.name(kind.element))
        if isinstance(kind, Union):
            variants = [
                {"case": case, "type": self.name(branch)} for case, branch in kind.branches.items()
            ]
            return self.object(self._members(kind), tag=kind.tag, variants=variants)
        if isinstance(kind, Struct):
            return self.object(self._members(kind))
        return self.builtin("any")

    def _members(self, kind: Struct) -> list[dict[str, Any]]:
        return [_member(self, name, each) for name, each in kind.own.items()]

    def object(self, members: list[dict[str, Any]], **more: Any) -> str:
        return self._add("object", {"members": members, **more})

    def array(self, element: str) -> str:
        return self._add("array", {"element-type": element}, f"[{element}]")

    def alternate(self, *names: str) -> str:
        return self._add("alternate", {"members": [{"type": self.builtin(name)} for name in names]})

    def builtin(self, name: str) -> str:
        return self._add("builtin", {"json-type": BUILTINS[name]}, name)

    def _add(self, meta: str, body: dict[str, Any], name: str | None = None) -> str:
        key = json.dumps([meta, body, name])
        if key not in self._names:
            self._names[key] = name or str(len(self._names))
            self.entries.append({"name": self._names[key], "meta-type": meta, **body})
        return self._names[key]


def _member(types: Types, name: str, kind: Kind, optional: bool = False) -> dict[str, Any]:
    member: dict[str, Any] = {"name": name, "type": types.name(kind)}
    return {**member, "default": None} if optional else member


def _command(types: Types, command: Command) -> dict[str, Any]:
    if command.whole:
        members = [
            {"name": each.name, "type": _parameter(types, each), "default": None}
            for each in (*PARAMETERS, *EXTENSIONS)
        ]
    else:
        members = [
            _member(types, each.name, each.kind, each.optional) for each in command.qmp_arguments()
        ]
    return {
        "name": command.qmp,
        "meta-type": "command",
        "arg-type": types.object(members),
        "ret-type": _returned(types, command.function),
    }


def _parameter(types: Types, parameter: Parameter) -> str:
    if parameter.kind == parameters.STRING:
        return types.alternate("str", "null")
    kind: Kind = INTEGER
    if parameter.kind == parameters.BOOL:
        kind = BOOLEAN
    elif parameter.kind == parameters.ENUM:
        kind = Enum(*parameter.values)
    elif parameter.kind == parameters.STRINGS:
        kind = STRINGS
    return types.name(kind)


def _returned(types: Types, function: Callable[..., Any]) -> str:
    annotation = str(function.__annotations__["return"])
    if annotation == "None":
        return types.object([])
    if annotation == "str":
        return types.builtin("str")
    if annotation.startswith("list"):
        return types.array(types.builtin("any"))
    return types.builtin("any")
