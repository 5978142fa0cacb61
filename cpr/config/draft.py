"""What the options and guest.cfg say, collected group by group before it is made a Config.

A group is what QEMU's -readconfig has in brackets; -m 1G is the key `size` of the group `memory`.
"""

from __future__ import annotations

from cpr.config.machine_options import MEMORY_KEYS, parse_accels
from cpr.config.option_values import BOOL, KEYVAL, OPTS, STRING
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

# Group: its dialect and its implied key.
GROUPS: dict[str, tuple[str, str | None]] = {
    "accel": (OPTS, "accel"),
    "action": (OPTS, None),
    "blockdev": (KEYVAL, "driver"),
    "boot-opts": (KEYVAL, "order"),
    "chardev": (OPTS, "backend"),
    "device": (OPTS, "driver"),
    "drive": (OPTS, None),
    "global": (OPTS, None),
    "machine": (KEYVAL, "type"),
    "memory": (OPTS, "size"),
    "mon": (OPTS, "chardev"),
    "msg": (OPTS, None),
    "netdev": (OPTS, "type"),
    "name": (OPTS, "guest"),
    "object": (OPTS, "qom-type"),
    "rtc": (OPTS, None),
    "run-with": (OPTS, None),
    "sandbox": (OPTS, "enable"),
    "smp-opts": (KEYVAL, "cpus"),
}

# Groups of which there may be many; of the others there is one, and what is given later wins.
REPEATED = ("accel", "blockdev", "chardev", "device", "drive", "global", "mon", "netdev", "object")
IDENTIFIED = ("chardev", "device", "drive", "mon", "netdev", "object")

ALLOW_OR_DENY = ("allow", "deny")
SANDBOX_WORDS = {
    "obsolete": ALLOW_OR_DENY,
    "elevateprivileges": ("allow", "deny", "children"),
    "spawn": ALLOW_OR_DENY,
    "resourcecontrol": ALLOW_OR_DENY,
}
RTC_WORDS = {"clock": ("host", "rt", "vm"), "driftfix": ("none", "slew")}

# The keys of the groups that are checked as soon as they are read.
KEYS: dict[str, dict[str, Kind]] = {
    "action": {
        "reboot": ("reset", "shutdown"),
        "shutdown": ("poweroff", "pause"),
        "panic": ("pause", "shutdown", "exit-failure", "none"),
        "watchdog": ("reset", "shutdown", "poweroff", "inject-nmi", "pause", "debug", "none"),
    },
    "memory": MEMORY_KEYS,
    "msg": {"timestamp": BOOL, "guest-name": BOOL},
    "name": {"guest": STRING, "process": STRING, "debug-threads": BOOL},
    "rtc": {"base": STRING, "clock": STRING, "driftfix": STRING},
    "run-with": {
        "async-teardown": BOOL,
        "chroot": STRING,
        "exit-with-parent": BOOL,
        "user": STRING,
    },
    "sandbox": {"enable": BOOL, **dict.fromkeys(SANDBOX_WORDS, STRING)},
}


class Draft:
    """What the options say, in the order in which they say it; guest.cfg's groups have `base`."""

    def __init__(self) -> None:
        self.groups: dict[str, list[OptionGroup]] = {name: [] for name in REPEATED}
        self.serials: list[tuple[str, str]] = []  # (argument, location), as the next one
        self.debugcons: list[tuple[str, str]] = []
        self.incoming: list[str] = []
        self.settings: dict[str, Any] = {}
        self.warnings: list[str] = []
        self.action: str | None = None
        self.action_text = ""
        self._single: dict[bool, dict[str, dict[str, Any]]] = {
            base: {name: {} for name in GROUPS if name not in REPEATED} for base in (True, False)
        }

    def add(self, group: OptionGroup) -> None:
        """Raises ConfigError."""
        if group.name in REPEATED:
            self._add_repeated(group)
            return
        values = group.typed(KEYS[group.name]) if group.name in KEYS else group.values
        single = self._single[group.base][group.name]
        if group.name == "sandbox":
            _check_sandbox(group, single | values)
        elif group.name == "rtc":
            _check_rtc(values)
        elif group.name == "run-with":
            values["location"] = group.location
        # -m is merged as it is written: what its size means depends on the last character.
        single.update(group.values if group.name == "memory" else values)

    def _add_repeated(self, group: OptionGroup) -> None:
        group.check_id()
        present = self.groups[group.name]
        identifier = group.values.get("id")
        if group.name in IDENTIFIED and identifier is not None:
            for index, other in enumerate(present):
                if other.values.get("id") != identifier:
                    continue
                if group.base or not other.base:
                    raise group.error(f"Duplicate ID '{identifier}' for {group.name}")
                present[index] = group
                return
        present.append(group)

    def single(self, name: str) -> dict[str, Any]:
        """The keys of a group that there is once."""
        return self._single[True][name] | self._single[False][name]

    def accels(self) -> tuple[str, ...]:
        """The accelerators that the options name, else those that guest.cfg does, else none."""
        for base in (False, True):
            groups = [group for group in self.groups["accel"] if group.base == base]
            machine_accel = self._single[base]["machine"].get("accel")
            names = parse_accels(machine_accel, groups, self.warnings)
            if names:
                return names
        return ()


def _check_sandbox(group: OptionGroup, values: dict[str, Any]) -> None:
    for name, accepted in SANDBOX_WORDS.items():
        if values.get("enable") and values.get(name, accepted[0]) not in accepted:
            raise group.error(f"invalid argument for {name}")


def _check_rtc(values: dict[str, Any]) -> None:
    for name, accepted in RTC_WORDS.items():
        if values.get(name, accepted[0]) not in accepted:
            raise ConfigError(f"invalid option value '{values[name]}'")
    base = values.get("base", "utc")
    if base not in ("utc", "localtime") and not _is_date(base):
        raise ConfigError(
            "invalid datetime format\nvalid formats: '2006-06-17T16:01:21' or '2006-06-17'"
        )


def _is_date(text: str) -> bool:
    import time

    for layout in ("%Y-%m-%dT%H:%M:%S", "%Y-%m-%d"):
        try:
            time.strptime(text, layout)
            return True
        except ValueError:
            continue
    return False
