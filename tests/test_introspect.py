"""query-qmp-schema: QEMU's format, and the table of commands."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from harness.vm import ROOT

from cpr.migration.parameters import PARAMETERS
from cpr.monitor.commands import COMMANDS
from cpr.monitor.introspect import EVENTS, qmp_schema

KEYS = {  # qapi/introspect.json of QEMU 11.1.3
    "command": {"arg-type", "ret-type"},
    "event": {"arg-type"},
    "object": {"members"},
    "enum": {"members", "values"},
    "array": {"element-type"},
    "alternate": {"members"},
    "builtin": {"json-type"},
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    entries = qmp_schema(COMMANDS)
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry for entry in entries}


def test_every_entry_has_the_keys_of_its_kind_and_names_types_that_there_are(schema):
    for entry in schema.values():
        more = {"tag", "variants"} if "tag" in entry else set()
        assert set(entry) == {"name", "meta-type"} | KEYS[entry["meta-type"]] | more
        named = [entry[key] for key in ("arg-type", "ret-type", "element-type") if key in entry]
        if entry["meta-type"] != "enum":
            named += [each["type"] for each in entry.get("members", ())]
        named += [each["type"] for each in entry.get("variants", ())]
        assert all(schema[name]["meta-type"] not in ("command", "event") for name in named)


def test_every_command_is_there_with_its_arguments(schema):
    for command in COMMANDS:
        if not command.qmp or command.whole:
            continue
        members = schema[schema[command.qmp]["arg-type"]]["members"]
        assert {each["name"]: "default" in each for each in members} == {
            each.name: each.optional for each in command.qmp_arguments()
        }
    parameters = schema[schema["migrate-set-parameters"]["arg-type"]]["members"]
    assert {each.name for each in PARAMETERS} <= {each["name"] for each in parameters}


def test_a_union_and_a_list_as_qemu_has_them(schema):
    members = {each["name"]: each for each in schema[schema["migrate"]["arg-type"]]["members"]}
    assert members["uri"] == {"name": "uri", "type": "str", "default": None}
    channel = schema[schema[members["channels"]["type"]]["element-type"]]
    address = schema[{each["name"]: each["type"] for each in channel["members"]}["addr"]]
    assert address["tag"] == "transport"
    cases = {each["case"]: schema[each["type"]] for each in address["variants"]}
    assert cases["exec"]["members"] == [{"name": "args", "type": "[str]"}]
    assert cases["socket"]["tag"] == "type"


def emitted() -> set[str]:
    """The events in the source: `….emit("NAME"…`."""
    found = set()
    for path in (ROOT / "cpr").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "emit":
                found.add(ast.literal_eval(node.args[0]))
    return found


def test_every_event_is_there(schema):
    assert emitted() == set(EVENTS)
    assert all(schema[name]["meta-type"] == "event" for name in EVENTS)
