"""cpr_state.py: QEMU's own state files, and states that are not valid."""

from __future__ import annotations

import struct

import pytest
from described import DATA
from hypothesis import example, given
from hypothesis import strategies as st

from cpr.errors import StateError
from cpr.state.cpr_state import MAGIC, VERSION, CprState, VfioDevice

GOLDEN = sorted(path.name.removesuffix(".cprstate.bin") for path in DATA.glob("*.cprstate.bin"))
AUX = {"/rom@etc/acpi/tables", "/rom@etc/table-loader", "/rom@etc/acpi/rsdp"}
PC_AUX = AUX | {"pc.bios", "pc.rom"}
NAMES = {
    "defaultram_aux": PC_AUX,
    "defaultram_noaux": set(),
    "file_share": PC_AUX,
    "hugetlb": PC_AUX | {"ram0"},
    "kvm": PC_AUX | {"ram0"},
    "machine_none": {"ram0"},
    "memfd1": PC_AUX | {"ram0"},
    "memfd1_noaux": {"ram0"},
    "microvm": AUX | {"pc.bios", "ram0"},
    "numa2": PC_AUX | {"ram0", "ram1"},
    "q35": PC_AUX | {"ram0"},
    "shm": PC_AUX | {"ram0"},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_states_round_trip(name):
    data = (DATA / f"{name}.cprstate.bin").read_bytes()
    state = CprState.decode(data)
    assert state.encode() == data
    assert {entry[0] for entry in state.fds} == NAMES[name]
    assert all(id == 0 and fd > 2 for _, id, fd in state.fds)
    assert state.vfio_devices == []


HEAD = b"QCPR" + struct.pack(">I", 1)


def element(name: bytes, *numbers: int) -> bytes:
    return b"\1" + struct.pack(">I", len(name)) + name + struct.pack(f">{len(numbers)}i", *numbers)


def vfio(body: bytes, version: int = 1, name: bytes = b"CprState/vfio devices") -> bytes:
    return bytes([5, len(name)]) + name + struct.pack(">I", version) + body


RAM0 = element(b"ram0\0", 0, 7)
DEVICE = element(b"0000:3a:10.1\0", 1, 2, 3)


def test_layout():
    state = CprState([("ram0", 0, 7)], [VfioDevice("0000:3a:10.1", 1, 2, 3)])
    data = HEAD + RAM0 + b"\0" + vfio(DEVICE + b"\0")
    assert state.encode() == data
    decoded = CprState.decode(data)
    assert (decoded.fds, decoded.vfio_devices) == (state.fds, state.vfio_devices)
    assert repr(state.vfio_devices[0]) == "VfioDevice('0000:3a:10.1', 1, 2, 3)"
    assert len(CprState([], []).encode()) == 37


ACCEPTED = {
    "no subsection": (HEAD + RAM0 + b"\0", [("ram0", 0, 7)]),
    "bytes after it": (HEAD + RAM0 + b"\0" + vfio(b"\0") + b"\5\1tail", [("ram0", 0, 7)]),
    "bytes instead of the subsection": (HEAD + RAM0 + b"\0tail", [("ram0", 0, 7)]),
    "subsection of another": (HEAD + b"\0" + vfio(b"\0", 1, b"Foo/bogus"), []),
    "subsection cut in its header": (HEAD + b"\0" + vfio(b"\0")[:10], []),
    "two of one name": (
        HEAD + RAM0 + element(b"ram0\0", 0, 8) + b"\0",
        [("ram0", 0, 7), ("ram0", 0, 8)],
    ),
    "any byte but 0 before an element": (HEAD + b"\2" + RAM0[1:] + b"\0", [("ram0", 0, 7)]),
    "bytes after the NUL": (HEAD + element(b"abc\0de\0", 0, 7) + b"\0", [("abc", 0, 7)]),
    "negative id": (HEAD + element(b"x\0", -1, 7) + b"\0", [("x", -1, 7)]),
}


@pytest.mark.parametrize(("data", "fds"), ACCEPTED.values(), ids=ACCEPTED)
def test_states_that_qemu_takes(data, fds):
    state = CprState.decode(data)
    assert (state.fds, state.vfio_devices) == (fds, [])


TRUNCATED = "Failed to load cpr fd state: stream error: -5"
LOADING = "Loading VM subsection 'CprState/vfio devices' in 'CprState' failed: "
OUTSIDE = LOADING + "CprState/vfio devices: incoming version_id {} is too {}"
REMEDY = "without QEMU_CPR_EXEC_STATE in the environment the VMM starts the guest afresh"
REFUSED = {
    "empty": (b"", "Not a migration stream (bad magic 0)"),
    "2 bytes": (b"QC", "Not a migration stream (bad magic 51430000)"),
    "magic": (b"QCPO" + HEAD[4:], "Not a migration stream (bad magic 5143504f)"),
    "7 bytes": (HEAD[:7], "Unsupported migration stream version 0"),
    "version 0": (b"QCPR\0\0\0\0", "Unsupported migration stream version 0"),
    "version 2": (b"QCPR\0\0\0\2", "Unsupported migration stream version 2"),
    "no list": (HEAD, "Failed to load CprState state: stream error: -5"),
    "no end of the list": (HEAD + RAM0, "Failed to load CprState state: stream error: -5"),
    "cut in an element": (HEAD + RAM0[:-1], TRUNCATED),
    "huge name": (HEAD + b"\1\xff\xff\xff\xffa\0" + RAM0 + b"\0", TRUNCATED),
    "subsection version 2": (
        HEAD + b"\0" + vfio(b"\0", 2),
        OUTSIDE.format(2, "new for local version_id 1"),
    ),
    "subsection version 0": (
        HEAD + b"\0" + vfio(b"\0", 0),
        OUTSIDE.format(0, "old for local minimum version_id 1"),
    ),
    "unknown subsection": (
        HEAD + b"\0" + vfio(b"\0", 1, b"CprState/bogus"),
        "VM subsection 'CprState/bogus' in 'CprState' does not exist",
    ),
    "cut in the subsection's version": (
        HEAD + b"\0" + vfio(b"")[:-2],
        OUTSIDE.format(0, "old for local minimum version_id 1"),
    ),
    "no list of devices": (
        HEAD + b"\0" + vfio(b""),
        LOADING + "Failed to load CprState/vfio devices state: stream error: -5",
    ),
    "cut in a device": (
        HEAD + b"\0" + vfio(DEVICE[:-1]),
        LOADING + "Failed to load cpr vfio device state: stream error: -5",
    ),
    # Where QEMU aborts, crashes, or loses the guest.
    "negative fd": (
        HEAD + element(b"ram0\0", 0, -1) + b"\0",
        f"CPR fd 'ram0' id 0 has the negative descriptor -1; {REMEDY}",
    ),
    "no NUL": (
        HEAD + element(b"ram0", 0, 7) + b"\0",
        f"CPR name 'ram0' of 4 bytes has no NUL at its end; {REMEDY}",
    ),
    "empty name": (
        HEAD + element(b"", 0, 7) + b"\0",
        f"CPR name '' of 0 bytes has no NUL at its end; {REMEDY}",
    ),
    "device without NUL": (
        HEAD + b"\0" + vfio(element(b"dev", 1, 2, 3) + b"\0"),
        f"CPR name 'dev' of 3 bytes has no NUL at its end; {REMEDY}",
    ),
}


@pytest.mark.parametrize(("data", "text"), REFUSED.values(), ids=REFUSED)
def test_states_that_are_refused(data, text):
    with pytest.raises(StateError) as caught:
        CprState.decode(data)
    assert str(caught.value) == text


def test_a_name_with_a_nul_cannot_be_written():
    with pytest.raises(ValueError, match="has a NUL in it"):
        CprState([("a\0b", 0, 7)], []).encode()


# A name is any bytes but NUL; those that are not UTF-8 come as surrogates.
names = st.binary(max_size=40).map(
    lambda raw: raw.replace(b"\0", b"-").decode(errors="surrogateescape")
)
ids = st.integers(-(2**31), 2**31 - 1)
fds = st.tuples(names, ids, st.integers(0, 2**31 - 1))
unsigned = st.integers(0, 2**32 - 1)
devices = st.builds(VfioDevice, names, ids, unsigned, unsigned)


@given(st.lists(fds), st.lists(devices))
def test_any_state_round_trips(entries, vfio_devices):
    data = CprState(entries, vfio_devices).encode()
    decoded = CprState.decode(data)
    assert (decoded.fds, decoded.vfio_devices) == (entries, vfio_devices)
    assert decoded.encode() == data


def decodes_or_raises_one_error(data: bytes) -> None:
    try:
        state = CprState.decode(data)
    except StateError as error:
        assert str(error)
        return
    assert CprState.decode(state.encode()).fds == state.fds


@given(st.binary(max_size=300))
@example(b"")
def test_arbitrary_bytes_decode_or_raise_one_error(data):
    decodes_or_raises_one_error(data)
    decodes_or_raises_one_error(struct.pack(">II", MAGIC, VERSION) + data)
    decodes_or_raises_one_error(HEAD + RAM0 + b"\0" + data)


@given(st.sampled_from(GOLDEN), st.integers(0, 214), st.binary(min_size=1, max_size=4))
def test_damaged_golden_states_decode_or_raise_one_error(name, offset, damage):
    data = (DATA / f"{name}.cprstate.bin").read_bytes()
    decodes_or_raises_one_error(data[:offset] + damage + data[offset + len(damage) :])
    decodes_or_raises_one_error(data[:offset])
