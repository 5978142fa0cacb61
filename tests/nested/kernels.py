"""The two kernels that the VM boots, each fetched or built once into the cache.

`type1` is Debian's stock kernel, which has VFIO's groups and containers.  No kernel package of
Debian's has iommufd, so `iommufd` is built from Debian's source with iommufd-kernel.config.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .packages import BUILD_PROGRAMS, CACHE, Archive, Unavailable, install, run

STOCK_SUITE = "bookworm"  # its 6.1 has 9p as a module; cloud kernels have none
SOURCE_SUITE = "trixie-backports"
CONFIG = Path(__file__).with_name("iommufd-kernel.config")
MODULES = (
    *("vfio", "vfio_iommu_type1", "vfio-pci", "kvm-amd", "virtio_pci", "9pnet_virtio", "9p"),
    *("tun", "vhost-net"),
)
BUILD_SECONDS = 7200.0
PROGRESS_SECONDS = 60.0

Say = Callable[[str], None]


class Kernel:
    """A kernel image and the modules to load in their order (none where all is built in)."""

    def __init__(self, name: str, release: str, image: Path, modules: list[Path]) -> None:
        self.name = name
        self.release = release
        self.image = image
        self.modules = modules


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """One process at a time fills a part of the cache."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _module_files(folder: Path, release: str) -> list[Path]:
    """The module files for MODULES with what they depend on, in the order of loading."""
    shown = [
        run("modprobe", "-d", folder, "-S", release, "--show-depends", name) for name in MODULES
    ]
    lines = "\n".join(shown).splitlines()
    files = [Path(line.split()[1]) for line in lines if line.startswith("insmod ")]
    return list(dict.fromkeys(files))


def stock(say: Say) -> Kernel:
    """Debian's kernel, from the cache or downloaded.  Raises Unavailable."""
    folder = CACHE / "stock"
    with _locked("stock"):
        if not folder.exists():
            archive = Archive(STOCK_SUITE)
            say(f"looking for the kernel of {STOCK_SUITE}")
            archive.update()
            package = archive.dependency("linux-image-amd64", "linux-image-")
            say(f"downloading {package}")
            unfinished = CACHE / "stock.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            archive.unpack(package, unfinished)
            run("depmod", "-b", unfinished, package.removeprefix("linux-image-"))
            unfinished.rename(folder)
    (image,) = folder.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    return Kernel("type1", release, image, _module_files(folder, release))


def with_iommufd(say: Say) -> Kernel:
    """The kernel with iommufd, from the cache or built, which takes a dozen CPU minutes.

    Raises Unavailable.
    """
    digest = hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:12]
    folder = CACHE / f"iommufd-{digest}"
    with _locked("iommufd"):
        if not folder.exists():
            install({"gcc": "/usr/bin/gcc", "make": "/usr/bin/make", **BUILD_PROGRAMS})
            unfinished = CACHE / "iommufd.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            tree = _source(unfinished, say)
            _build(tree, unfinished, say)
            shutil.rmtree(tree)
            unfinished.rename(folder)
    release = (folder / "release").read_text()
    return Kernel("iommufd", release, folder / "bzImage", [])


def _source(folder: Path, say: Say) -> Path:
    """Downloads and unpacks the source; returns the folder of the tree."""
    archive = Archive(SOURCE_SUITE)
    say(f"looking for the kernel source of {SOURCE_SUITE}")
    archive.update()
    package = archive.dependency("linux-source", "linux-source-")
    say(f"downloading {package}")
    archive.unpack(package, folder / "package")
    (tarball,) = (folder / "package").glob("usr/src/linux-source-*.tar.xz")
    say(f"unpacking {tarball.name}")
    run("tar", "-xJf", tarball, "-C", folder)
    shutil.rmtree(folder / "package")
    return folder / tarball.name.removesuffix(".tar.xz")


def _build(tree: Path, folder: Path, say: Say) -> None:
    """Builds the image into `folder`; what make said is in build.log there."""
    jobs = f"-j{os.cpu_count()}"
    say(f"building {tree.name} ({jobs}); the log is {folder}/build.log")
    with open(folder / "build.log", "w") as log:
        for goal in ("allnoconfig", "bzImage"):
            command = ["nice", "make", "-s", jobs, f"KCONFIG_ALLCONFIG={CONFIG}", goal]
            with subprocess.Popen(
                command, cwd=tree, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ) as make:
                _watch(make, tree, say)
            if make.returncode:
                raise Unavailable(f"make {goal} failed; see {folder}/build.log")
    release = run("make", "-s", "kernelrelease", cwd=tree).strip()
    (folder / "release").write_text(release)
    shutil.copy(tree / "arch/x86/boot/bzImage", folder / "bzImage")


def _watch(make: subprocess.Popen[bytes], tree: Path, say: Say) -> None:
    """Waits for make's end and says now and then how far it is; ends it after BUILD_SECONDS."""
    started = time.monotonic()
    while True:
        try:
            make.wait(PROGRESS_SECONDS)
            return
        except subprocess.TimeoutExpired:
            seconds = time.monotonic() - started
            objects = sum(1 for _ in tree.rglob("*.o"))
            say(f"{objects} files compiled after {seconds / 60:.0f} minutes")
            if seconds > BUILD_SECONDS:
                make.terminate()


KERNELS: dict[str, Callable[[Say], Kernel]] = {"type1": stock, "iommufd": with_iommufd}
