/*
 * Entry of the guests: long mode, the first 4 GiB identity-mapped, interrupts off, a stack.
 *
 * The mini-VMM enters an ELF64 image at start64, already so.  QEMU enters it by the note below
 * (PVH boot) at start32, in flat protected mode without paging.  Both go on with page tables and a
 * GDT of their own here, and call main.
 */

        .set    CODE, 0x08
        .set    DATA, 0x10
        .set    CR0_PG_PE, 0x80000011
        .set    CR4_PAE, 0x20
        .set    MSR_EFER, 0xc0000080
        .set    EFER_LME, 0x100
        .set    TABLE, 0x03             # present, writable
        .set    PAGE_2M, 0x83           # the same, and a page
        .set    XEN_ELFNOTE_PHYS32_ENTRY, 18

        .section .note.pvh, "a", @note
        .long   4, 4, XEN_ELFNOTE_PHYS32_ENTRY
        .asciz  "Xen"
        .long   start32

        .text
        .code32
        .globl  start32
start32:
        cli
        cld
        movl    $directories + TABLE, %eax
        movl    $pdpt, %edi
        movl    $4, %ecx
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $8, %edi
        addl    $0x1000, %eax
        loop    1b
        movl    $pdpt + TABLE, pml4
        movl    $directories, %edi
        movl    $PAGE_2M, %eax
1:      movl    %eax, (%edi)
        movl    $0, 4(%edi)
        addl    $8, %edi
        addl    $0x200000, %eax
        jnc     1b                      # carries at 4 GiB
        movl    $CR4_PAE, %eax
        movl    %eax, %cr4
        movl    $pml4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        movl    $EFER_LME, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $CR0_PG_PE, %eax
        movl    %eax, %cr0
        lgdt    gdt_pointer
        ljmp    $CODE, $common

        .code64
        .globl  start64
start64:
        cli
        cld
        lgdt    gdt_pointer
        pushq   $CODE
        pushq   $common
        lretq
common:
        movl    $DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movq    $stack_end, %rsp
        call    main
1:      hlt
        jmp     1b

        .balign 8
gdt:    .quad   0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .quad   gdt

        .bss
        .balign 4096
pml4:   .skip   4096
pdpt:   .skip   4096
directories:
        .skip   4 * 4096
        .skip   4096
stack_end:
