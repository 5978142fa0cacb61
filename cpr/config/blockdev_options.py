"""-blockdev: nodes that a disk is made of.  Here a node is a file, a host's disk, or raw over one.

A node that no other one is made of is a drive without a slot, with its node-name as id.
"""

from __future__ import annotations

from cpr.config.drive_options import NONE, DriveConfig
from cpr.config.option_values import BOOL, JSON, STRING, is_identifier, parse_property
from cpr.config.options import nest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

RAW = "raw"
FILES = ("file", "host_device")
MOST_NAME = 31  # characters of a node-name
CHILD = "file"

COMMON: dict[str, Kind] = {
    "auto-read-only": BOOL,
    "cache.direct": BOOL,
    "cache.no-flush": BOOL,
    "detect-zeroes": ("off",),
    "discard": ("ignore", "unmap"),
    "driver": STRING,
    "node-name": STRING,
    "read-only": BOOL,
}
FILE_KEYS: dict[str, Kind] = COMMON | {
    "aio": ("threads", "native", "io_uring"),
    "filename": STRING,
    "locking": ("auto", "on", "off"),
}


class Node:
    """One node: its options as `typed` gives them, and the node that a raw one is over."""

    __slots__ = ("child", "values")

    def __init__(self, values: dict[str, Any], child: Node | None) -> None:
        self.values = values
        self.child = child

    def says(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)


def parse_blockdevs(groups: list[OptionGroup]) -> tuple[DriveConfig, ...]:
    """The drives, in the order given.  Raises ConfigError."""
    nodes: dict[str, Node] = {}
    places: dict[str, OptionGroup] = {}
    used: set[str] = set()
    for group in groups:
        tree = group.values if group.dialect == JSON else nest(group.values)
        node = _node(group, tree, "", nodes, used)
        name = node.says("node-name", None)
        if name is None:
            raise group.error("'node-name' must be specified for the root node")
        places[name] = group
    return tuple(_drive(nodes[name], places[name].location) for name in places if name not in used)


def _node(
    group: OptionGroup, tree: dict[str, Any], path: str, nodes: dict[str, Node], used: set[str]
) -> Node:
    """The node of `tree`, at `path` of the option, in `nodes` by its name."""
    driver = tree.get("driver")
    if driver is None:
        raise group.error(f"Parameter '{path}driver' is missing")
    if driver != RAW and driver not in FILES:
        raise group.error(
            f"Parameter '{path}driver' does not accept value '{driver}'\n"
            f"There are {', '.join(FILES)}, and {RAW} over one; "
            "qemu-img convert -O raw makes a raw image of any other."
        )
    child = None
    if driver == RAW:
        tree, below = {k: v for k, v in tree.items() if k != CHILD}, tree.get(CHILD)
        child = _child(group, below, f"{path}{CHILD}", nodes, used)
    values = _typed(group, COMMON if driver == RAW else FILE_KEYS, tree, path)
    if driver != RAW and "filename" not in values:
        raise group.error(f"Parameter '{path}filename' is missing")
    node = Node(values, child)
    name = values.get("node-name")
    if name is not None:
        if not is_identifier(name) or len(name) > MOST_NAME:
            raise group.error(f"Invalid node-name: '{name}'")
        if name in nodes:
            raise group.error(f"Duplicate nodes with node-name='{name}'")
        nodes[name] = node
    return node


def _child(
    group: OptionGroup, below: Any, path: str, nodes: dict[str, Node], used: set[str]
) -> Node:
    """What a raw node is over: a node that is named, or described where it is used."""
    if below is None:
        raise group.error(f"Parameter '{path}' is missing")
    if isinstance(below, dict):
        child = _node(group, below, f"{path}.", nodes, used)
        child.values.setdefault("discard", "unmap")
        if (name := child.says("node-name", None)) is not None:
            used.add(name)
    elif isinstance(below, str) and below in nodes:
        child = nodes[below]
        if below in used:
            raise group.error(f"node '{below}' is used already: a node has one user here")
        used.add(below)
    else:
        raise group.error(f"Cannot find device='{below}' nor node-name='{below}'")
    return child


def _typed(
    group: OptionGroup, kinds: dict[str, Kind], tree: dict[str, Any], path: str
) -> dict[str, Any]:
    """The options of one node, those of cache as cache.direct and so on."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "cache" and isinstance(value, dict):
            flat |= {f"cache.{inner}": each for inner, each in value.items()}
        else:
            flat[key] = value
    for key in flat:
        if key not in kinds:
            raise group.error(f"Parameter '{path}{key}' is unexpected")
    return {
        key: parse_property(kinds[key], f"{path}{key}", value, group.dialect, group.location)
        for key, value in flat.items()
    }


def _drive(node: Node, location: str) -> DriveConfig:
    """A node and what it is over, as a drive."""
    chain = [node]
    while (below := chain[-1].child) is not None:
        chain.append(below)
    last = chain[-1]
    cache = "none" if last.says("cache.direct", False) else "writeback"
    if any(each.says("cache.no-flush", False) for each in chain):
        cache = "unsafe"
    return DriveConfig(
        *(last.values["filename"], RAW, NONE, 0),
        readonly=any(each.says("read-only", False) for each in chain),
        id=node.values["node-name"],
        location=location,
        cache=cache,
        discards=all(each.says("discard", "ignore") == "unmap" for each in chain),
        locking=last.says("locking", "auto") != "off",
    )
