"""QEMU's option grammar and values.  Accepted and refused spellings are those of QEMU 11.1.3."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr.config.option_json import parse_channel, parse_json
from cpr.config.option_values import (
    BOOL,
    INT,
    KEYVAL,
    OPTS,
    SIZE,
    STRING,
    is_identifier,
    parse_bool,
    parse_int,
    parse_property,
    parse_size,
)
from cpr.config.options import OptionGroup, is_uri, nest, parse_keyval, parse_opts, quote
from cpr.errors import ConfigError

KEYS = st.from_regex(r"[a-z][a-z0-9_-]{0,8}", fullmatch=True)
VALUES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)


def opts(text: str, implied: str | None = None) -> dict[str, str]:
    return parse_opts(text, implied, "-x", [])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("+4096", 4096),
        (" 4096", 4096),
        ("010000", 10000),
        ("5.", 5),
        ("1.0", 1),
        ("1b", 1),
        ("1.0b", 1),
        ("4096k", 4 << 20),
        ("16M", 16 << 20),
        ("16m", 16 << 20),
        ("4G", 4 << 30),
        ("1.5G", 3 << 29),
        (".5G", 1 << 29),
        ("2T", 2 << 40),
        ("1P", 1 << 50),
        ("15E", 15 << 60),
        ("4096.0007k", (4096 << 10) + 1),
        ("4096.0003k", 4096 << 10),
        ("0x1000000", 16 << 20),
        ("0XfF", 255),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "foo", "M", ".", ".M", "16X", "16MM", "16Kb", "16 ", "1.5", "1.5b", "1e3", "0x", "0x10M"]
    + ["0x1.8", "1_000", "inf", "nan", "--5", "- 5", "1..5G", "1.5.5G", "٣", "0x_1"],
)
def test_parse_size_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["-1", "-0", "16E", "18446744073709551616", "16777216T", "9" * 5000, "0x" + "f" * 5000]
)
def test_parse_size_out_of_range(text: str) -> None:
    with pytest.raises(OverflowError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("12", 12), ("+2", 2), (" 2", 2), ("-2", -2), ("0x10", 16), ("010", 8), ("0b11", 3)],
)
def test_parse_int(text: str, value: int) -> None:
    assert parse_int(text) == value


@pytest.mark.parametrize(
    "text", ["", "foo", "2 ", "09", "0x", "0b", "1_0", "1.0", "2M", "0b2", "-"]
)
def test_parse_int_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_int(text)


def test_parse_int_out_of_range() -> None:
    for text in ("18446744073709551616", "9" * 5000):
        with pytest.raises(OverflowError):
            parse_int(text)


def test_parse_bool() -> None:
    assert all(parse_bool(text) is True for text in ("on", "yes", "true", "y"))
    assert all(parse_bool(text) is False for text in ("off", "no", "false", "n"))
    for text in ("", "1", "On", "maybe"):
        with pytest.raises(ValueError):
            parse_bool(text)


def test_identifiers() -> None:
    assert all(is_identifier(text) for text in ("a", "ram0", "a.b-c_d"))
    assert not any(is_identifier(text) for text in ("", "1a", "a/b", "a b", "é", "_a"))


def test_property_kinds() -> None:
    assert parse_property(BOOL, "p", "on", KEYVAL, "") is True
    assert parse_property(INT, "p", "0x10", KEYVAL, "") == 16
    assert parse_property(SIZE, "p", "1k", KEYVAL, "") == 1024
    assert parse_property(STRING, "p", "on", KEYVAL, "") == "on"
    assert parse_property(("a", "b"), "p", "b", KEYVAL, "") == "b"


def test_opts() -> None:
    assert opts("") == {}
    assert opts("pc,a=1,b=", "type") == {"type": "pc", "a": "1", "b": ""}
    assert opts("a=x,,y=z,b=1") == {"a": "x,y=z", "b": "1"}
    assert opts("a,,b", "guest") == {"guest": "a,b"}
    assert opts(",b=1", "guest") == {"guest": "", "b": "1"}
    assert opts("a=1,a=2") == {"a": "2"}
    assert opts("id=a,id=b") == {"id": "a"}
    assert opts("a=1,") == {"a": "1"}


def test_opts_flags_warn() -> None:
    warnings: list[str] = []
    assert parse_opts("x,server,nowait", "path", "-serial x,server,nowait", warnings) == {
        "path": "x",
        "server": "on",
        "wait": "off",
    }
    assert warnings == [
        "-serial x,server,nowait: warning: short-form boolean option 'server' deprecated\n"
        "Please use server=on instead",
        "-serial x,server,nowait: warning: short-form boolean option 'nowait' deprecated\n"
        "Please use wait=off instead",
    ]


def test_keyval() -> None:
    assert parse_keyval("", "type", "") == {}
    assert parse_keyval("pc,a=1,b=x,,y", "type", "") == {"type": "pc", "a": "1", "b": "x,y"}
    assert parse_keyval("smp.cpus=2,a.0=x", "type", "") == {"smp.cpus": "2", "a.0": "x"}
    assert parse_keyval("pc,", "type", "") == {"type": "pc"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pc,foo", "Expected '=' after parameter 'foo'"),
        ("pc,,x", "Invalid parameter ''"),
        (",pc", "Invalid parameter ''"),
        ("=pc", "Invalid parameter ''"),
        ("pc,-a=1", "Invalid parameter '-a'"),
        ("pc,a$=1", "Invalid parameter 'a$'"),
        ("pc,1=1", "Invalid parameter '1'"),
        ("pc,a=1,a.b=2", "Parameters 'a.*' used inconsistently"),
    ],
)
def test_keyval_refuses(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keyval(text, "type", f"-M {text}")
    assert str(caught.value) == f"-M {text}: {message}"


def test_nest() -> None:
    assert nest({"a": "1", "b.c": "2", "b.d.e": "3", "f.1": "y", "f.0": "x"}) == {
        "a": "1",
        "b": {"c": "2", "d": {"e": "3"}},
        "f": ["x", "y"],
    }


@given(st.dictionaries(KEYS, VALUES))
def test_both_dialects_give_back_what_was_quoted(values: dict[str, str]) -> None:
    text = ",".join(f"{key}={quote(value)}" for key, value in values.items())
    assert opts(text) == values
    assert opts(text, "implied") == values
    assert parse_keyval(text, "implied", "") == values


@given(VALUES)
def test_any_text_parses_or_gives_one_error(text: str) -> None:
    assert all(isinstance(value, str) for value in opts(text, "a").values())
    try:
        assert isinstance(parse_keyval(text, "a", "-x"), dict)
    except ConfigError as error:
        assert str(error).startswith("-x: ")


@given(st.integers(0, (1 << 64) - 1))
def test_sizes_round_trip(size: int) -> None:
    assert parse_size(str(size)) == parse_size(hex(size)) == size


def test_typed_group() -> None:
    group = OptionGroup("g", {"a": "1", "b": "on", "c": "1k", "d": "x"}, "-g", OPTS)
    kinds = {"a": INT, "b": BOOL, "c": SIZE, "d": STRING}
    assert group.typed(kinds) == {"a": 1, "b": True, "c": 1024, "d": "x"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a":}', "1:6: JSON parse error, expecting value"),
        ("{", "1:2: JSON parse error, premature end of input"),
        ('{"a":1 "b":2}', "1:8: JSON parse error, expected ',' or '}'"),
        ('{"a":1,}', "1:8: JSON parse error, expecting key"),
        ('{"a" 1}', "1:6: JSON parse error, expecting ':'"),
        ('{"a":bogus}', "1:6: JSON parse error, invalid keyword 'bogus'"),
        ('{"a":@}', "1:6: JSON parse error, stray '@'"),
        ("{} x", "Expecting at most one JSON value"),
        ('{"a":1,"a":2}', "JSON parse error, duplicate key"),
        ('{"a":' * 5000, "JSON parse error, number or nesting too large"),
    ],
)
def test_json_errors(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text, "-object …")
    assert str(caught.value) == f"-object …: {message}"


def test_channels() -> None:
    expected = {"channel-type": "main", "addr": {"transport": "exec", "args": ["/bin/true", "x"]}}
    assert (
        parse_channel(
            '{"channel-type": "main", "addr": {"transport": "exec", "args": ["/bin/true", "x"]}}'
        )
        == parse_channel("main,addr.transport=exec,addr.args.0=/bin/true,addr.args.1=x")
        == expected
    )
    assert parse_channel("defer") is None
    assert parse_channel("file:/x,offset=0") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("main", "Parameter 'addr' is missing"),
        ("bogus", "Parameter 'channel-type' does not accept value 'bogus'"),
        ("{}", "Parameter 'channel-type' is missing"),
        ("main,addr=1", "Invalid parameter type for 'addr', expected: object"),
        ("main,addr.transport=file,foo=1", "Parameter 'foo' is unexpected"),
    ],
)
def test_channels_are_checked(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_channel(text, f"-incoming {text}")
    assert str(caught.value) == f"-incoming {text}: {message}"


def test_uris() -> None:
    assert all(is_uri(text) for text in ("file:/x", "tcp:[::1]:4", ":x", "a+b.c-d:"))
    assert not any(is_uri(text) for text in ("defer", "main", '{"a":1}', "main,addr.path=/a:b"))
