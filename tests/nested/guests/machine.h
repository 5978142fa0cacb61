/*
 * What the guests have in common: ports, memory-mapped registers, PCI by mechanism #1, MSI and
 * MSI-X, interrupts through the local APIC.
 *
 * A MAILBOX variable is one dword that a test reads, or writes, in the guest's RAM; the build
 * leaves the addresses in NAME.sym.  Interrupts are on only while a guest waits for them (wait_for):
 * one that is lost, or comes twice, leaves its counters standing.
 */
#ifndef MACHINE_H
#define MACHINE_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define MAILBOX __attribute__((section(".mailbox"))) volatile u32

enum { STARTED = 1, READY = 2 };

MAILBOX stage = 0;              /* STARTED, then READY: the device is set up */
MAILBOX failed = 0;             /* the source line of the check that did not hold */
MAILBOX hold = 0;               /* written by the test: stop after this round */
MAILBOX held = 0;               /* 1 while the guest stands still because of it */
MAILBOX triggered = 0;          /* interrupts that the guest made the device raise */
MAILBOX interrupts = 0;         /* interrupts that came */
MAILBOX command = 0;            /* PCI_COMMAND, as the guest reads it in each round */

#define CHECK(condition) do { if (!(condition)) fail(__LINE__); } while (0)

static void fail(u32 line)
{
    failed = line;
    for (;;)
        __asm__ volatile("cli; hlt");
}

static inline void out8(u16 port, u8 value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static inline void out32(u16 port, u32 value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port));
}

static inline u32 in32(u16 port)
{
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static inline u32 read32(u64 address)
{
    return *(volatile u32 *)address;
}

static inline void write32(u64 address, u32 value)
{
    *(volatile u32 *)address = value;
}

/* Keeps the compiler from moving accesses to DMA buffers over a doorbell. */
static inline void barrier(void)
{
    __asm__ volatile("mfence" : : : "memory");
}

/* -- PCI */

enum {
    CONFIG_ADDRESS = 0xcf8,
    CONFIG_DATA = 0xcfc,
    PCI_ID = 0x00,
    PCI_COMMAND = 0x04,
    PCI_BAR0 = 0x10,
    PCI_CAPABILITIES = 0x34,
    PCI_COMMAND_MEMORY = 0x2,
    PCI_COMMAND_MASTER = 0x4,
    PCI_COMMAND_SERR = 0x100,
    PCI_CAP_MSI = 0x05,
    PCI_CAP_MSIX = 0x11,
    PCI_SLOTS = 32,
    BARS_FROM = 0xf8000000,     /* above RAM and ECAM, below the I/O APIC */
};

static u32 pci_slot;
static u32 bars_from = BARS_FROM;

static u32 pci_read(u32 offset)
{
    out32(CONFIG_ADDRESS, 0x80000000u | pci_slot << 11 | (offset & 0xfc));
    return in32(CONFIG_DATA);
}

static void pci_write(u32 offset, u32 value)
{
    out32(CONFIG_ADDRESS, 0x80000000u | pci_slot << 11 | (offset & 0xfc));
    out32(CONFIG_DATA, value);
}

/* Makes the device with this id (device << 16 | vendor) on bus 0 the one that the others mean. */
static void pci_find(u32 id)
{
    for (pci_slot = 0; pci_slot < PCI_SLOTS; pci_slot++)
        if (pci_read(PCI_ID) == id)
            return;
    fail(__LINE__);
}

/* The address of memory BAR `number`, given one where no firmware has. */
static u64 pci_bar(u32 number)
{
    u32 offset = PCI_BAR0 + 4 * number;
    u32 value = pci_read(offset);
    u32 is_64 = (value & 6) == 4;

    if (!(value & ~0xfu) && !(is_64 && pci_read(offset + 4))) {
        pci_write(offset, 0xffffffff);
        u32 size = ~(pci_read(offset) & ~0xfu) + 1;
        CHECK(size && !(size & (size - 1)));
        bars_from = (bars_from + size - 1) & ~(size - 1);
        pci_write(offset, bars_from);
        if (is_64)
            pci_write(offset + 4, 0);
        bars_from += size;
        value = pci_read(offset);
    }
    return (value & ~0xfu) | (is_64 ? (u64)pci_read(offset + 4) << 32 : 0);
}

static void pci_enable(void)
{
    u32 wanted = PCI_COMMAND_MEMORY | PCI_COMMAND_MASTER | PCI_COMMAND_SERR;
    pci_write(PCI_COMMAND, (pci_read(PCI_COMMAND) & 0xffff) | wanted);
    CHECK((pci_read(PCI_COMMAND) & wanted) == wanted);
}

static void report_command(void)
{
    command = pci_read(PCI_COMMAND) & 0xffff;
}

static u32 pci_capability(u32 wanted)
{
    u32 offset = pci_read(PCI_CAPABILITIES) & 0xfc;
    while (offset) {
        u32 value = pci_read(offset);
        if ((value & 0xff) == wanted)
            return offset;
        offset = value >> 8 & 0xfc;
    }
    fail(__LINE__);
    return 0;
}

/* -- Interrupts */

enum {
    PIC1_MASK = 0x21,
    PIC2_MASK = 0xa1,
    APIC = 0xfee00000,
    APIC_EOI = 0x0b0,
    APIC_SPURIOUS = 0x0f0,
    APIC_LVT_TIMER = 0x320,
    APIC_TIMER_INITIAL = 0x380,
    APIC_TIMER_DIVIDE = 0x3e0,
    APIC_TIMER_PERIODIC = 0x20000,
    DIVIDE_BY_16 = 0x3,
    TICK = 1250000,             /* 20 ms at the 1 GHz of KVM's and QEMU's local APIC */
    TICK_VECTOR = 0x40,
    MSI_ADDRESS = 0xfee00000,   /* physical destination: APIC 0 */
    CODE_SELECTOR = 0x08,
    INTERRUPT_GATE = 0x8e,
    VECTOR = 0x41,
    VECTORS = 256,
};

struct gate {
    u16 offset_low, selector;
    u8 stack, type;
    u16 offset_middle;
    u32 offset_high, reserved;
};

static struct gate gates[VECTORS];

struct interrupt_frame;

static void set_gate(u32 vector, void (*handler)(struct interrupt_frame *))
{
    u64 address = (u64)handler;
    gates[vector] = (struct gate){
        .offset_low = (u16)address,
        .selector = CODE_SELECTOR,
        .type = INTERRUPT_GATE,
        .offset_middle = (u16)(address >> 16),
        .offset_high = (u32)(address >> 32),
    };
}

static inline void end_of_interrupt(void)
{
    write32(APIC + APIC_EOI, 0);
}

__attribute__((interrupt)) static void on_tick(struct interrupt_frame *frame)
{
    (void)frame;
    end_of_interrupt();
}

/* The local APIC on, the PICs silent: whoever booted this may have left a timer running. */
static void interrupts_start(void)
{
    out8(PIC1_MASK, 0xff);
    out8(PIC2_MASK, 0xff);
    struct { u16 limit; u64 base; } __attribute__((packed)) idt = {
        sizeof gates - 1, (u64)gates,
    };
    __asm__ volatile("lidt %0" : : "m"(idt));
    write32(APIC + APIC_SPURIOUS, 0x1ff);
    set_gate(TICK_VECTOR, on_tick);
    write32(APIC + APIC_TIMER_DIVIDE, DIVIDE_BY_16);
    write32(APIC + APIC_LVT_TIMER, APIC_TIMER_PERIODIC | TICK_VECTOR);
    write32(APIC + APIC_TIMER_INITIAL, TICK);
}

/* One vector, by MSI. */
static void msi_start(u32 vector)
{
    u32 offset = pci_capability(PCI_CAP_MSI);
    u32 control = pci_read(offset);
    pci_write(offset + 4, MSI_ADDRESS);
    if (control & 0x00800000) {         /* 64-bit address */
        pci_write(offset + 8, 0);
        pci_write(offset + 12, vector);
    } else {
        pci_write(offset + 8, vector);
    }
    pci_write(offset, (control & ~0x00700000u) | 0x00010000);
}

/* The entries 0 to count - 1 of the MSI-X table get the vectors from `vector` on. */
static void msix_start(u32 vector, u32 count)
{
    u32 offset = pci_capability(PCI_CAP_MSIX);
    u32 where = pci_read(offset + 4);
    u64 table = pci_bar(where & 7) + (where & ~7u);
    for (u32 entry = 0; entry < count; entry++) {
        write32(table + 16 * entry, MSI_ADDRESS);
        write32(table + 16 * entry + 4, 0);
        write32(table + 16 * entry + 8, vector + entry);
        write32(table + 16 * entry + 12, 0);    /* not masked */
    }
    pci_write(offset, (pci_read(offset) & ~0x40000000u) | 0x80000000u);
}

/*
 * Halts until `counter` is `value`.  On a CPU nothing comes between sti and hlt; under an emulator of
 * nested virtualization an interrupt does, now and then, and hlt waits for one that was already
 * counted.  Hence the tick: it ends that wait, and makes up for no interrupt that is lost.
 */
static void wait_for(volatile u32 *counter, u32 value)
{
    while (*counter != value)
        __asm__ volatile("sti; hlt; cli" : : : "memory");
}

/* Between two rounds: stands still as long as the test wants it. */
static void hold_if_asked(void)
{
    while (hold) {
        held = 1;
        __asm__ volatile("sti; nop; nop; cli; pause" : : : "memory");
    }
    held = 0;
}

#endif
