"""-chardev, and the short forms of it that -serial, -monitor and the like take.

-chardev null|stdio|pty,id=ID
-chardev file,id=ID,path=PATH[,append=on|off]
-chardev socket,id=ID,path=PATH[,server=on|off][,wait=on|off][,reconnect-ms=N]
-chardev socket,id=ID,host=HOST,port=PORT[,nodelay=on|off][…the same]
-serial null|stdio|pty|file:PATH|unix:PATH[,…]|tcp:[HOST]:PORT[,…]

All take cpr=on|off, which says in which updates the connection is kept: all, or none.
"""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, OPTS, STRING, error
from cpr.config.options import OptionGroup, parse_opts
from cpr.config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind

KEYS: dict[str, Kind] = {
    "id": STRING,
    "backend": STRING,
    "path": STRING,
    "input-path": STRING,
    "host": STRING,
    "port": STRING,
    "fd": STRING,
    "to": INT,
    "ipv4": BOOL,
    "ipv6": BOOL,
    "wait": BOOL,
    "server": BOOL,
    "nodelay": BOOL,
    "reconnect-ms": INT,
    "telnet": BOOL,
    "tn3270": BOOL,
    "tls-creds": STRING,
    "tls-authz": STRING,
    "websocket": BOOL,
    "mux": BOOL,
    "signal": BOOL,
    "append": BOOL,
    "cpr": BOOL,
    "logfile": STRING,
    "logappend": BOOL,
    "abstract": BOOL,
    "tight": BOOL,
}

# What each backend takes; QEMU ignores the others, too, except for those below.
BACKENDS: dict[str, tuple[str, ...]] = {
    "null": (),
    "stdio": ("signal", "cpr"),
    "pty": ("cpr",),
    "file": ("path", "append", "cpr"),
    "socket": ("path", "host", "port", "server", "wait", "nodelay", "reconnect-ms", "cpr"),
}

# QEMU has these for the backend, and there they do something.
UNSUPPORTED_FOR_ALL = ("mux", "logfile")
UNSUPPORTED: dict[str, tuple[str, ...]] = {
    "pty": ("path",),
    "file": ("input-path",),
    "socket": (
        "fd",
        "to",
        "ipv4",
        "ipv6",
        "telnet",
        "tn3270",
        "websocket",
        "tls-creds",
        "tls-authz",
        "abstract",
    ),
}


class ChardevConfig(Record):
    """One chardev.  `options` holds those of BACKENDS[backend] that were given: `port` and other
    words as str, on|off as bool, `reconnect-ms` (ms) as int.  `location` is what an error about
    it begins with.
    """

    __slots__ = ("id", "backend", "options", "location")  # noqa: RUF023 - constructor's order
    id: str
    backend: str
    options: dict[str, Any]
    location: str

    def __init__(self, id: str, backend: str, options: dict[str, Any], location: str = "") -> None:
        self._fill(id, backend, options, location)


def parse_chardev(group: OptionGroup) -> ChardevConfig:
    """A -chardev.  Raises ConfigError."""
    group.check_id()
    values = group.typed(KEYS)
    if "id" not in values:
        raise group.error("chardev: no id specified")
    identifier = values["id"]
    if "backend" not in values:
        raise group.error(f'chardev: "{identifier}" missing backend')
    return _chardev(identifier, values["backend"], values, group.location)


class Frontend:
    """One use of a chardev on the command line: the argument of -serial, -monitor and the like.

    `label` is the id that a chardev made for it gets, `refusal` the error where QEMU has none
    more precise.
    """

    __slots__ = ("label", "location", "refusal", "text")

    def __init__(self, text: str, label: str, location: str, refusal: str) -> None:
        self.text = text
        self.label = label
        self.location = location
        self.refusal = refusal


def parse_short_form(frontend: Frontend, warnings: list[str]) -> ChardevConfig:
    """The chardev that a Frontend asks for.  Raises ConfigError."""
    text, label, location = frontend.text, frontend.label, frontend.location
    kind, colon, rest = text.partition(":")
    if text in ("null", "pty", "stdio"):
        return _chardev(label, text, {}, location)
    if kind == "file" and colon:
        return _chardev(label, "file", {"path": rest}, location)
    if kind in ("unix", "tcp") and colon:
        address, _, opts = rest.partition(",")
        values = _address(kind, address)
        if values is None:
            raise error(location, frontend.refusal)
        group = OptionGroup("chardev", parse_opts(opts, None, location, warnings), location, OPTS)
        return _chardev(label, "socket", group.typed(KEYS) | values, location)
    if kind == "mon" and colon:
        raise error(
            location,
            "'mon:' shares one character device between two users, which is not supported; "
            "give the monitor a device of its own with -monitor",
        )
    raise error(location, f"'{text}' is not a valid char driver")


def _address(kind: str, address: str) -> dict[str, Any] | None:
    if kind == "unix":
        return {"path": address}
    host, colon, port = address.rpartition(":")
    if not colon or not port:
        return None
    return {"host": host.removeprefix("[").removesuffix("]"), "port": port}


def _chardev(identifier: str, backend: str, values: dict[str, Any], location: str) -> ChardevConfig:
    known = BACKENDS.get(backend)
    if known is None:
        raise error(location, f"'{backend}' is not a valid char driver name")
    for name in (*UNSUPPORTED_FOR_ALL, *UNSUPPORTED.get(backend, ())):
        if values.get(name):
            raise error(location, f"chardev: {backend}: '{name}' is not supported; leave it out")
    problem = CHECKS[backend](values) if backend in CHECKS else None
    if problem is not None:
        raise error(location, problem)
    options = {name: values[name] for name in known if name in values}
    return ChardevConfig(identifier, backend, options, location)


def _check_file(values: dict[str, Any]) -> str | None:
    return None if "path" in values else "chardev: file: no filename given"


def _check_socket(values: dict[str, Any]) -> str | None:
    server = values.get("server", False)
    if "path" in values and "host" in values:
        return "None or one of 'path', 'fd' or 'host' option required."
    if not values.get("path") and "host" not in values:
        return "chardev: socket: no path or host given"
    if "path" not in values and "port" not in values:
        return "chardev: socket: no port given"
    if "wait" in values and not server:
        return "'wait' option is incompatible with socket in client connect mode"
    if values.get("reconnect-ms") and server:
        return "'reconnect-ms' option is incompatible with socket in server listen mode"
    return None


CHECKS = {"file": _check_file, "socket": _check_socket}
