/*
 * debugcon: prints "hello\n" to the debug console at port 0xe9 and halts.
 *
 * Real mode.
 *
 * Memory map
 *   none
 */

#include "pc.h"

        .set    DEBUGCON, 0xe9

        .code16
        .globl  start16
start16:
        real_mode_start
        movw    $text, %si
        movw    $text_end - text, %cx
1:      lodsb
        outb    %al, $DEBUGCON
        loop    1b
halt:   hlt
        jmp     halt

text:   .ascii  "hello\n"
text_end:

        boot_signature
