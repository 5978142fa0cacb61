"""The first file system of the VM: busybox, the kernel's modules, and an init that runs pytest.

Python is the host's own: its root is shared with the VM read-only by 9p, and the tests run in a
chroot to it, with the checkout and its virtual environment under the paths they have outside.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

from .kernels import Kernel

BUSYBOX = "/bin/busybox"
APPLETS = ("sh", "mount", "mkdir", "insmod", "chroot", "cat", "poweroff", "ip", "stty", "sleep")
MOUNT_TAG = "host"
RESULTS = "/dev/ttyS1"  # one JSON object a line; the kernel's console is ttyS0

_INIT = """\
#!/bin/sh
mkdir -p /proc /sys /dev /host /opened
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
stty -F {results} raw -echo
echo '{{"event": "init"}}' >{results}
{insmod}
mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=loose,ro {tag} /host \\
    || {{ echo '{{"event": "failed", "text": "no 9p share"}}' >{results}; poweroff -f; }}
{opened}
mount -t proc proc /host/proc
mount -t sysfs sysfs /host/sys
mount -t devtmpfs devtmpfs /host/dev
mkdir -p /host/dev/shm /host/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /host/dev/shm
mount -t devpts devpts /host/dev/pts
ip link set lo up
cd /
chroot /host /usr/bin/env -i {environment} /bin/sh -c {command}
echo "{{\\"event\\": \\"exit\\", \\"status\\": $?}}" >{results}
poweroff -f
"""


def _opened_folders(needed: list[Path]) -> str:
    """Shell lines that let every user reach `needed` where a folder above is its owner's alone."""
    lines = []
    closed: list[Path] = []
    for number, path in enumerate(dict.fromkeys(needed)):
        above = [folder for folder in reversed(path.parents) if not folder.stat().st_mode & 0o001]
        if not above:
            continue
        kept = f"/opened/{number}"
        lines.append(f"mkdir -p {kept}; mount --bind {shlex.quote(f'/host{path}')} {kept}")
        closed.append(above[0])
    for folder in dict.fromkeys(closed):
        lines.append(f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(f'/host{folder}')}")
    for number, path in enumerate(dict.fromkeys(needed)):
        if any(folder in path.parents for folder in closed):
            inside = shlex.quote(f"/host{path}")
            lines.append(f"mkdir -p {inside}; mount --bind /opened/{number} {inside}")
    return "\n".join(lines)


def init_script(
    kernel: Kernel,
    command: list[str],
    folder: Path,
    environment: dict[str, str],
    needed: list[Path],
) -> str:
    """The text of /init: `command` runs in `folder` of the host's tree, then the VM ends."""
    words = " ".join(shlex.quote(word) for word in command)
    return _INIT.format(
        results=RESULTS,
        tag=MOUNT_TAG,
        insmod="\n".join(f"insmod /modules/{file.name}" for file in kernel.modules),
        opened=_opened_folders(needed),
        environment=" ".join(shlex.quote(f"{name}={value}") for name, value in environment.items()),
        command=shlex.quote(f"cd {shlex.quote(str(folder))} && exec {words}"),
    )


def build(kernel: Kernel, init: str, folder: Path) -> Path:
    """Writes folder/initramfs.cpio; uncompressed, since the emulated CPU is slow."""
    tree = folder / "tree"
    for part in ("bin", "modules"):
        (tree / part).mkdir(parents=True)
    tree.chmod(0o755)  # other users reach the chroot through it
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    for applet in APPLETS:
        (tree / "bin" / applet).symlink_to("busybox")
    for module in kernel.modules:
        shutil.copy(module, tree / "modules")
    (tree / "init").write_text(init)
    (tree / "init").chmod(0o755)
    archive = folder / "initramfs.cpio"
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    with open(archive, "wb") as output:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "-R", "0:0", "--quiet"],
            cwd=tree,
            input=f".\n{names}\n".encode(),
            stdout=output,
            check=True,
        )
    shutil.rmtree(tree)
    return archive
