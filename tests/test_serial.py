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

    def set_handlers(self, can_receive, receive, event) -> None:
        self.can_receive = can_receive
        self.receive = receive

    def write(self, data: bytes) -> None:
        self.written += data

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
