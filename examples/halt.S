/*
 * halt: fills the registers with values of their own and halts for ever.
 *
 * Long mode, interrupts off, so that nothing changes a register any more: what the vCPU holds
 * after an update can be compared bit by bit with what it held before.
 *
 *   rax rcx rdx rbx rsp rbp rsi rdi r8 to r15   each byte of number n is 0xa0 + n
 *   rflags              0x203cd7: CF PF AF ZF SF DF OF, IOPL 3, ID
 *   ds es ss fs gs tr   0x18 0x20 0x28 0x30 0x38 0x40, each with a limit of its own
 *   fs base, gs base    0x1f1f1f1f1f1f, 0x2f2f2f2f2f2f; MSR_KERNEL_GS_BASE 0x3f3f3f3f3f3f
 *   dr0 to dr3          0xd0d0d0d0, 0xd1d1d1d1, 0xd2d2d2d2, 0xd3d3d3d3, not enabled
 *   cr2, cr8            0xc2c2c2c2, 5
 *   fcw fsw mxcsr       0x0c7f, 0x3800 (TOP is 7), 0x3f80
 *   st0 to st7          10 bytes each, counting up in memory order from 0x20, 0x30, … 0x90
 *   xmm0 to xmm15       16 bytes each, counting up in memory order from 0xa0, 0xb0, … modulo 256
 *
 * Memory map
 *   0x8000  dword      HALTED  1 when all are loaded: `hlt` is next
 *   0x9000  byte[512]  FXSAVE  the image from which the x87 and SSE registers are loaded
 *   0x9200  byte[104]  TSS     the task state segment, not used
 */

#include "pc.h"
#include "modes.h"

        memory  HALTED, 0x8000
        memory  FXSAVE, 0x9000
        memory  TSS, 0x9200

        .set    FXSAVE_SIZE, 512
        .set    FCW_FSW_FTW, 0x0c7f + (0x3800 << 16) + (0xff << 32)     # all eight are in use
        .set    MXCSR, 0x3f80
        .set    RFLAGS, 0x203cd7
        .set    MSR_FS_BASE, 0xc0000100
        .set    MSR_KERNEL_GS_BASE, 0xc0000102
        .set    DESCRIPTOR_TSS, 0x0000890000000067

/* Sets `register` to what the one before it has, plus 1 in each byte. */
        .macro  follow before, register
        leaq    (%\before, %r15), %\register
        .endm

        .code16
        .globl  start16
start16:
        real_mode_start
        enter_long_mode

        .globl  start64
start64:
        lgdt    gdt_pointer
        xorl    %eax, %eax
        movl    %eax, HALTED
        movl    $CR4_PAE + CR4_OSFXSR, %eax
        movq    %rax, %cr4
        movl    $DATA, %eax
        movl    %eax, %ds
        addb    $8, %al
        movl    %eax, %es
        addb    $8, %al
        movl    %eax, %ss
        addb    $8, %al
        movl    %eax, %fs
        addb    $8, %al
        movl    %eax, %gs
        addb    $8, %al
        ltr     %ax

        movl    $MSR_FS_BASE, %ecx
        movl    $0x1f1f1f1f, %eax
        movl    $0x1f1f, %edx
1:      wrmsr
        addl    $0x10101010, %eax
        addl    $0x1010, %edx
        incl    %ecx
        cmpb    $MSR_KERNEL_GS_BASE & 0xff, %cl
        jbe     1b

        movl    $0xd0d0d0d0, %eax
        movl    $0x01010101, %ecx
        movq    %rax, %db0
        addl    %ecx, %eax
        movq    %rax, %db1
        addl    %ecx, %eax
        movq    %rax, %db2
        addl    %ecx, %eax
        movq    %rax, %db3
        movl    $0xc2c2c2c2, %eax
        movq    %rax, %cr2
        movl    $5, %eax
        movq    %rax, %cr8

        movl    $FXSAVE, %edi
        movl    $FXSAVE_SIZE, %ecx
1:      movb    %dil, %al               # the byte's offset, modulo 256
        stosb
        loop    1b
        movl    $FXSAVE, %edi
        movq    $FCW_FSW_FTW, %rax
        stosq
        xorl    %eax, %eax              # instruction and operand pointer
        stosq
        stosq
        movl    $MXCSR, %eax
        stosl
        fxrstor FXSAVE

        pushq   $RFLAGS
        popfq
        movq    $0xa0a0a0a0a0a0a0a0, %rax
        movq    $0x0101010101010101, %r15
        follow  rax, rcx
        follow  rcx, rdx
        follow  rdx, rbx
        follow  rbx, rsp
        follow  rsp, rbp
        follow  rbp, rsi
        follow  rsi, rdi
        follow  rdi, r8
        follow  r8, r9
        follow  r9, r10
        follow  r10, r11
        follow  r11, r12
        follow  r12, r13
        follow  r13, r14
        follow  r14, r15
        movb    $1, HALTED
halt:   hlt
        jmp     halt

        flat_gdt DESCRIPTOR_CODE64, \
                DESCRIPTOR_DATA - 1, DESCRIPTOR_DATA - 2, DESCRIPTOR_DATA - 3, \
                DESCRIPTOR_DATA - 4, DESCRIPTOR_TSS + (TSS << 16), 0
        boot_signature
