/*
 * heartbeat: counts, as fast as it can, and does nothing else.
 *
 * Real mode.  The counter starts at 0, so that a guest that was booted again instead of being
 * carried over is seen by its counter going back.
 *
 * Memory map
 *   0x8000  dword  HEARTBEAT  the counter
 */

#include "pc.h"

        memory  HEARTBEAT, 0x8000

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, HEARTBEAT
count:  incl    HEARTBEAT
        jmp     count

        boot_signature
