"""Runs the tests of cpr.live, or a module, on several Pythons: `make test-pythons`.

    python -m tests.pythons [--needs PACKAGE]... [--module NAME] VERSION... [-- ARGUMENT...]

The arguments are pytest's, or the module's.  VERSION is one such as 3.14, or the path of a program:
what uv finds, pyenv's too, else what uv can download, else Debian's.  The exit status is 1 where
something has failed, or where a version could not be had.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from . import debian

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = ("tests/test_live_*.py", "tests/test_guard*.py")
VENVS = ROOT / ".venv"
UV = Path(sys.executable).with_name("uv")


def find(version: str) -> Path:
    """The interpreter of a version.  Raises LookupError naming why there is none."""
    if "/" in version:
        return Path(version)
    if found := _ask_uv(version) or (_download_with_uv(version) and _ask_uv(version)):
        return Path(found)
    try:
        return debian.fetch(version, VENVS / f"debian-{version}")
    except (LookupError, OSError, subprocess.SubprocessError) as error:
        raise LookupError(f"uv has no Python {version}, and Debian neither: {error}") from None


def _ask_uv(version: str) -> str:
    words = (str(UV), "python", "find", "--system", "--no-python-downloads", version)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    folders = [str(path) for path in sorted(pyenv.glob(f"versions/{version}.*/bin"))]
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])
    result = subprocess.run(
        words, env={**os.environ, "PATH": path}, cwd="/", capture_output=True, text=True
    )
    return result.stdout.strip() if result.returncode == 0 else ""


def _download_with_uv(version: str) -> bool:
    words = (str(UV), "python", "install", "-q", "--no-bin", version)
    variables = {**os.environ, "UV_HTTP_RETRIES": "0"}
    return subprocess.run(words, env=variables, capture_output=True).returncode == 0


def run(version: str, needs: list[str], module: str, arguments: list[str]) -> bool:
    """Whether there is this Python and all tests pass on it."""
    try:
        interpreter = find(version)
    except LookupError as error:
        print(f"Python {version}: {error}", flush=True)
        return False
    venv = VENVS / f"python-{version.replace('/', '_')}"
    python = str(venv / "bin/python")
    make = [str(UV), "venv", "-q", "--allow-existing", "--seed", "--python", str(interpreter)]
    subprocess.run([*make, str(venv)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *needs], check=True)
    told = subprocess.run([python, "-VV"], check=True, capture_output=True, text=True).stdout
    print(f"{told.strip()}, {interpreter}", flush=True)
    words = [module]
    if not module:
        files = [str(path.relative_to(ROOT)) for each in TESTS for path in sorted(ROOT.glob(each))]
        words = ["pytest", "-q", "-p", "no:cacheprovider", *files]
    return subprocess.run([python, "-m", *words, *arguments], cwd=ROOT).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.pythons", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--needs", action="append", default=[], metavar="PACKAGE")
    parser.add_argument("--module", default="", metavar="NAME")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    options, arguments = parser.parse_args(words[:at]), words[at + 1 :]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "uv"], check=True)
    failed = [
        each for each in options.versions if not run(each, options.needs, options.module, arguments)
    ]
    if failed:
        print(f"not passed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
