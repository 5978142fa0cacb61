/*
 * msr-values: sets an MTRR pair, a fixed MTRR, their default type, PAT and a bank of the machine
 * check once, and reads them all the time.
 *
 * Memory map
 *   0x8000  dword  READY   1 when they are set
 *   0x8004  dword  ROUNDS  times that all were read
 *   0x8100  qword  VALUES  what was read, one after the other
 */

#include "pc.h"

        memory  READY, 0x8000
        memory  ROUNDS, 0x8004
        memory  VALUES, 0x8100

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, ROUNDS
        movw    $wanted, %si
        movw    $COUNT, %bp
1:      movl    (%si), %ecx
        movl    4(%si), %eax
        movl    8(%si), %edx
        wrmsr
        addw    $12, %si
        decw    %bp
        jnz     1b
        movl    $1, READY
again:  movw    $wanted, %si
        movw    $VALUES, %di
        movw    $COUNT, %bp
1:      movl    (%si), %ecx
        rdmsr
        movl    %eax, (%di)
        movl    %edx, 4(%di)
        addw    $12, %si
        addw    $8, %di
        decw    %bp
        jnz     1b
        incl    ROUNDS
        jmp     again

        .balign 4
wanted: .long   0x200, 0x80000006, 0
        .long   0x201, 0x80000800, 0xf
        .long   0x250, 0x06060606, 0x06060606
        .long   0x26f, 0x05050505, 0x05050505
        .long   0x2ff, 0xc06, 0
        .long   0x277, 0x00070106, 0x00070105
        .long   0x400, 0, 0             # MC0_CTL: all ones at power-on
        .long   0x17a, 0x5, 0           # MCG_STATUS
        .set    COUNT, (. - wanted) / 12
        boot_signature
