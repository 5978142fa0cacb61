#include "tid_address.h"

#include <errno.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define WORDS 256 /* of a thread's description; glibc has the ID at 720 bytes, musl before */

static int own_id(void)
{
    return (int)syscall(SYS_gettid);
}

static int *description(void)
{
    return (int *)pthread_self();
}

/* In which words of its own description a thread has its ID. */
static void *note_words(void *argument)
{
    char *has_id = argument;

    for (int i = 0; i < WORDS; i++) {
        has_id[i] = description()[i] == own_id();
    }
    return NULL;
}

/* A number may be in other words by chance, but hardly in the same one of two threads. */
int *cpr_find_tid_address(void)
{
    static int found = -1;
    char has_id[WORDS];
    pthread_t other;
    int error;

    if (found < 0) {
        error = pthread_create(&other, NULL, note_words, has_id);
        if (error) {
            errno = error;
            return NULL;
        }
        pthread_join(other, NULL);
        for (int i = 0; i < WORDS && found < 0; i++) {
            if (has_id[i] && description()[i] == own_id()) {
                found = i;
            }
        }
    }
    if (found < 0) {
        errno = ENOSYS;
        return NULL;
    }
    return &description()[found];
}

int *cpr_tid_address(void)
{
    int *address = NULL;

    return prctl(PR_GET_TID_ADDRESS, &address) == 0 ? address : cpr_find_tid_address();
}
