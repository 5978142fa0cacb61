/*
 * reset-i8042: resets the machine once, by the reset line of the keyboard controller.
 *
 * Real mode.  It resets when it is booted for the first time and halts when it is booted again.
 * RAM outlives a reset; BOOTS is where a BIOS clears nothing on its way to the boot sector.
 *
 * Memory map
 *   0x0600  dword  BOOTS  times that the guest was booted, in RAM that began as zeros
 */

#include "pc.h"

        memory  BOOTS, 0x0600

        .set    I8042_COMMAND, 0x64
        .set    PULSE_RESET, 0xfe

        .code16
        .globl  start16
start16:
        real_mode_start
        incl    BOOTS
        cmpl    $1, BOOTS
        jne     halt
        out8    I8042_COMMAND, PULSE_RESET
halt:   hlt
        jmp     halt

        boot_signature
