/*
 * nmi-pending: an NMI that waits, because another one is being handled until GO is written.
 *
 * Memory map
 *   0x8000  dword  READY   1 in the handler of the first, with the second sent
 *   0x8004  dword  NMIS    NMIs taken
 *   0x8008  dword  GO      the host writes 1
 *   0x800c  dword  NESTED  NMIs taken within the first
 *   0x8010  dword  ROUNDS  of waiting in the handler
 */

#include "pc.h"
#include "modes.h"

        memory  READY, 0x8000
        memory  NMIS, 0x8004
        memory  GO, 0x8008
        memory  NESTED, 0x800c
        memory  ROUNDS, 0x8010

        .set    NMI_VECTOR, 2
        .set    ICR_NMI, 0x4400         # to the APIC with the ID in the other half: 0

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, NMIS
        movl    $0, GO
        movl    $0, NESTED
        movl    $0, ROUNDS
        movw    $nmi, NMI_VECTOR * 4
        movw    $0, NMI_VECTOR * 4 + 2
        out8    PIC1 + 1, 0xff
        out8    PIC2 + 1, 0xff
        open_fs
        movl    $APIC, %ebx
        movl    $APIC_SOFTWARE_ENABLE + 0xff, %fs:APIC_SPURIOUS(%ebx)
        movl    $0, %fs:APIC_ICR_HIGH(%ebx)
        movl    $ICR_NMI, %fs:APIC_ICR_LOW(%ebx)
sleep:  hlt
        jmp     sleep

nmi:    incl    NMIS
        cmpl    $1, NMIS
        jne     2f
        movl    $ICR_NMI, %fs:APIC_ICR_LOW(%ebx)
        movl    $1, READY
1:      incl    ROUNDS
        cmpl    $0, GO
        je      1b
        movl    $2, READY
        iretw
2:      cmpl    $1, READY
        jne     3f
        incl    NESTED
3:      iretw

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
