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


@triton.jit
def bits_of(tile):
    """A tile's own bits, as integers of its width."""
    if tile.dtype.primitive_bitwidth == 32:
        bits = tile.to(tl.int32, bitcast=True)
    elif tile.dtype.primitive_bitwidth == 16:
        bits = tile.to(tl.int16, bitcast=True)
    else:
        bits = tile.to(tl.int8, bitcast=True)
    return bits


@triton.jit
def compacted(bits, kept, N: tl.constexpr):
    """Of M tiles of bits, with kept -1 in N of them for every group and 0 in the others: N tiles, in order."""
    out = ()
    if N == 2 and len(kept) == 4:
        b = kept[1] & ~kept[0]
        c = kept[2] & ~kept[3]
        low = (bits[0] & kept[0].to(bits[0].dtype)) | (bits[1] & b.to(bits[0].dtype))
        high = (bits[3] & kept[3].to(bits[0].dtype)) | (bits[2] & c.to(bits[0].dtype))
        low = low | (bits[2] & (kept[2] & kept[3]).to(bits[0].dtype))
        high = high | (bits[1] & (kept[1] & kept[0]).to(bits[0].dtype))
        out = (low, high)
    else:
        for place in tl.static_range(N):
            value = bits[0] & 0
            before = kept[0] & 0
            for k in tl.static_range(len(kept)):
                here = tl.where(before == -place, kept[k], 0)
                value = value | (bits[k] & here.to(bits[0].dtype))
                before += kept[k]
            out = out + (value,)
    return out


@triton.jit
def spread(low, high, words, PLACE: tl.constexpr):
    """The inverse of :func:`compacted` at 2:4: of two tiles of bits the four members of their groups, 0 where pruned.

    Bits PLACE to PLACE + 3 of ``words`` say which are kept, exactly two.
    """
    a = words << (31 - PLACE) < 0
    b = words << (30 - PLACE) < 0
    c = words << (29 - PLACE) < 0
    d = words << (28 - PLACE) < 0
    second = tl.where(b, tl.where(a, high, low), 0)
    third = tl.where(c, tl.where(d, low, high), 0)
    return tl.where(a, low, 0), second, third, tl.where(d, high, 0)


@triton.jit
def kept_before(words, j, M: tl.constexpr):
    """How many inputs of j's group of M are kept before j; ``words`` hold a bit for each of the 32 inputs around it."""
    before = words & ((1 << j % 32) - (1 << j % 32 // M * M))
    pairs = before - (before >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((fours + (fours >> 4) & 0x0F0F0F0F) * 0x01010101) >> 24
