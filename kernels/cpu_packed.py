"""Calls into the compiled CPU library for packed weights: packing, unpacking and their products, one function each.

As for :mod:`~ace_triton.kernels.cpu`, only the launchers call these functions.
"""

from __future__ import annotations

import ctypes

import torch

from .cpu import factors
from .cpu_library import call, library
from .errors import ArgumentError
from .memory import ELEMENTS, Region, address, contiguous, matrix, new
from .packed_dense import PackedDense
from .packed_nm import PackedNM
from .packed_rows import PackedRows
from .score_terms import ScoreTerms

_FLOAT, _INT, _LONG = torch.float32, torch.int32, torch.int64


def pack_nm(weight: torch.Tensor, terms: ScoreTerms | None, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """CPU body of :func:`~ace_triton.kernels.pack_nm.pack_nm` and ``pack_scored``.

    Returns:
        Values, metadata, and whether no group had more than n non-zeros, so that none was lost.
    """
    _owner, source = matrix(weight, "weight")
    rows, cols = weight.shape
    values, values_at = new((rows, cols // m * n), weight.dtype)
    meta, meta_at = new((rows, (cols + 31) // 32), _INT)
    whole = ctypes.c_int32()
    call(
        "ace_pack_nm",
        *(*source, *factors(terms, rows, cols)),
        *(values_at, meta_at, int(terms is not None), n, m, torch.get_num_threads(), ctypes.byref(whole)),
    )
    return values, meta, bool(whole.value)


def _packed(packed: PackedNM) -> tuple[int, int]:
    """The addresses of values and metadata; ArgumentError if they do not fit the pattern and the shape."""
    (rows, cols), n, m, values = packed.shape, packed.n, packed.m, packed.values
    packed.check_pattern()
    try:
        values_at = address(values, values.dtype, (rows, cols // m * n), "values")
        return values_at, address(packed.meta, _INT, (rows, (cols + 31) // 32), "meta")
    except ValueError:
        packed.check_tensors()
        raise


def unpack_nm(packed: PackedNM, into: torch.Tensor | None) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.unpack_nm.unpack_nm`."""
    dtype = packed.values.dtype
    source = *_packed(packed), *packed.shape, packed.n, packed.m, packed.values.element_size()
    if into is None:
        into, place = new(packed.shape, dtype)
    else:
        place = address(into, dtype, packed.shape, "into")
    call("ace_unpack_nm", *source, place, torch.get_num_threads())
    return into


def pack_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CPU body of :func:`~ace_triton.kernels.pack_rows.pack_rows`; returns values, metadata and row starts."""
    _owner, source = matrix(weight, "weight")
    rows, cols = weight.shape
    meta, meta_at = new((rows, (cols + 31) // 32), _INT)
    starts, starts_at = new((rows + 1,), _LONG)
    call("ace_kept_bits", *source, meta_at, starts_at, torch.get_num_threads())
    values, values_at = new((int(starts[-1]),), weight.dtype)
    call("ace_pack_rows", *source, meta_at, starts_at, values_at, torch.get_num_threads())
    return values, meta, starts


def _packed_rows(packed: PackedRows) -> tuple[int, int, int, int]:
    """The address and number of values, and the addresses of metadata and row starts; ArgumentError if they do not fit
    the shape."""
    (rows, cols), values = packed.shape, packed.values
    try:
        return (
            address(values, values.dtype, (values.numel(),), "values"),
            values.numel(),
            address(packed.meta, _INT, (rows, (cols + 31) // 32), "meta"),
            address(packed.starts, _LONG, (rows + 1,), "starts"),
        )
    except ValueError:
        packed.check_tensors()
        raise


def unpack_rows(packed: PackedRows, into: torch.Tensor | None) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.pack_rows.unpack_rows`."""
    source, dtype = _packed_rows(packed), packed.values.dtype
    if into is None:
        into, place = new(packed.shape, dtype)
    else:
        place = address(into, dtype, packed.shape, "into")
    call("ace_unpack_rows", *source, *packed.shape, packed.values.element_size(), place, torch.get_num_threads())
    return into


def nm_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.nm_linear.nm_linear` for tokens [n_tokens, in]; outputs are fp32."""
    weight = *_packed(packed), packed.shape[0], packed.n, packed.m
    return _linear("ace_nm_linear", tokens, packed, weight, bias)


def rows_linear(tokens: torch.Tensor, packed: PackedRows, bias: torch.Tensor | None) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.rows_linear.rows_linear` for tokens [n_tokens, in]; outputs are fp32."""
    weight = *_packed_rows(packed), packed.shape[0]
    return _linear("ace_rows_linear", tokens, packed, weight, bias)


def _inputs(tokens: torch.Tensor, cols: int) -> tuple[torch.Tensor, Region]:
    """As :func:`~ace_triton.kernels.memory.matrix`, for tokens with as many inputs as the weight has."""
    owner, source = matrix(tokens, "tokens")
    if source[2] != cols:
        raise ArgumentError(f"tokens must have the {cols} inputs of the weight, got {source[2]}")
    return owner, source


def _offset(bias: torch.Tensor | None, rows: int) -> tuple[torch.Tensor | None, int | None]:
    """The bias in fp32, which the caller keeps during the call, and its address."""
    if bias is None:
        return None, None
    bias = contiguous(bias if bias.dtype is _FLOAT else bias.float())
    return bias, address(bias, _FLOAT, (rows,), "bias")


def _linear(
    name: str,
    tokens: torch.Tensor,
    packed: PackedNM | PackedRows,
    weight: tuple[int, ...],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    rows, cols = packed.shape
    _owner, source = _inputs(tokens, cols)
    out, place = new((source[1], rows), _FLOAT)
    _offset_owner, offset = _offset(bias, rows)
    call(name, *source, *weight, ELEMENTS[packed.values.dtype][0], offset, place, torch.get_num_threads())
    return out


def has_expanded_product() -> bool:
    """True if the processor multiplies pairs of bf16 numbers and expands 16-bit numbers (AVX512-BF16, VBMI2), and the
    instruction set in use allows it."""
    return bool(library().ace_has_expanded_product())


def has_tiles() -> bool:
    """True if :func:`expanded_linear` multiplies by tiles (AMX), else by vectors."""
    return bool(library().ace_has_tiles())


def use_tiles(tiles: bool) -> None:
    """Let :func:`expanded_linear` multiply by tiles, or by vectors only, in the whole process.

    Raises:
        ArgumentError: if the processor has no tiles, or the system does not let this process use them.
    """
    if library().ace_use_tiles(int(tiles)) != 0:
        raise ArgumentError("this processor has no tiles for bf16 (AMX), or the system does not allow them")


def expanded_linear(
    tokens: torch.Tensor, packed: PackedNM | PackedRows | PackedDense, bias: torch.Tensor | None
) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.expanded_linear.expanded_linear` for bf16 tokens [n_tokens, in]."""
    rows, cols = packed.shape
    name = "ace_expanded_linear"
    weight: tuple[int | None, ...]
    if isinstance(packed, PackedRows):
        values_at, n_values, meta_at, starts_at = _packed_rows(packed)
        weight = values_at, n_values, meta_at, starts_at, rows, 0, 0
    elif packed.absmax is None:
        values_at, meta_at = _packed(packed)
        weight = values_at, packed.values.numel(), meta_at, None, rows, packed.n, packed.m
    else:
        name, weight = "ace_expanded_few_bits_linear", _few_bits(packed)
    _owner, source = _inputs(tokens, cols)
    out, place = new((source[1], rows), torch.bfloat16)
    _offset_owner, offset = _offset(bias, rows)
    call(name, *source[:4], *weight, offset, place, torch.get_num_threads())
    return out


def few_bits_linear(tokens: torch.Tensor, packed: PackedNM | PackedDense, bias: torch.Tensor | None) -> torch.Tensor:
    """As :func:`nm_linear`, for a quantized weight, n:m or dense."""
    (rows, cols), absmax = packed.shape, packed.absmax
    assert absmax is not None
    weight = _few_bits(packed)
    _owner, source = _inputs(tokens, cols)
    out, place = new((source[1], rows), _FLOAT)
    _offset_owner, offset = _offset(bias, rows)
    call("ace_few_bits_linear", *source, *weight, ELEMENTS[absmax.dtype][0], offset, place, torch.get_num_threads())
    return out


def _few_bits(packed: PackedNM | PackedDense) -> tuple[int | None, ...]:
    """A quantized weight as arguments: addresses of values, metadata (if any) and absmax, then rows, n, m, bits and
    group; ArgumentError if its tensors do not fit."""
    packed.check_tensors()
    values, meta, absmax = packed.values, packed.meta, packed.absmax
    assert absmax is not None
    return (
        address(values, values.dtype, values.shape, "values"),
        None if meta is None else address(meta, _INT, meta.shape, "meta"),
        address(absmax, absmax.dtype, absmax.shape, "absmax"),
        *(packed.shape[0], packed.n, packed.m, packed.bits, packed.group),
    )
