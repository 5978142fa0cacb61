"""cpr.state.cpr_channel: the bytes and descriptors of a cpr-transfer, from a state of QEMU's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpr.errors import StateError
from cpr.state import cpr_channel
from cpr.state.cpr_state import CprState

DATA = Path(__file__).with_name("data")
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def joined(state):
    """What the other side receives: the bytes as one, and the descriptors in order."""
    messages = cpr_channel.messages(state)
    return b"".join(data for data, _ in messages), [fd for _, fd in messages if fd >= 0]


@pytest.mark.parametrize("name", ["memfd1", "numa2", "defaultram_noaux"])
def test_the_wire_is_the_file_with_a_blank_for_each_descriptor(name):
    data = (DATA / f"{name}.cprstate.bin").read_bytes()
    state = CprState.decode(data)
    wire, descriptors = joined(state)
    assert descriptors == [fd for _, _, fd in state.fds]
    expected = data
    for _, _, fd in state.fds:  # in the file the number is the element's last field
        expected = expected.replace(b"\0\0\0\0" + fd.to_bytes(4, "big"), b"\0\0\0\0 ", 1)
    assert wire == expected


def test_one_message_for_each_descriptor():
    messages = cpr_channel.messages(CprState([("ram0", 0, 11), ("pc.bios", 0, 12)], []))
    assert [fd for _, fd in messages] == [11, 12, -1]
    assert messages[0][0] == bytes.fromhex("5143505200000001 01 00000005") + b"ram0\0\0\0\0\0 "
    assert messages[1][0] == b"\1\0\0\0\x08pc.bios\0\0\0\0\0 "
    assert messages[2][0].startswith(b"\0\5\x15CprState/vfio devices")


@given(st.lists(st.tuples(NAMES, st.integers(0, 1000), st.integers(0, 1000))))
def test_round_trip(fds):
    state = CprState(fds, [])
    assert cpr_channel.decode(*joined(state)).fds == fds


def test_a_missing_descriptor_is_named():
    wire, descriptors = joined(CprState([("ram0", 0, 11)], []))
    with pytest.raises(StateError, match="CPR fd 'ram0' id 0 came without its descriptor"):
        cpr_channel.decode(wire, descriptors[:-1])


@given(st.binary(max_size=80))
def test_arbitrary_bytes_raise_one_error(data):
    try:
        cpr_channel.decode(data, [1] * 80)
    except StateError:
        pass
