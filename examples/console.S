/*
 * console: answers every line that comes in on COM1 with "<count>: <line>\r\n".
 *
 * Real mode; COM1 at 115200 8n1 with its FIFOs on.  It prints "ready\r\n" when it can be typed to.
 * A line ends with CR or LF; empty lines are ignored, so that CRLF ends one line; what is longer
 * than LINE_MAX is cut off there.
 *
 * The guest sleeps in `hlt` until IRQ 4 (through the 8259, vector 0x24).  The handler closes the
 * UART's interrupt enable register; the main loop drains the receive FIFO, answers, and opens it
 * again.  Bytes that come meanwhile wait in the FIFO, so none is lost however long an answer takes.
 *
 * Memory map
 *   0x8000  dword      LINES       lines answered
 *   0x8004  dword      INTERRUPTS  interrupts taken
 *   0x8008  word       LENGTH      bytes of the line that is being received
 *   0x8100  byte[256]  LINE        that line
 */

#include "pc.h"

        memory  LINES, 0x8000
        memory  INTERRUPTS, 0x8004
        memory  LENGTH, 0x8008
        memory  LINE, 0x8100
        .set    LINE_MAX, 256

        .set    COM1, 0x3f8
        .set    COM1_IRQ, 4
        .set    IER, COM1 + 1           # interrupt enable
        .set    FCR, COM1 + 2           # FIFO control
        .set    LCR, COM1 + 3           # line control
        .set    MCR, COM1 + 4           # modem control
        .set    LSR, COM1 + 5           # line status
        .set    IER_RECEIVE, 0x01
        .set    LSR_DATA_READY, 0x01
        .set    LSR_TRANSMIT_EMPTY, 0x20

        .code16
        .globl  start16
start16:
        real_mode_start
        movl    $0, LINES
        movl    $0, INTERRUPTS
        movw    $0, LENGTH
        movw    $uart_interrupt, (IRQ_BASE + COM1_IRQ) * 4
        movw    $0, (IRQ_BASE + COM1_IRQ) * 4 + 2
        pic_start COM1_IRQ

        out8_dx LCR, 0x80               # the next two bytes are the divisor
        out8_dx COM1, 1                 # 115200 baud
        out8_dx IER, 0
        out8_dx LCR, 0x03               # 8n1
        out8_dx FCR, 0x07               # FIFOs on and empty, interrupt at one byte
        out8_dx MCR, 0x0b               # DTR, RTS, and OUT2, which opens the interrupt line
        movw    $ready, %si
        call    puts

sleep:
        cli
        out8_dx IER, IER_RECEIVE
        sti                             # lets no interrupt in before hlt: no wake-up is missed
        hlt
drain:
        movw    $LSR, %dx
        inb     %dx, %al
        testb   $LSR_DATA_READY, %al
        jz      sleep
        movw    $COM1, %dx
        inb     %dx, %al
        movw    LENGTH, %bx
        cmpb    $'\r', %al
        je      answer
        cmpb    $'\n', %al
        je      answer
        cmpw    $LINE_MAX, %bx
        jae     drain
        movb    %al, LINE(%bx)
        incw    LENGTH
        jmp     drain

answer:
        testw   %bx, %bx
        jz      drain
        incl    LINES
        movl    LINES, %eax
        call    put_decimal
        movw    $separator, %si
        call    puts
        movw    $LINE, %si
1:      lodsb
        call    putc
        decw    LENGTH
        jnz     1b
        movw    $end_of_line, %si
        call    puts
        jmp     drain

/* Prints the string at si up to its NUL.  Clobbers ax, dx, si. */
1:      call    putc
puts:   lodsb
        testb   %al, %al
        jnz     1b
        ret

/* Prints eax in decimal, by recursion: its last digit comes last.  Clobbers eax, ebx, edx. */
put_decimal:
        movl    $10, %ebx
        xorl    %edx, %edx
        divl    %ebx
        pushw   %dx
        testl   %eax, %eax
        jz      1f
        call    put_decimal
1:      popw    %ax
        addb    $'0', %al

/* Prints al when the transmitter has room.  Clobbers ah, dx. */
putc:   movb    %al, %ah
        movw    $LSR, %dx
1:      inb     %dx, %al
        testb   $LSR_TRANSMIT_EMPTY, %al
        jz      1b
        movb    %ah, %al
        movw    $COM1, %dx
        outb    %al, %dx
        ret

uart_interrupt:
        pushw   %ax
        pushw   %dx
        out8_dx IER, 0
        incl    INTERRUPTS
        out8    PIC1, PIC_EOI
        popw    %dx
        popw    %ax
        iretw

ready:  .asciz  "ready\r\n"
separator:
        .asciz  ": "
end_of_line:
        .asciz  "\r\n"

        boot_signature
