#ifndef CPR_FILE_STAMPS_H
#define CPR_FILE_STAMPS_H

#include <stdint.h>

/* What tells a file from one that has replaced it; all 0 where there is none. */
struct cpr_file_stamp {
    uint64_t device, inode;
    int64_t mtime_ns;
};

/* Those of `count` files; the paths stay the caller's. */
void cpr_file_stamps(const char *const *paths, uint32_t count, struct cpr_file_stamp *stamps);

#endif
