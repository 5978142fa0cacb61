"""The 16550A UART of COM1 to COM4 (National Semiconductor PC16550D data sheet).

The transmitter is as fast as its chardev: what the guest writes has left at once.  Where the peer
does not read, the bytes wait in the shift register and the transmit FIFO, and the guest sees that
the transmitter is busy; if it writes on, the oldest are lost.  Received bytes wait in the FIFO, and
before that in the chardev's own host buffer: none is dropped.
"""

from __future__ import annotations

from contextlib import nullcontext

from cpr.constants import NS_PER_S
from cpr.devices.base import MAX_UNATTACHED, Device
from cpr.state.vmstate import VMStateDescription, boolean, buffer, i32, struct_, u8, u16, u32

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cpr.acpi.tables import Acpi
    from cpr.chardev.base import Chardev
    from cpr.devices.base import Platform
    from cpr.mainloop import Timer

PORT_COUNT = 8
PORTS = (0x3F8, 0x2F8, 0x3E8, 0x2E8)
IRQS = (4, 3, 4, 3)
FIFO_SIZE = 16
CLOCK_HZ = 115200

# Register offsets; RBR and THR, and FCR and IIR, share one.
RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IIR_NO_INT, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_CTI = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 0x01, 0x02, 0x04
LCR_DLAB = 0x80
MCR_LOOP = 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
LSR_ERRORS = 0x1E
MSR_ANY_DELTA = 0x0F
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
TRIGGER_LEVELS = (1, 4, 8, 14)

VMSTATE_FIFO8 = VMStateDescription(
    "Fifo8", 1, 1, (buffer("data", FIFO_SIZE), u32("head"), u32("num"))
)
VMSTATE_RECV_FIFO = VMStateDescription(
    "serial/recv_fifo", 1, 1, (struct_("recv_fifo", VMSTATE_FIFO8),)
)
VMSTATE_PENDING = VMStateDescription(
    "serial/thr_ipending", 1, 1, (i32("thr_ipending"), boolean("timeout_ipending"))
)
VMSTATE_TSR = VMStateDescription("serial/tsr", 1, 1, (u32("tsr_retry"), u8("thr"), u8("tsr")))
VMSTATE_XMIT_FIFO = VMStateDescription(
    "serial/xmit_fifo", 1, 1, (struct_("xmit_fifo", VMSTATE_FIFO8),)
)
VMSTATE_SERIAL = VMStateDescription(
    "serial",
    3,
    2,
    (
        u16("divider"),
        u8("rbr"),
        u8("ier"),
        u8("iir"),
        u8("lcr"),
        u8("mcr"),
        u8("lsr"),
        u8("msr"),
        u8("scr"),
        u8("fcr_vmstate"),
    ),
    subsections=(VMSTATE_PENDING, VMSTATE_TSR, VMSTATE_RECV_FIFO, VMSTATE_XMIT_FIFO),
)


class Serial(Device):
    """COM port number `index` (0 is COM1), at its usual port and IRQ where none is given.

    The chardev is attached later and stays the caller's.

    What the guest writes before a chardev is attached is kept for it; `attach(None)` says that
    there will be none.
    """

    idstr = "serial"
    vmstate = VMStateDescription("serial", 3, 3, (struct_("state", VMSTATE_SERIAL),))

    def __init__(self, index: int, port: int | None = None, irq: int = 0) -> None:
        self.instance_id = index
        self.index = index
        self.port = PORTS[index] if port is None else port
        self.irq = irq or IRQS[index]
        self._platform: Platform | None = None
        self._chardev: Chardev | None = None
        self._unattached: bytearray | None = bytearray()
        self._timer: Timer | None = None
        self._fifo = bytearray()
        self._unsent = bytearray()  # the shift register, then the transmit FIFO
        self.reset()

    def realize(self, platform: Platform) -> None:
        self._platform = platform
        platform.register_io(self.port, PORT_COUNT, self._read, self._write, f"serial{self.index}")

    def unrealize(self) -> None:
        if self._platform is not None:
            self._stop_timer()
            self._platform.unregister_io(self.port, PORT_COUNT)
            self._platform = None

    def describe(self, acpi: Acpi) -> None:
        from cpr.acpi import aml

        where = aml.resources(aml.io_ports(self.port, PORT_COUNT), aml.irq(self.irq))
        names = (
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(self.index + 1)),
            aml.name("_CRS", where),
        )
        acpi.add_device(aml.device(f"COM{self.index + 1}", *names))

    def attach(self, chardev: Chardev | None) -> None:
        """Connects the host's end, while the guest may run; the inverse is `detach`."""
        # What the guest writes meanwhile comes after the rest.
        with self._platform.lock if self._platform is not None else nullcontext():
            written, self._unattached = self._unattached, None
            self._chardev = chardev
            if chardev is not None:
                if written:
                    chardev.write(bytes(written))
                chardev.set_handlers(
                    self._can_receive, self._on_receive, self._on_event, self._on_writable
                )
            self._on_writable()

    def detach(self) -> None:
        self._chardev = None
        self._unattached = bytearray()

    def reset(self) -> None:
        self._fifo.clear()
        self._unsent.clear()
        self._divider = 0x0C
        self._ier = 0
        self._iir = IIR_NO_INT
        self._lcr = 0
        self._mcr = 0x08
        self._lsr = LSR_THRE | LSR_TEMT
        self._msr = MSR_DCD | MSR_DSR | MSR_CTS
        self._scr = 0
        self._fcr = 0
        self._rbr = 0
        self._thr_ipending = False
        self._timeout_ipending = False
        self._stop_timer()
        self._update_irq()

    def save(self) -> dict:
        waiting: dict = {}
        if self._unsent:
            # A retry count of 1 is what says that there is a byte in the shift register.
            waiting[VMSTATE_TSR.name] = {"tsr_retry": 1, "thr": 0, "tsr": self._unsent[0]}
        if len(self._unsent) > 1:
            waiting[VMSTATE_XMIT_FIFO.name] = {"xmit_fifo": _fifo_state(self._unsent[1:])}
        return {
            "state": {
                "divider": self._divider,
                "rbr": self._rbr,
                "ier": self._ier,
                "iir": self._iir,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "lsr": self._lsr,
                "msr": self._msr,
                "scr": self._scr,
                "fcr_vmstate": self._fcr,
                VMSTATE_PENDING.name: {
                    "thr_ipending": int(self._thr_ipending),
                    "timeout_ipending": self._timeout_ipending,
                },
                VMSTATE_RECV_FIFO.name: {"recv_fifo": _fifo_state(self._fifo)},
                **waiting,
            }
        }

    def restore(self, state: dict) -> None:
        registers = state["state"]
        self._divider = registers["divider"]
        self._rbr = registers["rbr"]
        self._ier = registers["ier"]
        self._lcr = registers["lcr"]
        self._mcr = registers["mcr"]
        self._lsr = registers["lsr"]
        self._msr = registers["msr"]
        self._scr = registers["scr"]
        self._fcr = registers["fcr_vmstate"]
        pending = registers.get(VMSTATE_PENDING.name, {})
        self._thr_ipending = bool(pending.get("thr_ipending", 0))
        self._timeout_ipending = pending.get("timeout_ipending", False)
        fifo = registers.get(VMSTATE_RECV_FIFO.name, {}).get("recv_fifo")
        if fifo is not None:
            self._fifo = _fifo_content(fifo)
        self._unsent.clear()
        shift = registers.get(VMSTATE_TSR.name)
        if shift is not None and shift["tsr_retry"]:
            self._unsent.append(shift["tsr"])
        fifo = registers.get(VMSTATE_XMIT_FIFO.name, {}).get("xmit_fifo")
        if fifo is not None:
            self._unsent += _fifo_content(fifo)
        self._iir = registers["iir"]  # the interrupt line is the irqchip's own state

    def on_run(self) -> None:
        if self._fifo and self._fcr & FCR_ENABLE:
            self._start_timer()
        if self._chardev is not None:
            self._chardev.accept_input()
        if self._unsent and self._platform is not None:
            self._platform.loop.call_soon(self._on_writable)

    def on_stop(self) -> None:
        self._stop_timer()

    def _read(self, offset: int, size: int) -> int:
        if offset == RBR_THR:
            return self._divider & 0xFF if self._lcr & LCR_DLAB else self._receive_byte()
        if offset == IER:
            return self._divider >> 8 if self._lcr & LCR_DLAB else self._ier
        if offset == IIR_FCR:
            value = self._iir
            if value & 0x0E == IIR_THRI:
                self._thr_ipending = False
                self._update_irq()
            return value
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == LSR:
            value = self._lsr
            if self._lsr & LSR_ERRORS:
                self._lsr &= ~LSR_ERRORS
                self._update_irq()
            return value
        if offset == MSR:
            return self._read_msr()
        return self._scr

    def _read_msr(self) -> int:
        if self._mcr & MCR_LOOP:  # DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD
            mcr = self._mcr
            return (mcr & 0x0C) << 4 | (mcr & 0x02) << 3 | (mcr & 0x01) << 5
        value = self._msr
        if value & MSR_ANY_DELTA:
            self._msr &= ~MSR_ANY_DELTA
            self._update_irq()
        return value

    def _write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == RBR_THR:
            if self._lcr & LCR_DLAB:
                self._divider = self._divider & 0xFF00 | value
            else:
                self._transmit(value)
        elif offset == IER:
            if self._lcr & LCR_DLAB:
                self._divider = self._divider & 0x00FF | value << 8
            else:
                self._write_ier(value & 0x0F)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
        elif offset == MCR:
            self._mcr = value & 0x1F
        elif offset == SCR:
            self._scr = value

    def _write_ier(self, value: int) -> None:
        enabled = value & ~self._ier
        self._ier = value
        if enabled & IER_THRI and self._lsr & LSR_THRE:
            self._thr_ipending = True
        self._update_irq()

    def _write_fcr(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RX | FCR_CLEAR_TX
        if value & FCR_CLEAR_RX:
            self._fifo.clear()
            self._lsr &= ~LSR_DR
            self._timeout_ipending = False
            self._stop_timer()
        if value & FCR_CLEAR_TX:
            del self._unsent[1:]
            self._lsr |= LSR_THRE
            self._thr_ipending = True
        self._fcr = value & 0xC9
        self._update_irq()
        self._accept_input()

    def _transmit(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._store(bytes([value]))
        elif self._unsent or not self._send(bytes([value])):
            size = FIFO_SIZE if self._fcr & FCR_ENABLE else 1
            if len(self._unsent) > size:
                del self._unsent[1]
            self._unsent.append(value)
            self._update_transmitter()
            self._update_irq()
            return
        self._thr_ipending = True
        self._update_irq()

    def _send(self, data: bytes) -> int:
        """How many bytes have left."""
        if self._chardev is not None:
            return self._chardev.try_write(data)
        if self._unattached is not None:
            data = data[: MAX_UNATTACHED - len(self._unattached)]
            self._unattached += data
        return len(data)

    def _on_writable(self) -> None:
        """The peer takes bytes again: what has waited leaves, and the guest goes on."""
        if self._platform is None:
            return
        with self._platform.lock:
            # A stopped VM changes no register, or the saved state would be an older one.
            if self._unsent and self._platform.clock.enabled:
                del self._unsent[: self._send(bytes(self._unsent))]
                self._update_transmitter()
                self._update_irq()

    def _update_transmitter(self) -> None:
        """THRE: the FIFO is empty; TEMT: and the shift register too."""
        was_busy = not self._lsr & LSR_THRE
        self._lsr &= ~(LSR_THRE | LSR_TEMT)
        if len(self._unsent) <= 1:
            self._lsr |= LSR_THRE
        if not self._unsent:
            self._lsr |= LSR_TEMT
        self._thr_ipending = bool(self._lsr & LSR_THRE) and (was_busy or self._thr_ipending)

    def _receive_byte(self) -> int:
        if self._fcr & FCR_ENABLE:
            value = self._fifo.pop(0) if self._fifo else 0
            self._timeout_ipending = False
            if self._fifo:
                self._start_timer()
            else:
                self._lsr &= ~LSR_DR
                self._stop_timer()
        else:
            value = self._rbr
            self._lsr &= ~LSR_DR
        self._update_irq()
        self._accept_input()
        return value

    def _accept_input(self) -> None:
        if self._chardev is not None and not self._mcr & MCR_LOOP:
            self._chardev.accept_input()

    def _can_receive(self) -> int:
        """How many bytes fit now; asked by the chardev, on the main loop."""
        if self._platform is None or not self._platform.clock.enabled:
            return 0  # a stopped VM takes nothing, or the byte would miss the saved state
        if self._fcr & FCR_ENABLE:
            return FIFO_SIZE - len(self._fifo)
        return 0 if self._lsr & LSR_DR else 1

    def _on_receive(self, data: bytes) -> None:
        assert self._platform is not None
        with self._platform.lock:
            self._store(data)
            self._update_irq()

    def _on_event(self, event: str) -> None:
        """A client that comes or goes changes no modem line: the port stays connected."""

    def _store(self, data: bytes) -> None:
        if self._fcr & FCR_ENABLE:
            room = FIFO_SIZE - len(self._fifo)
            self._fifo += data[:room]
            if len(data) > room:
                self._lsr |= LSR_OE
            self._start_timer()
        else:
            if self._lsr & LSR_DR:
                self._lsr |= LSR_OE
            self._rbr = data[-1]
        self._lsr |= LSR_DR

    def _update_irq(self) -> None:
        trigger = TRIGGER_LEVELS[self._fcr >> 6]
        if self._ier & IER_RLSI and self._lsr & LSR_ERRORS:
            iir = IIR_RLSI
        elif self._ier & IER_RDI and self._timeout_ipending:
            iir = IIR_CTI
        elif (
            self._ier & IER_RDI
            and self._lsr & LSR_DR
            and (not self._fcr & FCR_ENABLE or len(self._fifo) >= trigger)
        ):
            iir = IIR_RDI
        elif self._ier & IER_THRI and self._thr_ipending:
            iir = IIR_THRI
        elif self._ier & IER_MSI and self._msr & MSR_ANY_DELTA:
            iir = IIR_MSI
        else:
            iir = IIR_NO_INT
        self._iir = iir | (IIR_FIFO_ENABLED if self._fcr & FCR_ENABLE else 0)
        if self._platform is not None:
            self._platform.set_irq(self.irq, iir != IIR_NO_INT)

    def _start_timer(self) -> None:
        """(Re)starts the FIFO time-out: four characters after the last byte came or was read."""
        self._stop_timer()
        if self._platform is not None:
            bits = 10 * 4
            delay_ns = bits * max(self._divider, 1) * NS_PER_S // CLOCK_HZ
            self._timer = self._platform.loop.call_later(delay_ns, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self._platform is None:
            return
        with self._platform.lock:
            if self._fifo and self._fcr & FCR_ENABLE:
                self._timeout_ipending = True
                self._update_irq()


def _fifo_state(content: bytearray) -> dict:
    return {"data": bytes(content).ljust(FIFO_SIZE, b"\0"), "head": 0, "num": len(content)}


def _fifo_content(state: dict) -> bytearray:
    ring = state["data"] + state["data"]
    head = state["head"] % FIFO_SIZE
    return bytearray(ring[head : head + min(state["num"], FIFO_SIZE)])
