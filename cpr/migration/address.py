"""Migration addresses: what a URI or a `channels` argument says, checked, as a dict.

    file:PATH[,offset=N]    exec:COMMAND    fd:NAME    unix:PATH    tcp:HOST:PORT

The dict is QEMU's MigrationAddress: {"transport": "file", "filename", "offset"}, {"transport":
"exec", "args"}, {"transport": "socket", "type": "unix", "path"}, {"transport": "socket", "type":
"inet", "host", "port"}, {"transport": "socket", "type": "fd", "str"}.
"""

from __future__ import annotations

from cpr.constants import MAX_FILE_OFFSET, SIZE_SUFFIXES, UNIX_PATH_MAX
from cpr.errors import MigrationError

BACKGROUND = frozenset({"unix", "inet"})


def parse(uri: str | None, channels: list[dict] | None) -> dict:
    """The main channel's address.  Raises MigrationError with QEMU's text."""
    if bool(uri is not None) == bool(channels):
        raise MigrationError("need either 'uri' or 'channels' argument")
    if uri is not None:
        return parse_uri(uri)
    assert channels is not None
    main = [c for c in channels if _channel_type(c) == "main"]
    if len(main) > 1:
        raise MigrationError("Channel list has more than one main entry")
    if not main:
        raise MigrationError("Channel list has no main entry: add one of channel-type 'main'")
    return check(main[0]["addr"])


def cpr_address(channels: list[dict] | None) -> dict | None:
    """The address of the cpr channel, or None where there is none."""
    for each in channels or ():
        if _channel_type(each) == "cpr":
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

    What no system call takes (a NUL in a path, an offset of 2^63) is refused here.  Raises
    MigrationError with QEMU's text.
    """
    if not isinstance(address, dict):
        raise MigrationError("Invalid parameter type for 'addr', expected: object")
    transport = _string(address, "transport")
    kind = _string(address, "type") if transport == "socket" else transport
    if kind not in REQUIRED_KEYS or (transport == "socket" and kind in ("file", "exec")):
        name = "type" if transport == "socket" else "transport"
        raise MigrationError(f"Parameter '{name}' does not accept value '{kind}'")
    for key in REQUIRED_KEYS[kind]:
        if key == "args":
            _check_arguments(address)
        else:
            _string(address, key)
    if kind == "file":
        return address | {"offset": _offset(address.get("offset", 0))}
    if kind == "unix":
        check_unix_path(address["path"])
    return address


def check_unix_path(path: str) -> None:
    """Raises MigrationError with QEMU's text for one that no socket can have."""
    if len(path.encode(errors="surrogateescape")) >= UNIX_PATH_MAX:
        raise MigrationError(
            f"UNIX socket path '{path}' is too long\nPath must be less than {UNIX_PATH_MAX} bytes"
        )


def _channel_type(channel: dict) -> object:
    if not isinstance(channel, dict) or "addr" not in channel:
        raise MigrationError("Parameter 'addr' is missing")
    return channel.get("channel-type")


def _string(address: dict, key: str) -> str:
    if key not in address:
        raise MigrationError(f"Parameter '{key}' is missing")
    return _checked(key, address[key])


def _checked(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise MigrationError(f"Invalid parameter type for '{key}', expected: string")
    if "\0" in value:
        raise MigrationError(f"Parameter '{key}' has a NUL in it: {value!r}")
    return value


def _check_arguments(address: dict) -> None:
    arguments = address.get("args")
    if arguments is None:
        raise MigrationError("Parameter 'args' is missing")
    if not isinstance(arguments, list):
        raise MigrationError("Invalid parameter type for 'args', expected: array")
    if not arguments:
        raise MigrationError("Parameter 'args' expects a command: its program and arguments")
    for number, argument in enumerate(arguments):
        _checked(f"args[{number}]", argument)


def _offset(value: object) -> int:
    try:
        offset = value if type(value) is int else int(str(value))  # which may have 4300 digits
    except ValueError:
        raise MigrationError(f"Parameter 'offset' expects a number, not {value!r}") from None
    if not 0 <= offset <= MAX_FILE_OFFSET:
        raise MigrationError(f"file offset {offset:#x} is in no file: give one below {1 << 63:#x}")
    return offset


def parse_uri(uri: str) -> dict:
    """The address that `uri` stands for, checked.  Raises MigrationError with QEMU's text."""
    return check(_parse(uri))


def _parse(uri: str) -> dict:
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


def port_of(address: dict) -> int:
    """Raises ValueError for what is no number of a port."""
    text = str(address["port"])
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 1 << 16):
        raise ValueError(f"'{text}' is no port: give a number below 65536")
    return int(text)
