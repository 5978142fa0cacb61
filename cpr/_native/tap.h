#ifndef CPR_TAP_H
#define CPR_TAP_H

#include <stdbool.h>
#include <stdint.h>

enum { CPR_TAP_NAME = 16 }; /* bytes of a name, the zero at its end included */

/* Makes `fd`, which is /dev/net/tun opened, the tap `name`, or a new one for an empty name, whose
   frames have a header of virtio's. Returns 0, and the name in *name, or -errno. */
int cpr_tap_attach(int fd, char *name);

/* Asks a tap for its name, and whether its frames have such a header; that is made as long as
   virtio's then. Returns 0, or -errno: -EBADFD for what is no tap. */
int cpr_tap_query(int fd, char *name, bool *has_header);

/* What the reader of the tap can take: frames without checksums, segments for TCP over IPv4 and
   IPv6, ECN with these, and segments for UDP. Returns 0 or -errno. */
int cpr_tap_offload(int fd, bool checksums, bool tcp4, bool tcp6, bool ecn, bool udp);

#endif
