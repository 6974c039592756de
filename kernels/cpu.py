"""Calls into the compiled CPU library (:mod:`~ace_triton.kernels.cpu_library`), one function per operation.

Those of packed weights are in :mod:`~ace_triton.kernels.cpu_packed`.

Only the launchers call these functions; they have checked the arguments. Only :mod:`~ace_triton.kernels.memory` takes
addresses of tensors; it checks the memory behind them. The library uses as many threads as torch.
"""

from __future__ import annotations

import ctypes

import torch

from .cpu_library import call, library
from .errors import ArgumentError
from .memory import ELEMENTS, address, contiguous, elements, matrix, new, sequences
from .records import ColumnScale, GradientMoments, Step
from .score_terms import ScoreTerms

_FLOAT, _DOUBLE, _INT, _LONG = torch.float32, torch.float64, torch.int32, torch.int64
_OUTPUTS = {"weight": 0, "mask": 1, "bits": 2}

_VARIANCE_NORMS = {"max_layer": 0, "max_sequence": 1, "channel": 2, "frobenius": 3}

# Tokens per chunk of the coupling's GEMM: its fp32 operands take a few MB for the widest layers.
_COUPLING_CHUNK = 256


def select_nm(weight: torch.Tensor, terms: ScoreTerms, n: int, m: int, axis: str, output: str) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.select_nm.select_nm`."""
    along_out = int(axis == "out")
    return _select("ace_select_nm", weight, terms, output, n, m, along_out)


def select_rows(weight: torch.Tensor, terms: ScoreTerms, k: int, scope: str, output: str) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.select_rows.select_rows`."""
    whole_layer = int(scope == "layer")
    return _select("ace_select_rows", weight, terms, output, k, whole_layer)


def _select(name: str, weight: torch.Tensor, terms: ScoreTerms, output: str, *rule: int) -> torch.Tensor:
    rows, cols = weight.shape
    selection, place = weight, None
    if output == "mask":
        selection, place = new((rows, cols), torch.bool)
    elif output == "bits":
        selection, place = new((rows, (cols + 7) // 8), torch.uint8)
    owner, source = matrix(weight, "weight", written=output == "weight")
    call(name, *source, *factors(terms, rows, cols), _OUTPUTS[output], place, *rule, torch.get_num_threads())
    if output == "weight" and owner is not weight:
        with torch.no_grad():
            weight.copy_(owner)
    return selection


def factors(terms: ScoreTerms | None, rows: int, cols: int) -> tuple[int | None, ...]:
    """Addresses of the four score terms, the power, and whether the terms were checked already."""
    if terms is None:
        return (None, None, None, None, 1, 1)
    row, col, scale, coupling = terms.row, terms.col, terms.scale, terms.coupling
    return (
        None if row is None else address(row, _FLOAT, (rows,), "score term 'row'"),
        None if col is None else address(col, _FLOAT, (cols,), "score term 'col'"),
        None if scale is None else address(scale, _FLOAT, (cols,), "score term 'scale'"),
        None if coupling is None else address(coupling, _FLOAT, (rows, cols), "score term 'coupling'"),
        terms.power,
        terms.checked,
    )


def weight_sums(
    weight: torch.Tensor, inverse: bool = False, scale: ColumnScale | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """CPU body of both operations of :mod:`ace_triton.kernels.weight_sums`.

    Returns:
        Row sums and column sums or, with ``inverse``, their inverses; the column scale or None; an int32 [1] flag that
        is non-zero if one of these is not finite.
    """
    _owner, source = matrix(weight, "weight")
    (rows, rows_at), (cols, cols_at) = new((source[1],), _FLOAT), new((source[2],), _FLOAT)
    columns, columns_at = (None, None) if scale is None else new((source[2],), _FLOAT)
    found, found_at = new((1,), _INT)
    made = int(inverse), *_columns(scale, source[2]), columns_at, found_at
    call("ace_weight_sums", *source, rows_at, cols_at, *made, torch.get_num_threads())
    return rows, cols, columns, found


def column_scale(of: ColumnScale) -> tuple[torch.Tensor, torch.Tensor]:
    """CPU body of :func:`~ace_triton.kernels.column_scale.checked_column_scale`."""
    (scale, scale_at), (found, found_at) = new((of.in_features,), _FLOAT), new((1,), _INT)
    call("ace_column_scale", of.in_features, *_columns(of, of.in_features), scale_at, found_at)
    return scale, found


def variance_factor(sequence_square: torch.Tensor, norm: str, power: float, eps: float) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.variance_factor.variance_factor`."""
    n_sequences, channels = sequence_square.shape
    owner = contiguous(sequence_square)
    square = address(owner, _FLOAT, (n_sequences, channels), "sequence_square")
    factor, place = new((channels,), _FLOAT)
    rule = _VARIANCE_NORMS[norm], power, eps
    call("ace_variance_factor", square, n_sequences, channels, *rule, place, torch.get_num_threads())
    return factor


def _columns(of: ColumnScale | None, cols: int) -> tuple[int | None, float, int | None, int | None, int, int]:
    if of is None:
        return None, 1.0, None, None, 1, 4
    square, inverse, base, factor = of.parts()
    return (
        None if square is None else address(square, _DOUBLE, (cols,), "square"),
        inverse,
        None if base is None else address(base, _FLOAT, (cols,), "base"),
        None if factor is None else address(factor, _FLOAT, (cols,), "factor"),
        of.sign,
        of.quarters,
    )


def divergence(logits: torch.Tensor, wanted: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.divergence.divergence`; returns the losses and writes ``gradient``."""
    if logits.dtype != wanted.dtype or logits.dtype == torch.float16:
        exact, _ = new(tuple(logits.shape), _FLOAT)
        loss = divergence(logits.float(), wanted.float(), exact)
        gradient.copy_(exact)
        return loss
    _owner, source = matrix(logits, "logits")
    _target_owner, target = matrix(wanted, "wanted")
    gradient_owner, into = matrix(gradient, "into", written=True)
    loss, place = new((source[1],), _FLOAT)
    call("ace_divergence", *source, target[0], target[3], into[0], into[3], place, torch.get_num_threads())
    if gradient_owner is not gradient:
        gradient.copy_(gradient_owner)
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
    """CPU body of :func:`~ace_triton.kernels.adamw.adamw`."""
    copy = None if rounded is None or rounded.dtype == torch.float16 else rounded
    shape = values.shape
    call(
        "ace_adamw",
        address(values, _FLOAT, shape, "values"),
        address(moments.first, _FLOAT, shape, "first moments"),
        address(moments.second, _FLOAT, shape, "second moments"),
        values.numel(),
        *elements(gradient, shape, "gradient"),
        *((None, 0) if copy is None else elements(copy, shape, "rounded copy")),
        None if factor is None else address(factor, _FLOAT, factor.shape, "factor"),
        *(*step.scalars, int(zeros_stay), torch.get_num_threads()),
    )
    if rounded is not copy and rounded is not None:
        with torch.no_grad():
            rounded.copy_(values)


def token_norms(outputs: torch.Tensor) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.token_norms.token_norms`."""
    _owner, source = matrix(outputs, "outputs")
    norms, place = new((source[1],), _FLOAT)
    call("ace_token_norms", *source, place, torch.get_num_threads())
    return norms


def all_finite(tensor: torch.Tensor, *, not_below_zero: bool = False) -> bool:
    """CPU body of :func:`~ace_triton.kernels.finite.all_finite`; ``not_below_zero`` (fp32) rejects negatives too."""
    _owner, source = matrix(tensor.view(1, -1) if tensor.is_contiguous() else tensor.flatten(0, -2), "tensor")
    finite = ctypes.c_int32()
    call("ace_all_finite", *source, int(not_below_zero), torch.get_num_threads(), ctypes.byref(finite))
    return bool(finite.value)


def moments(
    tokens: torch.Tensor, valid: torch.Tensor | None
) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """CPU body of :func:`~ace_triton.kernels.moments.moments`; returns the fields of Moments in order."""
    _owner, source = sequences(tokens, "tokens")
    _, n_sequences, length, channels, *_ = source
    valid = None if valid is None else valid.contiguous()
    (total, total_at), (deviation, deviation_at) = new((channels,), _DOUBLE), new((channels,), _DOUBLE)
    sequence_square, square_at = new((n_sequences, channels), _FLOAT)
    sequence_count, count_at = new((n_sequences,), _LONG)
    call(
        "ace_moments",
        *source,
        None if valid is None else address(valid, torch.bool, (n_sequences, length), "valid"),
        *(total_at, deviation_at, square_at, count_at, torch.get_num_threads()),
    )
    return int(sequence_count.sum()), total, deviation, sequence_square, sequence_count


def weighted_squares(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.weighted_squares.weighted_squares`."""
    _owner, source = matrix(tokens, "tokens")
    weights, layers = contiguous(weights), weights.shape[0]
    given = address(weights, _FLOAT, (layers, source[1]), "weights")
    out, place = new((layers, source[2]), _FLOAT)
    call("ace_weighted_squares", *source, given, layers, place, torch.get_num_threads())
    return out


def join_gains(candidates: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.join_gains.join_gains`; takes contiguous tensors."""
    n_pools, rows, n_candidates = candidates.shape
    groups = thresholds.shape[2]
    given = address(candidates, _FLOAT, (n_pools, rows, n_candidates), "candidates")
    thresholds_at = address(thresholds, _FLOAT, (n_pools, rows, groups), "thresholds")
    gains, place = new((n_pools, groups, n_candidates), _FLOAT)
    if not rows:
        return gains.zero_()
    call("ace_join_gains", given, thresholds_at, n_pools, rows, groups, n_candidates, place, torch.get_num_threads())
    return gains


def has_gram_product() -> bool:
    """True if the processor has AVX512-BF16 and the instruction set in use allows it. Otherwise torch multiplies, and
    rounds its sums differently."""
    return bool(library().ace_has_gram_product())


def gram_product(rows: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.gram_product.gram_product`."""
    owner, source = matrix(rows, "tokens")
    if owner.dtype != torch.bfloat16:
        raise ArgumentError(f"tokens must be bfloat16, got {owner.dtype}")
    width = source[2]
    gram = new((width, width), _FLOAT)[0].zero_() if into is None else into
    place = address(gram, _FLOAT, (width, width), "into")
    call("ace_gram_product", *source[:4], place, torch.get_num_threads())
    return gram


def assign(gains: torch.Tensor) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.assignment.assignment`; takes a contiguous tensor."""
    n_pools, size, _ = gains.shape
    given = address(gains, _FLOAT, (n_pools, size, size), "gains")
    joins, place = new((n_pools, size), _INT)
    call("ace_assign", given, n_pools, size, place, torch.get_num_threads())
    return joins.long()


def coupling(
    tokens: torch.Tensor, outputs: torch.Tensor, weights: torch.Tensor, reduce: str, into: torch.Tensor
) -> torch.Tensor:
    """CPU body of :func:`~ace_triton.kernels.coupling.coupling`: torch's own GEMM, one chunk of tokens at a time."""
    used = weights.nonzero()[:, 0]
    with torch.no_grad():
        for index in used.split(_COUPLING_CHUNK):
            left = outputs[index].float().abs_().mul_(weights[index, None])
            right = tokens[index].float().abs_()
            if reduce == "rms":
                left, right = left.square_(), right.square_()
            into.addmm_(left.t(), right)
    return into


def dense_linear(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The loop of the product of a packed weight over a dense weight [out, in]; the baseline of benchmarks."""
    _owner, source = matrix(tokens, "tokens")
    _weight_owner, (weight_at, rows, cols, stride, element) = matrix(weight, "weight")
    if source[2] != cols:
        raise ArgumentError(f"tokens must have the {cols} inputs of the weight, got {source[2]}")
    out, place = new((source[1], rows), _FLOAT)
    call("ace_dense_linear", *source, weight_at, rows, stride, element, None, place, torch.get_num_threads())
    return out


def round_groups(values: torch.Tensor, bits: int, group: int, dtype: torch.dtype, into: torch.Tensor) -> None:
    """CPU body of :func:`~ace_triton.kernels.round_groups.round_groups`."""
    if into.dtype == torch.float16:
        exact, _ = new(tuple(values.shape), _FLOAT)
        round_groups(values, bits, group, dtype, exact)
        into.copy_(exact)
        return
    rows, cols = values.shape
    given = address(values, _FLOAT, values.shape, "values")
    rule = bits, group, ELEMENTS[dtype][0]
    call("ace_round_groups", given, rows, cols, *rule, *elements(into, values.shape, "into"), torch.get_num_threads())
