/*
 * random-io: reads and writes random ports and random physical addresses, without end.
 *
 * A test patches `seed`, the last four bytes in front of the boot signature.  At 0x8000 it counts.
 * It leaves alone the ports that end or reset the machine on purpose: 0x64, 0x92, 0xcf9 and the
 * power management's.
 */
#include "pc.h"
#include "modes.h"

        memory  counter, 0x8000

        .code16
        .globl  start16
start16:
        real_mode_start
        open_fs
        movl    seed, %ebp
        movl    $0, counter
again:  incl    counter
        call    random
        movl    %ebp, %ebx              # what to do
        testb   $3, %bl
        jz      memory_access
        call    random
        movw    %bp, %dx
        testb   $4, %bl
        jz      1f
        andw    $0x3ff, %dx             # most of what there is
1:      cmpw    $0x64, %dx
        je      again
        cmpw    $0x92, %dx
        je      again
        cmpw    $0xcf9, %dx
        je      again
        movw    %dx, %ax
        andw    $0xffc0, %ax
        cmpw    $0xb000, %ax
        je      again
        cmpw    $0x600, %ax
        je      again
        call    random
        movl    %ebp, %eax
        testb   $8, %bl
        jz      input
        testb   $16, %bl
        jz      1f
        outb    %al, %dx
        jmp     again
1:      testb   $32, %bl
        jz      2f
        outw    %ax, %dx
        jmp     again
2:      outl    %eax, %dx
        jmp     again
input:  testb   $16, %bl
        jz      1f
        inb     %dx, %al
        jmp     again
1:      inl     %dx, %eax
        jmp     again

memory_access:
        call    random
        movl    %ebp, %edi
        testb   $4, %bl
        jz      1f
        andl    $0x00ffffff, %edi       # RAM, but not this code
        orl     $0x00100000, %edi
        jmp     2f
1:      andl    $0x00ffffff, %edi       # I/O APIC, local APIC, what is above
        orl     $0xfe000000, %edi
2:      call    random
        testb   $8, %bl
        jz      3f
        movl    %ebp, %fs:(%edi)
        jmp     again
3:      movl    %fs:(%edi), %eax
        testb   $16, %bl
        jz      again
        movb    %al, %fs:(%edi)
        jmp     again

random: movl    %ebp, %ecx              # xorshift
        shll    $13, %ecx
        xorl    %ecx, %ebp
        movl    %ebp, %ecx
        shrl    $17, %ecx
        xorl    %ecx, %ebp
        movl    %ebp, %ecx
        shll    $5, %ecx
        xorl    %ecx, %ebp
        ret

        flat_gdt DESCRIPTOR_CODE32
        .org    SECTOR - 6
seed:   .long   0x2545f491
        boot_signature
