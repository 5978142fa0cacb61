#ifndef CPR_VIRTIO_NET_H
#define CPR_VIRTIO_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "virtio_ring.h"

/* A network card on a tap: one thread that carries frames between it and two virtqueues
   (virtio 1.2, 5.1). */
struct cpr_net;

/* Makes a card without its thread, on the non-blocking descriptor `tap`, each of whose frames has a
   header of CPR_NET_HEADER bytes if `has_header`. `receive` and `transmit` are the guest's queues,
   and their kicks non-blocking eventfds. All of them stay the caller's. Returns 0 or -errno. */
int cpr_net_new(int tap, bool has_header, struct cpr_virtqueue *receive, int receive_kick,
                struct cpr_virtqueue *transmit, int transmit_kick, struct cpr_net **made);

enum { CPR_NET_HEADER = 12 }; /* struct virtio_net_hdr_v1 */

/* Frees it; it must not be running. */
void cpr_net_free(struct cpr_net *net);

/* Starts the thread, deaf to signals. A frame may take several of the guest's buffers if
   `merges`. Returns 0 or -errno. */
int cpr_net_start(struct cpr_net *net, bool merges);

/* The inverse. When it returns, each chain that had been taken is given back. Nothing happens where
   there is no thread. */
void cpr_net_stop(struct cpr_net *net);

#endif
