#ifndef CPR_RAW_SYSCALL_H
#define CPR_RAW_SYSCALL_H

/* System calls for code that runs in a child made with CLONE_VM. It shares the caller's thread-local
   storage: errno and the stack protector's canary are the caller's. So it makes its calls itself,
   gets -errno, and its functions are marked CPR_IN_CHILD. Not for cffi: inline code. */
#define CPR_IN_CHILD __attribute__((no_stack_protector))

static inline long cpr_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define cpr_syscall1(number, a) cpr_syscall(number, (long)(a), 0, 0, 0, 0, 0)
#define cpr_syscall3(number, a, b, c) \
    cpr_syscall(number, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define cpr_syscall5(number, a, b, c, d, e) \
    cpr_syscall(number, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

#endif
