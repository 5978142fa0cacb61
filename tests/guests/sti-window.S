/*
 * sti-window: an interrupt that waits is taken only after the instruction after STI.
 *
 * Each round sends an interrupt to itself while interrupts are off, and then has them on for one
 * instruction.
 *
 * Memory map
 *   0x8000  dword  READY       1 when the rounds begin
 *   0x8004  dword  INTERRUPTS  interrupts taken
 *   0x8008  dword  AFTER       times that the instruction after STI was executed
 *   0x800c  dword  EARLY       interrupts taken before it
 *   0x8010  dword  LATE        interrupts not taken right after it, as a KVM may that emulates
 */

#include "pc.h"
#include "modes.h"

        memory  READY, 0x8000
        memory  INTERRUPTS, 0x8004
        memory  AFTER, 0x8008
        memory  EARLY, 0x800c
        memory  LATE, 0x8010

        .set    VECTOR, 0x20
        .set    ICR_SELF, 0x44000 + VECTOR

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, INTERRUPTS
        movl    $0, AFTER
        movl    $0, EARLY
        movl    $0, LATE
        movw    $interrupt, VECTOR * 4
        movw    $0, VECTOR * 4 + 2
        out8    PIC1 + 1, 0xff
        out8    PIC2 + 1, 0xff
        open_fs
        movl    $APIC, %ebx
        movl    $APIC_SOFTWARE_ENABLE + 0xff, %fs:APIC_SPURIOUS(%ebx)
        movl    $1, READY
again:  movl    $ICR_SELF, %fs:APIC_ICR_LOW(%ebx)
        sti
        incl    AFTER
        cli
        jmp     again

interrupt:
        incl    INTERRUPTS
        movl    AFTER, %eax
        cmpl    INTERRUPTS, %eax
        je      1f
        ja      2f
        incl    EARLY
        jmp     3f
2:      incl    LATE
3:      movl    %eax, INTERRUPTS        # each is counted once
1:      movl    $0, %fs:APIC_EOI(%ebx)
        iretw

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
