/* Chains for devices in Python: taken and given back in one call. */
#include <errno.h>
#include <sys/random.h>

#include "virtio_chain.h"
#include "virtio_ring.h"

static int64_t take(struct cpr_virtqueue *queue)
{
    if (cpr_virtqueue_pop(queue, cpr_virtqueue_scratch(queue))) {
        return 0;
    }
    return cpr_virtqueue_is_broken(queue) ? -EPROTO : -EAGAIN;
}

static void give_back(struct cpr_virtqueue *queue, uint32_t written)
{
    cpr_virtqueue_push(queue, cpr_virtqueue_scratch(queue)->head, written);
    cpr_virtqueue_interrupt(queue);
    cpr_virtqueue_ask(queue, true);
}

static int64_t read_out(struct cpr_virtqueue *queue, uint8_t *buffer, uint32_t room, bool takes)
{
    struct cpr_chain *chain = cpr_virtqueue_scratch(queue);
    struct cpr_cursor cursor;
    int64_t result;

    cpr_virtqueue_lock(queue);
    result = take(queue);
    if (!result) {
        cursor = cpr_chain_out(chain);
        if (chain->out_bytes > room) {
            cpr_virtqueue_break(queue, "a buffer is longer than the device takes");
            result = -EPROTO;
        } else {
            result = (int64_t)cpr_cursor_read(&cursor, buffer, room);
            if (takes) {
                give_back(queue, 0);
            } else {
                cpr_virtqueue_unpop(queue);
            }
        }
    }
    cpr_virtqueue_unlock(queue);
    return result;
}

int64_t cpr_virtqueue_receive(struct cpr_virtqueue *queue, uint8_t *buffer, uint32_t room)
{
    return read_out(queue, buffer, room, true);
}

int64_t cpr_virtqueue_peek(struct cpr_virtqueue *queue, uint8_t *buffer, uint32_t room)
{
    return read_out(queue, buffer, room, false);
}

int64_t cpr_virtqueue_send(struct cpr_virtqueue *queue, const uint8_t *data, uint32_t size)
{
    struct cpr_chain *chain = cpr_virtqueue_scratch(queue);
    struct cpr_cursor cursor;
    int64_t result;

    cpr_virtqueue_lock(queue);
    result = take(queue);
    if (!result) {
        cursor = cpr_chain_in(chain);
        result = (int64_t)cpr_cursor_write(&cursor, cpr_virtqueue_memory(queue), data, size);
        give_back(queue, (uint32_t)result);
    }
    cpr_virtqueue_unlock(queue);
    return result;
}

int64_t cpr_virtqueue_send_random(struct cpr_virtqueue *queue, uint32_t most)
{
    struct cpr_chain *chain = cpr_virtqueue_scratch(queue);
    struct cpr_cursor cursor;
    int64_t result;

    cpr_virtqueue_lock(queue);
    result = take(queue);
    if (!result) {
        uint8_t bytes[256]; /* getrandom gives so many without being interrupted */

        cursor = cpr_chain_in(chain);
        while (result < most && cursor.count) {
            uint32_t part = most - (uint32_t)result;

            part = part < sizeof(bytes) ? part : sizeof(bytes);
            if (getrandom(bytes, part, 0) != (ssize_t)part) {
                break;
            }
            result += (int64_t)cpr_cursor_write(&cursor, cpr_virtqueue_memory(queue), bytes, part);
        }
        give_back(queue, (uint32_t)result);
    }
    cpr_virtqueue_unlock(queue);
    return result;
}

int64_t cpr_virtqueue_room(struct cpr_virtqueue *queue)
{
    int64_t result;

    cpr_virtqueue_lock(queue);
    result = take(queue);
    if (!result) {
        uint64_t room = cpr_virtqueue_scratch(queue)->in_bytes;

        cpr_virtqueue_unpop(queue);
        result = room < INT64_MAX ? (int64_t)room : INT64_MAX;
    }
    cpr_virtqueue_unlock(queue);
    return result;
}
