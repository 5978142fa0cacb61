/*
 * reset-port92: resets the machine once, by bit 0 of system control port A.
 *
 * Real mode.  It resets when it is booted for the first time and halts when it is booted again.
 * RAM outlives a reset; BOOTS is where a BIOS clears nothing on its way to the boot sector.
 *
 * Memory map
 *   0x0600  dword  BOOTS  times that the guest was booted, in RAM that began as zeros
 */

#include "pc.h"

        memory  BOOTS, 0x0600

        .set    PORT92, 0x92
        .set    FAST_RESET_A20, 0x03    # bit 1 keeps A20 open

        .code16
        .globl  start16
start16:
        real_mode_start
        incl    BOOTS
        cmpl    $1, BOOTS
        jne     halt
        out8    PORT92, FAST_RESET_A20
halt:   hlt
        jmp     halt

        boot_signature
