"""-netdev: what network cards are connected to.  There is one kind, the tap."""

from __future__ import annotations

from cpr.config.option_values import BOOL, INT, SIZE, STRING
from cpr.config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

TAP = "tap"
NO_SCRIPT = "no"
MOST_NAME = 15  # characters of an interface's name

KEYS: dict[str, Kind] = {
    "type": STRING,
    "id": STRING,
    "cpr": BOOL,
    "downscript": STRING,
    "fd": STRING,
    "ifname": STRING,
    "queues": INT,
    "script": STRING,
    "sndbuf": SIZE,
    "vhost": BOOL,
    "vhostfd": STRING,
    "vhostforce": BOOL,
    "vnet_hdr": BOOL,
}
NOT_WITH_FD = ("ifname", "script", "downscript", "vnet_hdr", "queues")


class NetdevConfig(Record):
    """One -netdev tap.  `fd` is what was given, the number of a descriptor or the name of one, or
    None; `ifname` the tap's name, "" for a new one; `location` what an error about it begins with.
    `vhost`: the kernel carries the frames, and `vhostfd` is as `fd`, of /dev/vhost-net.
    """

    __slots__ = (  # noqa: RUF023 - the order of the constructor
        "id",
        "fd",
        "ifname",
        "location",
        "vhost",
        "vhostfd",
    )
    id: str
    fd: str | None
    ifname: str
    location: str
    vhost: bool
    vhostfd: str | None

    def __init__(
        self,
        id: str,
        fd: str | None,
        ifname: str,
        location: str = "",
        vhost: bool = False,
        vhostfd: str | None = None,
    ) -> None:
        self._fill(id, fd, ifname, location, vhost, vhostfd)


def parse_netdevs(groups: list[OptionGroup]) -> tuple[NetdevConfig, ...]:
    """Raises ConfigError."""
    return tuple(_parse(group) for group in groups)


def _parse(group: OptionGroup) -> NetdevConfig:
    group.check_id()
    kind = group.values.get("type")
    if kind is None:
        raise group.error("Parameter 'type' is missing")
    if kind != TAP:
        raise group.error(f"Parameter 'type' does not accept value '{kind}'\nThere is only tap.")
    values: dict[str, Any] = group.typed(KEYS)
    if "id" not in values:
        raise group.error("Parameter 'id' is missing")
    if "fd" in values and any(name in values for name in NOT_WITH_FD):
        raise group.error("ifname=, script=, downscript=, vnet_hdr=, queues= are invalid with fd=")
    for name in ("script", "downscript"):
        if values.get(name, NO_SCRIPT) not in (NO_SCRIPT, ""):
            raise group.error(
                f"{name}={values[name]} is not run: set the tap up before, and give {name}=no"
            )
    if values.get("queues", 1) != 1:
        raise group.error("a tap has one queue here: leave queues= out")
    if not values.get("cpr", True):
        raise group.error("cpr=off is not supported: a tap goes over every update; leave it out")
    vhostfd = values.get("vhostfd")
    vhost = values.get("vhost", vhostfd is not None or values.get("vhostforce", False))
    if vhostfd is not None and not vhost:
        raise group.error("vhostfd(s)= is not valid without vhost")
    ifname = values.get("ifname", "")
    if len(ifname.encode()) > MOST_NAME:
        raise group.error(f"ifname={ifname} is longer than the {MOST_NAME} characters of a name")
    return NetdevConfig(values["id"], values.get("fd"), ifname, group.location, vhost, vhostfd)
