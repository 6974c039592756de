"""The operations' bodies in the compiled CPU library (:mod:`~ace_triton.kernels.cpu_library`).

Functions here take what the launchers have checked, and are called by the launchers alone. Threads are torch's own.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from .cpu_library import call, library

if TYPE_CHECKING:
    from .adamw import GradientMoments, Step
    from .column_scale import ColumnScale
    from .packed_nm import PackedNM
    from .score_terms import ScoreTerms

_ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_OUTPUTS = {"weight": 0, "mask": 1, "bits": 2}

_VARIANCE_NORMS = {"max_layer": 0, "max_sequence": 1, "channel": 2, "frobenius": 3}

# A chunk of tokens whose coupling operands are made at a time: a few MB in fp32 for the widest layers.
_COUPLING_CHUNK = 256

# From here on an output is most likely new memory rather than what the allocator kept.
_LARGE_BYTES = 16 * 2**20


def select_nm(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, axis: str, output: str) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.select_nm.select_nm`."""
    along_out = int(axis == "out")
    return _select("ace_select_nm", weight, terms, output, n, m, along_out)


def select_rows(weight: torch.Tensor, terms: ScoreTerms, k: int, scope: str, output: str) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.select_rows.select_rows`."""
    whole_layer = int(scope == "layer")
    return _select("ace_select_rows", weight, terms, output, k, whole_layer)


def _select(name: str, weight: torch.Tensor, terms: ScoreTerms, output: str, *rule: int) -> torch.Tensor:
    rows, cols = weight.shape
    laid = _row_major(weight)
    if output == "weight":
        delivered = laid
    elif output == "mask":
        delivered = _large(torch.empty(rows, cols, dtype=torch.bool))
    else:
        delivered = torch.empty(rows, (cols + 7) // 8, dtype=torch.uint8)
    factors = (_address(factor) for factor in (terms.row, terms.col, terms.scale, terms.coupling))
    threads = torch.get_num_threads()
    call(name, *_matrix(laid), *factors, terms.power, _OUTPUTS[output], delivered.data_ptr(), *rule, threads)
    if output != "weight":
        return delivered
    if laid is not weight:
        with torch.no_grad():
            weight.copy_(laid)
    return weight


def weight_sums(
    weight: torch.Tensor, inverse: bool = False, scale: ColumnScale | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Body of both operations of :mod:`ace_triton.kernels.weight_sums`: row and column sums or their inverses, the
    scale, and whether one of these is not finite."""
    laid = _row_major(weight)
    rows, cols = torch.empty(weight.shape[0]), torch.empty(weight.shape[1])
    columns = None if scale is None else torch.empty_like(cols)
    found = torch.empty(1, dtype=torch.int32)
    made = int(inverse), *_columns(scale), *_addresses(columns, found)
    call("ace_weight_sums", *_matrix(laid), *_addresses(rows, cols), *made, torch.get_num_threads())
    return rows, cols, columns, found


def column_scale(of: ColumnScale) -> tuple[torch.Tensor, torch.Tensor]:
    """Body of :func:`~ace_triton.kernels.column_scale.checked_column_scale`."""
    scale, found = torch.empty(of.in_features), torch.empty(1, dtype=torch.int32)
    call("ace_column_scale", of.in_features, *_columns(of), *_addresses(scale, found))
    return scale, found


def variance_factor(sequence_square: torch.Tensor, norm: str, power: float, eps: float) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.variance_factor.variance_factor`."""
    laid = sequence_square.contiguous()
    factor = torch.empty(laid.shape[1])
    rule = _VARIANCE_NORMS[norm], power, eps
    call("ace_variance_factor", laid.data_ptr(), *laid.shape, *rule, factor.data_ptr(), torch.get_num_threads())
    return factor


def _columns(of: ColumnScale | None) -> tuple[int | None, float, int | None, int | None, int]:
    if of is None:
        return None, 1.0, None, None, 1
    square, inverse, base, factor = of.parts()
    return _address(square), inverse, _address(base), _address(factor), of.sign


def divergence(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.divergence.divergence`: the losses; the gradient goes into its tensor."""
    if logits.dtype != wanted.dtype or logits.dtype == torch.float16:
        exact = torch.empty(logits.shape)
        loss = divergence(logits.float(), wanted.float(), exact)
        gradient.copy_(exact)
        return loss
    laid, aim = _row_major(logits), _row_major(wanted)
    loss = torch.empty(logits.shape[0])
    places = aim.data_ptr(), aim.stride(0), gradient.data_ptr(), gradient.stride(0)
    call("ace_divergence", *_matrix(laid), *places, loss.data_ptr(), torch.get_num_threads())
    return loss


def adamw(
    values: torch.Tensor,
    moments: GradientMoments,
    gradient: torch.Tensor,
    step: Step,
    factor: torch.Tensor | None,
    rounded: torch.Tensor | None,
    zeros_stay: bool,
) -> None:
    """Body of :func:`~ace_triton.kernels.adamw.adamw`."""
    copy = None if rounded is None or rounded.dtype == torch.float16 else rounded
    call(
        "ace_adamw",
        *_addresses(values, moments.first, moments.second),
        values.numel(),
        *(gradient.data_ptr(), _ELEMENTS[gradient.dtype]),
        *(_address(copy), 0 if copy is None else _ELEMENTS[copy.dtype]),
        *(_address(factor), *step.scalars, int(zeros_stay), torch.get_num_threads()),
    )
    if rounded is not copy and rounded is not None:
        with torch.no_grad():
            rounded.copy_(values)


def token_norms(outputs: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.token_norms.token_norms`."""
    laid = _row_major(outputs)
    norms = torch.empty(outputs.shape[0])
    call("ace_token_norms", *_matrix(laid), norms.data_ptr(), torch.get_num_threads())
    return norms


def all_finite(tensor: torch.Tensor) -> bool:
    """Body of :func:`~ace_triton.kernels.finite.all_finite`."""
    laid = tensor.view(1, -1) if tensor.is_contiguous() else _row_major(tensor.flatten(0, -2))
    finite = ctypes.c_int32()
    call("ace_all_finite", *_matrix(laid), torch.get_num_threads(), ctypes.byref(finite))
    return bool(finite.value)


def moments(
    tokens: torch.Tensor, valid: torch.Tensor | None
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Body of :func:`~ace_triton.kernels.moments.moments`; returns the fields of Moments in order."""
    sequences, length, channels = tokens.shape
    laid = _row_major(tokens)
    valid = None if valid is None else valid.contiguous()
    total, deviation = torch.empty(2, channels, dtype=torch.float64)
    sequence_square = _large(torch.empty(sequences, channels))
    sequence_count = torch.empty(sequences, dtype=torch.int64)
    call(
        "ace_moments",
        laid.data_ptr(),
        sequences,
        length,
        channels,
        laid.stride(0),
        laid.stride(1),
        _ELEMENTS[laid.dtype],
        _address(valid),
        total.data_ptr(),
        deviation.data_ptr(),
        sequence_square.data_ptr(),
        sequence_count.data_ptr(),
        torch.get_num_threads(),
    )
    return int(sequence_count.sum()), total, deviation, sequence_square, sequence_count


def weighted_squares(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.weighted_squares.weighted_squares`."""
    laid, weights = _row_major(tokens), weights.contiguous()
    out = torch.empty(weights.shape[0], tokens.shape[1])
    call(
        "ace_weighted_squares",
        *_matrix(laid),
        weights.data_ptr(),
        weights.shape[0],
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def join_gains(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.join_gains.join_gains`; takes contiguous tensors."""
    n_pools, rows, n_candidates = candidates.shape
    groups = thresholds.shape[2]
    gains = torch.empty(n_pools, groups, n_candidates) if rows else torch.zeros(n_pools, groups, n_candidates)
    call(
        "ace_join_gains",
        *(candidates.data_ptr(), thresholds.data_ptr()),
        *(n_pools, rows, groups, n_candidates),
        *(gains.data_ptr(), torch.get_num_threads()),
    )
    return gains


def has_gram_product() -> bool:
    """Whether this processor multiplies bf16 in pairs, and may under the instruction set in use; torch's product, which
    serves the others, rounds its sums otherwise."""
    return bool(library().ace_has_gram_product())


def gram_product(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.gram_product.gram_product`."""
    laid = _row_major(rows)
    shape = *laid.shape, laid.stride(0)
    call("ace_gram_product", laid.data_ptr(), *shape, into.data_ptr(), torch.get_num_threads())
    return into


def assign(gains: torch.Tensor) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.assignment.assignment`; takes a contiguous tensor."""
    n_pools, size, _ = gains.shape
    joins = torch.empty(n_pools, size, dtype=torch.int32)
    call("ace_assign", gains.data_ptr(), n_pools, size, joins.data_ptr(), torch.get_num_threads())
    return joins.long()


def coupling(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: str, into: torch.Tensor
) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.coupling.coupling`: torch's own GEMM, a chunk of tokens at a time."""
    used = weights.nonzero()[:, 0]
    with torch.no_grad():
        for index in used.split(_COUPLING_CHUNK):
            left = outputs[index].float().abs_().mul_(weights[index, None])
            right = tokens[index].float().abs_()
            if reduce == "rms":
                left, right = left.square_(), right.square_()
            into.addmm_(left.t(), right)
    return into


def pack_nm(weight: torch.Tensor, terms: ScoreTerms | None, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Body of :func:`~ace_triton.kernels.pack_nm.pack_nm` and ``pack_scored``: values, metadata, and whether all that
    is not 0 found a place."""
    rows, cols = weight.shape
    laid = _row_major(weight)
    values = _large(torch.empty(rows, cols // m * n, dtype=weight.dtype))
    meta = torch.empty(rows, (cols + 31) // 32, dtype=torch.int32)
    factors = (terms.row, terms.col, terms.scale, terms.coupling) if terms else (None,) * 4
    whole = ctypes.c_int32()
    call(
        "ace_pack_nm",
        *_matrix(laid),
        *(_address(factor) for factor in factors),
        terms.power if terms else 1,
        values.data_ptr(),
        meta.data_ptr(),
        int(terms is not None),
        n,
        m,
        torch.get_num_threads(),
        ctypes.byref(whole),
    )
    return values, meta, bool(whole.value)


def unpack_nm(packed: PackedNM, into: torch.Tensor | None) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.unpack_nm.unpack_nm`."""
    if into is None:
        into = _large(torch.empty(packed.shape, dtype=packed.values.dtype))
    source = packed.values.data_ptr(), packed.meta.data_ptr(), *packed.shape
    pattern = packed.n, packed.m, packed.values.element_size()
    call("ace_unpack_nm", *source, *pattern, into.data_ptr(), torch.get_num_threads())
    return into


def nm_linear(tokens: torch.Tensor, packed: PackedNM, bias: torch.Tensor | None) -> torch.Tensor:
    """Body of :func:`~ace_triton.kernels.nm_linear.nm_linear` for tokens [n_tokens, in]."""
    laid = _row_major(tokens)
    out = torch.empty(tokens.shape[0], packed.shape[0])
    call(
        "ace_nm_linear",
        *_matrix(laid),
        packed.values.data_ptr(),
        packed.meta.data_ptr(),
        packed.shape[0],
        packed.n,
        packed.m,
        _ELEMENTS[packed.values.dtype],
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def dense_linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loop of :func:`nm_linear` over a dense weight [out, in]: what benchmarks hold it against."""
    laid, rows = _row_major(tokens), _row_major(weight)
    out = torch.empty(tokens.shape[0], weight.shape[0])
    threads = torch.get_num_threads()
    address, n_rows, _, stride, element = _matrix(rows)
    call("ace_dense_linear", *_matrix(laid), address, n_rows, stride, element, None, out.data_ptr(), threads)
    return out


def _large(output: torch.Tensor) -> torch.Tensor:
    """``output``, not written yet, on huge pages where it is large enough to be new memory."""
    if output.nbytes >= _LARGE_BYTES:
        call("ace_prefer_huge_pages", output.data_ptr(), output.nbytes)
    return output


def _row_major(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself where its last dimension is contiguous, which is what the library walks; else a copy."""
    if tensor.dtype not in _ELEMENTS:
        raise ValueError(f"expected float32, float16 or bfloat16, got {tensor.dtype}: convert it with .float()")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return tensor.detach().contiguous()
    return tensor


def _matrix(tensor: torch.Tensor) -> tuple[int, int, int, int, int]:
    rows, cols = tensor.shape
    return tensor.data_ptr(), rows, cols, tensor.stride(0), _ELEMENTS[tensor.dtype]


def _addresses(*tensors: torch.Tensor | None) -> tuple[int | None, ...]:
    return tuple(_address(tensor) for tensor in tensors)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
