/* Drives all of the page code, for the sanitizers: `pages SEED`. Each instruction set that the CPU
 * has, with one thread and with several; on failure it says where, and ends with 1.
 */
#include "pages.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "page_bitmap.h"
#include "page_file.h"
#include "page_io.h"
#include "page_load.h"
#include "page_records.h"

#include "check.h"

#define PAGES 1500 /* not a multiple of anything */
#define WORDS ((PAGES + 63) / 64)
#define SIZE ((size_t)PAGES * CPR_PAGE_SIZE)
#define STREAM_SIZE (SIZE + PAGES * 8 + 300)
#define NAME "ram0"

static void fill_random(uint8_t *data, size_t size)
{
    for (size_t i = 0; i + 8 <= size; i += 8) {
        uint64_t word = random_number();

        memcpy(data + i, &word, 8);
    }
}

/* A fresh memfd of PAGES pages, mapped. */
static struct cpr_page_memory new_memory(void)
{
    struct cpr_page_memory memory = {.pages = PAGES, .fd = memfd_create("pages", MFD_CLOEXEC)};

    CHECK(memory.fd >= 0 && ftruncate(memory.fd, SIZE) == 0);
    memory.host = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory.fd, 0);
    CHECK(memory.host != MAP_FAILED);
    return memory;
}

static void free_memory(struct cpr_page_memory *memory)
{
    munmap(memory->host, SIZE);
    close(memory->fd);
}

static uint64_t pages_in_file(const struct cpr_page_memory *memory)
{
    struct stat status;

    CHECK(fstat(memory->fd, &status) == 0);
    return (uint64_t)status.st_blocks * 512 / CPR_PAGE_SIZE;
}

static uint8_t *page_of(const struct cpr_page_memory *memory, uint64_t page)
{
    return memory->host + page * CPR_PAGE_SIZE;
}

/* Runs of holes, of zero pages and of pages with something in them. Returns how many are not
   holes. */
static uint64_t fill_memory(const struct cpr_page_memory *memory)
{
    for (uint64_t page = 0, count; page < PAGES; page += count) {
        uint64_t kind = random_number() % 4;

        count = 1 + random_number() % (random_number() % 8 ? 9 : 700);
        for (uint64_t i = page; i < page + count && i < PAGES; i++) {
            if (kind == 1) {
                memset(page_of(memory, i), 0, CPR_PAGE_SIZE);
            } else if (kind == 2) {
                page_of(memory, i)[random_number() % CPR_PAGE_SIZE] = 1;
            } else if (kind == 3) {
                fill_random(page_of(memory, i), CPR_PAGE_SIZE);
            }
        }
    }
    return pages_in_file(memory);
}

static bool selected(const uint64_t *bitmap, uint64_t page)
{
    return !bitmap || bitmap[page / 64] >> page % 64 & 1;
}

static bool is_zero(const uint8_t *page)
{
    static const uint8_t zeros[CPR_PAGE_SIZE];

    return memcmp(page, zeros, CPR_PAGE_SIZE) == 0;
}

static uint64_t *new_bitmap(void)
{
    uint64_t *bitmap = malloc(WORDS * sizeof(*bitmap));

    CHECK(bitmap);
    for (int i = 0; i < WORDS; i++) {
        uint64_t kind = random_number() % 4;

        bitmap[i] = kind == 0 ? 0 : kind == 1 ? ~0ull : random_number();
    }
    return bitmap;
}

static struct cpr_page_walk walk_of(const struct cpr_page_memory *memory, const uint64_t *bitmap)
{
    return (struct cpr_page_walk){.memory = *memory, .bitmap = bitmap};
}

static void test_ops(const struct cpr_page_ops *ops)
{
    uint8_t *from = calloc(1, CPR_PAGE_SIZE + 9);
    uint8_t *to = aligned_alloc(CPR_PAGE_SIZE, CPR_PAGE_SIZE);

    CHECK(from && to);
    for (int shift = 0; shift <= 9; shift += 3) {
        CHECK(ops->is_zero(from + shift));
        for (int i = 0; i < CPR_PAGE_SIZE; i++) {
            from[shift + i] = 1;
            CHECK(!ops->is_zero(from + shift));
            from[shift + i] = 0;
        }
        fill_random(from, CPR_PAGE_SIZE + 8);
        ops->copy(to, from + shift);
        ops->fence();
        CHECK(memcmp(to, from + shift, CPR_PAGE_SIZE) == 0);
        memset(from, 0, CPR_PAGE_SIZE + 9);
    }
    free(from);
    free(to);
}

static void check_copied(const struct cpr_page_memory *source, const struct cpr_page_memory *target,
                         const uint64_t *bitmap, const uint8_t *before, bool skip)
{
    for (uint64_t page = 0; page < PAGES; page++) {
        bool copied = selected(bitmap, page) && !(skip && is_zero(page_of(source, page)));
        const uint8_t *expected =
            copied ? page_of(source, page) : before + page * CPR_PAGE_SIZE;

        CHECK(memcmp(page_of(target, page), expected, CPR_PAGE_SIZE) == 0);
    }
}

static void test_copy(struct cpr_page_pool *pool, const struct cpr_page_memory *source,
                      const uint64_t *bitmap, enum cpr_zero_pages zero_pages, uint64_t budget)
{
    struct cpr_page_memory target = new_memory();
    struct cpr_page_walk walk = walk_of(source, bitmap);
    uint8_t *before = malloc(SIZE);

    CHECK(before);
    fill_memory(&target);
    CHECK(pread(target.fd, before, SIZE, 0) == (ssize_t)SIZE);
    while (walk.next < PAGES) {
        struct cpr_page_counts counts = {0};

        CHECK(cpr_pages_copy(pool, &walk, &target, zero_pages, budget, &counts) == 0);
        CHECK(counts.bytes <= budget || counts.normal == 1);
        CHECK(counts.bytes == counts.normal * CPR_PAGE_SIZE);
    }
    check_copied(source, &target, bitmap, before, zero_pages == CPR_ZERO_SKIP);
    free(before);
    free_memory(&target);
}

static void test_clear(struct cpr_page_pool *pool, uint64_t *bitmap)
{
    struct cpr_page_memory memory = new_memory();
    uint64_t there = fill_memory(&memory);
    struct cpr_page_walk walk = walk_of(&memory, bitmap);
    struct cpr_page_counts counts = {0};

    walk.inverted = bitmap ? ~0ull : 0;
    CHECK(cpr_pages_clear(pool, &walk, &counts) == 0);
    CHECK(pages_in_file(&memory) == there);
    for (uint64_t page = 0; page < PAGES; page++) {
        CHECK((bitmap && selected(bitmap, page)) || is_zero(page_of(&memory, page)));
    }
    free_memory(&memory);
}

static struct cpr_record_block new_block(void)
{
    struct cpr_record_block block = {.idstr_length = sizeof(NAME) - 1, .idstr = NAME};

    return block;
}

/* The records of the pages, written to a file a piece at a time; *size is set. The caller frees
   them. */
static uint8_t *encode(struct cpr_page_pool *pool, const struct cpr_page_memory *memory,
                       const uint64_t *bitmap, size_t *size)
{
    struct cpr_page_walk walk = walk_of(memory, bitmap);
    struct cpr_record_block block = new_block();
    uint8_t *stream = malloc(STREAM_SIZE);
    int file = memfd_create("records", 0);

    CHECK(stream && file >= 0);
    *size = 0;
    while (walk.next < PAGES) {
        struct cpr_page_counts counts = {0};
        uint64_t budget = CPR_RECORD_MOST + random_number() % (16 << 20);

        CHECK(cpr_records_write(pool, &walk, &block, file, budget, &counts) == 0);
        CHECK(counts.bytes <= budget);
        *size += counts.bytes;
        CHECK(lseek(file, 0, SEEK_END) == (off_t)*size);
    }
    CHECK(pread(file, stream, *size, 0) == (ssize_t)*size);
    close(file);
    return stream;
}

struct reading {
    int fd;
    uint8_t *data;
    size_t size;
};

static void *read_stream(void *argument)
{
    struct reading *reading = argument;
    ssize_t got;

    while ((got = read(reading->fd, reading->data + reading->size, 100000)) > 0) {
        reading->size += (size_t)got;
    }
    return NULL;
}

/* Writes the records to a descriptor whose other end a thread reads, and compares. */
static void test_write(struct cpr_page_pool *pool, const struct cpr_page_memory *memory,
                       const uint64_t *bitmap, const int ends[2], const uint8_t *stream,
                       size_t size)
{
    struct reading reading = {.fd = ends[0], .data = malloc(STREAM_SIZE + 100000)};
    struct cpr_page_walk walk = walk_of(memory, bitmap);
    struct cpr_record_block block = new_block();
    pthread_t thread;

    CHECK(reading.data && fcntl(ends[1], F_SETFL, O_NONBLOCK) == 0);
    CHECK(pthread_create(&thread, NULL, read_stream, &reading) == 0);
    while (walk.next < PAGES) {
        uint64_t budget = random_number() % 3000000;
        struct cpr_page_counts counts = {0};

        CHECK(cpr_records_write(pool, &walk, &block, ends[1], budget, &counts) == 0);
        CHECK(counts.bytes <= budget || counts.zero + counts.normal == 1);
    }
    close(ends[1]);
    pthread_join(thread, NULL);
    CHECK(reading.size == size && memcmp(reading.data, stream, size) == 0);
    free(reading.data);
    close(ends[0]);
}

static struct cpr_load new_load(const struct cpr_load_block *block)
{
    return (struct cpr_load){.blocks = block, .count = 1, .current = -1};
}

/* Loads `size` bytes of records, given in pieces that end where they like, in heap blocks of just
   that size. Returns the bytes taken. */
static size_t feed(struct cpr_page_pool *pool, struct cpr_load *load, const uint8_t *stream,
                   size_t size)
{
    size_t begin = 0, end = 0;

    while (end < size) {
        size_t more = 1 + random_number() % 300000;
        uint8_t *piece;
        int64_t taken;

        end = more < size - end ? end + more : size;
        piece = malloc(end - begin);
        CHECK(piece);
        memcpy(piece, stream + begin, end - begin);
        taken = cpr_load_bytes(pool, load, piece, end - begin);
        free(piece);
        CHECK(taken >= 0 && (size_t)taken <= end - begin);
        begin += (size_t)taken;
        if (load->stopped) {
            break;
        }
    }
    return begin;
}

static void test_load(struct cpr_page_pool *pool, const struct cpr_page_memory *source,
                      const uint64_t *bitmap, const uint8_t *stream, size_t size)
{
    static const uint8_t other[8] = {0, 0, 0, 0, 0, 0, 0, 16};
    struct cpr_page_memory target = new_memory();
    struct cpr_load_block block = {NAME, sizeof(NAME) - 1, target};
    struct cpr_load load = new_load(&block);
    uint8_t *before = malloc(SIZE);

    CHECK(before);
    fill_memory(&target);
    CHECK(pread(target.fd, before, SIZE, 0) == (ssize_t)SIZE);
    CHECK(feed(pool, &load, stream, size) == size);
    CHECK(!load.stopped && load.counts.bytes == size);
    CHECK(feed(pool, &load, other, sizeof(other)) == 0 && load.stopped);
    check_copied(source, &target, bitmap, before, false);
    free(before);
    free_memory(&target);
}

/* Whatever is in a stream, the loader stays within its memory and the stream. */
static void test_load_garbage(struct cpr_page_pool *pool, const uint8_t *stream, size_t size)
{
    struct cpr_page_memory target = new_memory();
    struct cpr_load_block block = {NAME, sizeof(NAME) - 1, target};

    for (int i = 0; i < 50; i++) {
        size_t length = 1 + random_number() % (size < 40000 ? size : 40000);
        uint8_t *bad = malloc(length);
        struct cpr_load load = new_load(&block);

        CHECK(bad);
        memcpy(bad, stream, length);
        for (uint64_t k = random_number() % 8; k; k--) {
            bad[random_number() % (length < 64 ? length : 64)] ^= 1 << random_number() % 8;
        }
        CHECK(feed(pool, &load, bad, length) <= length);
        free(bad);
    }
    free_memory(&target);
}

static void test_file(struct cpr_page_pool *pool, const struct cpr_page_memory *source,
                      const uint64_t *bitmap)
{
    uint64_t present[WORDS] = {0};
    struct cpr_page_memory target = new_memory();
    struct cpr_page_walk save = walk_of(source, bitmap), load = walk_of(&target, present);
    int file = memfd_create("file", 0);
    uint64_t normal = 0;

    while (save.next < PAGES) {
        struct cpr_page_counts counts = {0};

        CHECK(cpr_file_save(pool, &save, file, 8192, present, 1000000, &counts) == 0);
        CHECK(counts.bytes <= 1000000);
        normal += counts.normal;
    }
    fill_memory(&target);
    for (int pass = 0; pass < 2; pass++) {
        struct cpr_page_counts counts = {0};

        load.next = 0;
        CHECK(cpr_file_load(pool, &load, file, 8192, &counts) == 0);
        CHECK(counts.normal == normal);
        for (uint64_t page = 0; page < PAGES; page++) {
            bool zero = is_zero(page_of(source, page));

            CHECK(selected(present, page) == (selected(bitmap, page) && !zero));
            CHECK(!selected(present, page) ||
                  memcmp(page_of(&target, page), page_of(source, page), CPR_PAGE_SIZE) == 0);
        }
        free_memory(&target);
        target = new_memory(); /* once into memory with holes among its pages, once into none */
        load.memory = target;
    }
    free_memory(&target);
    close(file);
}

static void test_errors(struct cpr_page_pool *pool, const struct cpr_page_memory *memory)
{
    struct cpr_page_walk walk = walk_of(memory, NULL);
    struct cpr_record_block block = new_block();
    struct cpr_page_counts counts = {0};
    uint64_t present[WORDS];
    int full = open("/dev/full", O_WRONLY), empty = memfd_create("empty", 0), ends[2];

    CHECK(cpr_records_write(pool, &walk, &block, full, UINT64_MAX, &counts) == -ENOSPC);
    walk.next = 0;
    CHECK(cpr_file_save(pool, &walk, full, 0, present, UINT64_MAX, &counts) == -ENOSPC);
    walk.next = 0;
    CHECK(cpr_file_load(pool, &walk, empty, 0, &counts) == -ENODATA);
    walk.next = 0;
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0 && close(ends[0]) == 0);
    CHECK(cpr_records_write(pool, &walk, &block, ends[1], UINT64_MAX, &counts) == -EPIPE);
    close(ends[1]);
    close(empty);
    close(full);
}

static void *cancel_walk(void *walk)
{
    usleep(10000);
    cpr_page_walk_cancel(walk);
    return NULL;
}

/* A pipe that nobody reads. */
static void test_cancel(struct cpr_page_pool *pool, const struct cpr_page_memory *memory)
{
    struct cpr_page_walk walk = walk_of(memory, NULL);
    struct cpr_record_block block = new_block();
    struct cpr_page_counts counts = {0};
    pthread_t thread;
    int full[2];

    CHECK(pipe2(full, O_NONBLOCK) == 0);
    CHECK(pthread_create(&thread, NULL, cancel_walk, &walk) == 0);
    CHECK(cpr_records_write(pool, &walk, &block, full[1], UINT64_MAX, &counts) == -ECANCELED);
    pthread_join(thread, NULL);
    close(full[0]);
    close(full[1]);
}

static void test_records(struct cpr_page_pool *pool, const struct cpr_page_memory *source,
                         const uint64_t *bitmap)
{
    size_t size;
    uint8_t *stream = encode(pool, source, bitmap, &size);
    int ends[2];

    CHECK(pipe(ends) == 0);
    test_write(pool, source, bitmap, ends, stream, size);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    test_write(pool, source, bitmap, ends, stream, size);
    test_load(pool, source, bitmap, stream, size);
    if (size) {
        test_load_garbage(pool, stream, size);
    }
    free(stream);
}

/* Nothing fills the holes of a source, and a fresh target gets only the pages that are not zero. */
static void test_holes(struct cpr_page_pool *pool)
{
    struct cpr_page_memory source = new_memory(), copied = new_memory(), loaded = new_memory();
    struct cpr_load_block block = {NAME, sizeof(NAME) - 1, loaded};
    struct cpr_load load = new_load(&block);
    struct cpr_page_walk walk = walk_of(&source, NULL);
    struct cpr_page_counts counts = {0};
    uint64_t there = fill_memory(&source);
    size_t size;
    uint8_t *stream = encode(pool, &source, NULL, &size);

    CHECK(feed(pool, &load, stream, size) == size);
    CHECK(cpr_pages_copy(pool, &walk, &copied, CPR_ZERO_CLEAR, UINT64_MAX, &counts) == 0);
    CHECK(counts.normal == load.counts.normal && counts.zero == load.counts.zero);
    CHECK(pages_in_file(&source) == there);
    CHECK(pages_in_file(&copied) == counts.normal && pages_in_file(&loaded) == counts.normal);
    CHECK(memcmp(copied.host, source.host, SIZE) == 0);
    CHECK(memcmp(loaded.host, source.host, SIZE) == 0);
    free(stream);
    free_memory(&source);
    free_memory(&copied);
    free_memory(&loaded);
}

static void test_pool(const char *instruction_set, uint32_t threads)
{
    struct cpr_page_memory source = new_memory();
    uint64_t *bitmap = new_bitmap();
    struct cpr_page_pool *pool;

    fill_memory(&source);
    fill_random(page_of(&source, PAGES - 1), CPR_PAGE_SIZE); /* so that a file of them is whole */
    CHECK(cpr_page_pool_create(threads, instruction_set, &pool) == 0);
    CHECK(strcmp(cpr_page_pool_ops(pool)->name, instruction_set) == 0);
    test_file(pool, &source, NULL);
    test_records(pool, &source, NULL);
    test_holes(pool);
    test_errors(pool, &source);
    test_cancel(pool, &source);
    for (enum cpr_zero_pages zero = CPR_ZERO_COPY; zero <= CPR_ZERO_CLEAR; zero++) {
        test_copy(pool, &source, NULL, zero, UINT64_MAX);
        test_copy(pool, &source, bitmap, zero, 500000);
    }
    test_clear(pool, NULL);
    test_clear(pool, bitmap);
    test_file(pool, &source, bitmap);
    test_records(pool, &source, bitmap);
    cpr_page_pool_destroy(pool);
    free(bitmap);
    free_memory(&source);
}

static bool bit(const uint64_t *words, uint64_t number)
{
    return words[number / 64] >> number % 64 & 1;
}

static void test_bitmaps(void)
{
    for (int round = 0; round < 200; round++) {
        uint64_t first = random_number() % 200, count = 1 + random_number() % 500;
        size_t words = (first + count + 63) / 64;
        uint64_t *source = calloc((count + 63) / 64, 8), *entries = calloc(count, 8);
        uint64_t *merged = calloc(words, 8), *existing = calloc(words, 8);
        uint64_t expected = 0;

        CHECK(source && entries && merged && existing);
        for (uint64_t i = 0; i < count; i++) {
            uint64_t kind = random_number() % 4; /* 1: in memory, 2: swapped out */

            entries[i] = kind << 62 | (random_number() & 0xffff);
            if (kind) {
                cpr_bitmap_set(source, i, 1);
                expected++;
            }
        }
        cpr_bitmap_merge(merged, first, source, count);
        cpr_bitmap_merge_pagemap(existing, first, entries, count);
        CHECK(cpr_bitmap_count(source, count) == expected);
        CHECK(cpr_bitmap_count(merged, first + count) == expected);
        CHECK(!memcmp(merged, existing, words * 8));
        for (uint64_t i = 0; i < count; i++) {
            CHECK(bit(merged, first + i) == (entries[i] >> 62 != 0));
        }
        cpr_bitmap_take(existing, merged, first + count);
        CHECK(cpr_bitmap_count(merged, first + count) == 0);
        CHECK(cpr_bitmap_count(existing, first + count) == expected);
        cpr_bitmap_set(existing, first, count);
        CHECK(cpr_bitmap_count(existing, first + count) == count);
        free(source);
        free(entries);
        free(merged);
        free(existing);
    }
}

static void *set_bits(void *words)
{
    for (uint64_t i = 0; i < PAGES; i++) {
        cpr_bitmap_set(words, i, 1);
    }
    return NULL;
}

/* No bit is lost between threads that set and one that takes. */
static void test_bitmap_threads(void)
{
    uint64_t log[WORDS] = {0}, taken[WORDS] = {0};
    pthread_t threads[2];

    for (int i = 0; i < 2; i++) {
        CHECK(!pthread_create(&threads[i], NULL, set_bits, log));
    }
    for (int i = 0; i < 50; i++) {
        cpr_bitmap_take(taken, log, PAGES);
    }
    for (int i = 0; i < 2; i++) {
        CHECK(!pthread_join(threads[i], NULL));
    }
    cpr_bitmap_take(taken, log, PAGES);
    CHECK(cpr_bitmap_count(taken, PAGES) == PAGES);
}

int main(int argc, char **argv)
{
    static const char *const sets[] = {"avx512", "avx2", "portable"};
    struct cpr_page_pool *pool;

    random_state = argc > 1 ? strtoull(argv[1], NULL, 0) | 1 : 1;
    signal(SIGPIPE, SIG_IGN);
    test_bitmaps();
    test_bitmap_threads();
    CHECK(cpr_page_pool_create(0, NULL, &pool) == -EINVAL);
    CHECK(cpr_page_pool_create(1, "abacus", &pool) == -ENOTSUP);
    for (size_t i = 0; i < sizeof(sets) / sizeof(sets[0]); i++) {
        if (!cpr_page_ops_find(sets[i])) {
            printf("%s: not on this CPU\n", sets[i]);
            continue;
        }
        test_ops(cpr_page_ops_find(sets[i]));
        for (uint32_t threads = 1; threads <= 3; threads++) {
            test_pool(sets[i], threads);
        }
        printf("%s: good\n", sets[i]);
    }
    return 0;
}
