"""Migration parameters and capabilities; the texts are those of QEMU 11.1.3."""

from __future__ import annotations

from typing import Any

import pytest

from cpr.errors import CommandError, MigrationError
from cpr.migration import parameters as module
from cpr.migration.capabilities import CAPABILITIES, Capabilities
from cpr.migration.parameters import Parameter, Parameters
from cpr.migration.text import words

DEFAULTS = {
    "announce-initial": 50,
    "announce-max": 550,
    "announce-rounds": 5,
    "announce-step": 100,
    "throttle-trigger-threshold": 50,
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "cpu-throttle-tailslow": False,
    "max-cpu-throttle": 99,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "max-bandwidth": 134217728,
    "avail-switchover-bandwidth": 0,
    "max-postcopy-bandwidth": 0,
    "downtime-limit": 300,
    "x-checkpoint-delay": 20000,
    "multifd-channels": 2,
    "multifd-compression": "none",
    "multifd-zlib-level": 1,
    "multifd-zstd-level": 1,
    "multifd-qatzip-level": 1,
    "zero-page-detection": "multifd",
    "xbzrle-cache-size": 67108864,
    "x-vcpu-dirty-limit-period": 1000,
    "vcpu-dirty-limit": 1,
    "mode": "normal",
    "direct-io": False,
    "x-rdma-chunk-size": 1048576,
    "cpr-exec-command": [],
}

INFO_LINES = """\
announce-initial: 50 ms
announce-max: 550 ms
announce-rounds: 5
announce-step: 100 ms
throttle-trigger-threshold: 50
cpu-throttle-initial: 20
cpu-throttle-increment: 10
cpu-throttle-tailslow: off
max-cpu-throttle: 99
tls-creds: ''
tls-hostname: ''
tls-authz: ''
max-bandwidth: 134217728 bytes/second
avail-switchover-bandwidth: 0 bytes/second
max-postcopy-bandwidth: 0 bytes/second
downtime-limit: 300 ms
x-checkpoint-delay: 20000 ms
multifd-channels: 2
multifd-compression: none
zero-page-detection: multifd
xbzrle-cache-size: 67108864 bytes
x-vcpu-dirty-limit-period: 1000 ms
vcpu-dirty-limit: 1 MB/s
mode: normal
direct-io: off
x-rdma-chunk-size: 1048576 bytes
cpr-exec-command:""".splitlines()


def test_the_defaults_are_qemus_thirty() -> None:
    assert Parameters().query() == DEFAULTS
    assert Parameters().info_lines() == INFO_LINES


@pytest.mark.parametrize("name", [n for n, value in DEFAULTS.items() if type(value) is int])
def test_an_integer_takes_no_other_type(name: str) -> None:
    wrongs: list[Any] = ["1", 1.5, None, True, [], 1 << 64]
    for wrong in wrongs:
        with pytest.raises(CommandError) as refused:
            Parameters().set({name: wrong})
        assert str(refused.value) == f"Parameter '{name}' expects uint64"


@pytest.mark.parametrize(
    ("name", "good", "bad", "text"),
    [
        ("announce-initial", [0, 100000], [100001, -1], "a value between 0 and 100000"),
        ("announce-max", [0, 100000], [100001], "a value between 0 and 100000"),
        ("announce-rounds", [0, 1000], [1001], "a value between 0 and 1000"),
        ("announce-step", [1, 10000], [0, 10001], "a value between 0 and 10000"),
        ("throttle-trigger-threshold", [1, 100], [0, 101], "an integer in the range of 1 to 100"),
        ("cpu-throttle-initial", [1, 99], [0, 100], "an integer in the range of 1 to 99"),
        ("cpu-throttle-increment", [1, 99], [0, 100], "an integer in the range of 1 to 99"),
        (
            "max-cpu-throttle",
            [20, 99],
            [19, 100],
            "an integer in the range of cpu-throttle-initial to 99",
        ),
        (
            "downtime-limit",
            [0, 2000000],
            [2000001, -1],
            "an integer in the range of 0 to (2000 * 1000) ms",
        ),
        ("multifd-channels", [1, 255], [0], "a value between 1 and 255"),
        ("multifd-zlib-level", [0, 9], [10], "a value between 0 and 9"),
        ("multifd-zstd-level", [0, 20], [21], "a value between 0 and 20"),
        ("multifd-qatzip-level", [1, 9], [0, 10], "a value between 1 and 9"),
        (
            "xbzrle-cache-size",
            [4096, 1 << 63],
            [0, 2048, 4097],
            "a power of two no less than the target page size",
        ),
        ("x-vcpu-dirty-limit-period", [1, 1000], [0, 1001], "a value between 1 and 1000"),
    ],
)
def test_ranges(name: str, good: list[int], bad: list[int], text: str) -> None:
    for value in good:
        parameters = Parameters()
        parameters.set({name: value})
        assert parameters.get(name) == value
    for value in bad:
        with pytest.raises(CommandError) as refused:
            Parameters().set({name: value})
        assert str(refused.value) == f"Option {name} expects {text}"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bogus": 1}, "Parameter 'bogus' is unexpected"),
        ({"bogus": 1, "mode": 3}, "Invalid parameter type for 'mode', expected: string"),
        ({"mode": "bogus"}, "Parameter 'mode' does not accept value 'bogus'"),
        ({"mode": None}, "Invalid parameter type for 'mode', expected: string"),
        ({"direct-io": 1}, "Invalid parameter type for 'direct-io', expected: boolean"),
        ({"tls-creds": 0}, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
        (
            {"cpr-exec-command": "a b"},
            "Invalid parameter type for 'cpr-exec-command', expected: array",
        ),
        (
            {"cpr-exec-command": ["a", 1]},
            "Invalid parameter type for 'cpr-exec-command[1]', expected: string",
        ),
        ({"multifd-channels": 256}, "Parameter 'multifd-channels' expects uint8_t"),
        ({"x-checkpoint-delay": 1 << 32}, "Parameter 'x-checkpoint-delay' expects uint32_t"),
        ({"vcpu-dirty-limit": 0}, "Parameter 'vcpu-dirty-limit' must be greater than 1 MB/s"),
        (
            {"x-rdma-chunk-size": 3},
            "Option x_rdma_chunk_size expects a power of 2 in the range 1MiB to 1024MiB",
        ),
    ],
)
def test_refusals(changes: dict, text: str) -> None:
    parameters = Parameters()
    with pytest.raises(CommandError) as refused:
        parameters.set({"announce-rounds": 7, **changes})
    assert str(refused.value) == text
    assert parameters.query() == DEFAULTS  # none of the changes was applied


def test_a_negative_bandwidth_wraps_as_in_qemu() -> None:
    parameters = Parameters()
    parameters.set({"max-bandwidth": -1, "tls-creds": None})
    assert parameters.get("max-bandwidth") == (1 << 64) - 1
    assert parameters.get("tls-creds") == ""


def test_query_gives_copies() -> None:
    parameters = Parameters()
    parameters.set({"cpr-exec-command": ["a"]})
    parameters.query()["cpr-exec-command"].append("b")
    assert parameters.get("cpr-exec-command") == ["a"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("announce-initial", "5k", 5120),
        ("announce-initial", "0x10", 16),
        ("downtime-limit", "1.5k", 1536),
        ("max-bandwidth", "5", 5 << 20),
        ("max-bandwidth", "1.5", 3 << 19),
        ("max-bandwidth", "0x10", 16 << 20),
        ("max-bandwidth", "5b", 5),
        ("max-bandwidth", "2G", 2 << 30),
        ("avail-switchover-bandwidth", "1", 1 << 20),
        ("max-postcopy-bandwidth", "3", 3),
        ("multifd-channels", "0x11", 17),
        ("cpu-throttle-tailslow", "yes", True),
        ("direct-io", "off", False),
        ("tls-hostname", '"x y"', '"x y"'),
        ("mode", "cpr-exec", "cpr-exec"),
        ("cpr-exec-command", "/x \"a b\" 'c d' e\\ f", ["/x", "a b", "c d", "e f"]),
        ("cpr-exec-command", "''", [""]),
    ],
)
def test_from_a_command_line(name: str, text: str, value: object) -> None:
    parameters = Parameters()
    parameters.set_from_string(name, text)
    assert parameters.get(name) == value


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("bogus", "1", "invalid parameter value: bogus"),
        ("mode", "cpr-exec x", "Parameter 'mode' does not accept value 'cpr-exec x'"),
        ("max-bandwidth", "5Q", "Invalid size 5Q"),
        ("max-bandwidth", "-1", "Invalid size -1"),
        ("max-bandwidth", "15E", "Invalid size 15E"),
        ("announce-max", "-1", "Value '-1' is out of range for parameter 'announce-max'"),
        (
            "announce-max",
            "1.5",
            "Parameter 'announce-max' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively.",
        ),
        ("multifd-channels", "2x", "Parameter 'multifd-channels' expects uint64"),
        ("multifd-channels", "300", "Parameter 'multifd-channels' expects uint8_t"),
        ("direct-io", "1", "Parameter 'direct-io' expects 'on' or 'off'"),
        (
            "cpr-exec-command",
            '"x',
            'Text ended before matching quote was found for ". (The text was “"x”)',
        ),
        (
            "cpr-exec-command",
            "x\\",
            "Text ended just after a “\\” character. (The text was “x\\”)",
        ),
    ],
)
def test_refused_from_a_command_line(name: str, text: str, error: str) -> None:
    parameters = Parameters()
    with pytest.raises(CommandError) as refused:
        parameters.set_from_string(name, text)
    assert str(refused.value) == error
    assert parameters.query() == DEFAULTS


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("  a   b  ", ["a", "b"]),
        ("a'b'\"c\"", ["abc"]),
        ("a#b #comment", ["a#b"]),
        ('"\\a\\$\\`\\""', ['\\a$`"']),
        ("a\\b", ["ab"]),
        ("a ''", ["a", ""]),
    ],
)
def test_words(text: str, result: list[str]) -> None:
    assert words(text) == result


def test_extensions_are_hidden_until_they_are_set() -> None:
    extension = Parameter("x-cpr-test", module.BOOL, True)
    parameters = Parameters([extension])
    assert parameters.get("x-cpr-test") is True
    assert parameters.query() == DEFAULTS
    assert "x-cpr-test" in parameters.names()
    parameters.set_from_string("x-cpr-test", "off")
    assert parameters.query() == {**DEFAULTS, "x-cpr-test": False}
    assert parameters.info_lines() == [*INFO_LINES, "x-cpr-test: off"]


def test_capabilities_are_listed_in_qemus_order() -> None:
    capabilities = Capabilities()
    assert len(CAPABILITIES) == 21
    assert capabilities.query() == [{"capability": n, "state": False} for n in CAPABILITIES]
    capabilities.set([{"capability": "events", "state": True}])
    assert capabilities.enabled("events")
    assert capabilities.info_lines()[:4] == [
        "xbzrle: off",
        "rdma-pin-all: off",
        "auto-converge: off",
        "events: on",
    ]


def switch_on(capabilities: Capabilities, *names: str) -> None:
    capabilities.set([{"capability": name, "state": True} for name in names])


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["bogus"], "Parameter 'capability' does not accept value 'bogus'"),
        (["x-colo"], "Capability 'x-colo' requires capability 'return-path'"),
        (["switchover-ack"], "Capability 'switchover-ack' requires capability 'return-path'"),
        (["postcopy-preempt"], "Postcopy preempt requires postcopy-ram"),
        (["postcopy-ram", "x-ignore-shared"], "Postcopy is not compatible with ignore-shared"),
        (["xbzrle", "multifd"], "Multifd is not compatible with xbzrle"),
        (["mapped-ram", "xbzrle"], "Mapped-ram migration is incompatible with xbzrle"),
        (["mapped-ram", "postcopy-ram"], "Mapped-ram migration is incompatible with postcopy"),
        (
            ["background-snapshot", "multifd"],
            "Background-snapshot is not compatible with multifd",
        ),
        (
            ["zero-copy-send"],
            "Zero copy only available for non-compressed non-TLS multifd migration",
        ),
        (
            ["dirty-limit"],
            "dirty-limit requires KVM with accelerator property 'dirty-ring-size' set",
        ),
        (
            ["dirty-limit", "auto-converge"],
            "dirty-limit conflicts with auto-converge either of then available currently",
        ),
    ],
)
def test_capabilities_that_do_not_go_together(names: list[str], text: str) -> None:
    capabilities = Capabilities()
    with pytest.raises(CommandError) as refused:
        switch_on(capabilities, *names)
    assert str(refused.value) == text
    assert not any(row["state"] for row in capabilities.query())


def test_zero_copy_needs_plain_multifd() -> None:
    parameters = Parameters()
    capabilities = Capabilities(parameters)
    switch_on(capabilities, "multifd", "zero-copy-send")
    parameters.set({"multifd-compression": "zlib"})
    with pytest.raises(CommandError):
        switch_on(capabilities, "events")


def test_capabilities_are_locked_while_a_migration_runs() -> None:
    capabilities = Capabilities(in_progress=lambda: True)
    with pytest.raises(MigrationError, match="There's a migration process in progress"):
        switch_on(capabilities, "events")


def test_parameters_of_an_earlier_release_are_taken_and_do_nothing(capfd):
    parameters = Parameters()
    parameters.set({"x-cpr-mm-holder": False, "downtime-limit": 5})
    parameters.set_from_string("x-cpr-early-resume", "off")
    said = "cpr-vmm: warning: migration parameter '{}' is deprecated, and does nothing\n"
    assert capfd.readouterr().err == "".join(
        said.format(name) for name in ("x-cpr-mm-holder", "x-cpr-early-resume")
    )
    assert parameters.query() == Parameters().query() | {"downtime-limit": 5}
    with pytest.raises(CommandError, match="expected: boolean"):
        parameters.set({"x-cpr-mm-holder": 3})
