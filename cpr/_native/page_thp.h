#ifndef CPR_PAGE_THP_H
#define CPR_PAGE_THP_H

#include <stdint.h>

/* Huge pages for what is about to be written to a file on a tmpfs. One allocation takes the place
   of 512, and write(2) copies into them at the speed of memory. The kernel makes them by
   MADV_COLLAPSE (Linux 6.1), whatever the mount's `huge=` is, unless shmem_enabled is `deny`. What
   this cannot do is done by the writes, in small pages. */
struct cpr_thp;

/* For at most `most` bytes from the position of `fd` on, which is the caller's and stays open until
   cpr_thp_close. The file is longer than its content until then. Returns NULL where nothing
   is to be gained: another kind of file, few bytes, no such pages. */
struct cpr_thp *cpr_thp_open(int fd, uint64_t most);

/* Adds `bytes` to what is going to be written, and gets pages for what no other thread gets them
   for; on any thread. */
void cpr_thp_plan(struct cpr_thp *thp, uint64_t bytes);

/* Waits until there are pages for the next `bytes`, which have been planned and are written next. */
void cpr_thp_wait(struct cpr_thp *thp, uint64_t bytes);

/* Ends the file at its position, or where it ended before; NULL is nothing. Returns 0 or -errno. */
int cpr_thp_close(struct cpr_thp *thp);

#endif
