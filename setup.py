"""Metadata is in pyproject.toml; setuptools takes the hook that compiles the kernels from here only."""

from setuptools import setup

setup(cffi_modules=["mimir/kernels/build.py:ffibuilder"])
