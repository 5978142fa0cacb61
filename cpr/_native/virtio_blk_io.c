/* Requests of a disk: read, write, flush, discard, write zeroes, and what it is called. */
#include "virtio_blk_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/virtio_blk.h>
#include <string.h>
#include <unistd.h>

#define SECTOR_SHIFT 9
#define SECTOR_SIZE (1 << SECTOR_SHIFT)
#define ZEROS_SIZE (64 << 10)
#define MOST_BYTES (64 << 20) /* of one step: who stops the device waits for it */
#define MOST_SECTORS 0x3fffff /* of one discard or write zeroes, as the configuration says */
#define UNFINISHED (-1) /* in place of an errno: the device stops, and bytes are left */

static const uint8_t zeros[ZEROS_SIZE];

static bool in_range(const struct cpr_blk_options *options, uint64_t sector, uint64_t bytes)
{
    return !(bytes % SECTOR_SIZE) && bytes >> SECTOR_SHIFT <= MOST_SECTORS &&
           sector <= options->sectors &&
           bytes >> SECTOR_SHIFT <= options->sectors - sector;
}

/* Moves the cursor on by `size` bytes, and notes that they were written if they are the guest's. */
static void advance(struct cpr_cursor *cursor, uint64_t size,
                    const struct cpr_virtio_memory *written)
{
    while (size) {
        struct iovec *piece = cursor->pieces;
        uint64_t part = piece->iov_len < size ? piece->iov_len : size;

        if (written) {
            cpr_virtio_written(written, piece->iov_base, part);
        }
        piece->iov_base = (uint8_t *)piece->iov_base + part;
        piece->iov_len -= part;
        size -= part;
        if (!piece->iov_len) {
            cursor->pieces++;
            cursor->count--;
        }
    }
}

/* Reads into all of the cursor; what is behind the end of the file is zero. */
static int read_all(int fd, struct cpr_cursor *cursor, uint64_t bytes, uint64_t offset,
                    const struct cpr_virtio_memory *memory)
{
    while (bytes) {
        ssize_t done = preadv(fd, cursor->pieces, (int)cursor->count, (off_t)offset);

        if (done < 0) {
            if (errno == EINTR) {
                continue;
            }
            return errno;
        }
        if (!done) {
            while (cursor->count) {
                cpr_cursor_write(cursor, memory, zeros, ZEROS_SIZE);
            }
            return 0;
        }
        advance(cursor, (uint64_t)done, memory);
        bytes -= (uint64_t)done;
        offset += (uint64_t)done;
    }
    return 0;
}

static int write_all(int fd, struct cpr_cursor *cursor, uint64_t bytes, uint64_t offset)
{
    while (bytes) {
        ssize_t done = pwritev(fd, cursor->pieces, (int)cursor->count, (off_t)offset);

        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return done < 0 ? errno : ENOSPC;
        }
        advance(cursor, (uint64_t)done, NULL);
        bytes -= (uint64_t)done;
        offset += (uint64_t)done;
    }
    return 0;
}

/* Bytes of the file that are changed step by step; `stopping` is as of cpr_blk_execute. */
struct range {
    uint64_t bytes, offset;
    const bool *stopping;
};

/* The first `part` bytes are done: 0, or UNFINISHED where the device stops before the rest. */
static int done(struct range *range, uint64_t part)
{
    range->bytes -= part;
    range->offset += part;
    return range->bytes && __atomic_load_n(range->stopping, __ATOMIC_ACQUIRE) ? UNFINISHED : 0;
}

static int write_zeros(int fd, struct range range)
{
    int error = 0;

    while (range.bytes && !error) {
        struct iovec piece = {.iov_base = (void *)zeros, .iov_len = ZEROS_SIZE};
        struct cpr_cursor cursor = {&piece, 1};
        uint64_t part = range.bytes < ZEROS_SIZE ? range.bytes : ZEROS_SIZE;

        piece.iov_len = part;
        error = write_all(fd, &cursor, part, range.offset);
        error = error ? error : done(&range, part);
    }
    return error;
}

/* Puts on the disk what has been written.  The kernel tells of a failed writeback once, and takes the
   pages for clean: another fdatasync would say that they are there. */
static void sync_file(const struct cpr_blk_options *options, struct cpr_blk_sync *sync,
                      struct cpr_blk_result *result)
{
    uint64_t begun = __atomic_load_n(&sync->begun, __ATOMIC_SEQ_CST);

    if (!options->syncs) {
        return;
    }
    pthread_mutex_lock(&sync->lock);
    if (!sync->error && sync->begun == begun) { /* else one has begun since, and has ended */
        __atomic_store_n(&sync->begun, begun + 1, __ATOMIC_SEQ_CST);
        if (fdatasync(options->fd) < 0) {
            __atomic_store_n(&sync->error, errno, __ATOMIC_RELEASE);
        }
    }
    result->error = sync->error;
    result->unsynced = sync->error;
    pthread_mutex_unlock(&sync->lock);
}

static int punch(int fd, uint64_t bytes, uint64_t offset)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(fd, mode, (off_t)offset, (off_t)bytes) < 0 ? errno : 0;
}

static bool is_unsupported(int error)
{
    return error == EOPNOTSUPP || error == ENOSYS || error == ENODEV || error == EINVAL;
}

static int zero_range(const struct cpr_blk_options *options, bool unmaps, struct range range)
{
    int mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, fd = options->fd;
    int error;

    if (unmaps && options->discards) {
        error = punch(fd, range.bytes, range.offset);
    } else {
        error = fallocate(fd, mode, (off_t)range.offset, (off_t)range.bytes) < 0 ? errno : 0;
    }
    return is_unsupported(error) ? write_zeros(fd, range) : error;
}

static int discard(const struct cpr_blk_options *options, uint64_t bytes, uint64_t offset)
{
    int error = options->discards ? punch(options->fd, bytes, offset) : 0;

    return is_unsupported(error) ? 0 : error;
}

/* Discards the range, or makes it zeroes. */
static int change_range(const struct cpr_blk_options *options, bool zeroes, bool unmaps,
                        struct range range)
{
    int error = 0;

    while (range.bytes && !error) {
        struct range part = range;

        part.bytes = range.bytes < MOST_BYTES ? range.bytes : MOST_BYTES;
        error = zeroes ? zero_range(options, unmaps, part)
                       : discard(options, part.bytes, part.offset);
        error = error ? error : done(&range, part.bytes);
    }
    return error;
}

/* `sync` is NULL where what is written is not put on the disk at once. */
static void discard_or_zero(const struct cpr_blk_options *options, struct cpr_blk_sync *sync,
                            const bool *stopping, bool zeroes, struct cpr_cursor *out,
                            uint64_t out_bytes, struct cpr_blk_result *result)
{
    struct virtio_blk_discard_write_zeroes range;
    uint64_t bytes;
    uint32_t known = zeroes ? VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP : 0;

    result->is_write = true;
    if (out_bytes > sizeof(range)) {
        result->status = VIRTIO_BLK_S_UNSUPP;
        return;
    }
    if (cpr_cursor_read(out, &range, sizeof(range)) != sizeof(range)) {
        result->problem = "a request has no range";
        return;
    }
    if (range.flags & ~known) {
        result->status = VIRTIO_BLK_S_UNSUPP;
        return;
    }
    bytes = (uint64_t)range.num_sectors << SECTOR_SHIFT;
    if (range.num_sectors > MOST_SECTORS || !in_range(options, range.sector, bytes)) {
        result->status = VIRTIO_BLK_S_IOERR;
        return;
    }
    result->error =
        change_range(options, zeroes, range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
                     (struct range){bytes, range.sector << SECTOR_SHIFT, stopping});
    if (result->error == UNFINISHED) {
        result->error = 0;
        result->unfinished = true;
    } else if (!result->error && zeroes && bytes && sync) {
        sync_file(options, sync, result);
    }
}

/* Takes the status byte off the end of what the guest gives to be written. */
static uint8_t *take_status(struct cpr_cursor *in)
{
    struct iovec *last = &in->pieces[in->count - 1];

    last->iov_len--;
    if (!last->iov_len) {
        in->count--;
    }
    return (uint8_t *)last->iov_base + last->iov_len;
}

void cpr_blk_execute(const struct cpr_blk_options *options, struct cpr_blk_sync *sync,
                     const bool *stopping, bool write_through, const struct cpr_virtio_memory *memory,
                     struct cpr_chain *chain, struct cpr_blk_result *result)
{
    struct cpr_cursor out = cpr_chain_out(chain);
    struct cpr_cursor in = cpr_chain_in(chain);
    struct virtio_blk_outhdr header;
    uint64_t out_bytes = chain->out_bytes - sizeof(header), in_bytes = chain->in_bytes - 1;
    uint8_t name[CPR_BLK_SERIAL_SIZE];

    *result = (struct cpr_blk_result){.status = VIRTIO_BLK_S_OK, .written = 1};
    if (chain->out_bytes < sizeof(header) || !chain->in_bytes) {
        result->problem = "a request has no header or no status";
        return;
    }
    cpr_cursor_read(&out, &header, sizeof(header));
    result->place = take_status(&in);
    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        if (in_bytes > MOST_BYTES || !in_range(options, header.sector, in_bytes)) {
            result->status = VIRTIO_BLK_S_IOERR;
            return;
        }
        result->error = read_all(options->fd, &in, in_bytes, header.sector << SECTOR_SHIFT, memory);
        result->written = (uint32_t)(in_bytes + 1);
        return;
    case VIRTIO_BLK_T_OUT:
        result->is_write = true;
        if (options->readonly || out_bytes > MOST_BYTES ||
            !in_range(options, header.sector, out_bytes)) {
            result->status = VIRTIO_BLK_S_IOERR;
            return;
        }
        result->error = write_all(options->fd, &out, out_bytes, header.sector << SECTOR_SHIFT);
        if (!result->error && write_through) {
            sync_file(options, sync, result);
        }
        return;
    case VIRTIO_BLK_T_FLUSH:
        result->is_write = true;
        if (!options->readonly) {
            sync_file(options, sync, result);
        }
        return;
    case VIRTIO_BLK_T_GET_ID:
        memcpy(name, options->serial, sizeof(name));
        result->written += (uint32_t)cpr_cursor_write(
            &in, memory, name, in_bytes < sizeof(name) ? in_bytes : sizeof(name));
        return;
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        if (options->readonly) {
            result->status = VIRTIO_BLK_S_IOERR;
            return;
        }
        discard_or_zero(options, write_through ? sync : NULL, stopping,
                        header.type == VIRTIO_BLK_T_WRITE_ZEROES, &out, out_bytes, result);
        return;
    default:
        result->status = VIRTIO_BLK_S_UNSUPP;
    }
}
