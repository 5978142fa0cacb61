/* Watches a guest's heartbeat from another process and reports how long it stands still.
 *
 *     observer PATH OFFSET POLL_US THRESHOLD_US
 *
 * PATH is the guest's RAM (/proc/PID/fd/N), OFFSET the byte offset of a 32-bit counter in it.
 * The counter is polled every POLL_US (0: without a break).  One line on stdout for each gap of
 * at least THRESHOLD_US between two changes, and a last line when stdin is closed:
 *
 *     ready COUNTER
 *     gap START_NS LENGTH_NS BEFORE AFTER
 *     backwards AT_NS BEFORE AFTER
 *     end COUNTER POLLS
 *
 * Times are CLOCK_MONOTONIC.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_US 1000
#define STDIN_CHECK_NS 5000000 /* how often stdin is looked at */

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int stdin_closed(void)
{
    struct pollfd in = {.fd = 0, .events = POLLIN};
    char byte;

    return poll(&in, 1, 0) > 0 && read(0, &byte, 1) == 0;
}

static const volatile uint32_t *map_counter(const char *path, uint64_t offset)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat status;
    uint64_t page, start;
    char *base;

    if (fd < 0 || fstat(fd, &status) < 0) {
        fprintf(stderr, "observer: %s: %s\n", path, strerror(errno));
        return NULL;
    }
    page = (uint64_t)status.st_blksize; /* the page size, huge pages included */
    start = offset / page * page;
    base = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, (off_t)start);
    close(fd);
    if (base == MAP_FAILED) {
        fprintf(stderr, "observer: mmap of %s: %s\n", path, strerror(errno));
        return NULL;
    }
    return (const volatile uint32_t *)(base + (offset - start));
}

static void watch(const volatile uint32_t *counter, uint64_t poll_ns, uint64_t threshold_ns)
{
    struct timespec pause = {.tv_nsec = (long)poll_ns};
    uint32_t last = *counter;
    uint64_t changed = now_ns(), checked = changed, polls = 0;

    printf("ready %" PRIu32 "\n", last);
    for (;;) {
        uint32_t value = *counter;
        uint64_t now = now_ns();

        polls++;
        if (value != last) {
            if ((int32_t)(value - last) < 0) {
                printf("backwards %" PRIu64 " %" PRIu32 " %" PRIu32 "\n", now, last, value);
            }
            if (now - changed >= threshold_ns) {
                printf("gap %" PRIu64 " %" PRIu64 " %" PRIu32 " %" PRIu32 "\n", changed,
                       now - changed, last, value);
            }
            last = value;
            changed = now;
        }
        if (now - checked >= STDIN_CHECK_NS) {
            checked = now;
            if (stdin_closed()) {
                break;
            }
        }
        if (poll_ns) {
            nanosleep(&pause, NULL);
        }
    }
    printf("end %" PRIu32 " %" PRIu64 "\n", last, polls);
}

int main(int argc, char **argv)
{
    const volatile uint32_t *counter;

    if (argc != 5) {
        fprintf(stderr, "usage: observer PATH OFFSET POLL_US THRESHOLD_US\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1);
    counter = map_counter(argv[1], strtoull(argv[2], NULL, 0));
    if (counter == NULL) {
        return 1;
    }
    watch(counter, strtoull(argv[3], NULL, 0) * NS_PER_US,
          strtoull(argv[4], NULL, 0) * NS_PER_US);
    return 0;
}
