/* Zero detection and copying of one page: AVX-512, AVX2 and portable C, chosen at run time. */
#include "page_ops.h"

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

/* A zero page is read to its end, at the speed of memory; any other page mostly ends in the first
   STEP, so that little of it is read before it is copied. */
#define STEP 256

static bool is_zero_portable(const void *page)
{
    const uint8_t *bytes = page;
    uint64_t words[STEP / sizeof(uint64_t)];

    for (size_t at = 0; at < CPR_PAGE_SIZE; at += STEP) {
        uint64_t any = 0;

        memcpy(words, bytes + at, STEP);
        for (size_t i = 0; i < STEP / sizeof(uint64_t); i++) {
            any |= words[i];
        }
        if (any) {
            return false;
        }
    }
    return true;
}

static void copy_portable(void *to, const void *from)
{
    memcpy(to, from, CPR_PAGE_SIZE);
}

static void fence_portable(void)
{
}

__attribute__((target("avx2"))) static bool is_zero_avx2(const void *page)
{
    const uint8_t *bytes = page;

    for (size_t at = 0; at < CPR_PAGE_SIZE; at += STEP) {
        __m256i any = _mm256_setzero_si256();

        for (size_t i = 0; i < STEP; i += sizeof(any)) {
            any = _mm256_or_si256(any, _mm256_loadu_si256((const void *)(bytes + at + i)));
        }
        if (!_mm256_testz_si256(any, any)) {
            return false;
        }
    }
    return true;
}

__attribute__((target("avx2"))) static void copy_avx2(void *to, const void *from)
{
    uint8_t *out = to;
    const uint8_t *in = from;

    for (size_t at = 0; at < CPR_PAGE_SIZE; at += 4 * sizeof(__m256i)) {
        __m256i a = _mm256_loadu_si256((const void *)(in + at));
        __m256i b = _mm256_loadu_si256((const void *)(in + at + 32));
        __m256i c = _mm256_loadu_si256((const void *)(in + at + 64));
        __m256i d = _mm256_loadu_si256((const void *)(in + at + 96));

        _mm256_stream_si256((void *)(out + at), a);
        _mm256_stream_si256((void *)(out + at + 32), b);
        _mm256_stream_si256((void *)(out + at + 64), c);
        _mm256_stream_si256((void *)(out + at + 96), d);
    }
}

__attribute__((target("avx512f"))) static bool is_zero_avx512(const void *page)
{
    const uint8_t *bytes = page;

    for (size_t at = 0; at < CPR_PAGE_SIZE; at += STEP) {
        __m512i any = _mm512_setzero_si512();

        for (size_t i = 0; i < STEP; i += sizeof(any)) {
            any = _mm512_or_si512(any, _mm512_loadu_si512(bytes + at + i));
        }
        if (_mm512_test_epi64_mask(any, any)) {
            return false;
        }
    }
    return true;
}

__attribute__((target("avx512f"))) static void copy_avx512(void *to, const void *from)
{
    uint8_t *out = to;
    const uint8_t *in = from;

    for (size_t at = 0; at < CPR_PAGE_SIZE; at += 4 * sizeof(__m512i)) {
        __m512i a = _mm512_loadu_si512(in + at);
        __m512i b = _mm512_loadu_si512(in + at + 64);
        __m512i c = _mm512_loadu_si512(in + at + 128);
        __m512i d = _mm512_loadu_si512(in + at + 192);

        _mm512_stream_si512((void *)(out + at), a);
        _mm512_stream_si512((void *)(out + at + 64), b);
        _mm512_stream_si512((void *)(out + at + 128), c);
        _mm512_stream_si512((void *)(out + at + 192), d);
    }
}

static void fence_stores(void)
{
    _mm_sfence();
}

static const struct cpr_page_ops avx512 = {"avx512", is_zero_avx512, copy_avx512, fence_stores};
static const struct cpr_page_ops avx2 = {"avx2", is_zero_avx2, copy_avx2, fence_stores};
static const struct cpr_page_ops portable = {
    "portable", is_zero_portable, copy_portable, fence_portable,
};

const struct cpr_page_ops *cpr_page_ops_find(const char *name)
{
    const struct cpr_page_ops *usable[] = {
        __builtin_cpu_supports("avx512f") ? &avx512 : NULL,
        __builtin_cpu_supports("avx2") ? &avx2 : NULL,
        &portable,
    };

    for (size_t i = 0; i < sizeof(usable) / sizeof(usable[0]); i++) {
        if (usable[i] && (!name || strcmp(usable[i]->name, name) == 0)) {
            return usable[i];
        }
    }
    return NULL;
}
