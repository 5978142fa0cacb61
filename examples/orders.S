/*
 * orders: makes accesses to devices, one after the other, as it is told through its memory.
 *
 * Real mode; a triple fault comes from protected mode.  ORDER says what is next; it is 0 again when that is done: 1 sends the next byte of
 * SENT to the debug console, 2 sends sixteen at once (`rep outsb`), 3 writes COM1's scratch register
 * and reads it back, 4 reads where there is no memory and writes to ROM, 5 makes a triple fault.
 * While STREAM is not 0, each round does 1 and 3 by itself.
 *
 * Memory map
 *   0x8000  dword     HEARTBEAT   rounds of the loop
 *   0x8004  dword     ORDER       what to do next
 *   0x8008  dword     DONE        orders done
 *   0x800c  dword     SENT        bytes sent; the lowest byte is the next one
 *   0x8010  dword     STREAM      whether every round sends and compares
 *   0x8014  dword     MISMATCHES  scratch register readings that were not what was written
 *   0x8018  dword     MISSING     what was read where there is no memory
 *   0x8020  byte[16]  STRING      what `rep outsb` sends
 */

#include "pc.h"
#include "modes.h"

        memory  HEARTBEAT, 0x8000
        memory  ORDER, 0x8004
        memory  DONE, 0x8008
        memory  SENT, 0x800c
        memory  STREAM, 0x8010
        memory  MISMATCHES, 0x8014
        memory  MISSING, 0x8018
        memory  STRING, 0x8020

        .set    DEBUGCON, 0xe9
        .set    COM1_SCRATCH, 0x3ff
        .set    STRING_SIZE, 16
        .set    VGA_SEGMENT, 0xa000     # no memory there
        .set    ROM_SEGMENT, 0xf000

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, HEARTBEAT
        movl    $0, ORDER
round:  incl    HEARTBEAT
        cmpl    $0, STREAM
        je      1f
        call    send
        call    scratch
1:      movl    ORDER, %eax
        cmpl    $1, %eax
        jne     2f
        call    send
2:      cmpl    $2, %eax
        jne     3f
        call    send_string
3:      cmpl    $3, %eax
        jne     4f
        call    scratch
4:      cmpl    $4, %eax
        jne     5f
        call    memoryless
5:      cmpl    $5, %eax
        je      fault
        testl   %eax, %eax
        jz      round
        incl    DONE
        movl    $0, ORDER
        jmp     round

send:   pushl   %eax
        movb    SENT, %al
        outb    %al, $DEBUGCON
        incl    SENT
        popl    %eax
        ret

send_string:
        movw    $STRING, %di
        movw    $STRING_SIZE, %cx
        movb    SENT, %bl
1:      movb    %bl, (%di)
        incb    %bl
        incw    %di
        loop    1b
        movw    $STRING, %si
        movw    $STRING_SIZE, %cx
        movw    $DEBUGCON, %dx
        rep outsb
        addl    $STRING_SIZE, SENT
        ret

scratch:
        pushl   %eax
        movw    $COM1_SCRATCH, %dx
        movb    HEARTBEAT, %al
        outb    %al, %dx
        inb     %dx, %al
        cmpb    HEARTBEAT, %al
        je      1f
        incl    MISMATCHES
1:      popl    %eax
        ret

memoryless:
        movw    $VGA_SEGMENT, %bx
        movw    %bx, %es
        movl    %es:0, %ebx
        movl    %ebx, MISSING
        movw    $ROM_SEGMENT, %bx
        movw    %bx, %es
        movl    %eax, %es:0
        xorw    %bx, %bx
        movw    %bx, %es
        ret

fault:  incl    DONE
        movl    $0, ORDER
        enter_protected_mode
        lidtl   empty_idt
        ud2

empty_idt:
        .word   0
        .long   0

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
