/*
 * What a Linux guest does in the benchmark of virtio devices.
 *
 *     guest-io read DISK BLOCKS          reads so many blocks of 1 MiB from the start, past the page
 *                                        cache, as dd does; prints how many a second
 *     guest-io write DISK BLOCKS         the same, writing
 *     guest-io random DISK COUNT DEPTH   reads 4 KiB at random places, past the page cache, DEPTH
 *                                        at a time; prints how many a second
 *     guest-io send ADDRESS PORT BYTES   connects, and sends so many bytes
 *     guest-io receive ADDRESS PORT      connects, and reads to the end
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define LARGE (1 << 20)
#define DEPTH_MOST 256
#define BUFFER (256 << 10)

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void copy(const char *path, int writes, long count)
{
    char *buffer;
    double begin;
    int fd = open(path, (writes ? O_WRONLY : O_RDONLY) | O_DIRECT);

    if (fd < 0 || posix_memalign((void **)&buffer, BLOCK, LARGE)) {
        err(1, "%s", path);
    }
    memset(buffer, 0x5a, LARGE);
    begin = now();
    for (long i = 0; i < count; i++) {
        ssize_t done = writes ? write(fd, buffer, LARGE) : read(fd, buffer, LARGE);

        if (done != LARGE) {
            err(1, "%s: block %ld", path, i);
        }
    }
    printf("%.1f\n", (double)count / (now() - begin));
}

/* xorshift: every run reads the same places. */
static uint64_t draw(void)
{
    static uint64_t state = 88172645463325252u;

    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void read_at_random(const char *path, long count, long depth)
{
    static struct io_event events[DEPTH_MOST];
    static struct iocb requests[DEPTH_MOST];
    struct iocb *pointers[DEPTH_MOST];
    aio_context_t context = 0;
    long submitted = 0, done = 0, ready;
    uint64_t blocks;
    char *buffers;
    double begin;
    int fd = open(path, O_RDONLY | O_DIRECT);

    if (fd < 0 || depth < 1 || depth > DEPTH_MOST) {
        err(1, "%s", path);
    }
    blocks = (uint64_t)lseek(fd, 0, SEEK_END) / BLOCK;
    if (posix_memalign((void **)&buffers, BLOCK, (size_t)depth * BLOCK) ||
        syscall(SYS_io_setup, depth, &context) < 0) {
        err(1, "io_setup");
    }
    for (long i = 0; i < depth; i++) {
        requests[i].aio_fildes = (uint32_t)fd;
        requests[i].aio_lio_opcode = IOCB_CMD_PREAD;
        requests[i].aio_buf = (uintptr_t)(buffers + i * BLOCK);
        requests[i].aio_nbytes = BLOCK;
        pointers[i] = &requests[i];
    }
    begin = now();
    for (ready = depth; done < count;) {
        long wanted = count - submitted < ready ? count - submitted : ready;

        for (long i = 0; i < wanted; i++) {
            pointers[i]->aio_offset = (int64_t)(draw() % blocks * BLOCK);
        }
        if (wanted && syscall(SYS_io_submit, context, wanted, pointers) != wanted) {
            err(1, "io_submit");
        }
        submitted += wanted;
        ready = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
        if (ready < 1) {
            err(1, "io_getevents");
        }
        for (long i = 0; i < ready; i++) {
            if (events[i].res != BLOCK) {
                errx(1, "%s: a read gave %lld", path, (long long)events[i].res);
            }
            pointers[i] = (struct iocb *)(uintptr_t)events[i].obj;
        }
        done += ready;
    }
    printf("%.1f\n", (double)count / (now() - begin));
}

static int connect_to(const char *address, const char *port)
{
    struct sockaddr_in there = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    int fd = socket(AF_INET, SOCK_STREAM, 0);

    if (fd < 0 || inet_pton(AF_INET, address, &there.sin_addr) != 1 ||
        connect(fd, (struct sockaddr *)&there, sizeof(there)) < 0) {
        err(1, "%s:%s", address, port);
    }
    return fd;
}

static void send_all(int fd, long bytes)
{
    static char buffer[BUFFER];

    while (bytes > 0) {
        ssize_t sent = write(fd, buffer, bytes < BUFFER ? (size_t)bytes : BUFFER);

        if (sent < 0) {
            err(1, "write");
        }
        bytes -= sent;
    }
}

static void receive_all(int fd)
{
    static char buffer[BUFFER];
    ssize_t got;

    do {
        got = read(fd, buffer, BUFFER);
        if (got < 0) {
            err(1, "read");
        }
    } while (got);
}

int main(int count, char **words)
{
    const char *what = count > 1 ? words[1] : "";

    if ((!strcmp(what, "read") || !strcmp(what, "write")) && count == 4) {
        copy(words[2], what[0] == 'w', atol(words[3]));
    } else if (!strcmp(what, "random") && count == 5) {
        read_at_random(words[2], atol(words[3]), atol(words[4]));
    } else if (!strcmp(what, "send") && count == 5) {
        send_all(connect_to(words[2], words[3]), atol(words[4]));
    } else if (!strcmp(what, "receive") && count == 4) {
        receive_all(connect_to(words[2], words[3]));
    } else {
        errx(2, "read DISK BLOCKS | write DISK BLOCKS | random DISK COUNT DEPTH | "
                "send ADDRESS PORT BYTES | receive ADDRESS PORT");
    }
    return 0;
}
