"""Build script: ``kernels/`` installs as ``ace_triton.kernels``, with the CPU library if a C++ compiler is found."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path
from runpy import run_path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, PlatformError

NOT_BUILT = """
the compiled CPU library of ace_triton was not built: {error}
The installation continues without it. On a GPU nothing is lost; on a CPU everything runs in plain torch, which is many
times slower. To build it, install a C++17 compiler (g++ or clang++; on Debian: apt install g++), name it in CXX if it
is not the default one, and install ace_triton again.
"""

SOURCES = run_path("kernels/cpu_sources.py")
DIGEST = SOURCES["digest"]()

# A plain C library that kernels/cpu_library.py opens with ctypes; without it every operation runs in plain torch.
cpu_library = Extension(
    "ace_triton.kernels._cpu",
    sources=sorted(glob("kernels/cpu/*.cpp")),
    depends=sorted(glob("kernels/cpu/*.h")),
    define_macros=[("ACE_SOURCES", f'"{DIGEST}"')],
    extra_compile_args=SOURCES["COMPILE_ARGUMENTS"],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)


def side_by_side(compile_files: Any) -> Any:
    """The compiler's method of the same arguments, but with one process a source file."""

    def compile_all(sources: list[str], *args: Any, **options: Any) -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = pool.map(lambda source: compile_files([source], *args, **options), sources)
            return [path for paths in objects for path in paths]

    return compile_all


PRINT_SOURCES = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
library.ace_sources.restype = ctypes.c_char_p
print(library.ace_sources().decode())
"""


def sources_of(library: Path) -> str | None:
    """The digest that a built library returns, loaded in another process; None if it cannot be loaded."""
    run = [sys.executable, "-c", PRINT_SOURCES, str(library.absolute())]
    done = subprocess.run(run, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def built_library(name: str) -> Path | None:
    """The library that the environment variable ACE_TRITON_CPU_LIBRARY names, to install instead of compiling.

    Args:
        name: file name of a library for this Python and this machine.

    Raises:
        SystemExit: if the file does not exist, has another name, cannot be loaded or was built from other sources.
    """
    named = os.environ.get("ACE_TRITON_CPU_LIBRARY")
    if not named:
        return None
    path = Path(named)
    fault = None
    if not path.is_file():
        fault = "there is no such file"
    elif path.name != name:
        fault = f"this Python needs a library named {name}"
    elif (sources := sources_of(path)) is None:
        fault = "it cannot be loaded here: it is damaged, or was built for another machine"
    elif sources != DIGEST:
        fault = "it was built from other sources"
    if fault:
        raise SystemExit(f"ACE_TRITON_CPU_LIBRARY={named}: {fault}; unset the variable to compile the library")
    return path


class BuildLibrary(build_ext):
    """Builds the CPU library, or says what its absence means and how to get it; the rest installs all the same."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        built = built_library(target.name)
        if built is not None:
            if not (target.exists() and target.samefile(built)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(built, target)
            return
        try:
            if self.compiler.compiler_type == "msvc":
                raise PlatformError("Microsoft's compiler has no vector extensions; GCC or Clang is needed")
            self.compiler.compile = side_by_side(self.compiler.compile)
            super().build_extension(extension)
        except (CCompilerError, PlatformError) as error:
            self.warn(NOT_BUILT.format(error=error))
            raise


WINGS = [
    "commands",
    "decoders",
    "decoding",
    "dispatched",
    "exporters",
    "formats",
    "inputs",
    "kernels",
    "methods",
    "packed",
    "planning",
    "recovery",
    "reordering",
    "serving",
    "solvers",
    "statistics",
    "streaming",
    "structures",
    "study",
]

setup(
    packages=[
        "ace_triton",
        *(f"ace_triton.{wing}" for wing in WINGS),
    ],
    package_dir={"ace_triton": "ace_triton", "ace_triton.kernels": "kernels"},
    include_package_data=False,
    package_data={"ace_triton": ["py.typed"], "ace_triton.kernels": ["cpu/abi.h"], "ace_triton.study": ["*.j2"]},
    ext_modules=[cpu_library],
    cmdclass={"build_ext": BuildLibrary},
)
