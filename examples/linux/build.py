"""Fetches Debian's kernel and busybox, and makes of them what examples/linux.cfg boots.

    python -m examples.linux.build [FOLDER]

FOLDER (examples/build/linux) gets

    bzImage       the kernel of the newest linux-image-6.1.0-*-cloud-amd64
    initrd.cpio   busybox, the kernel's drivers for virtio, and what is beside this file: `init`,
                  `power-button`, and `clockwatch.c`, which tells whether the clock goes back

The packages come from the host's own mirror by `apt-get download`, which needs no rights; nothing
is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from examples.linux.cpio import Archive

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "build" / "linux"
KERNEL, INITRD = "bzImage", "initrd.cpio"
METAPACKAGE = "linux-image-cloud-amd64"
BUSYBOX = "busybox-static"
DOWNLOAD_SECONDS = 600
POWER_BUTTON = "etc/acpi/PWRF"  # where busybox's acpid looks for what to do
FOLDERS = ("bin", "dev", "etc", "etc/acpi", POWER_BUTTON, "modules", "proc", "sys", "tmp")

# In the order in which they are loaded.
MODULES = (
    "drivers/input/evdev",
    "drivers/acpi/button",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/char/virtio_console",
    "drivers/char/hw_random/virtio-rng",
    "drivers/virtio/virtio_balloon",
)


class Unavailable(Exception):
    """A package cannot be had here; the text says which, and the remedy."""


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints.  Raises Unavailable with the end of what it said."""
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from None
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-2:])
        raise Unavailable(
            f"{' '.join(command)}: {last}; it needs Debian's apt with a mirror of Debian 12, and "
            "apt-get update"
        )
    return done.stdout


def kernel_package() -> str:
    """The package that has the newest kernel."""
    for line in run("apt-cache", "depends", METAPACKAGE).splitlines():
        word, _, name = line.strip().partition(": ")
        if word == "Depends" and name.startswith("linux-image-"):
            return name
    raise Unavailable(f"{METAPACKAGE} depends on no kernel; Debian 12 has it")


def unpack(package: str, folder: Path) -> Path:
    """Downloads a package; its files are in what this returns."""
    downloaded, unpacked = folder / package, folder / f"{package}.files"
    downloaded.mkdir()
    run("apt-get", "-qq", "-oAPT::Sandbox::User=", "download", package, cwd=downloaded)
    (archive,) = downloaded.glob("*.deb")
    run("dpkg-deb", "-x", str(archive), str(unpacked))
    return unpacked


def make_initrd(kernel: Path, busybox: Path, clockwatch: Path) -> bytes:
    """The first file system, of the two packages' files and of our own."""
    archive = Archive()
    for folder in FOLDERS:
        archive.folder(folder)
    archive.character_device("dev/console", 5, 1)
    archive.file("init", (HERE / "init").read_bytes(), 0o755)
    archive.file(f"{POWER_BUTTON}/00000080", (HERE / "power-button").read_bytes(), 0o755)
    archive.file("bin/clockwatch", clockwatch.read_bytes(), 0o755)
    program = busybox / "bin" / "busybox"
    archive.file("bin/busybox", program.read_bytes(), 0o755)
    for applet in run(str(program), "--list").split():
        if applet != "busybox":
            archive.link(f"bin/{applet}", "busybox")
    (tree,) = (kernel / "lib" / "modules").glob("*/kernel")
    present = [tree / f"{name}.ko" for name in MODULES]
    present = [path for path in present if path.exists()]
    for path in present:
        archive.file(f"modules/{path.name}", path.read_bytes())
    archive.file("modules/order", "".join(f"{path.name}\n" for path in present).encode())
    return archive.finish()


def build(folder: Path = FOLDER) -> Path:
    """Makes what is missing in `folder`, and returns it.  Raises Unavailable."""
    if (folder / KERNEL).exists() and (folder / INITRD).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        kernel, busybox = unpack(kernel_package(), work), unpack(BUSYBOX, work)
        (image,) = (kernel / "boot").glob("vmlinuz-*")
        clockwatch = work / "clockwatch"
        run("gcc", "-O2", "-static", "-o", str(clockwatch), str(HERE / "clockwatch.c"))
        (work / INITRD).write_bytes(make_initrd(kernel, busybox, clockwatch))
        os.replace(work / INITRD, folder / INITRD)
        os.replace(image, folder / KERNEL)
    return folder


if __name__ == "__main__":
    try:
        build(*(Path(word) for word in sys.argv[1:2]))
    except Unavailable as problem:
        sys.exit(f"cannot build the Linux guest: {problem}")
