/* Watches a guest's heartbeat from another process and tells how long it stood still.
 *
 *     observer PATH OFFSET POLL_US
 *
 * PATH is the guest's RAM (/proc/PID/fd/N), OFFSET the byte offset of a 32-bit counter in it.
 * The counter is polled every POLL_US (0: without a break).  First it says
 *
 *     ready COUNTER REALTIME
 *
 * REALTIME is 1 if it runs under SCHED_FIFO, so that nothing keeps it from looking.  For each line
 * on stdin it tells of the time since the line before, a window, in one line, and it ends when
 * stdin is closed:
 *
 *     window START_NS LENGTH_NS ERROR_NS BEFORE AFTER OPEN_NS BACKWARDS POLLS LATEST_NS
 *
 * START, LENGTH: the longest time in the window for which the counter can have stood still.  It is
 *     that between two looks, the first of which saw BEFORE first and the second AFTER, less what the
 *     guest needs to count so far.  So a gap in which nobody looked, because the host took the CPU
 *     away, is as long as the guest stood still in it, and no longer.
 * ERROR: how far off that may be, of the two intervals in which the counter stopped and went on.
 *     All 0 if it never changed.
 * OPEN: how long it has stood still now.  BACKWARDS: how often it went back since the start.
 * POLLS, LATEST: how often it was looked at, and the longest interval between two looks.
 *
 * Times are CLOCK_MONOTONIC.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <sched.h>
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
#define STDIN_CHECK_NS 1000000 /* how often stdin is looked at */
#define BLOCK_NS 2000000       /* for so long the guest's speed is measured */
#define BLIND_NS 500000        /* a block that nobody looked at for so long is none */

struct gap {
    uint64_t start, length, error;
    uint32_t before, after;
};

struct window {
    struct gap longest;
    uint64_t polls, latest;
};

/* How fast the guest counts at most, in steps per ns: nothing slows it down while nobody looks. */
struct speed {
    double fastest;
    uint64_t start;
    uint32_t value;
};

/* `value` was read after `before` and before `now`. */
static void measure(struct speed *speed, uint64_t before, uint64_t now, uint64_t interval,
                    uint32_t value)
{
    double steps = (int32_t)(value - speed->value);

    if (interval < BLIND_NS) {
        if (now - speed->start < BLOCK_NS) {
            return;
        }
        steps /= (double)(now - speed->start);
        speed->fastest = steps > speed->fastest ? steps : speed->fastest;
    }
    speed->start = before;
    speed->value = value;
}

/* The least time that the guest needs for so many steps, but not more than `most`. */
static uint64_t least_time(const struct speed *speed, uint32_t steps, uint64_t most)
{
    double least = speed->fastest > 0 ? (int32_t)steps / speed->fastest : 0;

    if (least < 0) {
        return 0;
    }
    return least < (double)most ? (uint64_t)least : most;
}

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* 1: a line has come, -1: stdin is closed, 0: neither. */
static int asked(void)
{
    struct pollfd in = {.fd = 0, .events = POLLIN};
    char byte;

    if (poll(&in, 1, 0) <= 0) {
        return 0;
    }
    if (read(0, &byte, 1) <= 0) {
        return -1;
    }
    return byte == '\n';
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

static void tell(const struct window *window, uint64_t open, uint64_t backwards)
{
    const struct gap *gap = &window->longest;

    printf("window %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu32 " %" PRIu32, gap->start,
           gap->length, gap->error, gap->before, gap->after);
    printf(" %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", open, backwards, window->polls,
           window->latest);
}

static void watch(const volatile uint32_t *counter, uint64_t poll_ns)
{
    struct timespec pause = {.tv_nsec = (long)poll_ns};
    struct window window = {0};
    uint32_t last = *counter;
    uint64_t changed = now_ns(), polled = changed, checked = changed;
    struct speed speed = {.start = changed, .value = last};
    uint64_t before_change = 0; /* unknown of the interval in which the counter became `last` */
    uint64_t backwards = 0;
    int question;

    for (;;) {
        uint64_t before = now_ns();
        uint32_t value = *counter;
        uint64_t now = now_ns(), interval = now - polled;

        polled = now;
        window.polls++;
        if (interval > window.latest) {
            window.latest = interval;
        }
        measure(&speed, before, now, interval, value);
        if (value != last) {
            uint64_t counting = least_time(&speed, value - last, interval);
            uint64_t stood = now - changed - counting;

            backwards += (int32_t)(value - last) < 0;
            if (stood > window.longest.length) {
                window.longest = (struct gap){
                    changed, stood, before_change + interval - counting, last, value};
            }
            last = value;
            changed = now;
            before_change = interval - counting;
        }
        if (now - checked >= STDIN_CHECK_NS) {
            checked = now;
            question = asked();
            if (question < 0) {
                return;
            }
            if (question > 0) {
                tell(&window, now - changed, backwards);
                window = (struct window){0};
            }
        }
        if (poll_ns) {
            nanosleep(&pause, NULL);
        }
    }
}

int main(int argc, char **argv)
{
    const struct sched_param lowest = {.sched_priority = 1};
    const volatile uint32_t *counter;
    uint64_t poll_ns;
    int realtime = 0;

    if (argc != 4) {
        fprintf(stderr, "usage: observer PATH OFFSET POLL_US\n");
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    prctl(PR_SET_TIMERSLACK, 1);
    mlockall(MCL_CURRENT);
    counter = map_counter(argv[1], strtoull(argv[2], NULL, 0));
    if (counter == NULL) {
        return 1;
    }
    poll_ns = strtoull(argv[3], NULL, 0) * NS_PER_US;
    if (poll_ns) { /* a real-time process that never sleeps would starve its CPU */
        realtime = sched_setscheduler(0, SCHED_FIFO, &lowest) == 0;
    }
    printf("ready %" PRIu32 " %d\n", *counter, realtime);
    watch(counter, poll_ns);
    return 0;
}
