/*
 * sweep: writes one word to each page of a range, from its start to its end, over and over.
 *
 * Long mode, interrupts off.  The range is RAM from START to END; it may be set at any time and
 * counts from the next sweep on.  Until END is above START only the heartbeat goes on.  16 pages
 * are written between two heartbeats, by 21 instructions, because a KVM that emulates them is slow.
 *
 * Memory map
 *   0x8000  dword  HEARTBEAT  blocks of 16 pages written, modulo 2**32
 *   0x9000  qword  START      first address of the range, a multiple of 65536 (1 MiB)
 *   0x9008  qword  END        first address after it, a multiple of 65536, at most 4 GiB (0)
 *   0x9010  qword  SWEEPS     whole sweeps done
 */

#include "pc.h"
#include "modes.h"

        memory  HEARTBEAT, 0x8000
        memory  START, 0x9000
        memory  END, 0x9008
        memory  SWEEPS, 0x9010

        .set    DEFAULT_START, 1 << 20
        .set    PAGE, 4096
        .set    BLOCK, 16 * PAGE

        .code16
        .globl  start16
start16:
        real_mode_start
        enter_long_mode

        xorl    %eax, %eax
        movl    %eax, HEARTBEAT
        movq    $DEFAULT_START, START
        movq    %rax, END
        movq    %rax, SWEEPS

sweep:
        movq    START, %rbx             # rbx: the block
        movq    END, %rdi
        movq    SWEEPS, %rax            # eax: what is written
        cmpq    %rdi, %rbx
        jae     idle
block:
        page = 0
        .rept   16
        movl    %eax, page(%rbx)
        page = page + PAGE
        .endr
        incl    HEARTBEAT
        addq    $BLOCK, %rbx
        cmpq    %rdi, %rbx
        jb      block
        incq    SWEEPS
        jmp     sweep

idle:   incl    HEARTBEAT
        jmp     sweep

        flat_gdt DESCRIPTOR_CODE64
        boot_signature
