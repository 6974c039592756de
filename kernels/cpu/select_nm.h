// Keeps n of every m by rank counting: a lane is kept if it beats at least m - n others of its group.
// Lane k beats lane l if key_l - key_k - [k > l] is negative; so among equal keys, the lower index loses.
#pragma once

#include "score.h"

namespace ace {
namespace {

// All ones in lanes whose index in their group of GROUP lanes is at least `place`, else 0.
template <int GROUP>
ACE_INLINE Ints from_place(int place) {
    int32_t lane[LANES];
    for (int k = 0; k < LANES; ++k) lane[k] = k % GROUP >= place ? -1 : 0;
    return load(lane);
}

// Negative in lane k if it beats the lane BY positions after it (modulo the group).
template <int GROUP, int BY>
ACE_INLINE Ints beats(const Ints& keys) {
    return rotate<GROUP, BY>(keys) - (keys - from_place<GROUP>(GROUP - BY));
}

ACE_INLINE Ints two_of_four(const Ints& keys) {
    const Ints first = beats<4, 1>(keys), second = beats<4, 2>(keys), third = beats<4, 3>(keys);
    return ((first & second) | (third & (first | second))) >> 31;
}

// For each lane of `keys`, minus the number of lanes of `others` that it beats. A group of more than 16 spans several
// vectors: `keys` is `offset` vectors after `others`.
template <int GROUP, int... BY>
ACE_INLINE Ints beaten(const Ints& keys, const Ints& others, int offset, std::integer_sequence<int, BY...>) {
    Ints count = Ints::all(0);
    const auto compare = [&](const Ints& other, const Ints& ties) ACE_INLINED {
        count = count + ((other - (keys - ties)) >> 31);
    };
    const Ints later = Ints::all(offset > 0 ? -1 : 0);
    (compare(rotate<GROUP, BY>(others), offset ? later : from_place<GROUP>(GROUP - BY)), ...);
    return count;
}

template <int M>
ACE_INLINE void choose_along_in(int32_t* keys, int count, int n) {
    constexpr int VECTORS = M > LANES ? M / LANES : 1, GROUP = M > LANES ? LANES : M;
    constexpr auto turns = std::make_integer_sequence<int, GROUP>{};
    const Ints losses = Ints::all(M - n - 1);
    for (int j = 0; j < count; j += VECTORS * LANES) {
        Ints group[VECTORS];
        for (int a = 0; a < VECTORS; ++a) group[a] = load(keys + j + a * LANES);
        for (int a = 0; a < VECTORS; ++a) {
            Ints below = losses;
            for (int b = 0; b < VECTORS; ++b) below = below + beaten<GROUP>(group[a], group[b], a - b, turns);
            store(keys + j + a * LANES, below >> 31);
        }
    }
}

ACE_INLINE void choose_along_in(int32_t* keys, int count, const Pattern& pattern) {
    switch (pattern.m) {
        case 2: return choose_along_in<2>(keys, count, pattern.n);
        case 4: return choose_along_in<4>(keys, count, pattern.n);
        case 8: return choose_along_in<8>(keys, count, pattern.n);
        case 16: return choose_along_in<16>(keys, count, pattern.n);
        default: return choose_along_in<32>(keys, count, pattern.n);
    }
}

// Groups run along the m rows of `keys`, which are `stride` elements apart.
ACE_INLINE void choose_along_out(int32_t* keys, int count, int stride, const Pattern& pattern) {
    const int m = pattern.m;
    for (int j = 0; j < count; j += LANES) {
        Ints wins[32];
        for (int k = 0; k < m; ++k) wins[k] = Ints::all(pattern.n - m + k);
        for (int k = 0; k < m; ++k) {
            const Ints key = load(keys + k * stride + j);
            for (int l = k + 1; l < m; ++l) {
                const Ints win = (load(keys + l * stride + j) - key) >> 31;
                wins[k] = wins[k] - win;
                wins[l] = wins[l] + win;
            }
        }
        for (int k = 0; k < m; ++k) store(keys + k * stride + j, (Ints::all(-1) - wins[k]) >> 31);
    }
}

// 2:4, the pattern of sparse tensor cores: from scores to the selection in registers.
inline void select_two_of_four(const Selection& s, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
        with_scorer(s, i, 0, [&](const auto& score) {
            deliver(s, i, 0, int(s.weight.cols),
                    [&](int j, int lanes) ACE_INLINED { return two_of_four(score(j, lanes)); });
        });
    }
}

inline void select_nm(const Selection& s, const Pattern& pattern, int64_t begin, int64_t end) {
    if (pattern.n == 2 && pattern.m == 4 && !pattern.along_out) return select_two_of_four(s, begin, end);
    constexpr int MOST_KEYS = 8 * KEY_STRIP;
    alignas(64) int32_t keys[MOST_KEYS];
    const int height = pattern.along_out ? pattern.m : 1;
    const int strip = pattern.along_out ? MOST_KEYS / 32 : KEY_STRIP;
    for (int64_t group = begin; group < end; ++group) {
        const int64_t top = group * height;
        for (int64_t from = 0; from < s.weight.cols; from += strip) {
            const int count = int(s.weight.cols - from < strip ? s.weight.cols - from : strip);
            for (int k = 0; k < height; ++k) score_keys(s, top + k, from, count, keys + k * strip);
            if (pattern.along_out) choose_along_out(keys, count, strip, pattern);
            else choose_along_in(keys, count, pattern);
            for (int k = 0; k < height; ++k) {
                deliver(s, top + k, from, count, [&](int j, int) ACE_INLINED { return load(keys + k * strip + j); });
            }
        }
    }
}

}  // namespace
}  // namespace ace
