"""Migration parameters and capabilities: names, defaults, what they accept, and QEMU's answers.

Values are what QMP carries: int, bool, str or a list of str.  Sizes and bandwidths are in bytes,
times in ms.
"""

from __future__ import annotations

from cpr.errors import CommandError, MigrationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence, Set
    from typing import Any

MIB = 1 << 20
PAGE_SIZE = 4096
U64 = 1 << 64

# What a parameter holds.  MIB_SIZE is a SIZE whose number without a suffix is in MiB at the HMP.
SIZE, MIB_SIZE, UINT8, UINT32, BOOL, STRING, ENUM, STRINGS = range(8)
WIDTHS = {UINT8: (8, "uint8_t"), UINT32: (32, "uint32_t")}

MODES = ("normal", "cpr-reboot", "cpr-transfer", "cpr-exec")


class Parameter:
    """One parameter.  `accepts` is checked on values of the right type; `complaint` is the text
    where it says no.  `listed` is false for those that `info migrate_parameters` leaves out.
    """

    __slots__ = ("accepts", "complaint", "default", "kind", "listed", "name", "unit", "values")

    def __init__(
        self,
        name: str,
        kind: int,
        default: Any,
        unit: str = "",
        accepts: Callable[[int], bool] | None = None,
        complaint: str = "",
        values: tuple[str, ...] = (),
        listed: bool = True,
    ) -> None:
        self.name = name
        self.kind = kind
        self.default = default
        self.unit = unit
        self.accepts = accepts
        self.complaint = complaint
        self.values = values
        self.listed = listed

    def convert(self, value: Any) -> Any:
        """The value to keep for what QMP brought.  Raises CommandError for a wrong type."""
        if self.kind == BOOL:
            if not isinstance(value, bool):
                raise _wrong_type(self.name, "boolean")
        elif self.kind == STRING:
            if value is None:
                return ""
            if not isinstance(value, str):
                raise _wrong_type(self.name, "StrOrNull")
        elif self.kind == ENUM:
            if not isinstance(value, str):
                raise _wrong_type(self.name, "string")
            if value not in self.values:
                raise CommandError(f"Parameter '{self.name}' does not accept value '{value}'")
        elif self.kind == STRINGS:
            return self._convert_strings(value)
        else:
            return self._convert_integer(value)
        return value

    def _convert_strings(self, value: Any) -> list[str]:
        if not isinstance(value, list):
            raise _wrong_type(self.name, "array")
        for index, word in enumerate(value):
            if not isinstance(word, str):
                raise _wrong_type(f"{self.name}[{index}]", "string")
        return list(value)

    def _convert_integer(self, value: Any) -> int:
        if type(value) is not int or not -U64 // 2 <= value < U64:
            raise CommandError(f"Parameter '{self.name}' expects uint64")
        value %= U64
        bits, type_name = WIDTHS.get(self.kind, (64, ""))
        if value >> bits:
            raise CommandError(f"Parameter '{self.name}' expects {type_name}")
        return int(value)

    def show(self, value: Any) -> str:
        """The line of `info migrate_parameters`."""
        if self.kind == BOOL:
            text = " on" if value else " off"
        elif self.kind == STRING:
            text = f" '{value}'"
        elif self.kind == STRINGS:
            text = "".join(f" {word}" for word in value)
        else:
            text = f" {value}"
        return f"{self.name}:{text}{self.unit}"


def _between(low: int, high: int) -> Callable[[int], bool]:
    return lambda value: low <= value <= high


def _power_of_two(low: int, high: int) -> Callable[[int], bool]:
    return lambda value: low <= value <= high and not value & value - 1


def _wrong_type(name: str, expected: str) -> CommandError:
    return CommandError(f"Invalid parameter type for '{name}', expected: {expected}")


def _level(name: str, low: int, high: int) -> Parameter:
    complaint = f"a value between {low} and {high}"
    return Parameter(name, UINT8, 1, "", _between(low, high), complaint, listed=False)


def _percentage(name: str, default: int, high: int) -> Parameter:
    complaint = f"an integer in the range of 1 to {high}"
    return Parameter(name, UINT8, default, "", _between(1, high), complaint)


PARAMETERS = (
    Parameter(
        "announce-initial", SIZE, 50, " ms", _between(0, 100000), "a value between 0 and 100000"
    ),
    Parameter(
        "announce-max", SIZE, 550, " ms", _between(0, 100000), "a value between 0 and 100000"
    ),
    Parameter("announce-rounds", SIZE, 5, "", _between(0, 1000), "a value between 0 and 1000"),
    Parameter("announce-step", SIZE, 100, " ms", _between(1, 10000), "a value between 0 and 10000"),
    _percentage("throttle-trigger-threshold", 50, 100),
    _percentage("cpu-throttle-initial", 20, 99),
    _percentage("cpu-throttle-increment", 10, 99),
    Parameter("cpu-throttle-tailslow", BOOL, False),
    Parameter("max-cpu-throttle", UINT8, 99),
    Parameter("tls-creds", STRING, ""),
    Parameter("tls-hostname", STRING, ""),
    Parameter("tls-authz", STRING, ""),
    Parameter("max-bandwidth", MIB_SIZE, 128 * MIB, " bytes/second"),
    Parameter("avail-switchover-bandwidth", MIB_SIZE, 0, " bytes/second"),
    Parameter("max-postcopy-bandwidth", SIZE, 0, " bytes/second"),
    Parameter(
        "downtime-limit",
        SIZE,
        300,
        " ms",
        _between(0, 2000 * 1000),
        "an integer in the range of 0 to (2000 * 1000) ms",
    ),
    Parameter("x-checkpoint-delay", UINT32, 20000, " ms"),
    Parameter("multifd-channels", UINT8, 2, "", _between(1, 255), "a value between 1 and 255"),
    Parameter("multifd-compression", ENUM, "none", values=("none", "zlib", "zstd")),
    _level("multifd-zlib-level", 0, 9),
    _level("multifd-zstd-level", 0, 20),
    _level("multifd-qatzip-level", 1, 9),
    Parameter("zero-page-detection", ENUM, "multifd", values=("none", "legacy", "multifd")),
    Parameter(
        "xbzrle-cache-size",
        SIZE,
        64 * MIB,
        " bytes",
        _power_of_two(PAGE_SIZE, U64),
        "a power of two no less than the target page size",
    ),
    Parameter(
        "x-vcpu-dirty-limit-period",
        SIZE,
        1000,
        " ms",
        _between(1, 1000),
        "a value between 1 and 1000",
    ),
    Parameter("vcpu-dirty-limit", SIZE, 1, " MB/s"),
    Parameter("mode", ENUM, "normal", values=MODES),
    Parameter("direct-io", BOOL, False),
    Parameter(
        "x-rdma-chunk-size",
        SIZE,
        MIB,
        " bytes",
        _power_of_two(MIB, 1024 * MIB),
        "a power of 2 in the range 1MiB to 1024MiB",
    ),
    Parameter("cpr-exec-command", STRINGS, []),
)

# Parameters of cpr itself, named x-cpr-…: shown and queried only once they have been set.
EXTENSIONS: tuple[Parameter, ...] = (
    # Whether the guest runs on while the new image starts: auto is on for the command cpr-exec.
    Parameter("x-cpr-exec-overlap", ENUM, "auto", values=("off", "on", "auto")),
    # How long a new image has until it must have the guest; 0 is for ever.
    Parameter("x-cpr-exec-timeout", SIZE, 30_000, " ms"),
    # cpr-exec and cpr-transfer copy RAM that is not shared, while the guest runs.
    Parameter("x-cpr-ram-staging", BOOL, False),
    # They copy RAM to pages of this size, whatever it has; 0 is as it is.
    Parameter(
        "x-cpr-ram-pagesize",
        SIZE,
        0,
        " bytes",
        lambda value: value == 0 or (value >= PAGE_SIZE and not value & value - 1),
        "0 or a power of two no less than 4096",
    ),
)

# The spelling in an error text where it is not the name itself.
SPELLINGS = {"x-rdma-chunk-size": "x_rdma_chunk_size"}


class Parameters:
    """The values.  A change takes all that are given, or none."""

    def __init__(self, extensions: Sequence[Parameter] = EXTENSIONS) -> None:
        self._table = {parameter.name: parameter for parameter in (*PARAMETERS, *extensions)}
        self._values = {parameter.name: parameter.default for parameter in PARAMETERS}

    def get(self, name: str) -> Any:
        """The value of `name`, which must exist; an extension that is not set has its default."""
        return self._values.get(name, self._table[name].default)

    def names(self) -> list[str]:
        return list(self._table)

    def query(self) -> dict[str, Any]:
        """What query-migrate-parameters returns."""
        return {
            name: list(value) if isinstance(value, list) else value
            for name, value in self._values.items()
        }

    def set(self, changes: Mapping[str, Any]) -> None:
        """Sets all of `changes`.  Raises CommandError, and then has changed none."""
        new = dict(self._values)
        for parameter in self._table.values():
            if parameter.name in changes:
                new[parameter.name] = parameter.convert(changes[parameter.name])
        for name in changes:
            if name not in self._table:
                raise CommandError(f"Parameter '{name}' is unexpected")
        for name in changes:
            _check(self._table[name], new[name])
        if not new["cpu-throttle-initial"] <= new["max-cpu-throttle"] <= 99:
            raise CommandError(
                "Option max-cpu-throttle expects an integer in the range of "
                "cpu-throttle-initial to 99"
            )
        self._values = new

    def set_from_string(self, name: str, text: str) -> None:
        """`migrate_set_parameter`: `text` is the rest of the line.  Raises CommandError."""
        from cpr.migration import text as parse

        parameter = self._table.get(name)
        if parameter is None:
            raise CommandError(f"invalid parameter value: {name}")
        value: Any = text
        if parameter.kind == SIZE:
            value = parse.size_parameter(name, text)
        elif parameter.kind == MIB_SIZE:
            value = parse.mib_parameter(text)
        elif parameter.kind in WIDTHS:
            value = parse.integer_parameter(name, text)
        elif parameter.kind == BOOL:
            value = parse.bool_parameter(name, text)
        elif parameter.kind == STRINGS:
            value = parse.words(text)
        self.set({name: value})

    def info_lines(self) -> list[str]:
        """The lines of `info migrate_parameters`."""
        return [
            self._table[name].show(value)
            for name, value in self._values.items()
            if self._table[name].listed
        ]


def _check(parameter: Parameter, value: Any) -> None:
    if parameter.name == "vcpu-dirty-limit" and value < 1:
        raise CommandError("Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s")
    if parameter.accepts is not None and not parameter.accepts(value):
        spelling = SPELLINGS.get(parameter.name, parameter.name)
        raise CommandError(f"Option {spelling} expects {parameter.complaint}")


CAPABILITIES = (
    "xbzrle",
    "rdma-pin-all",
    "auto-converge",
    "events",
    "postcopy-ram",
    "x-colo",
    "release-ram",
    "return-path",
    "pause-before-switchover",
    "multifd",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "zero-copy-send",
    "postcopy-preempt",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
)

# What background-snapshot cannot be together with, in the order in which it is looked at.
NO_BACKGROUND_SNAPSHOT = (
    "postcopy-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "return-path",
    "multifd",
    "pause-before-switchover",
    "auto-converge",
    "release-ram",
    "rdma-pin-all",
    "xbzrle",
    "x-colo",
    "validate-uuid",
    "zero-copy-send",
)


class Capabilities:
    """The switches.

    `in_progress()` tells whether a migration runs, which locks them; `parameters` are those that
    some of the switches look at.
    """

    def __init__(
        self,
        parameters: Parameters | None = None,
        in_progress: Callable[[], bool] = lambda: False,
    ) -> None:
        self._parameters = parameters or Parameters()
        self._in_progress = in_progress
        self._states = dict.fromkeys(CAPABILITIES, False)

    def enabled(self, name: str) -> bool:
        return self._states[name]

    def query(self) -> list[dict[str, Any]]:
        """What query-migrate-capabilities returns."""
        return [{"capability": name, "state": on} for name, on in self._states.items()]

    def set(self, changes: Sequence[Mapping[str, Any]]) -> None:
        """Takes a list of {"capability", "state"}, all or none.

        Raises MigrationError while a migration runs, CommandError for what does not go together.
        """
        if self._in_progress():
            raise MigrationError("There's a migration process in progress")
        new = dict(self._states)
        for change in changes:
            if change["capability"] not in new:
                raise CommandError(
                    f"Parameter 'capability' does not accept value '{change['capability']}'"
                )
            new[change["capability"]] = change["state"]
        self._check({name for name, on in new.items() if on})
        self._states = new

    def info_lines(self) -> list[str]:
        """The lines of `info migrate_capabilities`."""
        return [f"{name}: {'on' if on else 'off'}" for name, on in self._states.items()]

    def _check(self, on: Set[str]) -> None:
        """Raises CommandError for a set that QEMU refuses."""
        if {"postcopy-ram", "x-ignore-shared"} <= on:
            raise CommandError("Postcopy is not compatible with ignore-shared")
        if "background-snapshot" in on:
            for name in NO_BACKGROUND_SNAPSHOT:
                if name in on:
                    raise CommandError(f"Background-snapshot is not compatible with {name}")
        if "zero-copy-send" in on and not self._plain_multifd(on):
            raise CommandError(
                "Zero copy only available for non-compressed non-TLS multifd migration"
            )
        if "postcopy-preempt" in on and "postcopy-ram" not in on:
            raise CommandError("Postcopy preempt requires postcopy-ram")
        if {"multifd", "xbzrle"} <= on:
            raise CommandError("Multifd is not compatible with xbzrle")
        for name in ("x-colo", "switchover-ack"):
            if name in on and "return-path" not in on:
                raise CommandError(f"Capability '{name}' requires capability 'return-path'")
        if "dirty-limit" in on:
            if "auto-converge" in on:
                raise CommandError(
                    "dirty-limit conflicts with auto-converge either of then available currently"
                )
            raise CommandError(
                "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set"
            )
        if "mapped-ram" in on:
            for name, word in (("xbzrle", "xbzrle"), ("postcopy-ram", "postcopy")):
                if name in on:
                    raise CommandError(f"Mapped-ram migration is incompatible with {word}")

    def _plain_multifd(self, on: Set[str]) -> bool:
        return (
            "multifd" in on
            and "xbzrle" not in on
            and self._parameters.get("multifd-compression") == "none"
            and not self._parameters.get("tls-creds")
        )
