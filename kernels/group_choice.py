"""Which n of a group of m survive, for groups whose members lie in the registers of one thread.

Scores come as int32 keys, their bits without the sign: those of a non-negative fp32 number order as the
number does, and they order infinities and NaN too, so that exactly n survive whatever the scores hold.
Survivors go as int32 words, -1 where kept and 0 where pruned.
"""

from __future__ import annotations

from .triton_import import tl, triton


@triton.jit
def best_of_group(keys, N: tl.constexpr):
    """A tuple of M tiles of keys, member k of every group in tile k -> a tuple of M tiles, N of them -1."""
    if len(keys) == 2:
        lost = (keys[0] - keys[1] - 1) >> 31
        kept = (~lost, lost)
    elif len(keys) == 4:
        kept = _best_of_four(keys[0], keys[1], keys[2], keys[3], N)
    else:
        kept = _best_of_many(keys, N)
    return kept


@triton.jit
def _best_of_four(a, b, c, d, N: tl.constexpr):
    """Who beats at least 4 - N of three; among equals the later one does.

    Comparisons are left in the sign bits of six differences (keys are not negative, so none overflows):
    predicates would be moved one by one, signs are combined three at a time.
    """
    ab = b - a
    ac = c - a
    ad = d - a
    bc = c - b
    bd = d - b
    cd = d - c
    return (
        _wins(ab, ac, ad, N),
        _wins(~ab, bc, bd, N),
        _wins(~ac, ~bc, cd, N),
        _wins(~ad, ~bd, ~cd, N),
    )


@triton.jit
def _wins(x, y, z, N: tl.constexpr):
    if N == 1:
        enough = x & y & z
    elif N == 2:
        enough = (x & y) | (x & z) | (y & z)
    else:
        enough = x | y | z
    return enough >> 31


@triton.jit
def _best_of_many(keys, N: tl.constexpr):
    """The N-th best key by a sorting network (of which only its cone is compiled), ties from the last one down."""
    threshold = _sorted(keys)[len(keys) - N]
    spare = tl.full(threshold.shape, N, tl.int32)
    for k in tl.static_range(len(keys)):
        spare -= (keys[k] > threshold).to(tl.int32)
    kept = ()
    for back in tl.static_range(len(keys)):
        key = keys[len(keys) - 1 - back]
        tied = key == threshold
        kept = (-((key > threshold) | (tied & (spare > 0))).to(tl.int32),) + kept
        spare -= tied.to(tl.int32)
    return kept


@triton.jit
def _sorted(keys):
    """Ascending, by Batcher's odd-even merge sort: 19, 63 and 191 exchanges for 8, 16 and 32 keys."""
    for p in tl.static_range(5):
        for q in tl.static_range(5):
            if q <= p and (2 << p) <= len(keys):
                keys = _exchanges(keys, 1 << p, 1 << (p - q))
    return keys


@triton.jit
def _exchanges(keys, P: tl.constexpr, K: tl.constexpr):
    """One layer of the network: keys K apart put in order, inside runs of 2 P."""
    out = ()
    for k in tl.static_range(len(keys)):
        if _is_lower(k, P, K, len(keys)):
            out = out + (tl.minimum(keys[k], keys[k + K]),)
        elif _is_lower(k - K, P, K, len(keys)):
            out = out + (tl.maximum(keys[k - K], keys[k]),)
        else:
            out = out + (keys[k],)
    return out


@triton.constexpr_function
def _is_lower(k, p, distance, size):
    offset = k - distance % p
    in_lower_half = offset >= 0 and offset % (2 * distance) < distance
    return in_lower_half and k + distance < size and k // (2 * p) == (k + distance) // (2 * p)
