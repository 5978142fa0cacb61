/*
 * pvclock: a guest with KVM's clock, which tells it that it was stopped.
 *
 * Memory map
 *   0x8000  dword  READY   1 when the clock's page is KVM's
 *   0x8004  dword  ROUNDS  counts without end
 *   0x9000         CLOCK   struct pvclock_vcpu_time_info; its flags are at 0x901d
 */

#include "pc.h"
#include "modes.h"

        memory  READY, 0x8000
        memory  ROUNDS, 0x8004
        memory  CLOCK, 0x9000

        .set    MSR_KVM_SYSTEM_TIME_NEW, 0x4b564d01
        .set    ENABLE, 1

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, READY
        movl    $0, ROUNDS
        movl    $MSR_KVM_SYSTEM_TIME_NEW, %ecx
        movl    $CLOCK + ENABLE, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $1, READY
loop:   incl    ROUNDS
        jmp     loop

        boot_signature
