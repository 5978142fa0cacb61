/* Many files are looked at in one call, without the interpreter's lock: a guest runs meanwhile. */
#include "file_stamps.h"

#include <sys/stat.h>

#define NS_PER_S 1000000000ll

void cpr_file_stamps(const char *const *paths, uint32_t count, struct cpr_file_stamp *stamps)
{
    for (uint32_t i = 0; i < count; i++) {
        struct stat status;

        stamps[i] = (struct cpr_file_stamp){0};
        if (stat(paths[i], &status) == 0) {
            stamps[i].device = status.st_dev;
            stamps[i].inode = status.st_ino;
            stamps[i].mtime_ns = status.st_mtim.tv_sec * NS_PER_S + status.st_mtim.tv_nsec;
        }
    }
}
