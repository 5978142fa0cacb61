/*
 * triplefault: resets the machine once, by an exception that no handler takes.
 *
 * 32-bit protected mode with an empty IDT; the faulting instruction is ud2.  It faults
 * when it is booted for the first time and halts when it is booted again.  RAM outlives a reset;
 * BOOTS is where a BIOS clears nothing on its way to the boot sector.
 *
 * Memory map
 *   0x0600  dword  BOOTS  times that the guest was booted, in RAM that began as zeros
 */

#include "pc.h"
#include "modes.h"

        memory  BOOTS, 0x0600

        .code16
        .globl  start16
start16:
        real_mode_start
        incl    BOOTS
        cmpl    $1, BOOTS
        jne     halt
        enter_protected_mode
        lidtl   empty_idt
        ud2

        .code16
halt:   hlt
        jmp     halt

empty_idt:
        .word   0
        .long   0

        flat_gdt DESCRIPTOR_CODE32
        boot_signature
