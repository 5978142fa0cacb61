/*
 * From real mode to 32-bit protected mode or to long mode, interrupts off.
 *
 * The selectors are those with which the mini-VMM enters an ELF image, so that what follows
 * enter_protected_mode or enter_long_mode in a guest is also the entry point of that image.
 */

        .set    CODE, 0x10
        .set    DATA, 0x18

        .set    CR0_ET, 0x00000010
        .set    CR0_PE_ET, 0x00000011
        .set    CR0_PG, 0x80000000
        .set    CR4_PAE, 0x20
        .set    CR4_OSFXSR, 0x200
        .set    MSR_EFER, 0xc0000080
        .set    EFER_LME, 0x100

        .set    DESCRIPTOR_CODE32, 0x00cf9b000000ffff
        .set    DESCRIPTOR_CODE64, 0x00af9b000000ffff
        .set    DESCRIPTOR_DATA, 0x00cf93000000ffff

/* Page tables: one PML4, one PDPT, and four page directories of 2 MiB pages. */
        .set    PML4, 0x1000
        .set    PDPT, 0x2000
        .set    DIRECTORIES, 0x3000
        .set    TABLES_END, 0x7000
        .set    TABLE, 0x03             # present, writable
        .set    PAGE_2M, 0x83           # the same, and a page

/*
 * The GDT: CODE is `code`, DATA is flat, from 0x20 on come `more` descriptors.  Entries 0 and 1 are
 * never used, which leaves room for the operand of lgdt: a limit and a base of 4 bytes, in long
 * mode of 8.
 */
        .macro  flat_gdt code, more:vararg
        .balign 8
gdt:
gdt_pointer:
        .word   gdt_end - gdt - 1
        .long   gdt, 0
        .org    gdt + CODE
        .quad   \code
        .quad   DESCRIPTOR_DATA
        .ifnb   \more
        .quad   \more
        .endif
gdt_end:
        .endm

/* Opens fs to all 4 GiB and stays in real mode.  Clobbers eax. */
        .macro  open_fs
        lgdtl   gdt_pointer
        movl    $CR0_PE_ET, %eax
        movl    %eax, %cr0
        movw    $DATA, %ax
        movw    %ax, %fs
        movl    $CR0_ET, %eax
        movl    %eax, %cr0
        xorw    %ax, %ax
        movw    %ax, %fs                # base 0; in real mode the limit stays what it is
        .endm

/* Goes on after itself in 32-bit protected mode, paging off, segments flat.  Clobbers eax. */
        .macro  enter_protected_mode
        lgdtl   gdt_pointer
        movl    $CR0_PE_ET, %eax
        movl    %eax, %cr0
        ljmpl   $CODE, $1f
        .code32
1:      movl    $DATA, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        .endm

/*
 * Goes on after itself in long mode, the first 4 GiB identity-mapped; ds, es and ss keep their
 * real-mode values, which do not matter there.  Clobbers eax, ecx, edx, di.
 */
        .macro  enter_long_mode
        movw    $PML4, %di
        movw    $(TABLES_END - PML4) / 4, %cx
        xorl    %eax, %eax
        rep stosl
        movl    $PDPT + TABLE, PML4
        movw    $PDPT, %di
        movl    $DIRECTORIES + TABLE, %eax
        movw    $4, %cx
1:      movl    %eax, (%di)
        addw    $8, %di
        addw    $0x1000, %ax
        loop    1b
        movw    $DIRECTORIES, %di
        movl    $PAGE_2M, %eax
1:      movl    %eax, (%di)
        addw    $8, %di
        addl    $0x200000, %eax
        jnc     1b                      # carries at 4 GiB
        lgdtl   gdt_pointer
        movl    $CR4_PAE, %eax
        movl    %eax, %cr4
        movl    $PML4, %eax
        movl    %eax, %cr3
        movl    $MSR_EFER, %ecx
        movl    $EFER_LME, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $CR0_PG + CR0_PE_ET, %eax
        movl    %eax, %cr0
        ljmpl   $CODE, $1f
        .code64
1:
        .endm
