/*
 * churn: writes to every page of a range, round after round, and checks what it wrote before.
 *
 * Long mode, interrupts off.  The first 8 bytes of each page get
 *
 *     round << 32 | page frame number          (round counts from 1)
 *
 * so that no two stores ever write the same value.  From the second round on, the value that the
 * round before left is compared first; a page that lost a store, was copied from another page, or
 * is older than it should be, is a mismatch.
 *
 * START, END and DELAY are taken as they are found when the guest starts, unless END is 0: then
 * all three get their defaults.  DELAY may be changed at any time.
 *
 * Memory map
 *   0x8000  dword  HEARTBEAT         pages written, modulo 2**32
 *   0x9000  qword  START             first address of the range, a multiple of 4096 (16 MiB)
 *   0x9008  qword  END               first address after it, at most 4 GiB (32 MiB)
 *   0x9010  qword  DELAY             iterations of an empty loop after each page (0)
 *   0x9018  qword  ROUND             the round under way
 *   0x9020  qword  MISMATCHES        pages that did not hold what they should
 *   0x9028  qword  PAGES             pages written in all rounds
 *   0x9030  qword  MISMATCH_ADDRESS  address of the latest mismatch
 *   0x9038  qword  MISMATCH_FOUND    what was found there
 */

#include "pc.h"
#include "modes.h"

        memory  HEARTBEAT, 0x8000
        memory  START, 0x9000
        memory  END, 0x9008
        memory  DELAY, 0x9010
        memory  ROUND, 0x9018
        memory  MISMATCHES, 0x9020
        memory  PAGES, 0x9028
        memory  MISMATCH_ADDRESS, 0x9030
        memory  MISMATCH_FOUND, 0x9038

        .set    DEFAULT_START, 16 << 20
        .set    DEFAULT_END, 32 << 20
        .set    DEFAULT_DELAY, 0

        .code16
        .globl  start16
start16:
        real_mode_start
        enter_long_mode

        .globl  start64
start64:
        xorl    %eax, %eax
        movl    %eax, HEARTBEAT
        movq    %rax, ROUND
        movq    %rax, MISMATCHES
        movq    %rax, PAGES
        movq    %rax, MISMATCH_ADDRESS
        movq    %rax, MISMATCH_FOUND
        cmpq    %rax, END
        jne     1f
        movq    $DEFAULT_START, START
        movq    $DEFAULT_END, END
        movq    $DEFAULT_DELAY, DELAY
1:      movq    START, %rsi
        movq    END, %rdi
        xorl    %r8d, %r8d              # r8: 0 in the first round, which has nothing to check
        movq    $1 << 32, %r9           # r9: what a round adds to a value

round:
        incq    ROUND
        movq    %rsi, %rbx              # rbx: the page
        movq    %rsi, %rdx
        shrq    $12, %rdx
        movq    ROUND, %rax
        shlq    $32, %rax
        orq     %rdx, %rax              # rax: the value to write
        movq    %rax, %rdx
        subq    %r9, %rdx               # rdx: the value of the round before

page:
        cmpq    %rdx, (%rbx)
        jne     mismatch
write:  movq    %rax, (%rbx)
        incq    PAGES
        incl    HEARTBEAT
        movq    DELAY, %rcx
        jrcxz   2f
1:      loop    1b
2:      incq    %rax
        incq    %rdx
        addq    $4096, %rbx
        cmpq    %rdi, %rbx
        jb      page
        movl    $1, %r8d
        jmp     round

mismatch:
        testl   %r8d, %r8d
        jz      write
        incq    MISMATCHES
        movq    (%rbx), %rcx
        movq    %rcx, MISMATCH_FOUND
        movq    %rbx, MISMATCH_ADDRESS
        jmp     write

        flat_gdt DESCRIPTOR_CODE64
        boot_signature
