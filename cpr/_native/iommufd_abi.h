#ifndef CPR_IOMMUFD_ABI_H
#define CPR_IOMMUFD_ABI_H
/* IOMMUFD's ABI (Documentation/userspace-api/iommufd.rst), for systems whose headers are older.
 *
 * The system's header is used as far as it goes: linux/iommufd.h came with Linux 6.2, the VFIO
 * device's part with 6.6, mappings of files and the change of process with 6.13.  The assertions
 * hold for both. */
#include <linux/types.h>
#include <linux/vfio.h>
#include <stddef.h>
#include <sys/ioctl.h>

#if __has_include(<linux/iommufd.h>)
#include <linux/iommufd.h>
#else

#define IOMMUFD_TYPE (';')
#define IOMMU_DESTROY _IO(IOMMUFD_TYPE, 0x80)
#define IOMMU_IOAS_ALLOC _IO(IOMMUFD_TYPE, 0x81)
#define IOMMU_IOAS_MAP _IO(IOMMUFD_TYPE, 0x85)
#define IOMMU_IOAS_UNMAP _IO(IOMMUFD_TYPE, 0x86)
#define IOMMU_HWPT_ALLOC _IO(IOMMUFD_TYPE, 0x89)

enum {
    IOMMU_IOAS_MAP_FIXED_IOVA = 1 << 0,
    IOMMU_IOAS_MAP_WRITEABLE = 1 << 1,
    IOMMU_IOAS_MAP_READABLE = 1 << 2,
};

struct iommu_destroy {
    __u32 size;
    __u32 id;
};

struct iommu_ioas_alloc {
    __u32 size;
    __u32 flags;
    __u32 out_ioas_id;
};

struct iommu_ioas_map {
    __u32 size;
    __u32 flags;
    __u32 ioas_id;
    __u32 __reserved;
    __aligned_u64 user_va;
    __aligned_u64 length;
    __aligned_u64 iova;
};

struct iommu_ioas_unmap {
    __u32 size;
    __u32 ioas_id;
    __aligned_u64 iova;
    __aligned_u64 length;
};

struct iommu_hwpt_alloc {
    __u32 size;
    __u32 flags;
    __u32 dev_id;
    __u32 pt_id;
    __u32 out_hwpt_id;
    __u32 __reserved;
    __u32 data_type;
    __u32 data_len;
    __aligned_u64 data_uptr;
};
#endif

#ifndef IOMMU_IOAS_MAP_FILE
#define IOMMU_IOAS_MAP_FILE _IO(IOMMUFD_TYPE, 0x8f)
struct iommu_ioas_map_file {
    __u32 size;
    __u32 flags;
    __u32 ioas_id;
    __s32 fd;
    __aligned_u64 start;
    __aligned_u64 length;
    __aligned_u64 iova;
};
#endif

#ifndef IOMMU_IOAS_CHANGE_PROCESS
#define IOMMU_IOAS_CHANGE_PROCESS _IO(IOMMUFD_TYPE, 0x92)
struct iommu_ioas_change_process {
    __u32 size;
    __u32 __reserved;
};
#endif

#ifndef VFIO_DEVICE_BIND_IOMMUFD
#define VFIO_DEVICE_BIND_IOMMUFD _IO(VFIO_TYPE, VFIO_BASE + 18)
#define VFIO_DEVICE_ATTACH_IOMMUFD_PT _IO(VFIO_TYPE, VFIO_BASE + 19)
struct vfio_device_bind_iommufd {
    __u32 argsz;
    __u32 flags;
    __s32 iommufd;
    __u32 out_devid;
};
struct vfio_device_attach_iommufd_pt {
    __u32 argsz;
    __u32 flags;
    __u32 pt_id;
};
#endif

/* The numbers are from the kernel's own include/uapi (iommufd.h, vfio.h). */
#define CPR_REQUEST(name, number) \
    _Static_assert((name) == (';' << 8 | (number)), #name " is not the kernel's")
#define CPR_SIZE(name, size) \
    _Static_assert(sizeof(struct name) == (size), "struct " #name " is not the kernel's")
/* Newer kernels append fields: the first part is what counts. */
#define CPR_LAST(name, field, offset) \
    _Static_assert(offsetof(struct name, field) == (offset), "struct " #name " is not the kernel's")

CPR_REQUEST(IOMMU_DESTROY, 0x80);
CPR_REQUEST(IOMMU_IOAS_ALLOC, 0x81);
CPR_REQUEST(IOMMU_IOAS_MAP, 0x85);
CPR_REQUEST(IOMMU_IOAS_UNMAP, 0x86);
CPR_REQUEST(IOMMU_HWPT_ALLOC, 0x89);
CPR_REQUEST(IOMMU_IOAS_MAP_FILE, 0x8f);
CPR_REQUEST(IOMMU_IOAS_CHANGE_PROCESS, 0x92);
CPR_REQUEST(VFIO_DEVICE_BIND_IOMMUFD, 100 + 18);
CPR_REQUEST(VFIO_DEVICE_ATTACH_IOMMUFD_PT, 100 + 19);
CPR_REQUEST(VFIO_SET_IOMMU, 100 + 2);
CPR_REQUEST(VFIO_GROUP_SET_CONTAINER, 100 + 4);
CPR_REQUEST(VFIO_IOMMU_MAP_DMA, 100 + 13);
CPR_REQUEST(VFIO_IOMMU_UNMAP_DMA, 100 + 14);
CPR_SIZE(iommu_destroy, 8);
CPR_SIZE(iommu_ioas_alloc, 12);
CPR_SIZE(iommu_ioas_map, 40);
CPR_SIZE(iommu_ioas_map_file, 40);
CPR_SIZE(iommu_ioas_unmap, 24);
CPR_SIZE(iommu_ioas_change_process, 8);
CPR_SIZE(vfio_iommu_type1_dma_map, 32);
CPR_SIZE(vfio_iommu_type1_dma_unmap, 24);
CPR_SIZE(vfio_region_info, 32);
CPR_SIZE(vfio_irq_info, 16);
CPR_LAST(iommu_hwpt_alloc, data_uptr, 32);
CPR_LAST(vfio_device_bind_iommufd, out_devid, 12);
CPR_LAST(vfio_device_attach_iommufd_pt, pt_id, 8);

#undef CPR_REQUEST
#undef CPR_SIZE
#undef CPR_LAST
#endif
