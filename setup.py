"""Hooks the cffi build of cpr._native into setuptools; everything else is in pyproject.toml."""

from setuptools import setup
from setuptools.command.build_ext import build_ext

REMEDY = """
cpr's C part could not be built. It needs a C compiler, Python's headers and the kernel's:
    sudo apt-get install gcc python3-dev linux-libc-dev
"""


class BuildExt(build_ext):
    """Says what to install when the build fails."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            raise SystemExit(f"{error}{REMEDY}") from error


setup(
    cffi_modules=["cpr/_native/build.py:cpr", "cpr/_native/build.py:tcg"],
    cmdclass={"build_ext": BuildExt},
)
