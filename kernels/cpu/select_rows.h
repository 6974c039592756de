// Keeps exactly k weights of every row, or of the whole layer, without a sort.
#pragma once

#include "score.h"

namespace ace {
namespace {

// The number of keys at or above the threshold. Negative keys are padding and are not counted.
ACE_INLINE int64_t count_from(const int32_t* keys, int64_t padded, int32_t threshold) {
    const Ints at = Ints::all(threshold);
    Ints below = Ints::all(0);
    for (int64_t j = 0; j < padded; j += LANES) below = below + ((load(keys + j) - at) >> 31);
    return padded + sum(below);
}

// Index of the first of the last `wanted` keys that equal `threshold`.
ACE_INLINE int64_t last_ties(const int32_t* keys, int64_t count, int32_t threshold, int64_t wanted) {
    int64_t j = count;
    while (wanted && j > 0) wanted -= keys[--j] == threshold;
    return j;
}

// Bisects the key range until exactly k keys are at or above the threshold, or only ties are left.
inline Cut cut_row(const int32_t* keys, int64_t count, int64_t padded, int64_t k) {
    int32_t low = 0, high = HIGHEST_KEY + 1;
    int64_t above = 0;  // number of keys >= `high`, fewer than k; at least k keys are >= `low`
    if (k == 0) return {high, 0};
    if (k == count) return {low, 0};
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const int64_t from_middle = count_from(keys, padded, middle);
        if (from_middle == k) return {middle, 0};
        if (from_middle > k) {
            low = middle;
        } else {
            high = middle;
            above = from_middle;
        }
    }
    return {low, last_ties(keys, count, low, k - above)};
}

// Writes the output of a cut. `keys(j)` loads the keys of columns from + j on. Ties are kept if their column is at
// least `ties_from`.
template <typename Keys>
ACE_INLINE void deliver_cut(const Selection& s, int64_t i, int64_t from, int count, int32_t threshold,
                            int64_t ties_from, Keys keys) {
    int32_t place[LANES];
    for (int lane = 0; lane < LANES; ++lane) place[lane] = lane;
    const Ints places = load(place), at = Ints::all(threshold - 1);
    const int64_t clamped = ties_from < from ? 0 : ties_from - from < count ? ties_from - from : count;
    const Ints first_tie = Ints::all(int32_t(clamped));
    deliver(s, i, from, count, [&](int j, int) ACE_INLINED {
        const Ints before_ties = (places + Ints::all(j) - first_tie) >> 31;
        return (at - before_ties - keys(j)) >> 31;
    });
}

inline void select_rows(const Selection& s, int64_t k, int64_t begin, int64_t end, int32_t* keys) {
    const int64_t cols = s.weight.cols, padded = (cols + LANES - 1) / LANES * LANES;
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t from = 0; from < cols; from += KEY_STRIP) {
            score_keys(s, i, from, int(cols - from < KEY_STRIP ? cols - from : KEY_STRIP), keys + from);
        }
        for (int64_t j = cols; j < padded; ++j) keys[j] = -1;
        const Cut cut = cut_row(keys, cols, padded, k);
        for (int64_t from = 0; from < cols; from += KEY_STRIP) {
            const int count = int(cols - from < KEY_STRIP ? cols - from : KEY_STRIP);
            deliver_cut(s, i, from, count, cut.threshold, cut.ties_from,
                        [&](int j) ACE_INLINED { return load(keys + from + j); });
        }
    }
}

// Scores rows begin..end strip by strip and calls visit(i, from, count, keys) for each strip.
template <typename Visit>
ACE_INLINE void each_strip(const Selection& s, int64_t begin, int64_t end, Visit visit) {
    alignas(64) int32_t keys[KEY_STRIP];
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t from = 0; from < s.weight.cols; from += KEY_STRIP) {
            const int count = int(s.weight.cols - from < KEY_STRIP ? s.weight.cols - from : KEY_STRIP);
            score_keys(s, i, from, count, keys);
            visit(i, from, count, keys);
        }
    }
}

inline void count_keys(const Selection& s, const Histogram& h, int64_t begin, int64_t end, int64_t* bins) {
    each_strip(s, begin, end, [&](int64_t, int64_t, int count, const int32_t* keys) {
        for (int j = 0; j < count; ++j) {
            if (keys[j] >> h.prefix_shift == h.prefix) ++bins[(keys[j] >> h.bin_shift) & h.bin_mask];
        }
    });
}

inline int64_t find_ties(const Selection& s, int32_t threshold, int64_t wanted) {
    int64_t found = s.weight.rows * s.weight.cols;
    for (int64_t i = s.weight.rows - 1; wanted && i >= 0; --i) {
        // Strips of a row are visited in ascending order: count the row's ties, then find the last `wanted` of them.
        int64_t ties = 0;
        each_strip(s, i, i + 1, [&](int64_t, int64_t, int count, const int32_t* keys) {
            for (int j = 0; j < count; ++j) ties += keys[j] == threshold;
        });
        int64_t skipped = ties > wanted ? ties - wanted : 0;
        wanted -= ties - skipped;
        if (wanted) continue;
        each_strip(s, i, i + 1, [&](int64_t, int64_t from, int count, const int32_t* keys) {
            for (int j = 0; j < count; ++j) {
                if (keys[j] == threshold && skipped-- == 0) found = i * s.weight.cols + from + j;
            }
        });
    }
    return found;
}

inline void apply_cut(const Selection& s, const Cut& cut, int64_t begin, int64_t end) {
    each_strip(s, begin, end, [&](int64_t i, int64_t from, int count, const int32_t* keys) {
        deliver_cut(s, i, from, count, cut.threshold, cut.ties_from - i * s.weight.cols,
                    [&](int j) ACE_INLINED { return load(keys + j); });
    });
}

}  // namespace
}  // namespace ace
