/*
 * The PC that the guests run on: ports, vectors, and the macros that program them.
 *
 * Every guest is one boot sector.  It is loaded at 0x7c00 and entered there in real mode, by the
 * mini-VMM directly and under QEMU by the BIOS; it calls no BIOS service.  A20 is open on both.
 */

        .set    BOOT, 0x7c00            # where the sector is; the stack ends below it
        .set    SECTOR, 512

        .set    PIC1, 0x20              # 8259, IRQ 0 to 7; data port is one above
        .set    PIC2, 0xa0              # 8259, IRQ 8 to 15
        .set    PIC_EOI, 0x20           # non-specific end of interrupt
        .set    IRQ_BASE, 0x20          # vector that IRQ 0 is mapped to

        .set    APIC, 0xfee00000        # local APIC; the next ones are offsets of its registers
        .set    APIC_EOI, 0x0b0
        .set    APIC_SPURIOUS, 0x0f0
        .set    APIC_ICR_LOW, 0x300
        .set    APIC_ICR_HIGH, 0x310
        .set    APIC_LVT_TIMER, 0x320
        .set    APIC_TIMER_INITIAL, 0x380
        .set    APIC_TIMER_DIVIDE, 0x3e0
        .set    APIC_SOFTWARE_ENABLE, 0x100

/* Names an address of the guest's memory map; the symbol ends up in the guest's .sym file. */
        .macro  memory name, address
        .globl  \name
        .set    \name, \address
        .endm

/* Writes a byte to a port below 0x100.  Clobbers al. */
        .macro  out8 port, value
        movb    $\value, %al
        outb    %al, $\port
        .endm

/* Writes a byte to any port.  Clobbers al and dx. */
        .macro  out8_dx port, value
        movw    $\port, %dx
        movb    $\value, %al
        outb    %al, %dx
        .endm

/* Interrupts off; ds, es and ss are 0; the stack is below the sector.  Clobbers ax. */
        .macro  real_mode_start
        cli
        cld
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $BOOT, %sp
        .endm

/* Maps IRQ n to vector IRQ_BASE + n and opens the one IRQ `open`, 0 to 7.  Clobbers al. */
        .macro  pic_start open
        out8    PIC1, 0x11              # ICW1: edge-triggered, cascade, ICW4 follows
        out8    PIC2, 0x11
        out8    PIC1 + 1, IRQ_BASE      # ICW2: vectors
        out8    PIC2 + 1, IRQ_BASE + 8
        out8    PIC1 + 1, 0x04          # ICW3: the second PIC is at IRQ 2
        out8    PIC2 + 1, 0x02
        out8    PIC1 + 1, 0x01          # ICW4: 8086 mode
        out8    PIC2 + 1, 0x01
        out8    PIC1 + 1, ~(1 << \open) & 0xff # OCW1: the mask
        out8    PIC2 + 1, 0xff
        .endm

/* Ends the sector; the assembler refuses code that does not fit. */
        .macro  boot_signature
        .org    SECTOR - 2, 0
        .word   0xaa55
        .endm
