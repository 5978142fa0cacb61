"""Hooks the cffi build of cpr._native into setuptools; everything else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["cpr/_native/build.py:ffibuilder"])
