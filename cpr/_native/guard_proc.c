#include "guard_proc.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <unistd.h>

#include "raw_syscall.h"

#define PATH_SIZE 64
#define TEXT_SIZE 256
#define STATUS_SIZE 16384 /* the groups of a process are in its status, before its signals */
#define PROCESSES_MAX 64  /* of the new program's */

/* Writes `word`, in which each %d is one of the numbers in turn, none of them negative. */
CPR_IN_CHILD static void format(char *to, const char *word, const int32_t *numbers)
{
    for (; *word; word++) {
        int32_t scale = 1, number;

        if (*word != '%') {
            *to++ = *word;
            continue;
        }
        word++; /* the d */
        number = *numbers++;
        while (number / scale > 9) {
            scale *= 10;
        }
        for (; scale; scale /= 10) {
            *to++ = (char)('0' + number / scale % 10);
        }
    }
    *to = 0;
}

/* The size of the link's text, or -errno. */
CPR_IN_CHILD static long read_link(char *text, const char *path, const int32_t *numbers)
{
    char name[PATH_SIZE];

    format(name, path, numbers);
    return cpr_syscall3(SYS_readlink, name, text, TEXT_SIZE);
}

CPR_IN_CHILD long cpr_guard_open(const char *path, const int32_t *numbers, int flags)
{
    char name[PATH_SIZE];

    format(name, path, numbers);
    return cpr_syscall3(SYS_open, name, flags | O_CLOEXEC, 0);
}

/* The size of what is read, at most `size`, or -errno. */
CPR_IN_CHILD static long read_file(char *text, long size, const char *path, const int32_t *numbers)
{
    long fd = cpr_guard_open(path, numbers, O_RDONLY);

    if (fd < 0) {
        return fd;
    }
    size = cpr_syscall3(SYS_read, fd, text, size);
    cpr_syscall1(SYS_close, fd);
    return size;
}

CPR_IN_CHILD int cpr_guard_knows_proc(void)
{
    const int32_t none = 0, pid = (int32_t)cpr_syscall1(SYS_getpid, 0);
    char text[TEXT_SIZE], own[PATH_SIZE];
    long size = read_link(text, "/proc/self", &none);

    format(own, "%d", &pid);
    for (long i = 0; i < size; i++) {
        if (text[i] != own[i]) {
            return 0;
        }
    }
    return size > 0 && !own[size];
}

/* Whether a process has `fd`, with a link that says `expected`; 0 where it has ended too. */
CPR_IN_CHILD static int has(int32_t pid, int32_t fd, const char *expected)
{
    const int32_t numbers[] = {pid, fd};
    char text[TEXT_SIZE];
    long size = read_link(text, "/proc/%d/fd/%d", numbers);

    for (long i = 0; i < size; i++) {
        if (text[i] != expected[i]) {
            return 0;
        }
    }
    return size > 0;
}

/* Whether a process lives: one that ends has no file before its descriptors go. */
CPR_IN_CHILD static int lives(int32_t pid)
{
    char text[TEXT_SIZE];

    return read_link(text, "/proc/%d/exe", &pid) > 0;
}

CPR_IN_CHILD int cpr_guard_is_closed_to(int32_t pid)
{
    char text[TEXT_SIZE];

    return read_link(text, "/proc/%d/exe", &pid) == -EACCES;
}

/* Puts the children of a process behind the `count` PIDs, and returns how many they are then. */
CPR_IN_CHILD static int add_children(int32_t *pids, int count, int32_t parent)
{
    const int32_t numbers[] = {parent, parent};
    char text[TEXT_SIZE];
    long size = read_file(text, sizeof(text), "/proc/%d/task/%d/children", numbers);
    int32_t pid = 0;

    for (long i = 0; i < size && count < PROCESSES_MAX; i++) { /* a space is after each */
        if (text[i] >= '0' && text[i] <= '9') {
            pid = 10 * pid + text[i] - '0';
        } else if (pid) {
            pids[count++] = pid;
            pid = 0;
        }
    }
    return count;
}

static struct {
    int32_t pids[PROCESSES_MAX];
    int count;
} noted, started;

CPR_IN_CHILD static int is_noted(int32_t pid)
{
    for (int i = 0; i < noted.count; i++) {
        if (noted.pids[i] == pid) {
            return 1;
        }
    }
    return 0;
}

void cpr_guard_note_children(void)
{
    started.count = 0;
    noted.pids[0] = getpid();
    noted.count = 1;
    for (int i = 0; i < noted.count; i++) {
        noted.count = add_children(noted.pids, noted.count, noted.pids[i]);
    }
}

CPR_IN_CHILD int cpr_guard_has_taken(const struct cpr_guard *guard, int32_t pid)
{
    if (has(pid, guard->state_fd, guard->state_text)) {
        return 0;
    }
    /* A wrapper may close all that it was given, and start what knows nothing of the guest. A QEMU
       keeps the number of a descriptor that is RAM. */
    return (guard->kept_fd >= 0 ? has(pid, guard->kept_fd, guard->kept_text)
                                : pid == guard->old_pid) &&
           lives(pid);
}

CPR_IN_CHILD int32_t cpr_guard_taker(const struct cpr_guard *guard)
{
    if (guard->state_fd < 0) {
        return 0;
    }
    if (lives(guard->old_pid)) {
        started.pids[0] = guard->old_pid;
        started.count = 1;
    }
    for (int i = 0; i < started.count; i++) {
        const int32_t pid = started.pids[i];

        if ((i == 0 || !is_noted(pid)) && cpr_guard_has_taken(guard, pid)) {
            return pid;
        }
        if (noted.count < PROCESSES_MAX) { /* else there may be more that are not noted */
            started.count = add_children(started.pids, started.count, pid);
        }
    }
    return 0;
}

CPR_IN_CHILD static uint64_t read_hex(const char *text, const char *end)
{
    uint64_t value = 0;

    for (; text < end; text++) {
        if (*text >= '0' && *text <= '9') {
            value = value << 4 | (uint64_t)(*text - '0');
        } else if (*text >= 'a' && *text <= 'f') {
            value = value << 4 | (uint64_t)(*text - 'a' + 10);
        } else {
            break;
        }
    }
    return value;
}

/* Lines "SigPnd:\t" and "ShdPnd:\t" of proc_pid_status(5). */
CPR_IN_CHILD uint64_t cpr_guard_ending_signals(struct cpr_guard *guard)
{
    char text[STATUS_SIZE];
    uint64_t pending = 0;
    long size;

    if (!guard->ending) {
        return 0;
    }
    size = read_file(text, sizeof(text), "/proc/%d/status", &guard->old_pid);
    if (size < 0) {
        return guard->signalled;
    }
    for (long i = 0; i + 8 < size; i++) {
        if (text[i] == 'S' && text[i + 3] == 'P' && text[i + 4] == 'n' && text[i + 5] == 'd' &&
            text[i + 6] == ':') {
            pending |= read_hex(text + i + 8, text + size);
        }
    }
    return guard->signalled = pending & guard->ending;
}
