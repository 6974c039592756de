"""Register operations for Triton kernels: split and join the columns of a tile, mask weights, pack bits."""

from __future__ import annotations

from .triton_import import tl, triton


@triton.jit
def unzip(tile, WAYS: tl.constexpr):
    """Split a tile [R, C] into WAYS tiles [R, C / WAYS]; tile k holds the columns j with j % WAYS == k."""
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
    """The weight, bit for bit, if ``keep`` is -1; +0.0 if it is 0."""
    if weight.dtype.primitive_bitwidth == 32:
        bits = weight.to(tl.int32, bitcast=True) & keep
    else:
        bits = weight.to(tl.int16, bitcast=True) & keep.to(tl.int16)
    return bits.to(weight.dtype, bitcast=True)


@triton.jit
def joined_bits(codes, WIDTH: tl.constexpr):
    """Concatenate the lowest WIDTH bits of all codes; the first code is lowest."""
    word = codes[0] & ((1 << WIDTH) - 1)
    for k in tl.static_range(1, len(codes)):
        word = word | ((codes[k] & ((1 << WIDTH) - 1)) << (k * WIDTH))
    return word


@triton.jit
def bits_of(tile):
    """The bits of a tile, as integers of the same width."""
    if tile.dtype.primitive_bitwidth == 32:
        bits = tile.to(tl.int32, bitcast=True)
    elif tile.dtype.primitive_bitwidth == 16:
        bits = tile.to(tl.int16, bitcast=True)
    else:
        bits = tile.to(tl.int8, bitcast=True)
    return bits


@triton.jit
def compacted(bits, kept, N: tl.constexpr):
    """Compact M tiles of bits to the N kept ones, in order; ``kept`` is -1 for N members of every group, else 0."""
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
    """The inverse of :func:`compacted` at 2:4: the four members of every group from its two values; 0 if pruned.

    Exactly two of the bits PLACE to PLACE + 3 of ``words`` are set; they mark the kept members.
    """
    a = words << (31 - PLACE) < 0
    b = words << (30 - PLACE) < 0
    c = words << (29 - PLACE) < 0
    d = words << (28 - PLACE) < 0
    second = tl.where(b, tl.where(a, high, low), 0)
    third = tl.where(c, tl.where(d, low, high), 0)
    return tl.where(a, low, 0), second, third, tl.where(d, high, 0)


@triton.jit
def count_bits(words):
    """The number of set bits of every int32 word."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return ((fours + (fours >> 4) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def kept_before(words, j, M: tl.constexpr):
    """The number of kept inputs before j in its group of M; ``words`` is the word of metadata that contains j."""
    return count_bits(words & ((1 << j % 32) - (1 << j % 32 // M * M)))
