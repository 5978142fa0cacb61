/*
 * debug-registers: reads DR0 to DR3 and DR7 all the time; runs into the breakpoint of DR3 when
 * GO is written.
 *
 * Memory map
 *   0x8000  dword  READY   1 when they are set
 *   0x8004  dword  ROUNDS  times that all were read
 *   0x8008  dword  GO      the host writes 1
 *   0x800c  dword  HITS    debug exceptions
 *   0x8010  dword  PASSED  times that the instruction with the breakpoint was executed
 *   0x8014  dword  DR6     in the last debug exception
 *   0x8100  dword  VALUES  DR0, DR1, DR2, DR3, DR7
 */

#include "pc.h"

        memory  READY, 0x8000
        memory  ROUNDS, 0x8004
        memory  GO, 0x8008
        memory  HITS, 0x800c
        memory  PASSED, 0x8010
        memory  DR6_SEEN, 0x8014
        memory  VALUES, 0x8100

        .set    DEBUG_EXCEPTION, 1
        .set    ENABLE_3, 0x400 + 0x40  # local, on execution

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, ROUNDS
        movl    $0, GO
        movl    $0, HITS
        movl    $0, PASSED
        movw    $exception, DEBUG_EXCEPTION * 4
        movw    $0, DEBUG_EXCEPTION * 4 + 2
        movl    $0x11111111, %eax
        movl    %eax, %dr0
        movl    $0x22222222, %eax
        movl    %eax, %dr1
        movl    $0x33333333, %eax
        movl    %eax, %dr2
        movl    $marked, %eax
        movl    %eax, %dr3
        movl    $ENABLE_3, %eax
        movl    %eax, %dr7
        movl    $1, READY
again:  movl    %dr0, %eax
        movl    %eax, VALUES
        movl    %dr1, %eax
        movl    %eax, VALUES + 4
        movl    %dr2, %eax
        movl    %eax, VALUES + 8
        movl    %dr3, %eax
        movl    %eax, VALUES + 12
        movl    %dr7, %eax
        movl    %eax, VALUES + 16
        incl    ROUNDS
        cmpl    $0, GO
        je      again
marked: incl    PASSED
done:   hlt
        jmp     done

exception:
        movl    %dr6, %eax
        movl    %eax, DR6_SEEN
        xorl    %eax, %eax
        movl    %eax, %dr7
        incl    HITS
        iretw

        boot_signature
