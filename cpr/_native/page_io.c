/* Reading and writing through system calls that may do less than they are asked for. */
#include "page_io.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

/* After a failed call: 0 if it is to be made again, once the descriptor is ready; else -errno. */
static int retry(int fd, const int32_t *cancelled)
{
    struct pollfd ready = {.fd = fd, .events = POLLOUT};

    if (errno == EINTR) {
        return 0;
    }
    if (errno != EAGAIN) {
        return -errno;
    }
    do {
        if (__atomic_load_n(cancelled, __ATOMIC_RELAXED)) {
            return -ECANCELED;
        }
    } while (poll(&ready, 1, CPR_CANCEL_MS) == 0);
    return 0;
}

/* Drops the first `done` bytes of the vectors. */
static void advance(struct iovec **vectors, int *count, size_t done)
{
    while (*count && done >= (*vectors)->iov_len) {
        done -= (*vectors)->iov_len;
        (*vectors)++;
        (*count)--;
    }
    if (*count) {
        (*vectors)->iov_base = (uint8_t *)(*vectors)->iov_base + done;
        (*vectors)->iov_len -= done;
    }
}

int cpr_write_all(int fd, struct iovec *vectors, int count, const int32_t *cancelled)
{
    while (count) {
        ssize_t done = writev(fd, vectors, count);

        if (done >= 0) {
            advance(&vectors, &count, (size_t)done);
        } else {
            int error = retry(fd, cancelled);

            if (error) {
                return error;
            }
        }
    }
    return 0;
}

int cpr_pwrite_all(int fd, struct iovec *vectors, int count, uint64_t offset)
{
    while (count) {
        ssize_t done = pwritev(fd, vectors, count, (off_t)offset);

        if (done >= 0) {
            advance(&vectors, &count, (size_t)done);
            offset += (uint64_t)done;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}

int cpr_pread_all(int fd, void *data, size_t size, uint64_t offset)
{
    uint8_t *bytes = data;

    while (size) {
        ssize_t done = pread(fd, bytes, size, (off_t)offset);

        if (done == 0) {
            return -ENODATA;
        }
        if (done > 0) {
            bytes += done;
            size -= (size_t)done;
            offset += (uint64_t)done;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return 0;
}
