"""Choose the product of an :class:`~ace_triton.packed.nm_linear.NMLinear` by the number of rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import ArgumentError
from ..kernels import cpu_library
from ..kernels.nm_linear import DTYPES, nm_linear
from ..kernels.packed_nm import PackedNM
from ..kernels.unpack_nm import unpack_nm
from .semi_structured import backend_of, refusal, semi_structured_linear

Product = Literal["packed", "semi_structured", "dense"]


@dataclass(frozen=True)
class RowLimits:
    """Numbers of rows (tokens of a call) that choose the product of a packed layer.

    Calls with more than ``packed`` and fewer than ``semi_structured`` rows unpack the weight and multiply dense.

    Attributes:
        packed: our kernel is used for up to this many rows.
        semi_structured: torch's 2:4 product is used from this many rows on, if it supports the weight; None for never.
        second_copy: if torch uses cuSPARSELt, keep cuSPARSELt's copy of the weight after the first call (9/16 of the
            dense bytes in bf16) instead of making it in each call.

    Raises:
        ArgumentError: if a number of rows is invalid.
    """

    packed: int
    semi_structured: int | None = None
    second_copy: bool = False

    def __post_init__(self) -> None:
        for name in ("packed", "semi_structured"):
            rows = getattr(self, name)
            if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 0):
                raise ArgumentError(f"{name} must be a number of rows, 0 or more; got {rows!r}")


ALWAYS = 1 << 30
"""A limit above the number of rows of any call."""


@dataclass(frozen=True)
class PatternRows:
    """Largest number of rows for our CPU kernel: at 2:4, which has a specialized loop, and at other patterns."""

    two_of_four: int
    other: int


CPU_LIMITS = {
    "avx512": {
        torch.float32: PatternRows(128, 64),
        torch.float16: PatternRows(ALWAYS, ALWAYS),
        torch.bfloat16: PatternRows(64, 32),
    },
    "avx2": {
        torch.float32: PatternRows(8, 8),
        torch.float16: PatternRows(ALWAYS, ALWAYS),
        torch.bfloat16: PatternRows(ALWAYS, ALWAYS),
    },
    "portable": {
        torch.float32: PatternRows(4, 0),
        torch.float16: PatternRows(4, 0),
        torch.bfloat16: PatternRows(4, 0),
    },
}
"""Up to these numbers of rows our kernel is faster than unpacking the weight in the call, by instruction set of the
compiled library and by dtype. To measure them: ``ace-triton bench --rows 1,2,4,8,16,32,64,128`` with ``--sparsity`` and
``--dtype``, under ``ACE_TRITON_CPU_ISA=avx512|avx2|portable``. Measured on one core of AMD EPYC processors (AVX-512:
Zen 4 and 5; AVX2 and portable: Zen 4 without AVX-512). Estimated for AVX-512: patterns other than 2:4, and bf16 without
bf16 instructions.
"""

NATIVE_LIMITS = {"avx512": PatternRows(8, 4), "avx2": PatternRows(4, 4), "portable": PatternRows(1, 0)}
"""The same limits for fp16 or bf16 if the processor has multiply instructions for that dtype, as torch's dense product
then uses them."""

NATIVE = {
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
}
"""Names in ``torch.cpu.get_capabilities()`` that mean multiply instructions for a dtype."""

BLOCK_BYTES = 4 * 2**20
"""Bytes of the dense weight that a CPU unpacks at a time. Blocks of 1 MiB make the dense product slower."""

CUTLASS_LIMITS = RowLimits(packed=32, semi_structured=33)
CUSPARSELT_LIMITS = RowLimits(packed=64)
"""Our kernel reads the weight once for 32 rows and twice for 64, which moves fewer bytes than unpacking. cuSPARSELt is
used only if the caller's limits ask for it, best with ``second_copy``: otherwise each call unpacks and compresses the
weight."""

OTHER_LIMITS = RowLimits(packed=16)
ANY_PATTERN_LIMITS = RowLimits(packed=4)
"""For patterns other than 2:4: our kernel takes as long for four rows as unpacking."""


def default_limits(device: torch.device, dtype: torch.dtype, pattern: tuple[int, int] = (2, 4)) -> RowLimits:
    """The default limits for a device, a weight's dtype and its n:m pattern.

    On a CPU they depend on the instruction set of the compiled library. Without the library every call unpacks the
    weight, which is slow but faster than our reference. The GPU limits are estimated from machine code, not measured;
    ``ace-triton bench`` finds the best limits for a machine.
    """
    if device.type == "cpu":
        return cpu_limits(cpu_library.isa() if cpu_library.available() else None, dtype, pattern == (2, 4))
    if pattern != (2, 4):
        return ANY_PATTERN_LIMITS
    backend = backend_of(device)
    if backend is None or dtype == torch.float32:
        return OTHER_LIMITS
    return CUTLASS_LIMITS if backend == "cutlass" else CUSPARSELT_LIMITS


@functools.cache
def cpu_limits(isa: str | None, dtype: torch.dtype, two_of_four: bool) -> RowLimits:
    """The default limits of a CPU. ``isa`` is the instruction set of the compiled library, None without the library."""
    if isa is None:
        return RowLimits(packed=0)
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in NATIVE.get(dtype, ()))
    rows = NATIVE_LIMITS[isa] if native else CPU_LIMITS[isa].get(dtype, PatternRows(0, 0))
    return RowLimits(packed=rows.two_of_four if two_of_four else rows.other)


def choose_product(rows: int, packed: PackedNM, limits: RowLimits | None = None) -> Product:
    """Choose the product for a number of rows. ``limits`` None means the defaults of the device."""
    limits = limits or default_limits(packed.values.device, packed.values.dtype, (packed.n, packed.m))
    if rows <= limits.packed and packed.values.dtype in DTYPES:
        return "packed"
    if limits.semi_structured is not None and rows >= limits.semi_structured and refusal(packed) is None:
        return "semi_structured"
    return "dense"


def multiply(
    tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None, limits: RowLimits | None = None
) -> torch.Tensor:
    """Compute outputs [n_tokens, out_features] = tokens W^T + bias, for tokens [n_tokens, in_features] of W's dtype."""
    product = choose_product(len(tokens), packed, limits)
    if product == "packed":
        return nm_linear(tokens, packed, bias)
    if product == "semi_structured":
        second_copy = limits is not None and limits.second_copy
        return semi_structured_linear(tokens, packed, bias, second_copy=second_copy)
    return unpacked_linear(tokens, packed, bias)


def unpacked_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    """Like :func:`multiply`, always by unpacking the weight and multiplying dense.

    A CPU unpacks BLOCK_BYTES of the weight at a time, so that each block is still in the cache when it is multiplied.
    """
    out_features, in_features = packed.shape
    at_once = max(1, BLOCK_BYTES // max(1, in_features * packed.values.element_size()))
    if tokens.device.type != "cpu" or at_once >= out_features:
        return torch.nn.functional.linear(tokens, unpack_nm(packed), bias)
    outputs = tokens.new_empty(len(tokens), out_features)
    weights = packed.values.new_empty(at_once, in_features)
    for first in range(0, out_features, at_once):
        block = packed.outputs(first, first + at_once)
        part = slice(first, first + block.shape[0])
        weight = unpack_nm(block, weights[: block.shape[0]])
        outputs[:, part] = torch.nn.functional.linear(tokens, weight, None if bias is None else bias[part])
    return outputs
