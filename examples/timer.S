/*
 * timer: counts the interrupts of the PIT at about 100 Hz, and its own wake-ups from `hlt`.
 *
 * Real mode; PIT channel 0 in mode 2, IRQ 0 through the 8259, vector 0x20.
 *
 * Memory map
 *   0x8000  dword  WAKEUPS     times that `hlt` has come back
 *   0x8004  dword  INTERRUPTS  timer interrupts taken
 */

#include "pc.h"

        memory  WAKEUPS, 0x8000
        memory  INTERRUPTS, 0x8004

        .set    PIT_IRQ, 0
        .set    PIT_CHANNEL0, 0x40
        .set    PIT_COMMAND, 0x43
        .set    PIT_DIVISOR, 11932      # 1193182 Hz / 11932 = 99.998 Hz

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, WAKEUPS
        movl    $0, INTERRUPTS
        movw    $pit_interrupt, (IRQ_BASE + PIT_IRQ) * 4
        movw    $0, (IRQ_BASE + PIT_IRQ) * 4 + 2
        pic_start PIT_IRQ
        out8    PIT_COMMAND, 0x34       # channel 0, low byte then high byte, mode 2
        out8    PIT_CHANNEL0, PIT_DIVISOR & 0xff
        out8    PIT_CHANNEL0, PIT_DIVISOR >> 8
        sti
sleep:  hlt
        incl    WAKEUPS
        jmp     sleep

pit_interrupt:
        pushw   %ax
        incl    INTERRUPTS
        out8    PIC1, PIC_EOI
        popw    %ax
        iretw

        boot_signature
