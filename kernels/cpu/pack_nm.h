// Packs the kept weights of n:m selections: values in the order of their inputs, and one bit per weight.
#pragma once

#include "select_nm.h"

namespace ace {
namespace {

// Keys of a weight that is already pruned: 2 for non-zeros, 1 for negative zero, 0 for positive zero.
ACE_INLINE Ints presence(const Ints& bits) {
    const Ints magnitude = bits & Ints::all(0x7fffffff);
    return (((Ints::all(0) - magnitude) >> 31) & Ints::all(2)) | ((bits >> 31) & Ints::all(1));
}

// Writes the lanes marked by `kept` contiguously to `to`, which has room only for those.
ACE_INLINE void compact(const uint32_t* from, int lanes, uint16_t kept, uint32_t* to) {
#if ACE_WIDTH == 16
    const __m512i v = _mm512_maskz_loadu_epi32(uint16_t((1u << lanes) - 1), from);
    const uint16_t first = uint16_t((1u << __builtin_popcount(kept)) - 1);
    _mm512_mask_storeu_epi32(to, first, _mm512_maskz_compress_epi32(kept, v));
#else
    (void)lanes;
    for (uint32_t bits = kept; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
#endif
}

ACE_INLINE void compact(const uint16_t* from, int lanes, uint16_t kept, uint16_t* to) {
#if ACE_WIDTH == 16
    const __m512i v = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(uint16_t((1u << lanes) - 1), from));
    const uint16_t first = uint16_t((1u << __builtin_popcount(kept)) - 1);
    const __m512i front = _mm512_maskz_compress_epi32(kept, v);
    _mm256_mask_storeu_epi16(to, first, _mm512_maskz_cvtepi32_epi16(0xffff, front));
#else
    (void)lanes;
    for (uint32_t bits = kept; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
#endif
}

// Packs `count` columns of row i, from `from` on; `keep(j, lanes)` marks the kept ones.
template <typename Stored, typename Keep>
ACE_INLINE void deliver_packed(const Selection& s, const Pattern& pattern, const Packing& to, int64_t i, int64_t from,
                               int count, Keep keep) {
    const int64_t words = (s.weight.cols + 31) / 32;
    const auto* weight = static_cast<const Stored*>(s.weight.data) + i * s.weight.stride + from;
    auto* values = static_cast<Stored*>(to.values) + (i * s.weight.cols + from) / pattern.m * pattern.n;
    uint8_t* meta = reinterpret_cast<uint8_t*>(to.meta + i * words) + from / 8;
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        const uint16_t kept = signs(keep(j, lanes)) & ((1u << lanes) - 1);
        memcpy(meta + j / 8, &kept, sizeof kept);
        compact(weight + j, lanes, kept, values);
        values += __builtin_popcount(kept);
    });
}

template <typename Keep>
ACE_INLINE void deliver_packed(const Selection& s, const Pattern& pattern, const Packing& to, int64_t i, int64_t from,
                               int count, Keep keep) {
    if (s.weight.element == Element::fp32) deliver_packed<uint32_t>(s, pattern, to, i, from, count, keep);
    else deliver_packed<uint16_t>(s, pattern, to, i, from, count, keep);
}

// Keys of a pruned row.
template <typename E>
struct PresenceOf {
    const typename E::Stored* weight;
    ACE_INLINE Ints operator()(int j, int lanes) const {
        __builtin_prefetch(weight + j + PREFETCH);
        return presence(bits_of(E::load(weight + j, lanes)));
    }
};

template <typename Use>
ACE_INLINE void with_presence(const Selection& s, int64_t i, int64_t from, Use use) {
    with_element(s.weight.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        use(PresenceOf<E>{static_cast<const typename E::Stored*>(s.weight.data) + i * s.weight.stride + from});
    });
}

ACE_INLINE void choose_in_place(int32_t* keys, int count, const Pattern& pattern) {
    if (pattern.n != 2 || pattern.m != 4) return choose_along_in(keys, count, pattern);
    for (int j = 0; j < count; j += LANES) store(keys + j, two_of_four(load(keys + j)));
}

// Packs rows begin..end; false if a group has more than n non-zeros.
inline bool pack_nm(const Selection& s, const Pattern& pattern, const Packing& to, int64_t begin, int64_t end) {
    alignas(64) int32_t keys[KEY_STRIP];
    const int64_t words = (s.weight.cols + 31) / 32;
    Ints lost = Ints::all(0);
    for (int64_t i = begin; i < end; ++i) {
        if (s.weight.cols % 32) to.meta[(i + 1) * words - 1] = 0;
        for (int64_t from = 0; from < s.weight.cols; from += KEY_STRIP) {
            const int count = int(s.weight.cols - from < KEY_STRIP ? s.weight.cols - from : KEY_STRIP);
            const auto keep = [&](int j, int) ACE_INLINED { return load(keys + j); };
            if (to.by_score) {
                score_keys(s, i, from, count, keys);
                choose_in_place(keys, count, pattern);
                deliver_packed(s, pattern, to, i, from, count, keep);
                continue;
            }
            with_presence(s, i, from, [&](const auto& presence) ACE_INLINED {
                each_vector(count, [&](int j, int lanes) ACE_INLINED { store(keys + j, presence(j, lanes)); });
                choose_in_place(keys, count, pattern);
                each_vector(count, [&](int j, int lanes) ACE_INLINED {
                    lost = lost | (presence(j, lanes) - (load(keys + j) & presence(j, lanes)));
                });
            });
            deliver_packed(s, pattern, to, i, from, count, keep);
        }
    }
    return sum((lost >> 1) & Ints::all(1)) == 0;
}

}  // namespace
}  // namespace ace
