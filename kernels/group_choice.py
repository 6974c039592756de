"""Selects the n highest keys of every group of m, for groups whose members are in the registers of one thread.

Keys are int32: the bits of fp32 scores without the sign. The bits of non-negative fp32 numbers sort like the numbers.
They sort infinities and NaN too, so exactly n members are kept for any scores. Results are int32 masks: -1 if kept, 0
if pruned.
"""

from __future__ import annotations

from .triton_import import tl, triton


@triton.jit
def best_of_group(keys, N: tl.constexpr):
    """Masks of the N highest keys of every group: M tiles of keys -> M tiles of masks; tile k holds member k."""
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
    """Keep each member that beats at least 4 - N of the other three; among equal keys the later one wins.

    The comparisons stay in the sign bits of six differences (keys are not negative, so none overflows). One instruction
    combines three signs, while predicates would have to be moved one by one.
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
        signs = x & y & z
    elif N == 2:
        signs = (x & y) | (x & z) | (y & z)
    else:
        signs = x | y | z
    return signs >> 31


@triton.jit
def _best_of_many(keys, N: tl.constexpr):
    """Find the N-th highest key with a sorting network; among ties with it, the last members are kept.

    The compiler keeps only the comparisons that this one key depends on.
    """
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
    """Keys in ascending order, by Batcher's odd-even merge sort: 19, 63 and 191 exchanges for 8, 16 and 32 keys."""
    for p in tl.static_range(5):
        for q in tl.static_range(5):
            if q <= p and (2 << p) <= len(keys):
                keys = _exchanges(keys, 1 << p, 1 << (p - q))
    return keys


@triton.jit
def _exchanges(keys, P: tl.constexpr, K: tl.constexpr):
    """One layer of the network: orders pairs of keys that are K apart, within runs of 2 P."""
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
