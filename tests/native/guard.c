/* The guard under a sanitizer: each way in which an exec can end, again and again in one process.

   Python's part is put in place by functions that do nothing; the process has one thread. */
#include "guard.h"

#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ROUNDS 10
#define TOKEN (~0ull - 1)
#define TIMEOUT_NS 100000000ull
#define CHECK(condition) \
    ((condition) ? (void)0 : fail(#condition, __LINE__))

extern char **environ;

PyGILState_STATE PyGILState_Ensure(void)
{
    return PyGILState_UNLOCKED;
}

void PyGILState_Release(PyGILState_STATE state)
{
    (void)state;
}

void PyOS_BeforeFork(void)
{
}

void PyOS_AfterFork_Parent(void)
{
}

void PyOS_AfterFork_Child(void)
{
}

static void fail(const char *condition, int line)
{
    fprintf(stderr, "guard.c:%d: %s (errno %d)\n", line, condition, errno);
    _exit(1); /* whoever waits for this process's descriptors sees their end */
}

/* One exec of a shell command; what cpr_guard_exec returns, with the token in the right hands. */
static int execute(const char *path, const char *command, int early, struct cpr_guard *guard)
{
    static uint32_t guard_pid, hold;
    static const char *argv[] = {"sh", "-c", NULL, NULL};
    uint64_t count;
    int token = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK), result;
    int32_t keep[] = {token};

    CHECK(token >= 0);
    count = TOKEN;
    CHECK(write(token, &count, sizeof(count)) == sizeof(count));
    argv[2] = command;
    memset(guard, 0, sizeof(*guard));
    guard->path = path;
    guard->argv = argv;
    guard->envp = environ;
    guard->keep = keep;
    guard->keep_count = 1;
    guard->token_fd = token;
    guard->socket_fd = guard->notify_fd = guard->state_fd = guard->kept_fd = -1;
    guard->guard_pid = &guard_pid;
    guard->hold = &hold;
    guard->early = early;
    guard->timeout_ns = TIMEOUT_NS;
    result = cpr_guard_exec(guard);
    if (result == CPR_GUARD_EARLY || result < 0) {
        CHECK(read(token, &count, sizeof(count)) == sizeof(count));
    } else {
        CHECK(read(token, &count, sizeof(count)) < 0 && errno == EAGAIN);
    }
    if (result > 0) {
        CHECK((uint32_t)getpid() == guard_pid);
        CHECK(getpid() == (int)syscall(SYS_gettid));
        CHECK(guard->old_pid != getpid());
    }
    close(token);
    return result;
}

static void wait_for_end(int pid_fd)
{
    struct pollfd death = {.fd = pid_fd, .events = POLLIN};

    CHECK(poll(&death, 1, 10000) == 1);
    close(pid_fd);
}

/* The old image of all rounds: it is in another process after each. */
static void test(void)
{
    struct cpr_guard guard;
    char *memory = malloc(100000);

    memset(memory, 7, 100000);
    for (int i = 0; i < ROUNDS; i++) {
        int pid = getpid();

        CHECK(execute("/nonexistent", "", 0, &guard) == -ENOENT);
        CHECK(getpid() == pid);
        CHECK(execute("/bin/sh", "exit 3", 0, &guard) == CPR_GUARD_DIED);
        CHECK(getpid() != pid);
        close(guard.pid_fd);
        CHECK(execute("/bin/sh", "exec sleep 1000", 0, &guard) == CPR_GUARD_KILLED);
        close(guard.pid_fd);
        CHECK(execute("/bin/sh", "sleep 0.2", 1, &guard) == CPR_GUARD_EARLY);
        wait_for_end(guard.pid_fd);
        for (int k = 0; k < 100000; k++) {
            CHECK(memory[k] == 7);
        }
        free(memory);
        memory = malloc(100000);
        memset(memory, 7, 100000);
    }
    free(memory);
}

/* The test's own process is not the one that is followed: its PID ends with the first exec. */
int main(void)
{
    int ends[2], child;
    char answer = 0;

    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        close(ends[0]);
        test();
        CHECK(write(ends[1], "g", 1) == 1);
        _exit(0);
    }
    close(ends[1]);
    CHECK(read(ends[0], &answer, 1) == 1 && answer == 'g');
    waitpid(child, NULL, 0);
    printf("guard: good\n");
    return 0;
}
