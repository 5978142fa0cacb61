/*
 * exit: ends the VMM by way of isa-debug-exit (`-device isa-debug-exit`, ports 0x501 and 0x502).
 *
 * Real mode.  The VMM's exit status is VALUE << 1 | 1 = 33.  Without the device the write is lost
 * and the guest halts.
 *
 * Memory map
 *   none
 */

#include "pc.h"

        .set    DEBUG_EXIT, 0x501
        .set    VALUE, 0x10

        .code16
        .globl  start16
start16:
        real_mode_start
        out8_dx DEBUG_EXIT, VALUE
halt:   hlt
        jmp     halt

        boot_signature
