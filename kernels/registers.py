"""Moves inside registers: columns of a Triton tile taken apart and put together, weights masked, bits packed."""

from __future__ import annotations

from .triton_import import tl, triton


@triton.jit
def unzip(tile, WAYS: tl.constexpr):
    """[R, C] -> a tuple of WAYS tiles [R, C / WAYS]; tile k holds the columns j with j % WAYS == k."""
    parts = (tile,)
    for _ in tl.static_range(5):
        if len(parts) < WAYS:
            low = ()
            high = ()
            for k in tl.static_range(len(parts)):
                pairs = tl.reshape(parts[k], [parts[k].shape[0], parts[k].shape[1] // 2, 2])
                even, odd = tl.split(pairs)
                low = low + (even,)
                high = high + (odd,)
            parts = low + high
    return parts


@triton.jit
def zipped(parts):
    """The inverse of :func:`unzip`."""
    for _ in tl.static_range(5):
        if len(parts) > 1:
            joined = ()
            for k in tl.static_range(len(parts) // 2):
                pairs = tl.join(parts[k], parts[k + len(parts) // 2])
                joined = joined + (tl.reshape(pairs, [pairs.shape[0], pairs.shape[1] * 2]),)
            parts = joined
    return parts[0]


@triton.jit
def masked(weight, keep):
    """The weight's own bits where ``keep`` is -1, +0.0 where it is 0."""
    if weight.dtype.primitive_bitwidth == 32:
        bits = weight.to(tl.int32, bitcast=True) & keep
    else:
        bits = weight.to(tl.int16, bitcast=True) & keep.to(tl.int16)
    return bits.to(weight.dtype, bitcast=True)


@triton.jit
def joined_bits(codes, WIDTH: tl.constexpr):
    """The lowest WIDTH bits of each code side by side, the first one lowest."""
    word = codes[0] & ((1 << WIDTH) - 1)
    for k in tl.static_range(1, len(codes)):
        word = word | ((codes[k] & ((1 << WIDTH) - 1)) << (k * WIDTH))
    return word
