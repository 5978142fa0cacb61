"""Parts 3 and 4: the migration parameters and capabilities, by QMP and by HMP."""

from __future__ import annotations

from typing import Any

from ..lab import Lab
from ..match import expect, has
from ..row import Row, Step, step
from ..steps import (
    boot,
    capabilities,
    hmp,
    parameters,
    qmp,
    refused,
)

RANGE = "Option {name} expects a value between {range}"
INTEGER = "Option {name} expects an integer in the range of {range}"
UINT64 = "Parameter '{name}' expects uint64"
UINT32 = "Parameter '{name}' expects uint32_t"
UINT8 = "Parameter '{name}' expects uint8_t"
TYPE = "Invalid parameter type for '{name}', expected: {range}"
VALUE = "Parameter '{name}' does not accept value 'x'"
POWER = "Option {name} expects a power of two no less than the target page size"


class Parameter:
    """A parameter: its default, a value that it takes, and one that it refuses with `text`.

    `range` stands in the text; `line` is what `info migrate_parameters` prints of the default.
    """

    def __init__(
        self,
        name: str,
        default: Any,
        taken: Any,
        refused: Any,
        text: str,
        range: str = "",
        line: str | None = "{name}: {default}",
    ) -> None:
        self.name = name
        self.default = default
        self.taken = taken
        self.refused = refused
        self.text = text.format(name=name, range=range)
        self.line = None if line is None else line.format(name=name, default=default)


TABLE = [
    Parameter("announce-initial", 50, 0, 100001, RANGE, "0 and 100000", "{name}: {default} ms"),
    Parameter("announce-max", 550, 100000, -1, RANGE, "0 and 100000", "{name}: {default} ms"),
    Parameter("announce-rounds", 5, 1000, 1001, RANGE, "0 and 1000"),
    Parameter("announce-step", 100, 1, 0, RANGE, "0 and 10000", "{name}: {default} ms"),
    Parameter("throttle-trigger-threshold", 50, 100, 0, INTEGER, "1 to 100"),
    Parameter("cpu-throttle-initial", 20, 99, 100, INTEGER, "1 to 99"),
    Parameter("cpu-throttle-increment", 10, 1, 0, INTEGER, "1 to 99"),
    Parameter("cpu-throttle-tailslow", False, True, 1, TYPE, "boolean", "{name}: off"),
    Parameter("max-cpu-throttle", 99, 20, 19, INTEGER, "cpu-throttle-initial to 99"),
    Parameter("tls-creds", "", "x", 1, TYPE, "StrOrNull", "{name}: ''"),
    Parameter("tls-hostname", "", "x", 1, TYPE, "StrOrNull", "{name}: ''"),
    Parameter("tls-authz", "", "x", 1, TYPE, "StrOrNull", "{name}: ''"),
    Parameter(
        "max-bandwidth", 134217728, 1, "x", UINT64, line="{name}: {default} bytes/second"
    ),
    Parameter(
        "avail-switchover-bandwidth", 0, 1, None, UINT64, line="{name}: {default} bytes/second"
    ),
    Parameter(
        "max-postcopy-bandwidth", 0, 1, 1 << 64, UINT64, line="{name}: {default} bytes/second"
    ),
    Parameter(
        "downtime-limit", 300, 2000000, 2000001, INTEGER, "0 to (2000 * 1000) ms",
        "{name}: {default} ms",
    ),
    Parameter("x-checkpoint-delay", 20000, 0, -1, UINT32, line="{name}: {default} ms"),
    Parameter("multifd-channels", 2, 255, 256, UINT8),
    Parameter("multifd-compression", "none", "zlib", "x", VALUE),
    Parameter("multifd-zlib-level", 1, 9, 10, RANGE, "0 and 9", None),
    Parameter("multifd-zstd-level", 1, 20, 21, RANGE, "0 and 20", None),
    Parameter("multifd-qatzip-level", 1, 9, 0, RANGE, "1 and 9", None),
    Parameter("zero-page-detection", "multifd", "legacy", "x", VALUE),
    Parameter("xbzrle-cache-size", 67108864, 4096, 4095, POWER, line="{name}: {default} bytes"),
    Parameter(
        "x-vcpu-dirty-limit-period", 1000, 1, 0, RANGE, "1 and 1000", "{name}: {default} ms"
    ),
    Parameter(
        "vcpu-dirty-limit", 1, 2, 0, "Parameter '{name}' must be greater than 1 MB/s",
        line="{name}: {default} MB/s",
    ),
    Parameter("mode", "normal", "cpr-exec", 3, TYPE, "string"),
    Parameter("direct-io", False, True, "on", TYPE, "boolean", "{name}: off"),
    Parameter(
        "x-rdma-chunk-size", 1 << 20, 2 << 20, 3 << 20,
        "Option x_rdma_chunk_size expects a power of 2 in the range 1MiB to 1024MiB",
        line="{name}: {default} bytes",
    ),
    Parameter("cpr-exec-command", [], ["/bin/true", ""], "x", TYPE, "array", "{name}:"),
]  # fmt: skip

CAPABILITIES = [
    "xbzrle", "rdma-pin-all", "auto-converge", "events", "postcopy-ram", "x-colo", "release-ram",
    "return-path", "pause-before-switchover", "multifd", "dirty-bitmaps", "postcopy-blocktime",
    "late-block-activate", "x-ignore-shared", "validate-uuid", "background-snapshot",
    "zero-copy-send", "postcopy-preempt", "switchover-ack", "dirty-limit", "mapped-ram",
]  # fmt: skip

DEFAULTS = {each.name: each.default for each in TABLE}
LINES = [each.line for each in TABLE if each.line is not None]


def one(parameter: Parameter) -> Row:
    """Its default, a value that stays, and one that is refused and changes nothing."""
    name = parameter.name
    return Row(
        f"parameter-{name}",
        "3: query-migrate-parameters",
        boot(),
        qmp("query-migrate-parameters", None, has({name: parameter.default})),
        qmp("migrate-set-parameters", {name: parameter.taken}, {}),
        qmp("query-migrate-parameters", None, has({name: parameter.taken})),
        refused("migrate-set-parameters", {name: parameter.refused}, parameter.text),
        qmp("query-migrate-parameters", None, has({name: parameter.taken})),
    )


@step
def capability_list(lab: Lab, *enabled: str) -> None:
    """query-migrate-capabilities: all of them, in this order, with these enabled."""
    expected = [{"state": name in enabled, "capability": name} for name in CAPABILITIES]
    expect("capabilities", expected, lab.vm.query("query-migrate-capabilities"), lab.names)


def bad_parameter(id: str, source: str, value: Any, text: str) -> Row:
    name, _, _ = id.removeprefix("parameter-").partition("=")
    return Row(
        id,
        f"4: {source}",
        boot(),
        refused("migrate-set-parameters", {name: value}, text),
        qmp("query-migrate-parameters", None, DEFAULTS),
    )


def capability(name: str, state: bool = True) -> dict[str, Any]:
    return {"capabilities": [{"capability": name, "state": state}]}


SET = "migrate-set-capabilities"


def hmp_error(id: str, line: str, *lines: str, source: str = "3: HMP errors") -> Row:
    return Row(id, source, boot(), hmp(line, *lines))


def shown(words: str) -> Step:
    """The last line of `info migrate_parameters`."""
    return hmp("info migrate_parameters", *LINES[:-1], f"cpr-exec-command:{words}")


ROWS = [
    Row(
        "parameters",
        "3: query-migrate-parameters: 30 keys",
        boot(),
        qmp("query-migrate-parameters", None, DEFAULTS),
        hmp("info migrate_parameters", *LINES),
    ),
    *(one(each) for each in TABLE),
    bad_parameter(
        "parameter-cpr-exec-command=string",
        "command a string / null",
        "/bin/true",
        "Invalid parameter type for 'cpr-exec-command', expected: array",
    ),
    bad_parameter(
        "parameter-cpr-exec-command=null",
        "command a string / null",
        None,
        "Invalid parameter type for 'cpr-exec-command', expected: array",
    ),
    bad_parameter(
        "parameter-cpr-exec-command=numbers",
        "command [1,2]",
        [1, 2],
        "Invalid parameter type for 'cpr-exec-command[0]', expected: string",
    ),
    bad_parameter(
        "parameter-cpr-exec-command=second-number",
        "command [1,2]",
        ["/bin/true", 2],
        "Invalid parameter type for 'cpr-exec-command[1]', expected: string",
    ),
    bad_parameter(
        "parameter-mode=bogus",
        "mode bogus / 3",
        "bogus",
        "Parameter 'mode' does not accept value 'bogus'",
    ),
    bad_parameter(
        "parameter-mode=3",
        "mode bogus / 3",
        3,
        "Invalid parameter type for 'mode', expected: string",
    ),
    bad_parameter(
        "parameter-bogus", "unknown parameter / capability", 1, "Parameter 'bogus' is unexpected"
    ),
    Row(
        "parameters-none",
        "4: migrate-set-parameters without arguments",
        boot(),
        qmp("migrate-set-parameters", None, {}),
        qmp("migrate-set-parameters", {}, {}),
        qmp("query-migrate-parameters", None, DEFAULTS),
    ),
    Row(
        "parameters-one-bad-sets-none",
        "3: query-migrate-parameters",
        boot(),
        refused(
            "migrate-set-parameters",
            {"mode": "cpr-exec", "downtime-limit": -1},
            "Option downtime-limit expects an integer in the range of 0 to (2000 * 1000) ms",
        ),
        qmp("query-migrate-parameters", None, DEFAULTS),
    ),
    Row(
        "parameters-by-hmp",
        "3: HMP: migrate_set_parameter",
        boot(),
        hmp("migrate_set_parameter downtime-limit 500"),
        hmp("migrate_set_parameter mode cpr-exec"),
        hmp("migrate_set_parameter direct-io on"),
        qmp(
            "query-migrate-parameters",
            None,
            {**DEFAULTS, "downtime-limit": 500, "mode": "cpr-exec", "direct-io": True},
        ),
    ),
    Row(
        "command-by-hmp",
        "3: HMP: cpr-exec-command splits shell-like",
        boot(),
        hmp("migrate_set_parameter cpr-exec-command /x \"a b\" c 'd e'"),
        qmp("query-migrate-parameters", None, has({"cpr-exec-command": ["/x", "a b", "c", "d e"]})),
        shown(" /x a b c d e"),
        parameters(cpr_exec_command=[]),
        shown(""),
        hmp('migrate_set_parameter cpr-exec-command ""'),
        qmp("query-migrate-parameters", None, has({"cpr-exec-command": [""]})),
        shown(" "),
    ),
    Row(
        "capabilities",
        "3: query-migrate-capabilities, in this order",
        boot(),
        capability_list(),
        hmp("info migrate_capabilities", *(f"{name}: off" for name in CAPABILITIES)),
    ),
    *(
        Row(
            f"capability-{name}",
            "3: query-migrate-capabilities, in this order",
            boot(),
            capabilities(name),
            capability_list(name),
            capabilities(name, state=False),
            capability_list(),
        )
        for name in (
            "xbzrle",
            "auto-converge",
            "events",
            "release-ram",
            "return-path",
            "pause-before-switchover",
            "multifd",
            "dirty-bitmaps",
            "late-block-activate",
            "x-ignore-shared",
            "validate-uuid",
            "mapped-ram",
        )
    ),
    Row(
        "capability-by-hmp",
        "3: HMP: info migrate_capabilities",
        boot(),
        hmp("migrate_set_capability events on"),
        capability_list("events"),
        hmp("migrate_set_capability events off"),
        capability_list(),
    ),
    Row(
        "capability-bogus",
        "4: unknown parameter / capability",
        boot(),
        refused(SET, capability("bogus"), "Parameter 'capability' does not accept value 'bogus'"),
        capability_list(),
    ),
    Row(
        "capability-x-colo",
        "4: x-colo (needs return-path)",
        boot(),
        refused(SET, capability("x-colo"), "Capability 'x-colo' requires capability 'return-path'"),
        capability_list(),
    ),
    hmp_error(
        "hmp-unknown-parameter",
        "migrate_set_parameter bogus 1",
        "Error: invalid parameter value: bogus",
    ),
    hmp_error(
        "hmp-no-parameter",
        "migrate_set_parameter",
        "migrate_set_parameter: string expected",
        'Try "help migrate_set_parameter" for more information',
    ),
    hmp_error(
        "hmp-bad-mode",
        "migrate_set_parameter mode bogus",
        "Error: Parameter 'mode' does not accept value 'bogus'",
    ),
    hmp_error(
        "hmp-unknown-capability",
        "migrate_set_capability bogus on",
        "Error: invalid parameter value: bogus",
    ),
    hmp_error(
        "hmp-out-of-range",
        "migrate_set_parameter announce-step 0",
        "Error: Option announce-step expects a value between 0 and 10000",
    ),
    hmp_error("hmp-unknown-command", "bogus", "unknown command: 'bogus'"),
]
