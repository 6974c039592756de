// Unpacks weights to dense rows, sixteen weights at a time; elements are moved as raw bits.
#pragma once

#include "octets.h"
#include "packed_weight.h"

namespace ace {
namespace {

// to[k] is the next element of `from` if bit k is set, else 0; only `available` elements of `from` may be read.
template <typename Stored>
ACE_INLINE void spread_some(const Stored* from, int64_t available, uint16_t bits, Stored* to, int lanes) {
    for (int k = 0; k < lanes; ++k) to[k] = Stored(0);
    int64_t next = 0;
    for (uint32_t left = bits & ((1u << lanes) - 1); left && next < available; left &= left - 1) {
        to[__builtin_ctz(left)] = from[next++];
    }
}

#if ACE_WIDTH == 16
ACE_INLINE void spread_sixteen(const uint32_t* from, uint16_t bits, uint32_t* to) {
    _mm512_storeu_si512(to, _mm512_maskz_expand_epi32(bits, _mm512_loadu_si512(from)));
}

ACE_INLINE void spread_sixteen(const uint16_t* from, uint16_t bits, uint16_t* to) {
    const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m512i moved = _mm512_maskz_expand_epi32(bits, _mm512_maskz_cvtepu16_epi32(0xffff, values));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtepi32_epi16(0xffff, moved));
}

ACE_INLINE void spread_sixteen(const uint8_t* from, uint16_t bits, uint8_t* to) {
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m512i moved = _mm512_maskz_expand_epi32(bits, _mm512_maskz_cvtepu8_epi32(0xffff, values));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xffff, moved));
}
#elif ACE_WIDTH == 8 || ACE_NEON
#if ACE_NEON
ACE_INLINE void store_octet(const uint32x4x2_t& v, uint32_t* to) {
    vst1q_u32(to, v.val[0]);
    vst1q_u32(to + 4, v.val[1]);
}
ACE_INLINE void store_octet(uint16x8_t v, uint16_t* to) { vst1q_u16(to, v); }
ACE_INLINE void store_octet(uint8x8_t v, uint8_t* to) { vst1_u8(to, v); }
#else
ACE_INLINE void store_octet(const __m256i& v, uint32_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
ACE_INLINE void store_octet(const __m128i& v, uint16_t* to) { _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v); }
ACE_INLINE void store_octet(const __m128i& v, uint8_t* to) { _mm_storel_epi64(reinterpret_cast<__m128i*>(to), v); }
#endif

template <typename Stored>
ACE_INLINE void spread_sixteen(const Stored* from, uint16_t bits, Stored* to) {
    const int first = bits & 0xff;
    store_octet(spread_octet(from, first), to);
    store_octet(spread_octet(from + __builtin_popcount(first), bits >> 8), to + 8);
}
#else
template <typename Stored>
ACE_INLINE void spread_sixteen(const Stored* from, uint16_t bits, Stored* to) {
    spread_some(from, LANES, bits, to, LANES);
}
#endif

// Prefetch distance of values, in bytes.
constexpr int AHEAD = 2048;

template <typename Stored>
inline void unpack_rows(const Unpacking& task, int64_t begin, int64_t end) {
    const PackedWeight& w = task.packed;
    const int64_t stride = row_stride(w), words = (w.cols + 31) / 32;
    const auto* values = static_cast<const Stored*>(w.values);
    for (int64_t i = begin; i < end; ++i) {
        auto* row = static_cast<Stored*>(task.weight) + i * w.cols;
        const uint32_t* meta = w.meta + i * words;
        int64_t next = first_value(w, stride, i);
        for (int64_t j = 0; j < w.cols; j += LANES) {
            const uint16_t bits = uint16_t(meta[j / 32] >> (j % 32));
            // Damaged metadata cannot cause a read out of bounds.
            const int64_t available = w.n_values - next, lanes = w.cols - j;
            __builtin_prefetch(values + next + AHEAD / sizeof(Stored));
            if (available >= LANES && lanes >= LANES) spread_sixteen(values + next, bits, row + j);
            else spread_some(values + next, available, bits, row + j, int(lanes < LANES ? lanes : LANES));
            const int count = __builtin_popcount(bits);
            next += count < available ? count : available;
        }
    }
}

inline void unpack_nm(const Unpacking& task, int64_t begin, int64_t end) {
    switch (task.bytes) {
        case 1: return unpack_rows<uint8_t>(task, begin, end);
        case 2: return unpack_rows<uint16_t>(task, begin, end);
        default: return unpack_rows<uint32_t>(task, begin, end);
    }
}

}  // namespace
}  // namespace ace
