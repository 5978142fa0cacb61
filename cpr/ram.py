"""Guest RAM: memory backends and RAMBlocks.

A RAMBlock owns its mapping and its descriptor.  Shared blocks are kept across an exec: their
descriptor is found in the PreservedFds by the block's idstr instead of made anew, and is saved
there for the next exec.  What is found is mapped shared and in the page size that it has, whatever
the options say: a block that was private before may come over in a copy, and goes over the next
exec as it is.  Descriptors are close-on-exec; only cpr-exec clears that.
"""

from __future__ import annotations

import fcntl
import os

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE
from cpr.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from cpr.config import ObjectConfig
    from cpr.page_bitmap import PageBitmap
    from cpr.state.fds import PreservedFds

HUGE_ALIGNMENT = 2 << 20  # so that the kernel can use transparent huge pages
DEFAULT_HUGEPAGE = 2 << 20
HUGEPAGES = "/sys/kernel/mm/hugepages"
POPULATE_CHUNK = 2 << 20  # of a guest that runs: the mmap lock is not held for long

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

BACKENDS = frozenset(
    {"memory-backend-memfd", "memory-backend-shm", "memory-backend-file", "memory-backend-ram"}
)


class RAMBlock:
    """One contiguous block of guest RAM.

    `size` is the used length and `max_length` the mapped one, in bytes; `host` is the address of
    the mapping; `alignment` is that address's, and `fd` is
    -1 for anonymous memory.  `preserved` says that the descriptor goes over
    an exec, `reopened` that the new VMM opens the same file again by its path; a block that is
    neither loses its content in an exec, unless it is `regenerated` (a ROM that the machine
    makes).  `stale` says that it is a file whose bytes may be another guest's, so that pages which
    do not come in a state are to be cleared.  `prealloc` asks for all of it to be populated,
    `populated` bytes of it are by now.

    While a copy of the block is being made for another image, `copy_fd` is that copy's memfd, else
    -1, and `written` a bitmap of the pages that this process itself writes, else None; for threads
    in C `written_cell` points to that bitmap's words.
    """

    __slots__ = (
        "_former",
        "_written",
        "alignment",
        "backend",
        "copy_fd",
        "fd",
        "host",
        "idstr",
        "kept",
        "max_length",
        "offset",
        "page_size",
        "populated",
        "prealloc",
        "preserved",
        "readonly",
        "regenerated",
        "reopened",
        "shared",
        "size",
        "stale",
        "written_cell",
    )

    def __init__(self, idstr: str, size: int, backend: str) -> None:
        self.idstr = idstr
        self.size = size
        self.max_length = size
        self.backend = backend
        self.page_size = PAGE_SIZE
        self.alignment = PAGE_SIZE
        self.fd = -1
        self.host = 0
        self.offset = 0
        self.shared = False
        self.readonly = False
        self.prealloc = False
        self.populated = 0
        self.preserved = False
        self.kept = False
        self.reopened = False
        self.stale = False
        self.regenerated = False
        self.copy_fd = -1
        self.written_cell = ffi.new("uint64_t *[1]")
        self._written: PageBitmap | None = None
        self._former: PageBitmap | None = None

    @property
    def written(self) -> PageBitmap | None:
        return self._written

    @written.setter
    def written(self, bitmap: PageBitmap | None) -> None:
        self._former = self._written  # a thread may yet be setting a bit
        self._written = bitmap
        self.written_cell[0] = ffi.NULL if bitmap is None else bitmap.address

    def view(self, offset: int, size: int) -> memoryview:
        """[offset, offset+size) of the block, to be read; valid until `close`.

        Raises ValueError for what is not in the block.
        """
        return memoryview(self._buffer(offset, size)).toreadonly()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes `data` to the block, and marks it so.  Raises ValueError as `view` does."""
        self._buffer(offset, len(data))[:] = data
        self.mark_written(offset, len(data))

    def mark_written(self, offset: int, size: int) -> None:
        """To be called after any write to the mapping that neither `write` nor the guest did."""
        written = self.written
        if written is not None and size:
            first = offset // PAGE_SIZE
            written.set(first, (offset + size - 1) // PAGE_SIZE - first + 1)

    def _buffer(self, offset: int, size: int) -> Any:
        if offset < 0 or offset + size > self.max_length:
            raise ValueError(f"{self.idstr}: no {size} bytes at offset {offset:#x}")
        return ffi.buffer(ffi.cast("char *", self.host + offset), size)

    @property
    def outgoing_fd(self) -> int:
        """The descriptor in which the next image finds this RAM: the copy's, or its own; or -1."""
        return self.copy_fd if self.copy_fd >= 0 or not self.preserved else self.fd

    def cpr_blocker(self, regenerates: bool = True) -> str | None:
        """Why an update would lose this block's content, in QEMU's words, or None.

        `regenerates`: the new VMM makes the regenerated blocks again, as after an exec.
        """
        if self.preserved or self.reopened or (self.regenerated and regenerates):
            return None
        return (
            f"Memory region {self.idstr} is not compatible with CPR. share=on is required for "
            "memory-backend objects, and aux-ram-share=on is required."
        )

    def unmap(self) -> None:
        """Unmaps the block; its descriptor stays."""
        if self.host:
            lib.munmap(ffi.cast("void *", self.host), self.max_length)
            self.host = 0

    def close(self) -> None:
        """Unmaps the block and closes its descriptor."""
        self.unmap()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def create_backend_block(config: ObjectConfig, fds: PreservedFds) -> RAMBlock:
    """Makes the RAMBlock of a memory-backend object; the caller owns it.

    Raises ConfigError where the backend cannot be made; then nothing is left open, but a
    descriptor that was found in `fds` stays there.
    """
    properties = config.properties
    size = int(properties.get("size", 0))
    if size <= 0:
        raise ConfigError(f"property 'size' of {config.qom_type} doesn't take value '{size}'")
    block = RAMBlock(config.id, size, config.qom_type)
    default_share = config.qom_type in ("memory-backend-memfd", "memory-backend-shm")
    block.shared = bool(properties.get("share", default_share))
    block.prealloc = bool(properties.get("prealloc", False))
    if config.qom_type == "memory-backend-memfd" and properties.get("hugetlb"):
        block.page_size = int(properties.get("hugetlbsize", 0)) or DEFAULT_HUGEPAGE
        if block.page_size & (block.page_size - 1):
            raise ConfigError("Hugepage size must be a power of 2")
    if config.qom_type == "memory-backend-shm" and not block.shared:
        raise ConfigError("can't create shm backend with `share=off`")
    if size % block.page_size:
        raise ConfigError(
            f"memory size {size:#x} must be a multiple of page size {block.page_size:#x}"
        )
    _attach_descriptor(block, properties, fds)
    _map(block, int(properties.get("align", 0)))
    _advise(block, properties)
    return block


def create_aux_block(idstr: str, size: int, share: bool, fds: PreservedFds) -> RAMBlock:
    """Makes a block of the machine's own (a ROM): in a memfd where `share` (aux-ram-share=on)."""
    block = RAMBlock(idstr, size, "aux")
    block.regenerated = True
    block.shared = share
    if not _take_found(block, fds) and share:
        block.fd = os.memfd_create(idstr)
        os.ftruncate(block.fd, size)
        fds.save(idstr, 0, block.fd)
        block.preserved = True
    _map(block, 0)
    return block


def create_default_block(idstr: str, size: int, fds: PreservedFds) -> RAMBlock:
    """Makes the machine's default RAM, private and anonymous, as QEMU does without a backend."""
    block = RAMBlock(idstr, size, "memory-backend-ram")
    _take_found(block, fds)
    _map(block, 0)
    return block


def create_copy(block: RAMBlock, page_size: int) -> RAMBlock:
    """Makes an empty block like `block`, shared, in a memfd in pages of `page_size`.

    The caller owns it.  Raises ConfigError where there are no such pages, or not enough of them.
    """
    copy = RAMBlock(block.idstr, block.size, block.backend)
    copy.page_size = page_size
    copy.shared = True
    is_memfd = block.backend == "memory-backend-memfd"
    copy.fd = _create_memfd(copy, True, "memory-backend-memfd" if is_memfd else block.idstr)
    try:
        _map(copy, 0)
    except ConfigError:
        copy.close()
        raise
    return copy


def _take_found(block: RAMBlock, fds: PreservedFds) -> bool:
    """Takes over the block's descriptor from `fds`, if there is one."""
    found = fds.find(block.idstr, 0)
    if found is None:
        return False
    _check_size(block, found)
    block.fd = found
    block.page_size = _page_size(found)
    block.kept = block.shared = block.preserved = True
    return True


def _attach_descriptor(block: RAMBlock, properties: dict[str, Any], fds: PreservedFds) -> None:
    block.stale = block.backend == "memory-backend-file" and not fds.incoming
    if block.backend == "memory-backend-file" and block.shared:
        block.fd = _open_file(block, properties)
        block.reopened = True
        return
    if _take_found(block, fds):
        return
    if block.backend == "memory-backend-file":
        block.fd = _open_file(block, properties)
    elif block.backend == "memory-backend-memfd":
        block.fd = _create_memfd(block, bool(properties.get("seal", True)))
    elif block.backend == "memory-backend-shm":
        block.fd = _create_shm(block)
    elif block.shared:
        block.fd = os.memfd_create(block.idstr)
        os.ftruncate(block.fd, block.size)
    if block.fd >= 0 and block.shared:
        fds.save(block.idstr, 0, block.fd)
        block.preserved = True


def _create_memfd(block: RAMBlock, seal: bool, name: str = "memory-backend-memfd") -> int:
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if seal else 0)
    if block.page_size != PAGE_SIZE:
        flags |= os.MFD_HUGETLB
        flags |= (block.page_size.bit_length() - 1) << os.MFD_HUGE_SHIFT
    try:
        fd = os.memfd_create(name, flags)
    except OSError as error:
        raise ConfigError(
            f"failed to create memfd of page size {block.page_size:#x} for '{block.idstr}': "
            f"{error.strerror}"
        ) from None
    try:
        os.ftruncate(fd, block.size)
        if seal:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except OSError as error:
        os.close(fd)
        raise _no_memory(block, error) from None
    return fd


def _create_shm(block: RAMBlock) -> int:
    """A POSIX shared memory object, nameless from the start as QEMU's is."""
    for number in range(1000):
        path = f"/dev/shm/qemu-{os.getpid()}-shm-{number}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"failed to create POSIX shared memory: {error}") from None
        os.unlink(path)
        os.ftruncate(fd, block.size)
        return fd
    raise ConfigError("failed to create POSIX shared memory: no free name in /dev/shm")


def _open_file(block: RAMBlock, properties: dict[str, Any]) -> int:
    path = str(properties.get("mem-path", ""))
    if os.path.isdir(path):
        path = os.path.join(path, f"qemu_back_mem.{block.idstr}.{os.getpid()}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(
            f"can't open backing store {path} for guest RAM: {error.strerror}"
        ) from None
    block.page_size = _page_size(fd)
    align = int(properties.get("align", 0))
    if align % block.page_size:
        os.close(fd)
        raise ConfigError(
            f"alignment {align:#x} must be multiples of page size {block.page_size:#x}"
        )
    current = os.fstat(fd).st_size
    if current == 0:
        os.ftruncate(fd, block.size)
    elif current < block.size:
        os.close(fd)
        raise _too_small(block, current)
    return fd


def page_sizes() -> list[int]:
    """The page sizes that memfds can have on this host, in bytes, ascending."""
    try:
        names = os.listdir(HUGEPAGES)
    except OSError:
        names = []
    prefix, suffix = "hugepages-", "kB"
    huge = [int(name.removeprefix(prefix).removesuffix(suffix)) << 10 for name in names]
    return [PAGE_SIZE, *sorted(huge)]


def _page_size(fd: int) -> int:
    """The page size of a file: that of hugetlbfs where it is in one."""
    size = os.fstatvfs(fd).f_bsize
    return size if size >= HUGE_ALIGNMENT else PAGE_SIZE


def _check_size(block: RAMBlock, fd: int) -> None:
    current = os.fstat(fd).st_size
    if current < block.size:
        raise _too_small(block, current)


def _too_small(block: RAMBlock, current: int) -> ConfigError:
    return ConfigError(
        f"{block.idstr} backing store size {current:#x} is too small for 'size' option "
        f"{block.size:#x} plus 'offset' option 0x0"
    )


def _map(block: RAMBlock, align: int) -> None:
    """Maps the block at an address of its page size, 2 MiB or `align`, whichever is largest."""
    alignment = max(align, block.page_size, HUGE_ALIGNMENT if block.size >= HUGE_ALIGNMENT else 0)
    block.alignment = alignment
    flags = lib.MAP_SHARED if block.shared else lib.MAP_PRIVATE
    if block.fd < 0:
        flags = lib.MAP_PRIVATE | lib.MAP_ANONYMOUS | lib.MAP_NORESERVE
    address = lib.cpr_map_aligned(block.fd, 0, block.max_length, alignment, flags)
    if address == ffi.cast("void *", -1):
        raise _no_memory(block, OSError(ffi.errno, os.strerror(ffi.errno)))
    block.host = int(ffi.cast("uintptr_t", address))


def _no_memory(block: RAMBlock, error: OSError) -> ConfigError:
    if block.page_size == PAGE_SIZE:
        return ConfigError(f"cannot set up guest memory '{block.idstr}': {error.strerror}")
    kib = block.page_size >> 10
    pool = f"{HUGEPAGES}/hugepages-{kib}kB"
    need = block.size // block.page_size
    return ConfigError(
        f"unable to map backing store for guest RAM: {error.strerror}; '{block.idstr}' needs "
        f"{need} pages of {kib} KiB and {_read_number(pool + '/free_hugepages')} are free: "
        f"echo {need} > {pool}/nr_hugepages"
    )


def _read_number(path: str) -> int:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return 0


def _advise(block: RAMBlock, properties: dict[str, Any]) -> None:
    """Applies merge= and dump=, which are hints: a kernel without them is no error."""
    address = ffi.cast("void *", block.host)
    if properties.get("merge"):
        lib.madvise(address, block.max_length, lib.MADV_MERGEABLE)
    if not properties.get("dump", True):
        lib.madvise(address, block.max_length, lib.MADV_DONTDUMP)


def populate(block: RAMBlock) -> None:
    """Populates the whole block writable, as prealloc=on asks for.

    Raises ConfigError where the host has not enough memory.
    """
    while populate_chunk(block):
        pass


def populate_chunk(block: RAMBlock) -> bool:
    """Populates the next chunk, of 2 MiB or one page; false where there is none.

    `block.populated` tells how far it is, in bytes; any thread may do this while the guest runs.
    Raises ConfigError where the host has not enough memory.
    """
    size = min(max(POPULATE_CHUNK, block.page_size), block.size - block.populated)
    if size <= 0:
        return False
    populate_range(block, block.populated, size)
    block.populated += size
    return True


def populate_range(block: RAMBlock, offset: int, size: int) -> None:
    """Populates so many bytes of the block, writable.  Raises ConfigError as `populate`."""
    address = ffi.cast("void *", block.host + offset)
    if lib.madvise(address, size, lib.MADV_POPULATE_WRITE) < 0:
        raise _no_memory(block, OSError(ffi.errno, os.strerror(ffi.errno)))


def touched(block: RAMBlock) -> Iterator[tuple[int, int]]:
    """The ranges [start, end) of a block that its file has memory for, in bytes."""
    if block.fd < 0:
        return
    end = 0
    while end < block.size:
        try:
            start = os.lseek(block.fd, block.offset + end, os.SEEK_DATA) - block.offset
            end = os.lseek(block.fd, block.offset + start, os.SEEK_HOLE) - block.offset
        except OSError:  # ENXIO: only a hole is left
            return
        if start < block.size:
            yield start, min(end, block.size)
