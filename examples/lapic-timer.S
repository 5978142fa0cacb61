/*
 * lapic-timer: the same as timer, with the periodic timer of the local APIC.
 *
 * Real mode, vector 0x20, both 8259s masked.  The local APIC's registers are reached by way of fs,
 * whose limit a short visit to protected mode has raised to 4 GiB ("unreal mode"): a part of the
 * vCPU's state that no instruction can read back.  The rate is 100 Hz where the APIC's timer runs
 * at 1 GHz, as KVM's and QEMU's do.
 *
 * Memory map
 *   0x8000  dword  WAKEUPS     times that `hlt` has come back
 *   0x8004  dword  INTERRUPTS  timer interrupts taken
 */

#include "pc.h"
#include "modes.h"

        memory  WAKEUPS, 0x8000
        memory  INTERRUPTS, 0x8004

        .set    VECTOR, 0x20
        .set    TIMER_PERIODIC, 0x20000
        .set    TIMER_BY_16, 0x3
        .set    TIMER_COUNT, 1000000000 / 16 / 100

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, WAKEUPS
        movl    $0, INTERRUPTS
        movw    $timer_interrupt, VECTOR * 4
        movw    $0, VECTOR * 4 + 2
        out8    PIC1 + 1, 0xff
        out8    PIC2 + 1, 0xff
        open_fs
        movl    $APIC, %ebx
        movl    $APIC_SOFTWARE_ENABLE + 0xff, %fs:APIC_SPURIOUS(%ebx)
        movl    $TIMER_BY_16, %fs:APIC_TIMER_DIVIDE(%ebx)
        movl    $TIMER_PERIODIC + VECTOR, %fs:APIC_LVT_TIMER(%ebx)
        movl    $TIMER_COUNT, %fs:APIC_TIMER_INITIAL(%ebx)
        sti
sleep:  hlt
        incl    WAKEUPS
        jmp     sleep

timer_interrupt:
        incl    INTERRUPTS
        movl    $0, %fs:APIC_EOI(%ebx)
        iretw

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
