"""Debian packages for the VM: programs installed where we may, archives unpacked in a cache.

Archives come from the mirror that this host's own apt is configured with, through apt itself,
with lists and cache in a folder of their own: the host's configuration stays as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cpr"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DOWNLOAD_SECONDS = 900.0

# What of each package is looked for, to know whether it is there.
PROGRAMS = {
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
    "busybox-static": "/bin/busybox",
    "cpio": "/usr/bin/cpio",
    "kmod": "/sbin/modprobe",
}
BUILD_PROGRAMS = {
    "flex": "/usr/bin/flex",
    "bison": "/usr/bin/bison",
    "bc": "/usr/bin/bc",
    "xz-utils": "/usr/bin/xz",
    "libelf-dev": "/usr/include/libelf.h",
}


class Unavailable(Exception):
    """Something that the VM needs is not to be found here; the text says what and the remedy."""


def run(*command: str | Path, cwd: Path | None = None, seconds: float = DOWNLOAD_SECONDS) -> str:
    """Runs a command and returns its output.

    Raises Unavailable with the command and the last lines of what it said.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{name}: {error}") from error
    if done.returncode:
        last = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        words = " ".join(str(word) for word in command[1:] if not str(word).startswith("-o"))
        raise Unavailable(f"{name} {words[:80]}: {last}")
    return done.stdout


def install(programs: dict[str, str]) -> None:
    """Installs those of `programs` (package: a file of it) that are missing.

    Raises Unavailable where this user may not, naming the command to run.
    """
    missing = [package for package, file in programs.items() if not Path(file).exists()]
    if not missing:
        return
    remedy = f"missing: {' '.join(missing)}; install with: sudo apt-get install {' '.join(missing)}"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Unavailable(remedy)
    try:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing)
    except Unavailable as error:
        raise Unavailable(f"{remedy} ({error})") from error


def mirror() -> str:
    """The address of the Debian mirror in this host's apt configuration.

    Raises Unavailable on a host that is not Debian's.
    """
    if shutil.which("apt-get") is None:
        raise Unavailable("no apt-get: the kernels of the VM are Debian's packages")
    filters = ("Origin: Debian", "Label: Debian", "Created-By: Packages")
    listed = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *filters).split()
    if not listed:  # as long as no `apt-get update` has run, no list has an origin
        if os.geteuid() == 0:
            run("apt-get", "update", "-qq")
        listed = run("apt-get", "indextargets", "--format", "$(REPO_URI)", *filters).split()
    if not listed:
        raise Unavailable("no Debian mirror in this host's apt configuration; add one")
    return listed[0]


class Archive:
    """One suite of Debian, with apt's lists and cache in a folder of their own."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.folder = CACHE / "apt" / suite

    def _apt(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        own = {
            "Dir::Etc::sourcelist": f"{self.folder}/sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State": f"{self.folder}/state",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": f"{self.folder}/cache",
            "APT::Sandbox::User": "",
            "APT::Update::Post-Invoke-Success": "",
            "APT::Update::Error-Mode": "any",  # a mirror that does not answer is an error
        }
        options = [f"-o{name}={value}" for name, value in own.items()]
        return run(program, *options, *arguments, cwd=cwd)

    def update(self) -> None:
        """Reads the suite's list of packages.  Raises Unavailable."""
        for part in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        signed = f"[signed-by={KEYRING}] " if Path(KEYRING).exists() else ""
        source = f"deb {signed}{mirror()} {self.suite} main\n"
        (self.folder / "sources.list").write_text(source)
        self._apt("apt-get", "update", "-qq")

    def dependency(self, package: str, prefix: str) -> str:
        """The package with `prefix` that the metapackage `package` stands for."""
        for line in self._apt("apt-cache", "depends", package).splitlines():
            word, _, name = line.strip().partition(": ")
            if word == "Depends" and name.startswith(prefix):
                return name
        raise Unavailable(f"{self.suite} has no {package} that depends on {prefix}*")

    def unpack(self, package: str, folder: Path) -> None:
        """Downloads `package` and unpacks it under `folder`; nothing of it is installed."""
        downloads = self.folder / "downloads" / package
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir(parents=True)
        self._apt("apt-get", "download", "-qq", package, cwd=downloads)
        (archive,) = downloads.glob("*.deb")
        run("dpkg-deb", "-x", archive, folder)
        shutil.rmtree(downloads)
