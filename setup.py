"""Build script: ``kernels/`` installs as ``ace_triton.kernels``, with the CPU library where a C++ compiler is found."""

from glob import glob
from runpy import run_path

from setuptools import Extension, setup

# A plain C library that kernels/cpu_library.py opens with ctypes; without it every operation runs in plain torch.
cpu_library = Extension(
    "ace_triton.kernels._cpu",
    sources=sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    define_macros=[("ACE_SOURCES", f'"{run_path("kernels/cpu_sources.py")["digest"]()}"')],
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-g0",
    ],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(
    packages=["ace_triton", "ace_triton.commands", "ace_triton.kernels", "ace_triton.study"],
    package_dir={"ace_triton": "ace_triton", "ace_triton.kernels": "kernels"},
    include_package_data=False,
    package_data={"ace_triton": ["py.typed"], "ace_triton.study": ["*.j2"]},
    ext_modules=[cpu_library],
)
