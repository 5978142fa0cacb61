/* Fuzzes the C that takes bytes of a migration stream: page records into two blocks.

   LLVMFuzzerTestOneInput is libFuzzer's entry (clang -fsanitize=fuzzer).  With -DOWN_LOOP there is a
   loop of our own, which knows no coverage: SECONDS SEED, from records that are right. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "page_load.h"
#include "page_ops.h"
#include "page_pool.h"

#define CHECK_FAILED() abort()
#include "check.h"

enum { PAGES = 8, BLOCKS = 2, SIZE = PAGES * CPR_PAGE_SIZE, FEW = 3 };

static struct cpr_page_pool *pool;
static struct cpr_load_block blocks[BLOCKS];
static const char *const names[BLOCKS] = {"ram0", "pc.bios"};

static void prepare(void)
{
    if (pool != NULL) {
        return;
    }
    CHECK(cpr_page_pool_create(1, NULL, &pool) == 0);
    for (int i = 0; i < BLOCKS; i++) {
        struct cpr_page_memory memory = {.pages = PAGES, .fd = memfd_create(names[i], 0)};

        CHECK(memory.fd >= 0 && ftruncate(memory.fd, SIZE) == 0);
        memory.host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
        CHECK(memory.host != MAP_FAILED);
        blocks[i] = (struct cpr_load_block){names[i], strlen(names[i]), memory};
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cpr_load load = {.blocks = blocks, .count = BLOCKS, .current = -1};
    size_t begin = 0;

    prepare();
    for (int i = 0; i < FEW && begin < size && !load.stopped; i++) {
        size_t piece = i == FEW - 1 ? size - begin : (size - begin) / 2;
        uint8_t *copy = malloc(piece ? piece : 1); /* a read beyond it is found */
        int64_t taken;

        CHECK(copy);
        memcpy(copy, data + begin, piece);
        taken = cpr_load_bytes(pool, &load, copy, piece);
        free(copy);
        CHECK(taken >= 0 && (size_t)taken <= piece);
        begin += (size_t)taken;
    }
    CHECK(load.current >= -1 && load.current < BLOCKS);
    return 0;
}

#ifdef OWN_LOOP
static size_t put(uint8_t *to, uint64_t head, const char *name, size_t body)
{
    size_t used = 0, length = name ? strlen(name) : 0;

    for (int i = 7; i >= 0; i--) {
        to[used++] = (uint8_t)(head >> 8 * i);
    }
    if (name != NULL) {
        to[used++] = (uint8_t)length;
        memcpy(to + used, name, length);
        used += length;
    }
    for (size_t i = 0; i < body; i++) {
        to[used++] = body == 1 ? 0 : (uint8_t)random_number();
    }
    return used;
}

int main(int argc, char **argv)
{
    static uint8_t data[16 * (CPR_PAGE_SIZE + 300)];
    time_t end = time(NULL) + (argc > 1 ? atoi(argv[1]) : 1);
    uint64_t runs = 0;

    random_state = argc > 2 ? strtoull(argv[2], NULL, 10) | 1 : 1;
    for (; time(NULL) < end; runs++) {
        size_t size = 0;

        for (uint64_t n = 1 + random_number() % 12; n; n--) {
            uint64_t page = random_number() % (PAGES + 2) * CPR_PAGE_SIZE;
            uint64_t flags = random_number() % 3 ? 0x08 : 0x02;
            const char *name = names[random_number() % BLOCKS];

            if (size && random_number() % 2) {
                flags |= 0x20;
                name = NULL;
            }
            size += put(data + size, page | flags, name, flags & 0x08 ? CPR_PAGE_SIZE : 1);
        }
        for (uint64_t n = random_number() % 6; n; n--) {
            data[random_number() % size] = (uint8_t)random_number();
        }
        if (random_number() % 4 == 0) {
            size = random_number() % size;
        }
        LLVMFuzzerTestOneInput(data, size);
    }
    printf("%llu executions\n", (unsigned long long)runs);
    return 0;
}
#endif
