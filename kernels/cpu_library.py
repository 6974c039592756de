"""The compiled CPU library, loaded with ctypes; :mod:`~ace_triton.kernels.cpu` has its operations.

It is built from ``kernels/cpu`` by setup.py. It picks AVX-512, AVX2 or portable code by the processor;
``ACE_TRITON_CPU_ISA=avx512|avx2|portable`` forces one. Results do not depend on that, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

from .cpu_sources import digest
from .errors import ArgumentError, BackendError

ISA_VARIABLE = "ACE_TRITON_CPU_ISA"
ISAS = ("avx512", "avx2", "portable")

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double
_MATRIX = [_POINTER, _LONG, _LONG, _LONG, _INT]
_TERMS = [*[_POINTER] * 4, _INT, _INT]
_SELECTION = [*_MATRIX, *_TERMS, _INT, _POINTER]
_COLUMNS = [_POINTER, _DOUBLE, _POINTER, _POINTER, _INT]

# What a function returns instead of 0 where it refuses its arguments.
_REFUSED_TERMS = {2: "row", 3: "col", 4: "scale", 5: "coupling"}
_REFUSED_GAINS = 6

_SIGNATURES = {
    "ace_select_nm": [*_SELECTION, _INT, _INT, _INT, _INT],
    "ace_select_rows": [*_SELECTION, _LONG, _INT, _INT],
    "ace_weight_sums": [*_MATRIX, _POINTER, _POINTER, _INT, *_COLUMNS, _POINTER, _POINTER, _INT],
    "ace_column_scale": [_LONG, *_COLUMNS, _POINTER, _POINTER],
    "ace_variance_factor": [_POINTER, _LONG, _LONG, _INT, _FLOAT, _FLOAT, _POINTER, _INT],
    "ace_divergence": [*_MATRIX, *[_POINTER, _LONG] * 2, _POINTER, _INT],
    "ace_adamw": [*[_POINTER] * 3, _LONG, *[_POINTER, _INT] * 2, _POINTER, *[_FLOAT] * 5, _INT, _INT],
    "ace_token_norms": [*_MATRIX, _POINTER, _INT],
    "ace_all_finite": [*_MATRIX, _INT, _INT, _POINTER],
    "ace_moments": [_POINTER, *[_LONG] * 5, _INT, *[_POINTER] * 5, _INT],
    "ace_weighted_squares": [*_MATRIX, _POINTER, _LONG, _POINTER, _INT],
    "ace_join_gains": [_POINTER, _POINTER, *[_LONG] * 4, _POINTER, _INT],
    "ace_has_gram_product": [],
    "ace_gram_product": [_POINTER, *[_LONG] * 3, _POINTER, _INT],
    "ace_assign": [_POINTER, _LONG, _LONG, _POINTER, _INT],
    "ace_pack_nm": [*_MATRIX, *_TERMS, _POINTER, _POINTER, *[_INT] * 4, _POINTER],
    "ace_unpack_nm": [_POINTER, _POINTER, _LONG, _LONG, *[_INT] * 3, _POINTER, _INT],
    "ace_nm_linear": [*_MATRIX, _POINTER, _POINTER, _LONG, _INT, _INT, _INT, _POINTER, _POINTER, _INT],
    "ace_dense_linear": [*_MATRIX, _POINTER, _LONG, _LONG, _INT, _POINTER, _POINTER, _INT],
    "ace_use_isa": [ctypes.c_char_p],
    "ace_threads_for": [_LONG, _LONG, _INT],
    "ace_prefer_huge_pages": [_POINTER, _LONG],
}


def available() -> bool:
    """True where the compiled library was built and loads."""
    return not isinstance(load(), str)


def why_unavailable() -> str:
    """One phrase: why :func:`available` is False."""
    loaded = load()
    return loaded if isinstance(loaded, str) else ""


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "portable"."""
    return library().ace_isa().decode()


def use_isa(name: str) -> None:
    """Use another instruction set from now on.

    Raises:
        ValueError: there is none of that name, or this processor cannot run it.
    """
    if library().ace_use_isa(name.encode()) != 0:
        raise ArgumentError(f"instruction set {name!r} must be one of {ISAS} and one that this processor has")


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    here = Path(__file__).parent
    files = [here / f"_cpu{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = next((file for file in files if file.exists()), None)
    if built is None:
        return "it was not built: no C++ compiler was found when ace_triton was installed"
    try:
        loaded = ctypes.CDLL(str(built))
    except OSError as error:
        return f"it does not load: {error}"
    if (sources := digest()) and sources != _built_from(loaded):
        raise BackendError(
            f"{built.name} was built from other sources than lie in {here / 'cpu'}; build it again "
            "(python setup.py build_ext --inplace --force, or pip install .)"
        )
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, _INT
    loaded.ace_isa.restype = ctypes.c_char_p
    forced = os.environ.get(ISA_VARIABLE, "").strip().lower()
    if forced and loaded.ace_use_isa(forced.encode()) != 0:
        raise ArgumentError(f"{ISA_VARIABLE}={forced!r} must be one of {ISAS} and one that this processor has")
    return loaded


def _built_from(loaded: ctypes.CDLL) -> str:
    """The digest of its sources; "" of a library that is too old to tell."""
    if not hasattr(loaded, "ace_sources"):
        return ""
    loaded.ace_sources.restype = ctypes.c_char_p
    return loaded.ace_sources().decode()


def library() -> ctypes.CDLL:
    """The library; BackendError if it is not installed."""
    loaded = load()
    if isinstance(loaded, str):
        raise BackendError(f"the compiled CPU library is not available: {loaded}")
    return loaded


def call(name: str, *arguments: object) -> None:
    """Call one of its functions.

    Raises:
        MemoryError: memory ran out for its working buffers.
        ValueError: numbers that it refuses; nothing was written.
    """
    code = getattr(library(), name)(*arguments)
    if code != 0:
        if code in _REFUSED_TERMS:
            raise ArgumentError(
                f"score term {_REFUSED_TERMS[code]!r} holds NaN, infinity or a number below 0: a score is a product of "
                "finite factors, 0 or more"
            )
        if code == _REFUSED_GAINS:
            raise ArgumentError("sums of these gains leave the range of float32: divide all gains by one number first")
        raise MemoryError(f"{name} ran out of memory for its working buffers")
