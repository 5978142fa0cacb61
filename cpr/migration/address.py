"""Migration addresses: what a URI or a `channels` argument says, checked, as a dict.

    file:PATH[,offset=N]    exec:COMMAND    fd:NAME    unix:PATH    tcp:HOST:PORT

The dict is QEMU's MigrationAddress: {"transport": "file", "filename", "offset"}, {"transport":
"exec", "args"}, {"transport": "socket", "type": "unix", "path"}, {"transport": "socket", "type":
"inet", "host", "port"}, {"transport": "socket", "type": "fd", "str"}.
"""

from __future__ import annotations

from cpr.constants import SIZE_SUFFIXES
from cpr.errors import MigrationError

BACKGROUND = frozenset({"unix", "inet"})


def parse(uri: str | None, channels: list[dict] | None) -> dict:
    """The main channel's address.  Raises MigrationError with QEMU's text."""
    if bool(uri is not None) == bool(channels):
        raise MigrationError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    assert channels is not None
    main = [c for c in channels if c.get("channel-type") == "main"]
    if len(main) > 1:
        raise MigrationError("Channel list has more than one main entry")
    if not main:
        raise MigrationError("Channel list has no main entry: add one of channel-type 'main'")
    return check(main[0]["addr"])


def cpr_address(channels: list[dict] | None) -> dict | None:
    """The address of the cpr channel, or None where there is none."""
    for each in channels or ():
        if each.get("channel-type") == "cpr":
            return check(each["addr"])
    return None


REQUIRED_KEYS = {
    "file": ("filename",),
    "exec": ("args",),
    "unix": ("path",),
    "inet": ("host", "port"),
    "fd": ("str",),
}


def check(address: dict) -> dict:
    """The address of a `channels` argument or of -incoming, with all the keys that it must have.

    Raises MigrationError with QEMU's text.
    """
    transport = address.get("transport")
    if transport is None:
        raise MigrationError("Parameter 'transport' is missing")
    kind = address.get("type") if transport == "socket" else transport
    if kind is None:
        raise MigrationError("Parameter 'type' is missing")
    if kind not in REQUIRED_KEYS or (transport == "socket" and kind in ("file", "exec")):
        name = "type" if transport == "socket" else "transport"
        raise MigrationError(f"Parameter '{name}' does not accept value '{kind}'")
    for key in REQUIRED_KEYS[kind]:
        if key not in address:
            raise MigrationError(f"Parameter '{key}' is missing")
    if kind == "file":
        return address | {"offset": int(address.get("offset", 0))}
    return address


def parse_uri(uri: str) -> dict:
    """The address that `uri` stands for.  Raises MigrationError with QEMU's text."""
    scheme, colon, rest = uri.partition(":")
    if scheme == "file" and colon:
        return _parse_file(rest)
    if scheme == "exec" and rest:
        return {"transport": "exec", "args": ["/bin/sh", "-c", rest]}
    if scheme == "fd" and rest:
        return {"transport": "socket", "type": "fd", "str": rest}
    if scheme == "unix" and colon:
        if not rest:
            raise MigrationError("invalid Unix socket address")
        return {"transport": "socket", "type": "unix", "path": rest}
    if scheme == "tcp" and colon:
        host, separator, port = rest.rpartition(":")
        if not separator:
            raise MigrationError(f"error parsing address '{rest}'")
        return {"transport": "socket", "type": "inet", "host": host.strip("[]"), "port": port}
    raise MigrationError(f"unknown migration protocol: {uri}")


def _parse_file(rest: str) -> dict:
    path, found, offset = rest.partition(",offset=")
    return {
        "transport": "file",
        "filename": path,
        "offset": _parse_offset(offset) if found else 0,
    }


def _parse_offset(text: str) -> int:
    digits, suffix = text, ""
    if text[:2].lower() != "0x" and text[-1:].lower() in SIZE_SUFFIXES:
        digits, suffix = text[:-1], text[-1].lower()
    try:
        return int(digits, 0) << SIZE_SUFFIXES.get(suffix, 0)
    except ValueError:
        raise MigrationError(f"file URI has bad offset {text}: Invalid argument") from None


def connects_in_background(address: dict) -> bool:
    """True where QEMU answers `migrate` before the channel is there."""
    return address.get("type") in BACKGROUND


def describe(address: dict) -> str:
    """The address for messages, as QEMU writes it there."""
    if address["transport"] == "file":
        return str(address["filename"])
    if address["transport"] == "exec":
        return " ".join(address["args"])
    return str(address.get("path") or address.get("str") or f"{address['host']}:{address['port']}")
