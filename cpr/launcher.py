"""Where Python finds this package and cffi's runtime when it starts without its `site` module."""

from __future__ import annotations

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = f"{ROOT}/cpr/vmm/__main__.py"


def package_folders() -> list[str]:
    """The folders that `site` would add: this checkout, the virtual environment's, the system's."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    prefix = os.path.dirname(os.path.dirname(sys.executable))
    candidates = (
        ROOT,
        f"{prefix}/lib/{version}/site-packages",
        f"/usr/local/lib/{version}/dist-packages",
        "/usr/lib/python3/dist-packages",
    )
    return [folder for folder in candidates if os.path.exists(folder)]


def finds_packages() -> bool:
    """True where cffi's runtime is in one of these folders, and so found without `site` too."""
    runtime = sys.modules.get("_cffi_backend")
    folder = os.path.dirname(runtime.__file__ or "") if runtime is not None else ""
    return folder in package_folders()
