/*
 * pit-mode: PIT channel 0 in mode MODE with COUNT, loaded again by its own interrupt where RELOAD
 * is 1; channel 2 in the same mode.  What the chip says of both is read all the time.
 *
 * Memory map
 *   0x8000  dword  READY       1 when channel 0 is loaded
 *   0x8004  dword  INTERRUPTS  interrupts of channel 0
 *   0x8008  dword  ROUNDS      times that the status of both was read
 *   0x800c  byte   STATUS0     status of channel 0: bit 7 OUT, 4-5 access, 1-3 mode, 0 BCD
 *   0x800d  byte   STATUS2     of channel 2
 */

#include "pc.h"

        memory  READY, 0x8000
        memory  INTERRUPTS, 0x8004
        memory  ROUNDS, 0x8008
        memory  STATUS0, 0x800c
        memory  STATUS2, 0x800d

        .set    PIT_IRQ, 0
        .set    PIT_CHANNEL0, 0x40
        .set    PIT_CHANNEL2, 0x42
        .set    PIT_COMMAND, 0x43
        .set    CONTROL, 0x30 | MODE << 1       # low byte, then high byte
        .set    READ_BACK_STATUS, 0xe0
        .set    SPEAKER, 0x61

        .macro  load channel
        out8    \channel, COUNT & 0xff
        out8    \channel, COUNT >> 8
        .endm

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, INTERRUPTS
        movl    $0, ROUNDS
        movw    $pit_interrupt, (IRQ_BASE + PIT_IRQ) * 4
        movw    $0, (IRQ_BASE + PIT_IRQ) * 4 + 2
        pic_start PIT_IRQ
        out8    SPEAKER, 1              # the gate of channel 2
        out8    PIT_COMMAND, 0x80 + CONTROL
        load    PIT_CHANNEL2
        out8    PIT_COMMAND, CONTROL
        load    PIT_CHANNEL0
        movl    $1, READY
        sti
again:  cli
        out8    PIT_COMMAND, READ_BACK_STATUS + 0x02
        inb     $PIT_CHANNEL0, %al
        movb    %al, STATUS0
        out8    PIT_COMMAND, READ_BACK_STATUS + 0x08
        inb     $PIT_CHANNEL2, %al
        movb    %al, STATUS2
        sti
        incl    ROUNDS
        jmp     again

pit_interrupt:
        pushw   %ax
        incl    INTERRUPTS
        .if     RELOAD
        load    PIT_CHANNEL0
        .endif
        out8    PIC1, PIC_EOI
        popw    %ax
        iretw

        boot_signature
