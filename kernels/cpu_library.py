"""Loads the compiled CPU library with ctypes; :mod:`~ace_triton.kernels.cpu` calls its operations.

setup.py builds the library from ``kernels/cpu``. The library selects AVX-512, AVX2, NEON or portable code for the
processor; AVX-512 and NEON have one name with dot products of 8-bit integers and one without.
``ACE_TRITON_CPU_ISA=avx512_vnni|avx512|avx2|neon_dotprod|neon|portable`` forces one. Results do not depend on
the number of threads, nor on the instruction set, except those of :mod:`~ace_triton.kernels.expanded_linear`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .cpu_abi import HEADER, signatures, structures
from .cpu_sources import digest
from .errors import ArgumentError, BackendError

ISA_VARIABLE = "ACE_TRITON_CPU_ISA"
ISAS = ("avx512_vnni", "avx512", "avx2", "neon_dotprod", "neon", "portable")
"""Names of instruction sets, the fastest first."""

INPUT_BITS = (30, 8)
"""Bits to which products with quantized weights can round their inputs, the default first."""

# Values of AceFailure in cpu/abi.h for arguments out of range; 0 is success, any other value means out of memory.
_REFUSED_TERMS = {2: "row", 3: "col", 4: "scale", 5: "coupling"}
_REFUSED_GAINS = 6


def available() -> bool:
    """True if the compiled library was built and can be loaded."""
    return not isinstance(load(), str)


def why_unavailable() -> str:
    """Why :func:`available` is False, as part of a sentence; "" if it is True."""
    loaded = load()
    return loaded if isinstance(loaded, str) else ""


def isa() -> str:
    """The instruction set in use, one of :data:`ISAS`."""
    return library().ace_isa().decode()


def use_isa(name: str) -> None:
    """Use another instruction set from now on, one of :data:`ISAS`, in the whole process.

    Calls of the library that run in other threads keep the one they began with.

    Raises:
        ArgumentError: if the name is unknown, or if the processor does not support the instruction set.
        BackendError: if the compiled library is not available.
    """
    if library().ace_use_isa(name.encode()) != 0:
        raise ArgumentError(f"instruction set {name!r} must be one of {ISAS}, and supported by this processor")


def input_bits() -> int:
    """The bits to which products with quantized weights round their inputs, one of :data:`INPUT_BITS`."""
    return int(library().ace_input_bits())


def use_input_bits(bits: int) -> None:
    """Round the inputs of products with quantized weights to this many bits from now on, in the whole process.

    Products and decoding steps that run in other threads keep the bits they began with. Calls with so many rows that
    the weight is expanded or unpacked multiply inputs as they are.

    With 30 bits the products have about the precision of fp32. With 8 bits, every 32 inputs share a scale, from
    their largest magnitude: products are faster and less precise than with 30.

    Raises:
        ArgumentError: if ``bits`` is none of :data:`INPUT_BITS`.
        BackendError: if the compiled library is not available.
    """
    if type(bits) is not int or bits not in INPUT_BITS:
        raise ArgumentError(f"input bits must be {' or '.join(map(str, INPUT_BITS))}; got {bits!r}")
    library().ace_use_input_bits(bits)


@contextmanager
def exact_inputs() -> Iterator[None]:
    """A context in which inputs are rounded to the most bits of :data:`INPUT_BITS`, in the whole process."""
    usual = input_bits()
    use_input_bits(max(INPUT_BITS))
    try:
        yield
    finally:
        use_input_bits(usual)


@functools.cache
def load() -> ctypes.CDLL | str:
    """The loaded library, or the reason why it is not available.

    Raises:
        BackendError: if the library was built from other sources than those in ``kernels/cpu``.
        ArgumentError: if ``ACE_TRITON_CPU_ISA`` is not a supported instruction set.
    """
    here = Path(__file__).parent
    files = [here / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = next((file for file in files if file.exists()), None)
    if built is None:
        return "it was not built: no C++ compiler was found when ace_triton was installed"
    try:
        loaded, declared = ctypes.CDLL(str(built)), signatures(HEADER.read_text())
    except OSError as error:
        return f"it does not load: {error}"
    if (sources := digest()) and sources != _built_from(loaded):
        raise BackendError(
            f"{built.name} was built from other sources than those in {here / 'cpu'}: build it again "
            "(python setup.py build_ext --inplace --force, or pip install .)"
        )
    for name, signature in declared.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = signature
    forced = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if forced and loaded.ace_use_isa(forced.encode()) != 0:
        raise ArgumentError(f"{ISA_VARIABLE}={forced!r} must be one of {ISAS}, and supported by this processor")
    return loaded


def _built_from(loaded: ctypes.CDLL) -> str:
    """The digest of the sources that the library was built from; "" if an old library does not record it."""
    if not hasattr(loaded, "ace_sources"):
        return ""
    loaded.ace_sources.restype = ctypes.c_char_p
    return loaded.ace_sources().decode()


def library() -> ctypes.CDLL:
    """The loaded library; BackendError if it is not available."""
    loaded = load()
    if isinstance(loaded, str):
        raise BackendError(
            f"the compiled CPU library is not available ({loaded}): install a C++ compiler and reinstall ace_triton"
        )
    return loaded


@functools.cache
def structure(name: str) -> type[ctypes.Structure]:
    """A structure of the library's header, by name."""
    return structures(HEADER.read_text())[name]


def call(name: str, *arguments: object) -> None:
    """Call a function of the library by name.

    Raises:
        MemoryError: if there is not enough memory for the function's working buffers.
        ArgumentError: if score terms or gains are out of range; nothing was written.
        BackendError: if the library is not available.
    """
    code = getattr(library(), name)(*arguments)
    if code != 0:
        if code in _REFUSED_TERMS:
            raise ArgumentError(
                f"score term {_REFUSED_TERMS[code]!r} contains NaN, infinity or a negative number: all factors of a "
                "score must be finite and at least 0"
            )
        if code == _REFUSED_GAINS:
            raise ArgumentError("sums of these gains overflow float32: divide all gains by the same number first")
        raise MemoryError(f"{name} could not allocate its working buffers: out of memory")
