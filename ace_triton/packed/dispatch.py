"""Choose the product of an :class:`~ace_triton.packed.nm_linear.NMLinear` by the number of rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ..kernels import cpu_library
from ..kernels.launch import before_ampere
from ..kernels.packed_nm import PackedNM
from .dense_copy import DenseCopy
from .kernel import ExpandedRows, Expansion, Kernel, PatternRows, bits_of, expansion, expansion_of, pattern_of
from .products import Packed, Product, RowLimits, register_product, registry
from .semi_structured import SemiStructured, backend_of, warn_of_no_second_copy
from .sparse_units import SparseUnits, asked_for
from .unpacked import Unpacked

DENSE, DENSE_COPY = Unpacked(), DenseCopy()
for _product in (DENSE, SemiStructured(), Kernel()):  # The last one is asked first.
    register_product(_product)
if asked_for():
    register_product(SparseUnits())

ALWAYS = 1 << 30
"""A limit above the number of rows of any call."""


_NEON_LIMITS = {
    torch.float32: PatternRows(4, 2),
    torch.float16: PatternRows(16, 8),
    torch.bfloat16: PatternRows(16, 8),
}

_AVX512_LIMITS = {
    torch.float32: PatternRows(128, 64),
    torch.float16: PatternRows(ALWAYS, ALWAYS),
    torch.bfloat16: PatternRows(64, 32),
}

CPU_LIMITS = {
    "avx512_vnni": _AVX512_LIMITS,
    "avx512": _AVX512_LIMITS,
    "avx2": {
        torch.float32: PatternRows(4, 3),
        torch.float16: PatternRows(ALWAYS, ALWAYS),
        torch.bfloat16: PatternRows(ALWAYS, ALWAYS),
    },
    "neon_dotprod": _NEON_LIMITS,
    "neon": _NEON_LIMITS,
    "portable": {
        torch.float32: PatternRows(4, 0),
        torch.float16: PatternRows(4, 0),
        torch.bfloat16: PatternRows(4, 0),
    },
}
"""Up to these numbers of rows our kernel is faster than unpacking the weight in the call, by instruction set of the
compiled library and by dtype. To measure them: ``ace-triton bench --rows 1,2,4,8,16,32,64,128`` with ``--sparsity`` and
``--dtype``, under ``ACE_TRITON_CPU_ISA``. Measured on one core of AMD EPYC processors (AVX-512: Zen 4 and 5; AVX2 and
portable: Zen 4 without AVX-512). Those of AVX2 hold for small layers, whose unpacked weight stays in the cache; for
large ones our kernel is faster for a few rows more. Estimated for AVX-512: patterns other than 2:4, and bf16 without
bf16 instructions. All limits of NEON are estimates from machine code: nothing was timed on ARM.
"""

NATIVE_LIMITS = {
    "avx512_vnni": PatternRows(8, 4),
    "avx512": PatternRows(8, 4),
    "avx2": PatternRows(4, 4),
    "neon_dotprod": PatternRows(2, 1),
    "neon": PatternRows(2, 1),
    "portable": PatternRows(1, 0),
}
"""The same limits for fp16 or bf16 if the processor has multiply instructions for that dtype, as torch's dense product
then uses them."""

EXPANDED_LIMITS: dict[Expansion, ExpandedRows] = {
    "tiles": ExpandedRows(1024, 1024, ALWAYS),
    "vectors": ExpandedRows(1024, 128, ALWAYS),
}
"""The same limits for bf16 if our kernel expands the weight in the cache. Measured on one core of an Intel Emerald
Rapids, for vectors with oneDNN held to AVX512-BF16 (``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16``); not on AMD."""

NATIVE = {
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
}
"""Names in ``torch.cpu.get_capabilities()`` that mean multiply instructions for a dtype."""

CUTLASS_LIMITS = RowLimits(packed=32, semi_structured=33)
CUSPARSELT_LIMITS = RowLimits(packed=64)
"""Our kernel reads the weight once for 32 rows and twice for 64, which moves fewer bytes than unpacking. cuSPARSELt is
used only if the caller's limits ask for it, best with ``second_copy``: otherwise each call unpacks and compresses the
weight."""

OTHER_LIMITS = RowLimits(packed=16)
ANY_PATTERN_LIMITS = RowLimits(packed=4)
"""For other patterns, none, and quantized weights in fp32: our kernel takes as long for four rows as unpacking."""

FEW_BITS_LIMITS = RowLimits(packed=32)
"""For quantized weights in fp16 and bf16, from Ampere on: our kernel expands the weight once for 32 rows, and unpacking
takes several passes in fp32."""


@dataclass(frozen=True)
class CopyRows:
    """Largest number of rows for our CPU kernel beside a dense copy of the weight, for weights in few bits and others.

    They are for a model whose weights are read from memory. If the processor's cache holds all dense weights of the
    model, the dense product is the fastest at every number of rows.
    """

    few_bits: int
    other: int


COPY_ROWS = {"avx512_vnni": CopyRows(16, 16), "avx512": CopyRows(8, 16), "avx2": CopyRows(8, 3)}
"""Up to these numbers of rows our kernel is faster in fp32 than the dense product by a copy of the weight. Instruction
sets that are not listed, and other dtypes, have the limits of calls without a copy: they were not measured (bf16:
EXPANDED_COPY_ROWS). To measure them: ``ace-triton bench``, whose first column is the dense product."""

EXPANDED_COPY_ROWS: dict[Expansion, ExpandedRows] = {
    "tiles": ExpandedRows(512, 512, 512),
    "vectors": ExpandedRows(256, 4, 24),
}
"""The limits beside a dense copy of the weight, in bf16, if our kernel expands the weight in the cache. Measured as
EXPANDED_LIMITS."""

FEW_BITS_ROWS = {"avx512_vnni": 64, "avx512": 32, "avx2": 32, "neon_dotprod": 16, "neon": 8, "portable": 1}
"""The limits for quantized weights that our kernel does not expand, by instruction set of the compiled library.
Measured for AVX-512 and AVX2 with ``ace-triton bench --sparsity 8:16 --bits 8``; estimated for the others."""


def default_limits(
    device: torch.device, dtype: torch.dtype, pattern: tuple[int, int] | None = (2, 4), bits: int | None = None
) -> RowLimits:
    """The default limits for a device and a weight: its dtype, its n:m pattern (None if it has none), and the bits of
    its values if it is quantized.

    On a CPU they depend on the instruction set of the compiled library. Without the library every call unpacks the
    weight, which is slow but faster than our reference. The GPU limits are estimated from machine code, not measured;
    ``ace-triton bench`` finds the best limits for a machine. Products that you registered may take any number of rows.
    """
    if device.type == "cpu":
        limits = cpu_limits(cpu_library.isa() if cpu_library.available() else None, dtype, pattern, bits)
    elif bits is not None and dtype != torch.float32 and not before_ampere(device):
        limits = FEW_BITS_LIMITS
    elif pattern != (2, 4) or bits is not None:
        limits = ANY_PATTERN_LIMITS
    else:
        backend = backend_of(device)
        if backend is None or dtype == torch.float32:
            limits = OTHER_LIMITS
        else:
            limits = CUTLASS_LIMITS if backend == "cutlass" else CUSPARSELT_LIMITS
    return _with_others(limits, registry.others) if registry.others else limits


@functools.cache
def _with_others(limits: RowLimits, names: tuple[str, ...]) -> RowLimits:
    return replace(limits, others=tuple((name, 0, None) for name in names))


@functools.cache
def cpu_limits(
    isa: str | None, dtype: torch.dtype, pattern: tuple[int, int] | None, bits: int | None = None
) -> RowLimits:
    """The default limits of a CPU. ``isa`` is the instruction set of the compiled library, None without the library."""
    if isa is None:
        return RowLimits(packed=0)
    expanded = expansion_of(isa) if dtype == torch.bfloat16 else None
    if expanded is not None:
        return RowLimits(packed=EXPANDED_LIMITS[expanded].of_weight(pattern, bits))
    if bits is not None:
        return RowLimits(packed=FEW_BITS_ROWS[isa])
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in NATIVE.get(dtype, ()))
    rows = NATIVE_LIMITS[isa] if native else CPU_LIMITS[isa].get(dtype, PatternRows(0, 0))
    return RowLimits(packed=rows.of(pattern == (2, 4)))


def copy_limits(dtype: torch.dtype, pattern: tuple[int, int] | None, bits: int | None, *, cached: bool) -> RowLimits:
    """The limits of a weight that has a dense copy in the memory of a CPU.

    Args:
        dtype: dtype of the weight.
        pattern: its n:m pattern; None if it has none.
        bits: bits of its values if it is quantized.
        cached: True if the processor's cache holds all dense weights of the model.
    """
    limits = default_limits(torch.device("cpu"), dtype, pattern, bits)
    expanded = expansion() if dtype == torch.bfloat16 else None
    measured = COPY_ROWS.get(cpu_library.isa()) if cpu_library.available() and dtype == torch.float32 else None
    rows = limits.packed
    if expanded is not None:
        rows = min(rows, EXPANDED_COPY_ROWS[expanded].of_weight(pattern, bits))
    elif measured is not None:
        rows = 0 if cached else min(rows, measured.other if bits is None else measured.few_bits)
    return replace(limits, packed=rows, dense_copy=True)


def choose_product(rows: int, packed: Packed, limits: RowLimits | None = None) -> str:
    """Name of the product for a number of rows. ``limits`` None means the defaults of the device."""
    return product_for(rows, packed, limits).name


def product_for(rows: int, packed: Packed, limits: RowLimits | None = None) -> Product:
    """The product for a number of rows. ``limits`` None means the defaults of the device."""
    return _choose(rows, packed, limits)[0]


def multiply(
    tokens: torch.Tensor, packed: Packed, bias: torch.Tensor | None, limits: RowLimits | None = None
) -> torch.Tensor:
    """Compute outputs [n_tokens, out_features] = tokens W^T + bias, for tokens [n_tokens, in_features] of W's dtype."""
    product, limits = _choose(len(tokens), packed, limits)
    if limits.second_copy and product is DENSE and isinstance(packed, PackedNM):
        warn_of_no_second_copy(packed)
    return product.multiply(tokens, packed, bias, limits)


def _choose(rows: int, packed: Packed, limits: RowLimits | None) -> tuple[Product, RowLimits]:
    """The first product that the limits choose and that does not refuse the call, and these limits."""
    if limits is None or (limits.dense_copy and packed.values.device.type != "cpu"):
        limits = default_limits(packed.values.device, packed.dtype, pattern_of(packed), bits_of(packed))
    for product in registry.products:
        if product.takes(rows, limits) and product.why_not(packed, rows) is None:
            return product, limits
    return DENSE_COPY if limits.dense_copy else DENSE, limits
