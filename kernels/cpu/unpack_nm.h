// Dense rows from weights packed n:m, sixteen at a time: bits are moved, whatever they stand for.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

// to[k] is the next of `from` where bit k is set, else 0; of `from`, `available` may be read.
template <typename Stored>
ACE_INLINE void spread_some(const Stored* from, int64_t available, uint16_t bits, Stored* to, int lanes) {
    for (int k = 0, next = 0; k < lanes; ++k) {
        const bool kept = bits >> k & 1;
        to[k] = kept && next < available ? from[next] : Stored(0);
        next += kept;
    }
}

#if ACE_WIDTH == 8
// For every octet of bits: which of the values goes to each place, 0xff for none.
struct Places {
    uint8_t of[256][8];

    constexpr Places() : of() {
        for (int bits = 0; bits < 256; ++bits) {
            for (int k = 0, next = 0; k < 8; ++k) of[bits][k] = bits >> k & 1 ? uint8_t(next++) : uint8_t(0xff);
        }
    }
};
alignas(64) constexpr Places PLACES;

ACE_INLINE void spread_eight(const uint32_t* from, __m128i places, uint32_t* to) {
    const __m256i index = _mm256_cvtepi8_epi32(places);
    const __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), index);
    const __m256i none = _mm256_srai_epi32(index, 31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_andnot_si256(none, moved));
}

ACE_INLINE void spread_eight(const uint16_t* from, __m128i places, uint16_t* to) {
    const __m128i twice = _mm_adds_epi8(places, places);
    const __m128i bytes = _mm_or_si128(_mm_unpacklo_epi8(twice, twice), _mm_set1_epi16(0x0100));
    const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(values, bytes));
}

ACE_INLINE void spread_eight(const uint8_t* from, __m128i places, uint8_t* to) {
    const __m128i values = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(values, places));
}
#endif

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
#elif ACE_WIDTH == 8
template <typename Stored>
ACE_INLINE void spread_sixteen(const Stored* from, uint16_t bits, Stored* to) {
    const int first = bits & 0xff;
    const auto places = [](int octet) ACE_INLINED {
        return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.of[octet]));
    };
    spread_eight(from, places(first), to);
    spread_eight(from + __builtin_popcount(first), places(bits >> 8), to + 8);
}
#else
template <typename Stored>
ACE_INLINE void spread_sixteen(const Stored* from, uint16_t bits, Stored* to) {
    spread_some(from, LANES, bits, to, LANES);
}
#endif

// Bytes between what is read of the values and what memory is asked for meanwhile.
constexpr int AHEAD = 2048;

template <typename Stored>
inline void unpack_rows(const Unpacking& task, int64_t begin, int64_t end) {
    const int log_m = __builtin_ctz(unsigned(task.m));
    const int64_t stride = (task.cols >> log_m) * task.n, words = (task.cols + 31) / 32;
    const auto* values = static_cast<const Stored*>(task.values);
    for (int64_t i = begin; i < end; ++i) {
        auto* row = static_cast<Stored*>(task.weight) + i * task.cols;
        const uint32_t* meta = task.meta + i * words;
        int64_t before = 0;
        for (int64_t j = 0; j < task.cols; j += LANES) {
            const uint16_t bits = uint16_t(meta[j / 32] >> (j % 32));
            // Counted from the group, so that damaged metadata do not lead outside.
            int64_t next = i * stride + (j >> log_m) * task.n;
            if (task.m == 2 * LANES && j % 32) next += before < task.n ? before : task.n;
            before = __builtin_popcount(bits);
            const int64_t available = task.rows * stride - next, lanes = task.cols - j;
            __builtin_prefetch(values + next + AHEAD / sizeof(Stored));
            if (available >= LANES && lanes >= LANES) spread_sixteen(values + next, bits, row + j);
            else spread_some(values + next, available, bits, row + j, int(lanes < LANES ? lanes : LANES));
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
