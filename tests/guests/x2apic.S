/*
 * x2apic: a periodic timer of a local APIC in x2APIC mode, whose registers are MSRs.
 *
 * Outside x2APIC mode each of these MSRs is a general protection fault.
 *
 * Memory map
 *   0x8000  dword  READY       1 when the timer runs
 *   0x8004  dword  INTERRUPTS  timer interrupts taken
 *   0x8008  dword  FAULTS      general protection faults
 *   0x800c  dword  APIC_ID     the ID register, read in each interrupt
 *   0x8010  dword  APIC_BASE   the low half of IA32_APIC_BASE, read in each interrupt
 */

#include "pc.h"

        memory  READY, 0x8000
        memory  INTERRUPTS, 0x8004
        memory  FAULTS, 0x8008
        memory  APIC_ID, 0x800c
        memory  APIC_BASE, 0x8010

        .set    VECTOR, 0x20
        .set    GENERAL_PROTECTION, 13
        .set    MSR_APIC_BASE, 0x1b
        .set    X2APIC_ENABLE, 0x400
        .set    X2APIC, 0x800           # MSR of the register at offset 16 n is 0x800 + n

        .macro  write_x2apic offset, value
        movl    $X2APIC + (\offset >> 4), %ecx
        movl    $\value, %eax
        xorl    %edx, %edx
        wrmsr
        .endm

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, INTERRUPTS
        movl    $0, FAULTS
        movw    $timer_interrupt, VECTOR * 4
        movw    $0, VECTOR * 4 + 2
        movw    $fault, GENERAL_PROTECTION * 4
        movw    $0, GENERAL_PROTECTION * 4 + 2
        out8    PIC1 + 1, 0xff
        out8    PIC2 + 1, 0xff
        movl    $MSR_APIC_BASE, %ecx
        rdmsr
        orl     $X2APIC_ENABLE, %eax
        wrmsr
        write_x2apic APIC_SPURIOUS, APIC_SOFTWARE_ENABLE + 0xff
        write_x2apic APIC_TIMER_DIVIDE, 3
        write_x2apic APIC_LVT_TIMER, 0x20000 + VECTOR
        write_x2apic APIC_TIMER_INITIAL, 1000000000 / 16 / 100
        movl    $1, READY
        sti
sleep:  hlt
        jmp     sleep

timer_interrupt:
        movl    $X2APIC + 2, %ecx
        rdmsr
        movl    %eax, APIC_ID
        movl    $MSR_APIC_BASE, %ecx
        rdmsr
        movl    %eax, APIC_BASE
        write_x2apic APIC_EOI, 0
        incl    INTERRUPTS
        iretw

fault:  incl    FAULTS
        hlt
        jmp     fault

        boot_signature
