"""The Triton bodies of :mod:`.token_statistics` that read the tokens and merge partial sums."""

from __future__ import annotations

from .moments import first_valid, merge_squares, part_means
from .op import launch_metadata
from .triton_import import tl, triton


@triton.jit(
    do_not_specialize=["sequences", "length", "chunks", "parts", "trips", "norm_parts"],
    launch_metadata=launch_metadata,
)
def sum_batch(
    tokens_ptr,
    valid_ptr,
    inverses_ptr,
    norm_parts_ptr,
    layers_ptr,
    squares_ptr,
    lengths_ptr,
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    weighted_ptr,
    levels_ptr,
    weights_ptr,
    sequences,
    length,
    cols,
    sequence_stride,
    token_stride,
    chunks,
    parts,
    trips,
    norm_parts,
    layer_stride,
    LAYERS: tl.constexpr,
    NEGLIGIBLE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_NORMS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Sums of one part, as in :mod:`.moments`, and the weighted squares of all layers.

    Every program computes the units of the layers again from the partial sums of their norms.
    """
    STEP: tl.constexpr = PIECES * BLOCK_ROWS
    chunk_tokens = trips * STEP
    across = tl.cdiv(cols, BLOCK_COLS)
    block = tl.program_id(0) % across
    part = (tl.program_id(0) // across).to(tl.int64)
    chunk = part % chunks
    first_sequence = part // chunks * SEQUENCES
    first_token = chunk * chunk_tokens
    j = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    # Only the first block of columns stores what does not depend on them.
    column_block = block + tl.zeros([1, 1], tl.int32)
    is_first = column_block == 0
    n_tokens = tl.cast(sequences, tl.int64) * length

    units = ()
    limits = ()
    used_counts = ()
    weighted = ()
    if LAYERS > 0:
        counted = tl.maximum(_sum_of(norm_parts_ptr + LAYERS * norm_parts, norm_parts, BLOCK_NORMS), 1.0)
    for k in tl.static_range(LAYERS):
        level = _sum_of(norm_parts_ptr + k * norm_parts, norm_parts, BLOCK_NORMS) / counted
        tl.store(levels_ptr + k, level, mask=tl.program_id(0) == 0)
        units = units + (_unit(layers_ptr + k * layer_stride, level).to(tl.float32),)
        limits = limits + ((1.0 / (level * NEGLIGIBLE)).to(tl.float32),)
        used_counts = used_counts + (tl.zeros([BLOCK_ROWS, 1], tl.float32),)
        weighted = weighted + (tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32),)

    origin = first_valid(
        *(valid_ptr, first_sequence, first_token, sequences, length, chunk_tokens), SEQUENCES, 128 * BLOCK_ROWS
    )
    start = (first_sequence + origin // chunk_tokens) * sequence_stride
    start += (first_token + origin % chunk_tokens) * token_stride
    there = tl.where(origin < SEQUENCES * chunk_tokens, cols, 0)
    shift = tl.load(tokens_ptr + start + j, mask=j < there, other=0.0).to(tl.float32)

    counts = tl.zeros([BLOCK_ROWS, 1], tl.float32)
    totals = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    deviations = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
    for s in tl.range(SEQUENCES):
        sequence = first_sequence + s
        first = sequence * length + first_token
        line = tokens_ptr + sequence * sequence_stride + first_token * token_stride
        inside = (tl.where(sequence < sequences, length, 0) - first_token).to(tl.int32)
        here = tl.zeros([BLOCK_ROWS, 1], tl.float32)
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLS], tl.float32)
        for trip in tl.range(trips):
            for piece in tl.static_range(PIECES):
                place = trip * STEP + piece * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
                used = place < inside
                if valid_ptr is not None:
                    used &= tl.load(valid_ptr + first + place, mask=used, other=0) != 0
                x = tl.load(line + place * token_stride + j, mask=used & (j < cols), other=0.0).to(tl.float32)
                off = tl.where(used, x - shift, 0.0)
                here += used.to(tl.float32)
                totals += off
                deviations += off * off
                squares += x * x
                for k in tl.static_range(LAYERS):
                    at = k * n_tokens + first + place
                    inverse = tl.load(inverses_ptr + at, mask=place < inside, other=0.0)
                    weight = tl.where(inverse < limits[k], inverse, 0.0) * units[k]
                    if weights_ptr is not None:
                        tl.store(weights_ptr + at, weight, mask=(place < inside) & is_first)
                    weighted = weighted[:k] + (weighted[k] + x * x * weight,) + weighted[k + 1 :]
                    used_count = used_counts[k] + (weight != 0).to(tl.float32)
                    used_counts = used_counts[:k] + (used_count,) + used_counts[k + 1 :]
        counts += here
        of_sequence = chunk * sequences + sequence
        is_there = sequence < sequences
        tl.store(lengths_ptr + of_sequence + column_block, tl.sum(here, 0, keep_dims=True), mask=is_first & is_there)
        square = tl.sum(squares, 0, keep_dims=True)
        tl.store(squares_ptr + of_sequence * cols + j, square, mask=j < tl.where(is_there, cols, 0))

    count = tl.sum(counts, 0, keep_dims=True)
    total = tl.sum(totals, 0, keep_dims=True)
    mean = total / tl.maximum(count, 1.0)
    of_part = counts_ptr + part + column_block
    tl.store(of_part, count, mask=is_first)
    tl.store(shifts_ptr + part * cols + j, shift, mask=j < cols)
    tl.store(means_ptr + part * cols + j, mean, mask=j < cols)
    tl.store(deviations_ptr + part * cols + j, tl.sum(deviations, 0, keep_dims=True) - total * mean, mask=j < cols)
    for k in tl.static_range(LAYERS):
        tl.store(of_part + (k + 1) * parts, tl.sum(used_counts[k], 0, keep_dims=True), mask=is_first)
        sums_ptr = weighted_ptr + (part * LAYERS + k) * cols
        tl.store(sums_ptr + j, tl.sum(weighted[k], 0, keep_dims=True), mask=j < cols)


@triton.jit
def _sum_of(values_ptr, size, BLOCK: tl.constexpr):
    """The sum of ``size`` fp32 numbers, in fp64."""
    sums = tl.zeros([BLOCK], tl.float64)
    for first in tl.range(0, size, BLOCK):
        place = first + tl.arange(0, BLOCK)
        sums += tl.load(values_ptr + place, mask=place < size, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _unit(numbers_ptr, level):
    """The unit of a layer with running sums at ``numbers_ptr`` after a batch with the mean norm ``level``."""
    return tl.where(tl.load(numbers_ptr) > 0, tl.load(numbers_ptr + 1), tl.where(level == 0, 1.0, level))


@triton.jit(do_not_specialize=["parts", "chunks", "sequences", "count_blocks"], launch_metadata=launch_metadata)
def merge_batch(
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    weighted_ptr,
    levels_ptr,
    squares_ptr,
    lengths_ptr,
    count_before_ptr,
    mean_before_ptr,
    deviation_before_ptr,
    layers_before_ptr,
    count_ptr,
    mean_ptr,
    deviation_ptr,
    layers_ptr,
    sequence_square_ptr,
    sequence_count_ptr,
    parts,
    chunks,
    sequences,
    cols,
    count_blocks,
    layer_stride,
    LAYERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Programs for the moments, for each layer, for the sequences' counts, and for the sequences' squares."""
    across = tl.cdiv(cols, BLOCK_COLS)
    row = tl.program_id(0) // across
    block = tl.program_id(0) % across
    j = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    late = tl.program_id(0) - (1 + LAYERS) * across
    if row == 0:
        _merge_moments(
            *(counts_ptr, shifts_ptr, means_ptr, deviations_ptr, count_before_ptr, mean_before_ptr),
            *(deviation_before_ptr, count_ptr, mean_ptr, deviation_ptr, j, parts, cols),
            BLOCK_PARTS,
        )
    elif row <= LAYERS:
        if LAYERS > 0:  # Decided when Triton compiles.
            _merge_layer(
                *(counts_ptr, weighted_ptr, levels_ptr, layers_before_ptr + (row - 1) * layer_stride),
                *(layers_ptr + (row - 1) * layer_stride, row - 1, block, j, parts, cols, layer_stride),
                *(LAYERS, NUMBERS, BLOCK_PARTS),
            )
    elif late < count_blocks:
        s = late * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        count = tl.zeros([1, BLOCK_COLS], tl.float64)
        for first in tl.range(0, chunks, BLOCK_PARTS):
            chunk = first + tl.arange(0, BLOCK_PARTS)[:, None]
            place = chunk.to(tl.int64) * sequences + s
            found = tl.load(lengths_ptr + place, mask=(chunk < chunks) & (s < sequences), other=0.0)
            count += tl.sum(found.to(tl.float64), 0, keep_dims=True)
        tl.store(sequence_count_ptr + s, count.to(tl.int64), mask=s < sequences)
    else:
        late -= count_blocks
        j = late % across * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        merge_squares(squares_ptr, sequence_square_ptr, late // across, j, chunks, sequences, cols, BLOCK_PARTS)


@triton.jit
def _merge_moments(
    counts_ptr,
    shifts_ptr,
    means_ptr,
    deviations_ptr,
    count_before_ptr,
    mean_before_ptr,
    deviation_before_ptr,
    count_ptr,
    mean_ptr,
    deviation_ptr,
    j,
    parts,
    cols,
    BLOCK_PARTS: tl.constexpr,
):
    """Moments of the channels j: of all parts, the mean first, then merged with the running ones by Chan's rule."""
    own_count = tl.zeros([1, 1], tl.float64)
    total = tl.zeros(j.shape, tl.float64)
    for first in tl.range(0, parts, BLOCK_PARTS):
        counted, mean = part_means(counts_ptr, shifts_ptr, means_ptr, first, j, parts, cols, BLOCK_PARTS)
        own_count += tl.sum(counted, 0, keep_dims=True)
        total += tl.sum(mean * counted, 0, keep_dims=True)
    own_mean = total / tl.maximum(own_count, 1.0)
    deviation = tl.zeros(j.shape, tl.float64)
    for first in tl.range(0, parts, BLOCK_PARTS):
        counted, mean = part_means(counts_ptr, shifts_ptr, means_ptr, first, j, parts, cols, BLOCK_PARTS)
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        own = tl.load(deviations_ptr + part.to(tl.int64) * cols + j, mask=(part < parts) & (j < cols), other=0.0)
        apart = mean - own_mean
        deviation += tl.sum(own.to(tl.float64) + apart * apart * counted, 0, keep_dims=True)
    before = tl.load(count_before_ptr)
    count = before + own_count
    share = own_count / tl.maximum(count, 1.0)
    mean_before = tl.load(mean_before_ptr + j, mask=j < cols, other=0.0)
    deviation_before = tl.load(deviation_before_ptr + j, mask=j < cols, other=0.0)
    delta = own_mean - mean_before
    tl.store(mean_ptr + j, mean_before + delta * share, mask=j < cols)
    tl.store(deviation_ptr + j, deviation_before + deviation + delta * delta * (before * share), mask=j < cols)
    place = tl.program_id(0) + tl.zeros([1, 1], tl.int32)
    tl.store(count_ptr + place, count, mask=place == 0)


@triton.jit
def _merge_layer(
    counts_ptr,
    weighted_ptr,
    levels_ptr,
    before_ptr,
    after_ptr,
    layer,
    block,
    j,
    parts,
    cols,
    row,
    LAYERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
):
    """Running sums of one layer for the channels j; the first block also updates the layer's numbers."""
    weighted = tl.zeros(j.shape, tl.float64)
    count = tl.zeros([1, 1], tl.float64)
    for first in tl.range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)[:, None]
        place = (part.to(tl.int64) * LAYERS + layer) * cols + j
        found = tl.load(weighted_ptr + place, mask=(part < parts) & (j < cols), other=0.0)
        weighted += tl.sum(found.to(tl.float64), 0, keep_dims=True)
        counted = tl.load(counts_ptr + (layer + 1) * parts + part, mask=part < parts, other=0.0)
        count += tl.sum(counted.to(tl.float64), 0, keep_dims=True)
    inside = j < row - NUMBERS  # The padding too, which stays 0.
    tl.store(after_ptr + NUMBERS + j, tl.load(before_ptr + NUMBERS + j, mask=inside, other=0.0) + weighted, mask=inside)
    level = tl.load(levels_ptr + layer)
    place = block + tl.zeros([1, 1], tl.int32)
    at, is_first = after_ptr + place, place == 0
    finite = tl.where(tl.abs(level) < float("inf"), tl.load(before_ptr + 2), 0.0)
    tl.store(at, tl.load(before_ptr) + count, mask=is_first)
    tl.store(at + 1, _unit(before_ptr, level) + tl.zeros([1, 1], tl.float64), mask=is_first)
    tl.store(at + 2, finite + tl.zeros([1, 1], tl.float64), mask=is_first)
    tl.store(at + 3, tl.zeros([1, 1], tl.float64), mask=is_first)
