/*
 * ports: counts, and uses a device in each step, as guests do all the time.
 *
 * Real mode.  Each step reads the line status of COM1, writes its scratch register and reads that
 * back; a step whose byte comes back changed is counted as an error.
 *
 * Memory map
 *   0x8000  dword  HEARTBEAT  the counter
 *   0x8004  dword  ERRORS     bytes that came back as others
 */

#include "pc.h"

        memory  HEARTBEAT, 0x8000
        memory  ERRORS, 0x8004

        .equ    LINE_STATUS, 0x3fd
        .equ    SCRATCH, 0x3ff

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, HEARTBEAT
        movl    $0, ERRORS
count:  movw    $LINE_STATUS, %dx
        inb     %dx, %al
        movw    $SCRATCH, %dx
        movb    HEARTBEAT, %al
        outb    %al, %dx
        inb     %dx, %al
        cmpb    HEARTBEAT, %al
        je      right
        incl    ERRORS
right:  incl    HEARTBEAT
        jmp     count

        boot_signature
