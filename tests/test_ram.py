"""cpr.ram: backends, what of them outlives an exec, and the guest-physical map."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from descriptors import open_fds

from cpr import memory as guest_memory
from cpr import ram, ram_backend
from cpr.constants import MIB
from cpr.errors import ConfigError
from cpr.state.fds import PreservedFds


def backend(kind: str, **properties: object) -> SimpleNamespace:
    properties.setdefault("size", 4 * MIB)
    return SimpleNamespace(id="ram0", qom_type=f"memory-backend-{kind}", properties=properties)


def create(kind: str, fds: PreservedFds | None = None, **properties: object) -> ram.RAMBlock:
    names = {name.replace("_", "-"): value for name, value in properties.items()}
    return ram_backend.create_backend_block(backend(kind, **names), fds or PreservedFds())


@pytest.mark.parametrize(
    ("kind", "properties", "link", "seals"),
    [
        ("memfd", {}, "/memfd:memory-backend-memfd", 7),
        ("memfd", {"seal": False}, "/memfd:memory-backend-memfd", 1),
        ("ram", {"share": True}, "/memfd:ram0", 1),
        ("shm", {}, "/dev/shm/qemu-PID-shm-", 1),
    ],
)
def test_shared_backends_are_preserved(kind, properties, link, seals):
    fds = PreservedFds()
    block = create(kind, fds, **properties)
    assert fds.find("ram0", 0) == block.fd
    assert block.cpr_blocker() is None
    link = link.replace("PID", str(os.getpid()))
    assert os.readlink(f"/proc/self/fd/{block.fd}").startswith(link)
    assert fcntl.fcntl(block.fd, fcntl.F_GET_SEALS) == seals
    assert not os.get_inheritable(block.fd)
    assert os.fstat(block.fd).st_size == block.size
    block.close()


@pytest.mark.parametrize(("kind", "share"), [("ram", False), ("memfd", False)])
def test_private_backends_are_refused_for_an_update(kind, share):
    fds = PreservedFds()
    block = create(kind, fds, share=share)
    assert fds.entries() == []
    assert block.cpr_blocker() == (
        "Memory region ram0 is not compatible with CPR. share=on is required for memory-backend "
        "objects, and aux-ram-share=on is required."
    )
    block.close()


def test_file_backend_is_reopened_by_its_path(tmp_path):
    fds = PreservedFds()
    path = tmp_path / "ram"
    block = create("file", fds, mem_path=str(path), share=True)
    block.write(0, b"guest")
    assert fds.entries() == []
    assert block.cpr_blocker() is None
    block.close()
    again = create("file", fds, mem_path=str(path), share=True)
    assert again.view(0, 5) == b"guest"
    again.close()


def test_the_descriptor_is_found_again_with_its_content():
    fds = PreservedFds()
    first = create("memfd", fds)
    first.write(MIB, b"data")
    fd = os.dup(first.fd)
    first.close()
    fds.delete("ram0", 0)
    fds.save("ram0", 0, fd)
    second = create("memfd", fds)
    assert second.fd == fd
    assert second.view(MIB, 4) == b"data"
    second.close()


def test_a_found_descriptor_that_is_too_small_is_refused():
    fds = PreservedFds()
    fd = os.memfd_create("small")
    os.ftruncate(fd, MIB)
    fds.save("ram0", 0, fd)
    with pytest.raises(ConfigError) as refused:
        create("memfd", fds)
    assert str(refused.value) == (
        "ram0 backing store size 0x100000 is too small for 'size' option 0x400000 plus 'offset' "
        "option 0x0"
    )
    os.close(fd)


@pytest.mark.parametrize(
    ("kind", "properties", "text"),
    [
        ("shm", {"share": False}, "can't create shm backend with `share=off`"),
        ("memfd", {"size": 0}, "property 'size' of memory-backend-memfd doesn't take value '0'"),
        (
            "memfd",
            {"hugetlb": True, "hugetlbsize": 3 * MIB},
            "Hugepage size must be a power of 2",
        ),
        (
            "file",
            {"mem_path": "/nonexistent/x"},
            "can't open backing store /nonexistent/x for guest RAM: No such file or directory",
        ),
        ("ram", {"size": 1 << 57}, "cannot set up guest memory 'ram0': Cannot allocate memory"),
    ],
)
def test_bad_backends(kind, properties, text):
    before = set(open_fds())
    with pytest.raises(ConfigError) as refused:
        create(kind, **properties)
    assert str(refused.value) == text
    assert set(open_fds()) == before


def test_bad_files(tmp_path):
    """A device or a FIFO, and a size that no file has: nothing is left behind."""
    pipe, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(pipe)
    before = set(open_fds())
    for path in (pipe, "/dev/null"):
        with pytest.raises(ConfigError, match=f"{path} for guest RAM: it is no regular file"):
            create("file", mem_path=str(path), share=True)
    with pytest.raises(ConfigError, match="cannot set up guest memory 'ram0': "):
        create("file", mem_path=str(file), share=True, size=1 << 62)
    assert not file.exists()
    assert set(open_fds()) == before


def test_hugetlb_without_pages_says_how_many_are_needed():
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    free = int(pool.read_text()) if pool.exists() else 0
    if free:
        pytest.skip(f"{free} huge pages are free: the allocation would succeed")
    with pytest.raises(ConfigError) as refused:
        create("memfd", hugetlb=True, hugetlbsize=2 * MIB)
    text = str(refused.value)
    assert text.startswith("unable to map backing store for guest RAM: Cannot allocate memory")
    assert "'ram0' needs 2 pages of 2048 KiB and 0 are free: echo 2 >" in text


def test_mapping_is_aligned_for_huge_pages():
    block = create("memfd", size=16 * MIB)
    assert block.host % (2 * MIB) == 0
    block.close()


def test_populate_maps_every_page():
    block = create("memfd", prealloc=True)
    assert block.prealloc
    ram.populate(block)
    assert block.populated == block.size
    assert os.fstat(block.fd).st_blocks * 512 == block.size
    block.close()


def test_aux_block_is_shared_only_where_asked():
    fds = PreservedFds()
    private = ram_backend.create_aux_block("pc.rom", MIB, False, fds)
    assert private.fd == -1
    assert private.cpr_blocker() is None
    shared = ram_backend.create_aux_block("pc.bios", MIB, True, fds)
    assert fds.find("pc.bios", 0) == shared.fd
    private.close()
    shared.close()


def test_ram_addr_offsets_are_qemus():
    memory = guest_memory.GuestMemory()
    fds = PreservedFds()
    sizes = (("a", 16 * MIB), ("pc.bios", 256 << 10), ("pc.rom", 128 << 10), ("tables", 2 * MIB))
    blocks = [memory.add_block(ram_backend.create_aux_block(n, s, False, fds)) for n, s in sizes]
    assert [block.offset for block in blocks] == [0, 0x1000000, 0x1040000, 0x1080000]
    memory.close()


def test_reads_and_writes_across_sections_and_holes():
    memory = guest_memory.GuestMemory()
    block = memory.add_block(ram_backend.create_default_block("pc.ram", 2 * MIB, PreservedFds()))
    memory.add_section(0, 0x1000, block, 0, False, "low")
    memory.add_section(0x2000, 0x1000, block, 0x1000, False, "high")
    memory.write(0xFFE, b"abcd")
    assert memory.read(0xFFE, 4) == b"ab\xff\xff"
    memory.write(0x1FFE, b"wxyz")
    assert memory.read(0x2000, 2) == b"yz"
    assert block.view(0x1000, 2) == b"yz"
    assert memory.find(0x1800) is None
    memory.close()
