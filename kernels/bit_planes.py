"""Exact top-k by radix selection on bit planes: each step finds one bit of the threshold, for 32 keys per instruction.

A thread transposes 32 of its uint32 keys into words: word b holds bit b of all 32 keys. The sign bit is left out, since
keys are the bits of non-negative fp32 numbers. Steps go from the highest bit to the lowest. Each counts the candidates
(keys equal to the threshold so far) that have the bit set. If there are at least as many as are still needed, the other
candidates are rejected; if there are fewer, they are all selected, and the search goes on among the others. The same
steps over the bits of the index resolve ties, from the highest index to the lowest.

A part is a tile of words that a program holds; a step covers all parts of a row.
"""

from __future__ import annotations

from .registers import unzip
from .triton_import import tl, triton


@triton.jit
def planes_of(keys):
    """Transpose [WORDS, 32] keys to 32 tiles [WORDS, 1]: bit e of tile b is bit b of key e."""
    for log_distance in tl.static_range(5):
        keys = _exchanged(keys, 16 >> log_distance)
    return unzip(keys, 32)


@triton.jit
def _exchanged(words, DISTANCE: tl.constexpr):
    """One butterfly stage of the 32 x 32 transpose, between words DISTANCE apart; after five the order is restored."""
    LOW: tl.constexpr = 0xFFFFFFFF // ((1 << DISTANCE) + 1)
    HIGH: tl.constexpr = 0xFFFFFFFF - LOW
    count: tl.constexpr = words.shape[0]
    first, second = tl.split(tl.permute(tl.reshape(words, [count, 2, 16]), (0, 2, 1)))
    low = (first & LOW) | ((second << DISTANCE) & HIGH)
    high = ((first >> DISTANCE) & LOW) | (second & HIGH)
    return tl.reshape(tl.join(low, high), [count, 32])


@triton.jit
def valid_words(index, accesses, VECTOR: tl.constexpr, LOG_THREADS: tl.constexpr):
    """Words with a set bit for each key inside the row; the row has ``accesses`` accesses of VECTOR keys."""
    SHARE: tl.constexpr = 32 // VECTOR
    thread = index & ((1 << LOG_THREADS) - 1)
    left = ((accesses - thread + ((1 << LOG_THREADS) - 1)) >> LOG_THREADS) - (index >> LOG_THREADS) * SHARE
    places = tl.minimum(tl.maximum(left, 0), SHARE) * VECTOR
    return tl.where(places > 0, tl.full(index.shape, 0xFFFFFFFF, tl.uint32) >> (32 - places).to(tl.uint32), 0)


@triton.jit
def highest(planes, valid, indices, k, VECTOR: tl.constexpr, LOG_THREADS: tl.constexpr):
    """Select the k highest keys; among equal keys, those with the highest index.

    Args:
        planes: for each part, the result of :func:`planes_of`.
        valid: for each part, the result of :func:`valid_words`; at least k keys are valid.
        indices: for each part, the numbers [WORDS, 1] of its words in the row, w * THREADS + t. Key e of
            word (w, t) has the index ((w * 32 / VECTOR + e / VECTOR) * THREADS + t) * VECTOR + e % VECTOR.
        k: how many keys to select, at least 1.

    Returns:
        For each part, words [WORDS, 1] with a set bit for each selected key.
    """
    tied = valid
    above = ()
    for p in tl.static_range(len(valid)):
        above = above + (valid[p] ^ valid[p],)
    need = k
    for step in tl.static_range(31):
        plane = ()
        for p in tl.static_range(len(valid)):
            plane = plane + (planes[p][30 - step],)
        tied, above, need = _narrowed(tied, above, need, plane, LOG_THREADS)
    if _count(tied, LOG_THREADS) > need:
        tied, above = _settled(tied, above, need, indices, VECTOR, LOG_THREADS)
    kept = ()
    for p in tl.static_range(len(valid)):
        kept = kept + (tied[p] | above[p],)
    return kept


@triton.jit
def _settled(tied, above, need, indices, VECTOR: tl.constexpr, LOG_THREADS: tl.constexpr):
    """Resolve ties by the bits of the index, highest first: word of the row, access, thread, position in the access."""
    for step in tl.static_range(3 + 5 + LOG_THREADS):
        plane = ()
        for p in tl.static_range(len(tied)):
            plane = plane + (_index_plane(indices[p], step, VECTOR, LOG_THREADS),)
        tied, above, need = _narrowed(tied, above, need, plane, LOG_THREADS)
    return tied, above


@triton.jit
def _index_plane(index, STEP: tl.constexpr, VECTOR: tl.constexpr, LOG_THREADS: tl.constexpr):
    ACCESS_BITS: tl.constexpr = _log2(32 // VECTOR)
    if STEP < 3:
        plane = (0 - ((index >> (LOG_THREADS + 2 - STEP)) & 1)).to(tl.uint32)
    elif STEP < 3 + ACCESS_BITS:
        plane = tl.full(index.shape, _places_with_bit(7 - STEP), tl.uint32)
    elif STEP < 3 + ACCESS_BITS + LOG_THREADS:
        plane = (0 - ((index >> (LOG_THREADS + ACCESS_BITS + 2 - STEP)) & 1)).to(tl.uint32)
    else:
        plane = tl.full(index.shape, _places_with_bit(LOG_THREADS + 7 - STEP), tl.uint32)
    return plane


@triton.jit
def _narrowed(tied, above, need, plane, LOG_THREADS: tl.constexpr):
    """One step: candidates with the bit set move to ``above`` if they are too few, else only they stay candidates."""
    ones = ()
    for p in tl.static_range(len(tied)):
        ones = ones + (tied[p] & plane[p],)
    count = _count(ones, LOG_THREADS)
    too_few = ((count - need) >> 31).to(tl.uint32)
    narrowed = ()
    raised = ()
    for p in tl.static_range(len(tied)):
        narrowed = narrowed + (tied[p] & (plane[p] ^ too_few),)
        raised = raised + (above[p] | (ones[p] & too_few),)
    return narrowed, raised, need - (count & too_few.to(tl.int32))


@triton.jit
def _count(words, LOG_THREADS: tl.constexpr):
    """Number of set bits in all words of a program: first within each thread, then across threads."""
    counts = tl.zeros([1 << LOG_THREADS], tl.int32)
    for p in tl.static_range(len(words)):
        population = tl.reshape(_population(words[p]), [words[p].shape[0] >> LOG_THREADS, 1 << LOG_THREADS])
        counts += tl.sum(population, 0)
    return tl.sum(counts, 0)


@triton.jit
def _population(word):
    """Number of set bits in each word; LLVM recognizes this form and emits one instruction."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.constexpr_function
def _log2(number):
    return number.bit_length() - 1


@triton.constexpr_function
def _places_with_bit(bit):
    return sum(1 << place for place in range(32) if place >> bit & 1)
