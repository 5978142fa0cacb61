#ifndef CPR_PAGE_IO_H
#define CPR_PAGE_IO_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Whole transfers, whatever a single system call manages. A descriptor that would block is waited
   for; *cancelled, which another thread may set, ends that within CPR_CANCEL_MS with -ECANCELED.
   All return 0 or -errno unless said. */
enum { CPR_CANCEL_MS = 50 };

/* Writes the `count` vectors one after the other; they are used up. */
int cpr_write_all(int fd, struct iovec *vectors, int count, const int32_t *cancelled);

/* The same at `offset` of a file. */
int cpr_pwrite_all(int fd, struct iovec *vectors, int count, uint64_t offset);

/* -ENODATA where the file is too short. */
int cpr_pread_all(int fd, void *data, size_t size, uint64_t offset);

#endif
