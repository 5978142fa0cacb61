"""Where Python finds this package and cffi's runtime when it starts without its `site` module.

`os` is not imported here: it is a fifth of Python's start.
"""

from __future__ import annotations

import posix
import sys

ROOT = posix.getcwd() if "/" not in __file__ else __file__.rpartition("/")[0].rpartition("/")[0]
SCRIPT = f"{ROOT}/cpr/vmm/__main__.py"


def package_folders() -> list[str]:
    """The folders that `site` would add: this checkout, the virtual environment's, the system's."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefix = sys.executable.rpartition("/")[0].rpartition("/")[0]
    candidates = (
        ROOT,
        f"{prefix}/lib/{version}/site-packages",
        f"/usr/local/lib/{version}/dist-packages",
        "/usr/lib/python3/dist-packages",
    )
    return [folder for folder in candidates if _exists(folder)]


def _exists(path: str) -> bool:
    try:
        posix.stat(path)
    except OSError:
        return False
    return True


def finds_packages() -> bool:
    """True where cffi's runtime is in one of these folders, and so found without `site` too."""
    runtime = sys.modules.get("_cffi_backend")
    folder = (runtime.__file__ or "").rpartition("/")[0] if runtime is not None else ""
    return folder in package_folders()
