/* Where the kernel writes 0 when the calling thread ends or execs: libc keeps the thread's ID there.
   NULL and errno where it cannot be known. */
int *cpr_tid_address(void);

/* The same for a kernel that does not tell (without CONFIG_CHECKPOINT_RESTORE, or behind a filter):
   it is found in libc's description of the thread. */
int *cpr_find_tid_address(void);
