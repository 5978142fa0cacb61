/* Frames between a tap and a guest's queues. */
#include "virtio_net.h"

#include <errno.h>
#include <linux/virtio_net.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "virtio_chain.h"

#define FRAME_MOST ((64 << 10) + 256) /* a segment of 64 KiB, with its headers */
#define ROUND 64                      /* frames in one direction before the other has its turn */
#define BUFFERS_MOST 64               /* that one frame takes of the guest's */

enum { EVENT_STOP, EVENT_TAP, EVENT_RECEIVE, EVENT_TRANSMIT };

struct cpr_net {
    int tap, epoll, stop;
    bool has_header, merges;
    struct cpr_virtqueue *receive, *transmit;
    int receive_kick, transmit_kick;
    uint32_t listened; /* the events of the tap that the thread waits for */
    bool running;
    pthread_t thread;
    uint64_t frame_size; /* of one that waits for buffers, its header included; 0 for none */
    uint8_t frame[CPR_NET_HEADER + FRAME_MOST];
    struct cpr_chain chain;
};

static int listen_to(struct cpr_net *net, int fd, uint32_t events, uint32_t about)
{
    struct epoll_event event = {.events = events, .data.u32 = about};

    return epoll_ctl(net->epoll, EPOLL_CTL_ADD, fd, &event) < 0 ? -errno : 0;
}

int cpr_net_new(int tap, bool has_header, struct cpr_virtqueue *receive, int receive_kick,
                struct cpr_virtqueue *transmit, int transmit_kick, struct cpr_net **made)
{
    struct cpr_net *net = calloc(1, sizeof(*net));
    int error;

    if (!net) {
        return -ENOMEM;
    }
    net->tap = tap;
    net->has_header = has_header;
    net->receive = receive;
    net->receive_kick = receive_kick;
    net->transmit = transmit;
    net->transmit_kick = transmit_kick;
    net->epoll = epoll_create1(EPOLL_CLOEXEC);
    net->stop = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    error = net->epoll < 0 || net->stop < 0 ? -errno : 0;
    error = error ? error : listen_to(net, net->stop, EPOLLIN, EVENT_STOP);
    error = error ? error : listen_to(net, tap, 0, EVENT_TAP);
    error = error ? error : listen_to(net, receive_kick, EPOLLIN, EVENT_RECEIVE);
    error = error ? error : listen_to(net, transmit_kick, EPOLLIN, EVENT_TRANSMIT);
    if (error) {
        cpr_net_free(net);
        return error;
    }
    *made = net;
    return 0;
}

void cpr_net_free(struct cpr_net *net)
{
    if (net->epoll >= 0) {
        close(net->epoll);
    }
    if (net->stop >= 0) {
        close(net->stop);
    }
    free(net);
}

/* Waits for these events of the tap from now on. */
static void listen_tap(struct cpr_net *net, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = EVENT_TAP};

    if (net->listened != events && !epoll_ctl(net->epoll, EPOLL_CTL_MOD, net->tap, &event)) {
        net->listened = events;
    }
}

/* Reads the next frame of the tap: false where there is none. */
static bool read_frame(struct cpr_net *net)
{
    uint64_t offset = net->has_header ? 0 : CPR_NET_HEADER;
    ssize_t size;

    memset(net->frame, 0, CPR_NET_HEADER);
    size = read(net->tap, net->frame + offset, sizeof(net->frame) - offset);
    net->frame_size = size > 0 ? (uint64_t)size + offset : 0;
    return net->frame_size > CPR_NET_HEADER;
}

/* Puts the frame that was read into the guest's buffers: 1, or 0 where there are not enough. One
   that has no place even so is dropped. */
static int deliver(struct cpr_net *net)
{
    struct virtio_net_hdr_v1 *header = (struct virtio_net_hdr_v1 *)net->frame;
    struct cpr_virtqueue *queue = net->receive;
    uint16_t heads[BUFFERS_MOST];
    uint64_t room = 0, done = 0;
    uint32_t count = 0;

    while (room < net->frame_size && count < (net->merges ? BUFFERS_MOST : 1)) {
        if (!cpr_virtqueue_pop(queue, &net->chain)) {
            while (count--) {
                cpr_virtqueue_unpop(queue);
            }
            return 0;
        }
        heads[count++] = net->chain.head;
        room += net->chain.in_bytes;
    }
    if (room < net->frame_size) {
        while (count--) {
            cpr_virtqueue_unpop(queue);
        }
        net->frame_size = 0;
        return 1;
    }
    header->num_buffers = (uint16_t)count;
    for (uint32_t i = 0; i < count; i++) {
        struct cpr_cursor in;
        uint64_t part;

        if (!cpr_virtqueue_again(queue, heads[i], &net->chain)) {
            return 0; /* the guest has changed it: the queue is broken */
        }
        in = cpr_chain_in(&net->chain);
        part = cpr_cursor_write(&in, cpr_virtqueue_memory(queue), net->frame + done,
                                net->frame_size - done);
        cpr_virtqueue_fill(queue, i, heads[i], (uint32_t)part);
        done += part;
    }
    cpr_virtqueue_flush(queue, (uint16_t)count);
    net->frame_size = 0;
    return 1;
}

/* From the tap to the guest; true where there may be more. */
static bool receive(struct cpr_net *net)
{
    struct cpr_virtqueue *queue = net->receive;
    bool more = true;

    cpr_virtqueue_lock(queue);
    for (int i = 0; i < ROUND && more; i++) {
        if (!net->frame_size && !cpr_virtqueue_waits(queue)) {
            cpr_virtqueue_ask(queue, true);
            more = cpr_virtqueue_waits(queue);
            if (!more) {
                listen_tap(net, net->listened & ~(uint32_t)EPOLLIN);
            }
            continue;
        }
        if (!net->frame_size && !read_frame(net)) {
            listen_tap(net, net->listened | EPOLLIN);
            more = false;
        } else if (!deliver(net)) {
            cpr_virtqueue_ask(queue, true);
            more = deliver(net);
            if (!more) { /* the guest's next notification brings more buffers */
                listen_tap(net, net->listened & ~(uint32_t)EPOLLIN);
            }
        }
    }
    cpr_virtqueue_interrupt(queue);
    cpr_virtqueue_unlock(queue);
    return more;
}

/* Writes one frame to the tap; false where that has no room. What the tap refuses is dropped. */
static bool write_frame(struct cpr_net *net)
{
    struct cpr_cursor out = cpr_chain_out(&net->chain);
    uint8_t header[CPR_NET_HEADER];

    if (!net->has_header) {
        cpr_cursor_read(&out, header, sizeof(header));
    }
    /* ENOBUFS: one that is too long for the kernel, which is no matter of waiting. */
    return !out.count || writev(net->tap, out.pieces, (int)out.count) >= 0 || errno != EAGAIN;
}

/* From the guest to the tap; true where there may be more. */
static bool transmit(struct cpr_net *net)
{
    struct cpr_virtqueue *queue = net->transmit;
    bool more = true;

    cpr_virtqueue_lock(queue);
    for (int i = 0; i < ROUND && more; i++) {
        if (!cpr_virtqueue_pop(queue, &net->chain)) {
            cpr_virtqueue_ask(queue, true);
            more = cpr_virtqueue_waits(queue);
            continue;
        }
        cpr_virtqueue_ask(queue, false);
        if (net->chain.out_bytes < CPR_NET_HEADER) {
            cpr_virtqueue_break(queue, "a frame has no header");
            more = false;
        } else if (!write_frame(net)) {
            cpr_virtqueue_unpop(queue);
            listen_tap(net, net->listened | EPOLLOUT);
            more = false;
        } else {
            cpr_virtqueue_push(queue, net->chain.head, 0);
        }
    }
    cpr_virtqueue_interrupt(queue);
    cpr_virtqueue_unlock(queue);
    return more;
}

static void *work(void *argument)
{
    struct cpr_net *net = argument;
    bool receives = true, transmits = true;

    for (;;) {
        struct epoll_event events[4];
        int count = epoll_wait(net->epoll, events, 4, receives || transmits ? 0 : -1);
        uint64_t ignored;

        for (int i = 0; i < count; i++) {
            switch (events[i].data.u32) {
            case EVENT_STOP:
                return NULL;
            case EVENT_RECEIVE:
                receives |= read(net->receive_kick, &ignored, sizeof(ignored)) > 0;
                break;
            case EVENT_TRANSMIT:
                transmits |= read(net->transmit_kick, &ignored, sizeof(ignored)) > 0;
                break;
            default:
                if (events[i].events & EPOLLOUT) {
                    listen_tap(net, net->listened & ~(uint32_t)EPOLLOUT);
                    transmits = true;
                }
                if (events[i].events & (EPOLLERR | EPOLLHUP)) { /* the tap has gone */
                    epoll_ctl(net->epoll, EPOLL_CTL_DEL, net->tap, NULL);
                } else if (events[i].events & EPOLLIN) {
                    receives = true;
                }
            }
        }
        receives = receives && receive(net);
        transmits = transmits && transmit(net);
    }
}

int cpr_net_start(struct cpr_net *net, bool merges)
{
    sigset_t all, old;
    int error;

    net->merges = merges;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old);
    error = pthread_create(&net->thread, NULL, work, net);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    net->running = !error;
    return -error;
}

void cpr_net_stop(struct cpr_net *net)
{
    uint64_t count = 1;

    if (!net->running) {
        return;
    }
    if (write(net->stop, &count, sizeof(count)) < 0) {
        abort(); /* it is read below, and never full */
    }
    pthread_join(net->thread, NULL);
    net->running = false;
    if (read(net->stop, &count, sizeof(count)) < 0) {
        abort();
    }
}
