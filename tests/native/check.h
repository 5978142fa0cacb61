/* What the programs here check and draw by. */
#ifndef CPR_CHECK_H
#define CPR_CHECK_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#ifndef CHECK_FAILED
#define CHECK_FAILED() exit(1)
#endif

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                        \
            CHECK_FAILED();                                                                        \
        }                                                                                          \
    } while (0)

/* xorshift64: not 0. */
static uint64_t random_state __attribute__((unused)) = 1;

__attribute__((unused)) static uint64_t random_number(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

#endif
