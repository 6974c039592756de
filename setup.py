"""Build script: ``kernels/`` installs as ``ace_triton.kernels``."""

from setuptools import setup

setup(
    packages=["ace_triton", "ace_triton.kernels"],
    package_dir={"ace_triton": "ace_triton", "ace_triton.kernels": "kernels"},
)
