"""cpr.devices.serial: registers, interrupts, FIFO, flow control, state."""

from __future__ import annotations

import pytest
from fake_platform import FakePlatform

from cpr.devices import serial
from cpr.devices.serial import Serial

COM1 = 0x3F8
IRQ4 = 4
ENABLE_FIFO = 0x01


class FakeChardev:
    """Keeps what is written; `feed` gives the device as many bytes as it has room for."""

    def __init__(self) -> None:
        self.written = b""
        self.waiting = b""
        self.can_receive = lambda: 0
        self.receive = lambda data: None
        self.writable = lambda: None
        self.room = 1 << 30

    def set_handlers(self, can_receive, receive, event, writable) -> None:
        self.can_receive = can_receive
        self.receive = receive
        self.writable = writable

    def write(self, data: bytes) -> None:
        self.written += data

    def try_write(self, data: bytes) -> int:
        taken = data[: self.room]
        self.room -= len(taken)
        self.written += taken
        return len(taken)

    def read_on(self, room: int) -> None:
        self.room = room
        self.writable()

    def accept_input(self) -> None:
        room = self.can_receive()
        if room and self.waiting:
            data, self.waiting = self.waiting[:room], self.waiting[room:]
            self.receive(data)

    def feed(self, data: bytes) -> None:
        self.waiting += data
        self.accept_input()


class Port:
    """COM1 of a fake machine, by register."""

    def __init__(self) -> None:
        self.platform = FakePlatform()
        self.chardev = FakeChardev()
        self.device = Serial(0)
        self.device.realize(self.platform)
        self.device.attach(self.chardev)

    def read(self, register: int) -> int:
        return self.platform.bus.io_read(COM1 + register, 1)

    def write(self, register: int, value: int) -> None:
        self.platform.bus.io_write(COM1 + register, 1, value)

    @property
    def irq(self) -> bool:
        return self.platform.lines.get(IRQ4, False)


@pytest.fixture
def port():
    return Port()


def test_what_is_written_goes_to_the_chardev(port):
    for byte in b"hello":
        port.write(serial.RBR_THR, byte)
    assert port.chardev.written == b"hello"
    assert port.read(serial.LSR) & (serial.LSR_THRE | serial.LSR_TEMT) == 0x60


def test_divisor_latch_shadows_data_and_ier(port):
    port.write(serial.LCR, serial.LCR_DLAB)
    port.write(0, 0x34)
    port.write(1, 0x12)
    assert (port.read(0), port.read(1)) == (0x34, 0x12)
    port.write(serial.LCR, 3)
    assert port.read(serial.IER) == 0
    assert port.chardev.written == b""


def test_without_fifo_one_byte_at_a_time_and_none_is_lost(port):
    port.write(serial.IER, serial.IER_RDI)
    port.chardev.feed(b"abc")
    received = b""
    while port.read(serial.LSR) & serial.LSR_DR:
        assert port.irq
        received += bytes([port.read(0)])
    assert received == b"abc"
    assert not port.irq
    assert not port.read(serial.LSR) & serial.LSR_OE


def test_fifo_holds_sixteen_and_the_rest_waits_outside(port):
    port.write(serial.IIR_FCR, ENABLE_FIFO)
    port.chardev.feed(bytes(range(20)))
    assert len(port.chardev.waiting) == 4
    received = [port.read(0) for _ in range(20)]
    assert received == list(range(20))


def test_trigger_level_holds_the_interrupt_back_until_the_time_out(port):
    port.write(serial.IIR_FCR, ENABLE_FIFO | 2 << 6)  # 8 bytes
    port.write(serial.IER, serial.IER_RDI)
    port.chardev.feed(b"1234567")
    assert not port.irq
    while not port.irq:
        port.platform.loop.iterate(None)
    assert port.read(serial.IIR_FCR) == serial.IIR_CTI | serial.IIR_FIFO_ENABLED
    port.chardev.feed(b"8")
    port.read(0)
    assert not port.irq


def test_transmitter_empty_interrupt_is_acknowledged_by_reading_iir(port):
    port.write(serial.IER, serial.IER_THRI)
    assert port.irq
    assert port.read(serial.IIR_FCR) == serial.IIR_THRI
    assert not port.irq
    port.write(0, ord("x"))
    assert port.irq


def test_loopback(port):
    port.write(serial.MCR, serial.MCR_LOOP | 0x0B)
    port.write(0, 0x5A)
    assert port.chardev.written == b""
    assert port.read(0) == 0x5A
    assert port.read(serial.MSR) == serial.MSR_DCD | serial.MSR_DSR | serial.MSR_CTS


def test_a_stopped_machine_takes_no_input(port):
    port.platform.clock.disable()
    port.chardev.feed(b"later")
    assert port.chardev.waiting == b"later"
    port.platform.clock.enable()
    port.device.on_run()
    assert port.read(0) == ord("l")


def test_output_before_the_chardev_is_there_is_kept():
    platform, device = FakePlatform(), Serial(1)
    device.realize(platform)
    platform.bus.io_write(0x2F8, 1, ord("a"))
    chardev = FakeChardev()
    device.attach(chardev)
    platform.bus.io_write(0x2F8, 1, ord("b"))
    assert chardev.written == b"ab"


def test_nothing_overtakes_what_was_written_before_the_chardev_is_there():
    platform, device = FakePlatform(), Serial(0)
    device.realize(platform)
    platform.bus.io_write(COM1, 1, ord("a"))
    alone = []

    class Watching(FakeChardev):
        def write(self, data: bytes) -> None:
            alone.append(platform.keeps_vcpus_away())

        def set_handlers(self, *handlers) -> None:
            alone.append(platform.keeps_vcpus_away())

    device.attach(Watching())
    assert alone == [True, True]


BUSY = 0
SHIFTING = serial.LSR_THRE
IDLE = serial.LSR_THRE | serial.LSR_TEMT


def transmitter(port: Port) -> int:
    return port.read(serial.LSR) & IDLE


def test_a_peer_that_does_not_read_makes_the_transmitter_busy(port):
    port.chardev.room = 1
    port.write(serial.IER, serial.IER_THRI)
    port.write(serial.RBR_THR, ord("a"))
    assert transmitter(port) == IDLE
    port.write(serial.RBR_THR, ord("b"))
    assert transmitter(port) == SHIFTING
    port.write(serial.RBR_THR, ord("c"))
    assert transmitter(port) == BUSY
    assert not port.irq
    port.chardev.read_on(1)
    assert (transmitter(port), port.irq) == (SHIFTING, True)
    port.chardev.read_on(100)
    assert transmitter(port) == IDLE
    assert port.chardev.written == b"abc"


@pytest.mark.parametrize("fifo", [0, ENABLE_FIFO])
def test_a_guest_that_writes_on_loses_its_oldest_bytes_and_no_memory(port, fifo):
    port.write(serial.IIR_FCR, fifo)
    port.chardev.room = 0
    for value in range(256):
        port.write(serial.RBR_THR, value)
    size = serial.FIFO_SIZE if fifo else 1
    port.chardev.read_on(1000)
    assert port.chardev.written == bytes([0, *range(256 - size, 256)])
    assert transmitter(port) == IDLE


def test_clearing_the_transmit_fifo(port):
    port.write(serial.IIR_FCR, ENABLE_FIFO)
    port.chardev.room = 0
    for value in b"abc":
        port.write(serial.RBR_THR, value)
    port.write(serial.IIR_FCR, ENABLE_FIFO | serial.FCR_CLEAR_TX)
    port.chardev.read_on(1000)
    assert port.chardev.written == b"a"


def test_what_could_not_be_sent_goes_over_with_the_guest(port):
    port.write(serial.IIR_FCR, ENABLE_FIFO)
    port.chardev.room = 0
    for value in b"abcdef":
        port.write(serial.RBR_THR, value)
    port.platform.clock.disable()
    port.chardev.read_on(1000)
    assert port.chardev.written == b""  # what is saved now is all that there is
    body = port.device.vmstate.encode(port.device.save())
    from cpr.state.reader import BytesReader

    other = Port()
    other.device.restore(other.device.vmstate.decode(BytesReader(body), 3))
    assert other.device.save() == port.device.save()
    assert transmitter(other) == BUSY
    other.device.on_run()
    other.platform.loop.iterate(0)
    assert other.chardev.written == b"abcdef"
    assert transmitter(other) == IDLE


def test_output_without_a_chardev_yet_is_bounded():
    platform, device = FakePlatform(), Serial(0)
    device.realize(platform)
    for _ in range(serial.MAX_UNATTACHED):
        platform.bus.io_write(COM1, 1, ord("x"))
    platform.bus.io_write(COM1, 1, ord("y"))
    assert not platform.bus.io_read(COM1 + serial.LSR, 1) & serial.LSR_TEMT
    chardev = FakeChardev()
    device.attach(chardev)
    assert chardev.written == b"x" * serial.MAX_UNATTACHED + b"y"


def test_state_round_trip_through_the_stream(port):
    port.write(serial.IIR_FCR, ENABLE_FIFO | 3 << 6)
    port.write(serial.IER, serial.IER_RDI | serial.IER_THRI)
    port.write(serial.SCR, 0x77)
    port.chardev.feed(b"abc")
    body = port.device.vmstate.encode(port.device.save())
    from cpr.state.reader import BytesReader

    other = Port()
    other.device.restore(other.device.vmstate.decode(BytesReader(body), 3))
    assert other.device.save() == port.device.save()
    assert [other.read(0) for _ in range(3)] == list(b"abc")
    assert other.read(serial.SCR) == 0x77


def test_unrealize_frees_the_ports(port):
    port.device.unrealize()
    assert port.read(serial.SCR) == 0xFF
    port.device.realize(port.platform)
