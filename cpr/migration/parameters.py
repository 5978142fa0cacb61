"""Migration parameters: one row each, and their values.

Values are what QMP carries: int, bool, str or a list of str.  Sizes and bandwidths are in bytes,
times in ms.
"""

from __future__ import annotations

from cpr.constants import MIB, MODES, NORMAL, PAGE_SIZE, U64_LIMIT
from cpr.errors import CommandError
from cpr.migration import deprecated
from cpr.migration.parameter import (
    BOOL,
    ENUM,
    MIB_SIZE,
    SIZE,
    STRING,
    STRINGS,
    UINT8,
    UINT32,
    Parameter,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any


def _between(low: int, high: int) -> Callable[[int], bool]:
    return lambda value: low <= value <= high


def _power_of_two(low: int, high: int) -> Callable[[int], bool]:
    return lambda value: low <= value <= high and not value & value - 1


def _level(name: str, low: int, high: int) -> Parameter:
    complaint = f"a value between {low} and {high}"
    return Parameter(name, UINT8, 1, "", _between(low, high), complaint, listed=False)


def _percentage(name: str, default: int, high: int) -> Parameter:
    complaint = f"an integer in the range of 1 to {high}"
    return Parameter(name, UINT8, default, "", _between(1, high), complaint)


MAX_POLL_MS = (1 << 31) - 1  # of poll(2)

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
        _power_of_two(PAGE_SIZE, U64_LIMIT),
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
    Parameter(
        "vcpu-dirty-limit",
        SIZE,
        1,
        " MB/s",
        lambda value: value >= 1,
        refusal="Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s",
    ),
    Parameter("mode", ENUM, NORMAL, values=MODES),
    Parameter("direct-io", BOOL, False),
    Parameter(
        "x-rdma-chunk-size",
        SIZE,
        MIB,
        " bytes",
        _power_of_two(MIB, 1024 * MIB),
        refusal="Option x_rdma_chunk_size expects a power of 2 in the range 1MiB to 1024MiB",
    ),
    Parameter("cpr-exec-command", STRINGS, []),
)

# Parameters of cpr itself, named x-cpr-…: shown and queried only once they have been set.
EXTENSIONS: tuple[Parameter, ...] = (
    # Whether the guest runs on while the new image starts: auto is on for the command cpr-exec.
    Parameter("x-cpr-exec-overlap", ENUM, "auto", values=("off", "on", "auto")),
    # How long a new image has until it must have the guest; 0 is for ever.
    Parameter(
        "x-cpr-exec-timeout",
        SIZE,
        30_000,
        " ms",
        _between(0, MAX_POLL_MS),
        f"a value between 0 and {MAX_POLL_MS}",
    ),
    # Whether the guest's clock goes on while the guest stands still, in an update or otherwise.
    Parameter("x-cpr-guest-clock", ENUM, "stop", values=("stop", "advance")),
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
        """Sets all of `changes`.  Raises CommandError, and then has changed none.

        Those that did something once are taken, with a warning, and forgotten.
        """
        given, changes = changes, deprecated.without(changes)
        new = dict(self._values)
        for parameter in self._table.values():
            if parameter.name in changes:
                new[parameter.name] = parameter.convert(changes[parameter.name])
        for name in changes:
            if name not in self._table:
                raise CommandError(f"Parameter '{name}' is unexpected")
        for name in changes:
            self._table[name].check(new[name])
        if not new["cpu-throttle-initial"] <= new["max-cpu-throttle"] <= 99:
            raise CommandError(
                "Option max-cpu-throttle expects an integer in the range of "
                "cpu-throttle-initial to 99"
            )
        self._values = new
        deprecated.warn(given)

    def set_from_string(self, name: str, text: str) -> None:
        """`migrate_set_parameter`: `text` is the rest of the line.  Raises CommandError."""
        parameter = self._table.get(name) or deprecated.PARAMETERS.get(name)
        if parameter is None:
            raise CommandError(f"invalid parameter value: {name}")
        self.set({name: parameter.parse(text)})

    def info_lines(self) -> list[str]:
        """The lines of `info migrate_parameters`."""
        return [
            self._table[name].show(value)
            for name, value in self._values.items()
            if self._table[name].listed
        ]
