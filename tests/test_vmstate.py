"""vmstate.py: bodies against QEMU's own, descriptions against QEMU's own, and bad input."""

from __future__ import annotations

import functools
import struct

import pytest
from described import (
    STREAMS,
    blocks,
    description_of,
    golden,
    reader_of,
    skip_body,
    understood,
    vmsd_of,
)
from hypothesis import given
from hypothesis import strategies as st

from cpr.state.fields import FixedField
from cpr.state.ram_section import RamDecoder
from cpr.state.reader import BytesReader, StreamError
from cpr.state.vmstate import (
    VMStateDescription,
    boolean,
    buffer,
    decode,
    describe,
    encode,
    i32,
    i64,
    qlist,
    struct_,
    timer,
    u8,
    u16,
    u32,
    u64,
    unused,
    varray,
    vbuffer,
)

TIMER = VMStateDescription(
    "timer", 2, 1, (i64("cpu_ticks_offset"), unused(8), i64("cpu_clock_offset"))
)
GLOBALSTATE = VMStateDescription(
    "globalstate",
    1,
    1,
    (
        u32("size"),
        buffer("runstate", 32),
        u8("has_vm_was_suspended"),
        u8("vm_was_suspended"),
        buffer("unused", 66),
    ),
)
CPU_COMMON = VMStateDescription("cpu_common", 1, 1, (u32("halted"), u32("interrupt_request")))
PORT92 = VMStateDescription("port92", 1, 1, (u8("outport"),))
I8259 = VMStateDescription(
    "i8259",
    1,
    1,
    (
        u8("last_irr"),
        u8("irr"),
        u8("imr"),
        u8("isr"),
        u8("priority_add"),
        u8("irq_base"),
        u8("read_reg_select"),
        u8("poll"),
        u8("special_mask"),
        u8("init_state"),
        u8("auto_eoi"),
        u8("rotate_on_auto_eoi"),
        u8("special_fully_nested_mode"),
        u8("init4"),
        u8("single_mode"),
        u8("elcr"),
    ),
)
MC146818RTC = VMStateDescription(
    "mc146818rtc",
    3,
    1,
    (
        buffer("cmos_data", 128),
        u8("cmos_index"),
        unused(7 * 4),
        timer("periodic_timer"),
        i64("next_periodic_time"),
        unused(3 * 8),
        u32("irq_coalesced"),
        u32("period"),
        u64("base_rtc"),
        u64("last_update"),
        i64("offset"),
        timer("update_timer"),
        u64("next_alarm_time"),
    ),
)
PIT_CHANNEL = VMStateDescription(
    "pit channel",
    2,
    2,
    (
        i32("count"),
        u16("latched_count"),
        u8("count_latched"),
        u8("status_latched"),
        u8("status"),
        u8("read_state"),
        u8("write_state"),
        u8("write_latch"),
        u8("rw_mode"),
        u8("mode"),
        u8("bcd"),
        u8("gate"),
        i64("count_load_time"),
        i64("next_transition_time"),
    ),
)
I8254 = VMStateDescription(
    "i8254",
    3,
    2,
    (
        u32("channels[0].irq_disabled"),
        struct_("channels", PIT_CHANNEL, 3),
        i64("channels[0].next_transition_time"),
    ),
)
PCKBD_EXTENDED = VMStateDescription(
    "pckbd/extended_state",
    0,
    0,
    (u32("migration_flags"), u32("obsrc"), u8("obdata"), u8("cbdata")),
)
PCKBD = VMStateDescription(
    "pckbd",
    3,
    3,
    (
        struct_(
            "kbd",
            VMStateDescription(
                "pckbd",
                3,
                3,
                (u8("write_cmd"), u8("status"), u8("mode"), u8("pending_tmp")),
                (PCKBD_EXTENDED,),
            ),
        ),
    ),
)


BY_HAND = [TIMER, GLOBALSTATE, CPU_COMMON, PORT92, I8259, MC146818RTC, I8254, PCKBD]


def bodies(name: str) -> dict[tuple[str, int], tuple[bytes, dict]]:
    """The body of each device in the golden stream `name`, and its entry in the description."""
    stream = golden(name)
    entries = {(d["name"], d["instance_id"]): d for d in description_of(stream)["devices"]}
    found = {}
    reader = reader_of(stream)
    reader.header()
    with_addresses = "x-ignore-shared" in reader.configuration().capabilities
    ram = RamDecoder(blocks(name), with_addresses)
    for section in reader.sections(None):
        if section.idstr == "ram":
            list(ram.pages(reader, section.version_id))
            continue
        key = section.idstr, section.instance_id
        body = BytesReader(stream[reader.offset :])
        skip_body(body, entries[key])
        found[key] = reader.read(body.offset), entries[key]
    assert found.keys() == entries.keys()
    return found


@pytest.mark.parametrize("vmsd", BY_HAND, ids=lambda vmsd: vmsd.name)
def test_descriptions_by_hand_agree_with_qemu(vmsd):
    present = [(key, *found) for key, found in bodies("memfd1").items() if key[0] == vmsd.name]
    assert present
    for (idstr, instance_id), body, entry in present:
        state = decode(vmsd, BytesReader(body), vmsd.version_id)
        assert encode(vmsd, state) == body
        head = {"name": idstr, "instance_id": instance_id}
        described = head | describe(vmsd, state)
        assert described == entry
        assert list(described) == list(entry)
        assert [list(field) for field in described["fields"]] == [
            list(field) for field in entry["fields"]
        ]


@pytest.mark.parametrize("name", STREAMS)
def test_every_golden_device_decodes_and_encodes_to_the_same(name):
    checked = 0
    for body, entry in bodies(name).values():
        vmsd = vmsd_of(entry)
        reader = BytesReader(body)
        state = decode(vmsd, reader, vmsd.version_id)
        assert reader.offset == len(body)
        assert encode(vmsd, state) == body
        if understood(entry):
            ours = describe(vmsd, state)
            assert ours == {key: entry[key] for key in entry if key not in ("name", "instance_id")}
            checked += 1
    assert checked >= len(bodies(name)) / 2


def test_values_that_the_golden_files_are_known_to_hold():
    body, _ = bodies("memfd1")["globalstate", 0]
    state = decode(GLOBALSTATE, BytesReader(body), 1)
    assert state["runstate"] == b"running".ljust(32, b"\0")
    assert (state["size"], state["has_vm_was_suspended"], state["vm_was_suspended"]) == (8, 1, 0)
    body, _ = bodies("memfd1")["pckbd", 0]
    assert "pckbd/extended_state" in decode(PCKBD, BytesReader(body), 3)["kbd"]


def i8(name: str, num: int | None = None) -> FixedField:
    return FixedField(name, "int8", num)


def i16(name: str, num: int | None = None) -> FixedField:
    return FixedField(name, "int16", num)


PAIR = VMStateDescription("pair", 1, 1, (u8("a"), i16("b")))
EXTRA = VMStateDescription("optional/extra", 1, 1, (u8("x"),))
OPTIONAL = VMStateDescription("optional", 1, 1, (u8("a"),), (EXTRA,))


def round_trip(vmsd, state):
    data = encode(vmsd, state)
    reader = BytesReader(data)
    assert decode(vmsd, reader, vmsd.version_id) == state
    assert reader.offset == len(data)
    return data


def test_layout_of_each_kind():
    vmsd = VMStateDescription(
        "all",
        1,
        1,
        (
            i8("i8"),
            u16("u16"),
            boolean("flags", 2),
            buffer("bytes", 3),
            unused(2),
            timer("timer"),
            struct_("one", PAIR),
            struct_("two", PAIR, 2),
            u8("count"),
            varray("some", PAIR, "count"),
            u8("length"),
            vbuffer("text", "length"),
            qlist("list", PAIR),
        ),
    )
    pair = {"a": 1, "b": -2}
    state = {
        "i8": -1,
        "u16": 0x1234,
        "flags": [True, False],
        "bytes": b"abc",
        "timer": -1,
        "one": pair,
        "two": [pair, pair],
        "count": 1,
        "some": [pair],
        "length": 2,
        "text": b"hi",
        "list": [pair],
    }
    wire = "ff 1234 01 00 616263 0000 ffffffffffffffff 01fffe 01fffe 01fffe 01 01fffe 02 6869"
    assert round_trip(vmsd, state) == bytes.fromhex(wire + " 01 01fffe 00")
    described = {field["name"]: field for field in describe(vmsd, state)["fields"]}
    assert described["flags"] == {"name": "flags", "array_len": 2, "type": "bool", "size": 1}
    assert described["unused"] == {"name": "unused", "type": "unused_buffer", "size": 2}
    assert described["two"]["array_len"] == 2
    assert "array_len" not in described["some"]
    assert described["text"] == {"name": "text", "type": "buffer", "size": 2}
    skip_body(BytesReader(encode(vmsd, state)), describe(vmsd, state))


def test_empty_arrays_are_not_described():
    vmsd = VMStateDescription("empty", 1, 1, (u8("n"), u8("none", 0), varray("v", PAIR, "n")))
    state = {"n": 0, "none": [], "v": []}
    assert round_trip(vmsd, state) == b"\0"
    assert [field["name"] for field in describe(vmsd, state)["fields"]] == ["n"]


def test_elements_of_different_layouts_are_described_one_by_one():
    vmsd = VMStateDescription("many", 1, 1, (struct_("each", OPTIONAL, 2),))
    state = {"each": [{"a": 1}, {"a": 2, "optional/extra": {"x": 3}}]}
    assert round_trip(vmsd, state) == b"\1\2" + b"\5\x0eoptional/extra\0\0\0\1\3"
    first, second = describe(vmsd, state)["fields"]
    assert (first["name"], first["size"]) == ("each", 1)
    assert (second["name"], second["size"]) == ("each", 22)
    assert "array_len" not in first
    assert "subsections" not in first["struct"]
    assert [s["vmsd_name"] for s in second["struct"]["subsections"]] == ["optional/extra"]


def test_a_subsection_of_another_name_is_left_alone():
    reader = BytesReader(b"\7" + b"\5\5other\0\0\0\1")
    assert decode(OPTIONAL, reader, 1) == {"a": 7}
    assert reader.offset == 1


def header(name, version):
    return bytes([5, len(name)]) + name.encode() + struct.pack(">I", version)


FAILURE = "Loading VM subsection 'optional/extra' in 'optional' failed: "
CORRUPT = {
    "empty": (b"", "Failed to load optional state: stream error: -5"),
    "unknown subsection": (
        b"\0" + header("optional/other", 1),
        "VM subsection 'optional/other' in 'optional' does not exist",
    ),
    "subsection too new": (
        b"\0" + header("optional/extra", 2) + b"\0",
        FAILURE + "optional/extra: incoming version_id 2 is too new for local version_id 1",
    ),
    "subsection too old": (
        b"\0" + header("optional/extra", 0) + b"\0",
        FAILURE + "optional/extra: incoming version_id 0 is too old for local minimum version_id 1",
    ),
    "cut in the version": (
        b"\0" + header("optional/extra", 1)[:-2],
        FAILURE + "optional/extra: incoming version_id 0 is too old for local minimum version_id 1",
    ),
    "cut in the subsection": (
        b"\0" + header("optional/extra", 1),
        FAILURE + "Failed to load optional/extra state: stream error: -5",
    ),
}


@pytest.mark.parametrize(("data", "text"), CORRUPT.values(), ids=CORRUPT)
def test_corrupt_bodies_fail_with_the_text_of_qemu(data, text):
    with pytest.raises(StreamError) as caught:
        decode(OPTIONAL, BytesReader(data), 1)
    assert str(caught.value) == text


def test_versions_outside_the_range_are_refused():
    with pytest.raises(StreamError) as caught:
        decode(TIMER, BytesReader(bytes(24)), 0)
    text = "timer: incoming version_id 0 is too old for local minimum version_id 1"
    assert str(caught.value) == text
    with pytest.raises(StreamError) as caught:
        decode(TIMER, BytesReader(bytes(24)), 3)
    assert str(caught.value) == "timer: incoming version_id 3 is too new for local version_id 2"
    assert decode(TIMER, BytesReader(bytes(24)), 1) == {
        "cpu_ticks_offset": 0,
        "cpu_clock_offset": 0,
    }


@pytest.mark.parametrize("fields", [(struct_("s", PIT_CHANNEL),), (struct_("s", PIT_CHANNEL, 3),)])
def test_the_innermost_description_is_the_one_that_is_named(fields):
    with pytest.raises(StreamError) as caught:
        decode(VMStateDescription("i8254", 1, 1, fields), BytesReader(bytes(20)), 1)
    assert str(caught.value) == "Failed to load pit channel state: stream error: -5"


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ((u8("a", 2),), {"a": [1]}),
        ((u8("a", 2),), {"a": [1, 2, 3]}),
        ((buffer("a", 2),), {"a": b"1"}),
        ((buffer("a", 2),), {"a": b"123"}),
        ((struct_("a", PAIR, 2),), {"a": []}),
        ((u8("n"), varray("a", PAIR, "n")), {"n": 1, "a": []}),
        ((u8("n"), vbuffer("a", "n")), {"n": 1, "a": b""}),
    ],
)
def test_values_of_another_length_are_refused(fields, state):
    with pytest.raises(ValueError, match="field 'a' has"):
        encode(VMStateDescription("v", 1, 1, fields), state)


@pytest.mark.parametrize(("field", "value"), [(u8("a"), 256), (u32("a"), -1), (i32("a"), 1 << 31)])
def test_integers_out_of_range_are_refused(field, value):
    with pytest.raises(struct.error):
        encode(VMStateDescription("v", 1, 1, (field,)), {"a": value})


def test_a_subsection_must_be_named_after_its_description():
    with pytest.raises(ValueError, match="'pair' is no name for a subsection of 'v'"):
        VMStateDescription("v", 1, 1, (), (PAIR,))


INTEGERS = {u8: (0, 8), u16: (0, 16), u32: (0, 32), u64: (0, 64)}
INTEGERS |= {i8: (1, 8), i16: (1, 16), i32: (1, 32), i64: (1, 64)}


@st.composite
def integer_fields(draw, name):
    make = draw(st.sampled_from(list(INTEGERS)))
    signed, bits = INTEGERS[make]
    low = -(1 << bits - 1) if signed else 0
    value = st.integers(low, low + (1 << bits) - 1)
    num = draw(st.none() | st.integers(0, 4))
    if num is None:
        return make(name), draw(value)
    return make(name, num), draw(st.lists(value, min_size=num, max_size=num))


def several(make, count):
    return [make() for _ in range(count)]


@st.composite
def described_states(draw, name="v", depth=2):
    """A description, and a function that draws states for it."""
    fields, drawers = [u8("first")], {"first": lambda: draw(st.integers(0, 255))}
    for number in range(draw(st.integers(0, 4))):
        each = f"{name}{number}"
        kind = draw(st.sampled_from(["integer", "bytes", "unused", "struct", "array", "varray"]))
        if depth == 0 and kind in ("struct", "array", "varray"):
            kind = "integer"
        if kind == "integer":
            field, value = draw(integer_fields(each))
            fields.append(field)
            drawers[each] = lambda value=value: value  # type: ignore[misc]
        elif kind == "bytes":
            size = draw(st.integers(0, 5))
            fields.append(buffer(each, size))
            drawers[each] = functools.partial(draw, st.binary(min_size=size, max_size=size))
        elif kind == "unused":
            fields.append(unused(draw(st.integers(0, 5))))
        else:
            vmsd, make = draw(described_states(each, depth - 1))
            if kind == "struct":
                fields.append(struct_(each, vmsd))
                drawers[each] = make
                continue
            num = draw(st.integers(0, 3))
            if kind == "array":
                fields.append(struct_(each, vmsd, num))
            else:
                fields += [u16(f"n{each}"), varray(each, vmsd, f"n{each}")]
                drawers[f"n{each}"] = lambda num=num: num  # type: ignore[misc]
            drawers[each] = functools.partial(several, make, num)
    subsections = []
    if depth and draw(st.booleans()):
        vmsd, make = draw(described_states(f"{name}/s", 0))
        subsections.append((vmsd, make))

    def make_state():
        state = {key: drawer() for key, drawer in drawers.items()}
        for vmsd, make in subsections:
            if draw(st.booleans()):
                state[vmsd.name] = make()
        return state

    vmsds = tuple(vmsd for vmsd, _ in subsections)
    return VMStateDescription(name, 1, 1, tuple(fields), vmsds), make_state


@st.composite
def states(draw):
    vmsd, make = draw(described_states())
    return vmsd, make()


@given(states())
def test_any_state_round_trips_and_is_described(pair):
    vmsd, state = pair
    data = round_trip(vmsd, state)
    reader = BytesReader(data)
    skip_body(reader, describe(vmsd, state))
    assert reader.offset == len(data)


@given(states(), st.data())
def test_a_body_that_is_cut_fails_or_has_lost_a_subsection(pair, data):
    vmsd, state = pair
    body = encode(vmsd, state)
    size = data.draw(st.integers(0, len(body) - 1))
    try:
        decoded = decode(vmsd, BytesReader(body[:size]), 1)
    except StreamError:
        return
    assert decoded != state


@given(st.sampled_from(BY_HAND), st.binary(max_size=300))
def test_arbitrary_bytes_decode_or_raise_one_error(vmsd, data):
    try:
        state = decode(vmsd, BytesReader(data), vmsd.version_id)
    except StreamError:
        return
    assert len(encode(vmsd, state)) <= len(data)
