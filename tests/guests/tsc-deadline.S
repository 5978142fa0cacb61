/*
 * tsc-deadline: the local APIC's timer in TSC-deadline mode, TICKS ahead; armed again by its own
 * interrupt where REARM is 1.
 *
 * Memory map
 *   0x8000  dword  READY       1 when it is armed
 *   0x8004  dword  INTERRUPTS  timer interrupts taken
 *   0x8010  qword  DEADLINE    the TSC for which it was armed last
 *   0x8018  qword  TAKEN_AT    the TSC at the last interrupt
 */

#include "pc.h"
#include "modes.h"

        memory  READY, 0x8000
        memory  INTERRUPTS, 0x8004
        memory  DEADLINE, 0x8010
        memory  TAKEN_AT, 0x8018

        .set    VECTOR, 0x20
        .set    TIMER_TSC_DEADLINE, 0x40000
        .set    MSR_TSC_DEADLINE, 0x6e0

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, INTERRUPTS
        movw    $timer_interrupt, VECTOR * 4
        movw    $0, VECTOR * 4 + 2
        out8    PIC1 + 1, 0xff
        out8    PIC2 + 1, 0xff
        open_fs
        movl    $APIC, %ebx
        movl    $APIC_SOFTWARE_ENABLE + 0xff, %fs:APIC_SPURIOUS(%ebx)
        movl    $TIMER_TSC_DEADLINE + VECTOR, %fs:APIC_LVT_TIMER(%ebx)
        call    arm
        movl    $1, READY
        sti
sleep:  hlt
        jmp     sleep

arm:    rdtsc
        addl    $(TICKS & 0xffffffff), %eax
        adcl    $(TICKS >> 32), %edx
        movl    %eax, DEADLINE
        movl    %edx, DEADLINE + 4
        movl    $MSR_TSC_DEADLINE, %ecx
        wrmsr
        ret

timer_interrupt:
        rdtsc
        movl    %eax, TAKEN_AT
        movl    %edx, TAKEN_AT + 4
        .if     REARM
        call    arm
        .endif
        incl    INTERRUPTS
        movl    $0, %fs:APIC_EOI(%ebx)
        iretw

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
