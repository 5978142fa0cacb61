/* The tap of a network card. */
#include "tap.h"

#include <errno.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <linux/virtio_net.h>
#include <string.h>
#include <sys/ioctl.h>

static int set_header(int fd)
{
    int size = sizeof(struct virtio_net_hdr_v1);

    return ioctl(fd, TUNSETVNETHDRSZ, &size) < 0 ? -errno : 0;
}

int cpr_tap_attach(int fd, char *name)
{
    struct ifreq request;

    memset(&request, 0, sizeof(request));
    memcpy(request.ifr_name, name, CPR_TAP_NAME);
    request.ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
    if (ioctl(fd, TUNSETIFF, &request) < 0) {
        return -errno;
    }
    memcpy(name, request.ifr_name, CPR_TAP_NAME);
    return set_header(fd);
}

int cpr_tap_query(int fd, char *name, bool *has_header)
{
    struct ifreq request;

    memset(&request, 0, sizeof(request));
    if (ioctl(fd, TUNGETIFF, &request) < 0) {
        return errno == ENOTTY || errno == EINVAL ? -EBADFD : -errno;
    }
    if (!(request.ifr_flags & IFF_TAP)) {
        return -EBADFD;
    }
    memcpy(name, request.ifr_name, CPR_TAP_NAME);
    *has_header = request.ifr_flags & IFF_VNET_HDR;
    return *has_header ? set_header(fd) : 0;
}

int cpr_tap_offload(int fd, bool checksums, bool tcp4, bool tcp6, bool ecn, bool udp)
{
    unsigned long flags = 0;

    if (checksums) {
        flags = TUN_F_CSUM | (tcp4 ? TUN_F_TSO4 : 0) | (tcp6 ? TUN_F_TSO6 : 0) |
                (ecn && (tcp4 || tcp6) ? TUN_F_TSO_ECN : 0) | (udp ? TUN_F_UFO : 0);
    }
    return ioctl(fd, TUNSETOFFLOAD, flags) < 0 ? -errno : 0;
}
