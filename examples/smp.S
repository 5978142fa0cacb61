/*
 * smp: two vCPUs, each with a counter of its own, and a token that goes to and fro between them.
 *
 * The first vCPU runs in 32-bit protected mode, to reach the local APIC at 0xfee00000, and wakes
 * the vCPU with APIC ID 1 by INIT and SIPI; the SIPI is repeated until the other one answers.  The
 * second vCPU stays in real mode.  Interrupts are off on both.
 *
 * Whoever has the token adds 1 to PASSES and hands it on: TOKEN is PASSES modulo 2, or the holder
 * is just between these two stores.
 *
 * Memory map
 *   0x7000  byte[5]  TRAMPOLINE  where the second vCPU starts: a far jump
 *   0x8000  dword    COUNTER0    rounds of the first vCPU's loop
 *   0x8004  dword    COUNTER1    rounds of the second vCPU's loop
 *   0x8008  dword    PASSES      how often the token was handed on
 *   0x8010  dword    TOKEN       0: the first vCPU has it, 1: the second has it
 *   0x8014  dword    ANSWERED    1 once the second vCPU runs
 */

#include "pc.h"
#include "modes.h"

        memory  TRAMPOLINE, 0x7000
        memory  COUNTER0, 0x8000
        memory  COUNTER1, 0x8004
        memory  PASSES, 0x8008
        memory  TOKEN, 0x8010
        memory  ANSWERED, 0x8014

        .set    ICR_INIT, 0x4500        # level assert
        .set    ICR_STARTUP, 0x4600
        .set    OTHER_APIC_ID, 1
        .set    PATIENCE, 1000          # looks for the answer before the SIPI is repeated
        .set    JMP_FAR, 0xea

        .code16
        .globl  start16
start16:
        real_mode_start
        enter_protected_mode

        .globl  start32
start32:
        xorl    %eax, %eax
        movl    %eax, COUNTER0
        movl    %eax, COUNTER1
        movl    %eax, PASSES
        movl    %eax, TOKEN
        movl    %eax, ANSWERED
        movb    $JMP_FAR, TRAMPOLINE
        movl    $second, TRAMPOLINE + 1 # offset, and 0 for the segment

        movl    $APIC_SOFTWARE_ENABLE + 0xff, APIC + APIC_SPURIOUS
        movl    $OTHER_APIC_ID << 24, APIC + APIC_ICR_HIGH
        movl    $ICR_INIT, APIC + APIC_ICR_LOW
wake:
        movl    $PATIENCE, %ecx
1:      pause
        cmpl    %eax, ANSWERED
        jne     first
        loop    1b
        movl    $ICR_STARTUP + (TRAMPOLINE >> 12), APIC + APIC_ICR_LOW
        jmp     wake

first:
        incl    COUNTER0
        cmpl    $0, TOKEN
        jne     first
        incl    PASSES
        movl    $1, TOKEN
        jmp     first

        .code16
second:
        xorw    %ax, %ax
        movw    %ax, %ds
        movl    $1, ANSWERED
1:      incl    COUNTER1
        cmpl    $1, TOKEN
        jne     1b
        incl    PASSES
        movl    $0, TOKEN
        jmp     1b

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
