"""configuration.py: the configuration section and what does not agree with it."""

from __future__ import annotations

from errno import EINVAL

import pytest
from described import STREAMS, description_of, golden, reader_of

from cpr.state.configuration import VMSTATE_CONFIGURATION, Configuration
from cpr.state.reader import StreamError

UUID = bytes(range(16))
UUID_TEXT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
CAPABILITIES = {"x-ignore-shared": False, "mapped-ram": False, "xbzrle": True}

GOLDEN = {
    "machine_none": Configuration("none"),
    "none_pages": Configuration("none"),
    "memfd1": Configuration("pc-i440fx-11.1"),
    "microvm": Configuration("microvm"),
    "exec_ignore": Configuration("pc-i440fx-11.1", ("x-ignore-shared",)),
    "none_uuid_capabilities": Configuration("none", ("x-ignore-shared", "mapped-ram"), UUID),
}


@pytest.mark.parametrize("name", STREAMS)
def test_golden_configurations_round_trip_and_are_described_alike(name):
    stream = golden(name)
    reader = reader_of(stream)
    reader.header()
    received = reader.configuration()
    expected = GOLDEN[name]
    assert received.to_state() == expected.to_state()
    assert (received.machine, received.uuid) == (expected.machine, expected.uuid)
    state = expected.to_state()
    assert VMSTATE_CONFIGURATION.encode(state) == stream[9 : reader.offset]
    described = VMSTATE_CONFIGURATION.describe(state)
    assert described == description_of(stream)["configuration"]


def test_what_agrees_is_accepted():
    Configuration("pc").check("pc", CAPABILITIES, None)
    Configuration("pc").check("pc", CAPABILITIES, UUID)
    Configuration("pc", ("xbzrle",), UUID).check("pc", CAPABILITIES, UUID)
    ignore = CAPABILITIES | {"x-ignore-shared": True}
    assert Configuration("pc", ("x-ignore-shared",)).check("pc", ignore, None) == ()


def test_a_uuid_without_one_of_this_side_is_a_warning():
    warnings = Configuration("pc", (), UUID).check("pc", CAPABILITIES, None)
    assert warnings == (f"warning: UUID is received {UUID_TEXT}, but local uuid isn't set",)


HOOK = "post load hook failed for: configuration, version_id: 1, minimum_version: 0: "
LOADING = "Loading VM subsection 'configuration/{}' in 'configuration' failed: "
OFF = "Capability x-ignore-shared is off, but received capability is on"
ON = "Capability mapped-ram is on, but received capability is off"
REFUSED = {
    "machine": (
        Configuration("pc-i440fx-11.1"),
        ("pc-q35-11.1", CAPABILITIES, None),
        HOOK + "Machine type received is 'pc-i440fx-11.1' and local is 'pc-q35-11.1'",
        (),
    ),
    "capability on": (
        Configuration("pc", ("x-ignore-shared",)),
        ("pc", CAPABILITIES, None),
        HOOK + "Failed to validate capabilities",
        (OFF,),
    ),
    "two capabilities": (
        Configuration("pc", ("x-ignore-shared",)),
        ("pc", {"x-ignore-shared": False, "mapped-ram": True}, None),
        HOOK + "Failed to validate capabilities",
        (OFF, ON),
    ),
    "unknown capability": (
        Configuration("pc", ("bogus",)),
        ("pc", CAPABILITIES, None),
        LOADING.format("capabilities") + "Received unknown capability bogus",
        (),
    ),
    "uuid": (
        Configuration("pc", (), UUID),
        ("pc", CAPABILITIES, bytes(15) + b"\1"),
        LOADING.format("uuid")
        + "post load hook failed for: configuration/uuid, version_id: 1, minimum_version: 1, "
        "ret: -22",
        (f"UUID received is {UUID_TEXT} and local is 00000000-0000-0000-0000-000000000001",),
    ),
}


@pytest.mark.parametrize(("received", "local", "text", "lines"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_agree_is_refused(received, local, text, lines):
    with pytest.raises(StreamError) as caught:
        received.check(*local)
    assert str(caught.value) == text
    assert (caught.value.errno, caught.value.stderr) == (EINVAL, lines)
