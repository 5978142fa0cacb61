"""Memory backends: how a RAMBlock is made, or taken over from an older image.

Shared blocks are kept across an exec: their descriptor is found in the PreservedFds by the block's
idstr instead of made anew, and is saved there for the next exec.  What is found is mapped shared
and in the page size that it has, whatever the options say: a block that was private before may come
over in a copy, and goes over the next exec as it is.  Descriptors are close-on-exec; only cpr-exec
clears that.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress

from cpr._native._cpr import ffi, lib
from cpr.constants import PAGE_SIZE
from cpr.errors import ConfigError, CprError
from cpr.ram import HUGEPAGES, RAMBlock, no_memory
from cpr.uapi import file_lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from cpr.config import ObjectConfig
    from cpr.state.fds import PreservedFds

HUGE_ALIGNMENT = 2 << 20  # so that the kernel can use transparent huge pages
DEFAULT_HUGEPAGE = 2 << 20
LOCK_POLL = 0.0005  # s
NO_LOCK = 'Failed to get "write" lock'
"""What QEMU says where another process has what the guest needs."""

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


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
    folder = os.path.isdir(str(properties.get("mem-path", "")))
    if block.backend == "memory-backend-file" and block.shared and not folder:
        block.path = str(properties.get("mem-path", ""))
        found = fds.take_file(block.idstr, 0)
        if found is not None:
            _check_size(block, found)
            block.fd, block.page_size = found, _page_size(found)
        else:
            block.fd = _open_file(block, properties, create=not fds.incoming)
            block.fresh = _is_empty(block.fd)
        fds.save_file(block.idstr, 0, block.fd)
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


def claim(blocks: Iterable[RAMBlock], wait_ns: int = 0) -> None:
    """The guest of this VMM is in the files of the blocks from now on; `give_up` is the inverse.

    Raises ConfigError where another VMM, or a guard, has one in there, and has it still after
    `wait_ns`; then nothing is locked.  A file system without locks has none.
    """
    files = [block for block in blocks if block.reopened]
    deadline = time.monotonic_ns() + wait_ns
    while True:
        hold(files)
        names = ", ".join(block.idstr for block in files if _is_anothers(block))
        if not names:
            return
        give_up(files)
        if time.monotonic_ns() >= deadline:
            raise ConfigError(f"{NO_LOCK}: another VMM has a guest in the file of {names}")
        time.sleep(LOCK_POLL)


def hold(blocks: Iterable[RAMBlock]) -> None:
    """As `claim`, where who else has the guest is an older image of this VMM, which ends."""
    for block in blocks:
        if block.reopened:
            with suppress(OSError):
                file_lock.share(block.fd, file_lock.GUEST)


def give_up(blocks: Iterable[RAMBlock]) -> None:
    """Another VMM may have the guest."""
    for block in blocks:
        if block.reopened:
            with suppress(OSError):
                file_lock.unlock(block.fd, file_lock.GUEST)


def _is_anothers(block: RAMBlock) -> bool:
    try:
        return file_lock.is_locked(block.fd, file_lock.GUEST)
    except OSError:  # a file system without locks
        return False


def overwrites(files: Iterable[tuple[str, int]], path: str, where: str | int | None = None) -> str:
    """Why `path` is not to be written to: it is one of `files` (Machine.files); "" where not.

    `where` is what the path stands for, if that is not a file's: a descriptor.

    It is not opened for that: with any descriptor that is closed go the locks that this process has
    on the file (fcntl(2)).
    """
    try:
        found = os.stat(path if where is None else where)
    except (OSError, ValueError):
        return ""  # it is told where it is opened
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
        return ""  # it keeps nothing
    for what, fd in files:
        if os.path.samestat(os.fstat(fd), found):
            return f"'{path}' is {what} of this guest: name another file"
    return ""


def lost_files(blocks: Iterable[RAMBlock]) -> list[str]:
    """Which blocks' files another VMM would not find by their paths, and what to do about it."""
    return [
        f"the file of RAM block '{block.idstr}' is not at {block.path} any more: put it back "
        f"there, from /proc/{os.getpid()}/fd/{block.fd}"
        for block in blocks
        if block.reopened and not _is_at(block.fd, block.path)
    ]


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except PermissionError:  # the other VMM may see it
        return True
    except OSError:
        return False


def _is_empty(fd: int) -> bool:
    """Whether nothing was ever written to a file; false where the file system does not tell."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


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
        raise no_memory(block, error) from None
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
        _resize(block, fd)
        return fd
    raise ConfigError("failed to create POSIX shared memory: no free name in /dev/shm")


def _resize(block: RAMBlock, fd: int) -> None:
    """Makes an empty file as large as the block.  Raises ConfigError; then `fd` is closed."""
    try:
        os.ftruncate(fd, block.size)
    except OSError as error:
        os.close(fd)
        raise no_memory(block, error) from None


def _open_file(block: RAMBlock, properties: dict[str, Any], create: bool = True) -> int:
    """`create`: a file that is not there is made, and one that is empty grows."""
    path = str(properties.get("mem-path", ""))
    folder = os.path.isdir(path)
    if folder:
        path = os.path.join(path, f"qemu_back_mem.{block.idstr}.{os.getpid()}")
    try:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | (os.O_CREAT if create else 0)
        fd = os.open(path, flags, 0o644)
        if folder:  # nobody else finds it
            os.unlink(path)
    except OSError as error:
        raise ConfigError(
            f"can't open backing store {path} for guest RAM: {error.strerror}"
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(f"can't open backing store {path} for guest RAM: it is no regular file")
    block.page_size = _page_size(fd)
    align = int(properties.get("align", 0))
    if align % block.page_size:
        os.close(fd)
        raise ConfigError(
            f"alignment {align:#x} must be multiples of page size {block.page_size:#x}"
        )
    current = os.fstat(fd).st_size
    if current == 0 and create:
        try:
            _resize(block, fd)
        except CprError:
            if not folder:
                os.unlink(path)
            raise
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
        raise no_memory(block, OSError(ffi.errno, os.strerror(ffi.errno)))
    block.host = int(ffi.cast("uintptr_t", address))


def _advise(block: RAMBlock, properties: dict[str, Any]) -> None:
    """Applies merge= and dump=, which are hints: a kernel without them is no error."""
    address = ffi.cast("void *", block.host)
    if properties.get("merge"):
        lib.madvise(address, block.max_length, lib.MADV_MERGEABLE)
    if not properties.get("dump", True):
        lib.madvise(address, block.max_length, lib.MADV_DONTDUMP)
