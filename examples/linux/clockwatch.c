/* Watches CLOCK_MONOTONIC: clockwatch FILE.  Every 20 ms it reads the clock by the vDSO and by a
   system call; FILE has how often, how often it went back, and the longest step in ms. */
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long long as_ns(const struct timespec *time)
{
    return time->tv_sec * 1000000000LL + time->tv_nsec;
}

int main(int count, char **words)
{
    const struct timespec pause = {0, 20000000};
    long long last = 0, longest = 0, reads = 0, back = 0;
    int file = count == 2 ? open(words[1], O_CREAT | O_WRONLY | O_TRUNC, 0644) : -1;

    if (file < 0) {
        fprintf(stderr, "usage: clockwatch FILE\n");
        return 1;
    }
    for (;;) {
        struct timespec time;
        char line[80];
        for (int by_call = 0; by_call < 2; by_call++) {
            long long now;
            if (by_call) {
                syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &time);
            } else {
                clock_gettime(CLOCK_MONOTONIC, &time);
            }
            now = as_ns(&time);
            back += now < last;
            if (last && now - last > longest) {
                longest = now - last;
            }
            last = now;
            reads++;
        }
        if (pwrite(file, line, (size_t)snprintf(line, sizeof(line), "%08lld %04lld %08lld\n", reads,
                                                back, longest / 1000000), 0) < 0) {
            return 1;
        }
        nanosleep(&pause, NULL);
    }
}
