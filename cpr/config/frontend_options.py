"""Who uses which chardev: -serial, -monitor, -qmp, -mon, -debugcon and the chardev= of a -device.

A chardev has one user.  -monitor DEV is -mon with a chardev made for it; ids are QEMU's:
compat_monitor0, compat_monitor1 …, and serialN for COM N+1.
"""

from __future__ import annotations

from cpr.config.chardev_options import Frontend, parse_short_form
from cpr.config.option_values import BOOL, STRING, error
from cpr.config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.config.chardev_options import ChardevConfig
    from cpr.config.option_values import Kind
    from cpr.config.options import OptionGroup

READLINE, CONTROL = "readline", "control"
# The key for the argument of -monitor and -qmp; with its comma and its blanks it can be written
# neither in an option nor in a file.
SHORT_FORM = "short form, of -monitor"
NO_DEVICE = "none"

MON_KEYS: dict[str, Kind] = {
    "id": STRING,
    "chardev": STRING,
    "mode": STRING,
    "pretty": BOOL,
    "cpr": BOOL,
    SHORT_FORM: STRING,
}


class MonitorConfig(Record):
    """One monitor: the id of its chardev, its `mode` (readline or control), and whether a control
    monitor writes `pretty` JSON.  `cpr` is as that of the chardev, or None.
    """

    __slots__ = ("chardev", "mode", "pretty", "cpr")  # noqa: RUF023 - the constructor's order
    chardev: str
    mode: str
    pretty: bool
    cpr: bool | None

    def __init__(
        self, chardev: str, mode: str = READLINE, pretty: bool = False, cpr: bool | None = None
    ) -> None:
        self._fill(chardev, mode, pretty, cpr)


class ChardevTable:
    """The chardevs of a configuration, by id, and who uses them: one user each."""

    def __init__(self, daemonize: bool, warnings: list[str]) -> None:
        self._daemonize = daemonize
        self._warnings = warnings
        self._chardevs: dict[str, ChardevConfig] = {}
        self._used: set[str] = set()

    def add(self, chardev: ChardevConfig) -> None:
        """Raises ConfigError where the id or the terminal is taken."""
        if chardev.id in self._chardevs:
            raise error(chardev.location, f"Duplicate ID '{chardev.id}' for chardev")
        if chardev.backend == "stdio":
            if self._daemonize:
                raise error(chardev.location, "cannot use stdio with -daemonize")
            if self.uses_stdio:
                raise error(chardev.location, "cannot use stdio by multiple character devices")
        self._chardevs[chardev.id] = chardev

    @property
    def uses_stdio(self) -> bool:
        return any(chardev.backend == "stdio" for chardev in self._chardevs.values())

    @property
    def chardevs(self) -> tuple[ChardevConfig, ...]:
        return tuple(self._chardevs.values())

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._chardevs

    def use(self, identifier: str) -> str | None:
        """Gives the chardev its user; returns what is wrong if it has one already."""
        if identifier in self._used:
            return f"chardev '{identifier}' is already in use"
        self._used.add(identifier)
        return None

    def connect(self, frontend: Frontend) -> str:
        """Makes the chardev that `frontend` asks for, or finds it for chardev:ID; uses it.

        Returns its id.  Raises ConfigError.
        """
        kind, _, identifier = frontend.text.partition(":")
        if kind != "chardev":
            self.add(parse_short_form(frontend, self._warnings))
            identifier = frontend.label
        elif identifier not in self:
            raise error(frontend.location, frontend.refusal)
        problem = self.use(identifier)
        if problem is not None:
            raise error(frontend.location, problem)
        return identifier


def monitor_mode(group: OptionGroup) -> str:
    return str(group.values.get("mode", READLINE))


def overridden_monitors(groups: list[OptionGroup]) -> list[OptionGroup]:
    """The monitors of guest.cfg that give way to those of the same mode on the command line."""
    given = {monitor_mode(group) for group in groups if not group.base}
    return [group for group in groups if group.base and monitor_mode(group) in given]


def parse_monitors(groups: list[OptionGroup], chardevs: ChardevTable) -> list[MonitorConfig]:
    """Raises ConfigError."""
    monitors: list[MonitorConfig] = []
    made = 0
    for group in groups:
        group.check_id()
        values = group.typed(MON_KEYS)
        text = values.get(SHORT_FORM)
        if text == NO_DEVICE and monitor_mode(group) == READLINE:
            continue
        if text is None:
            chardev = _named_chardev(group, values.get("chardev"), chardevs)
        else:
            refusal = f"parse error: {text}"
            if text.startswith("chardev:"):
                refusal = f'chardev "{text.partition(":")[2]}" not found'
            frontend = Frontend(text, f"compat_monitor{made}", group.location, refusal)
            chardev = chardevs.connect(frontend)
            made += chardev == frontend.label
        mode, pretty = monitor_mode(group), values.get("pretty", False)
        if mode not in (READLINE, CONTROL):
            raise group.error(f"Parameter 'mode' does not accept value '{mode}'")
        if pretty and mode == READLINE:
            raise group.error("'pretty' is not compatible with HMP monitors")
        monitors.append(MonitorConfig(chardev, mode, pretty, values.get("cpr")))
    return monitors


def _named_chardev(group: OptionGroup, identifier: str | None, chardevs: ChardevTable) -> str:
    if identifier is None:
        raise group.error("Parameter 'chardev' is missing")
    if identifier not in chardevs:
        raise group.error(f'chardev "{identifier}" not found')
    problem = chardevs.use(identifier)
    if problem is not None:
        raise group.error(problem)
    return identifier


def connect_serials(given: list[tuple[str, str]], chardevs: ChardevTable) -> tuple[str | None, ...]:
    """The chardev ids of -serial, from (argument, location) of each.  Raises ConfigError."""
    serials: list[str | None] = []
    for index, (text, location) in enumerate(given):
        if text == NO_DEVICE:
            serials.append(None)
            continue
        refusal = f"could not connect serial device to character backend '{text}'"
        frontend = Frontend(text, f"serial{index}", location, refusal)
        serials.append(chardevs.connect(frontend))
    return tuple(serials)
