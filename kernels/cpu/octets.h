// Spreads values to the set bits of an octet with a table, for AVX2 and NEON: element k is the next value if bit k is
// set, else 0. Eight values are always read.
#pragma once

#include "vector.h"

#if ACE_WIDTH == 8 || ACE_NEON
namespace ace {
namespace {

// For every octet: the index of the value for each element, 0xff for none.
struct Places {
    uint8_t of[256][8];

    constexpr Places() : of() {
        for (int bits = 0; bits < 256; ++bits) {
            for (int k = 0, next = 0; k < 8; ++k) of[bits][k] = bits >> k & 1 ? uint8_t(next++) : uint8_t(0xff);
        }
    }
};
alignas(64) constexpr Places PLACES;

// For every octet: the source byte, out of eight two-byte values, for each byte of eight elements of SIZE bytes whose
// last two bytes are the spread values; 0x80 for zero.
template <int SIZE>
struct HalfPlaces {
    uint8_t of[256][8 * SIZE];

    constexpr HalfPlaces() : of() {
        for (int bits = 0; bits < 256; ++bits) {
            for (int k = 0, next = 0; k < 8; ++k) {
                const bool kept = bits >> k & 1;
                for (int byte = 0; byte < SIZE; ++byte) {
                    const int of_value = byte - (SIZE - 2);
                    of[bits][SIZE * k + byte] = kept && of_value >= 0 ? uint8_t(2 * next + of_value) : uint8_t(0x80);
                }
                next += kept;
            }
        }
    }
};
alignas(64) constexpr HalfPlaces<2> HALF_PLACES;

#if ACE_WIDTH == 8
alignas(64) constexpr HalfPlaces<4> UPPER_HALF_PLACES;

ACE_INLINE __m128i places_of_octet(uint64_t octet) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PLACES.of[octet]));
}

ACE_INLINE __m256i spread_octet(const uint32_t* from, uint64_t octet) {
    const __m256i index = _mm256_cvtepi8_epi32(places_of_octet(octet));
    const __m256i moved = _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), index);
    return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), moved);
}

ACE_INLINE __m128i spread_octet(const uint16_t* from, uint64_t octet) {
    return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                            _mm_load_si128(reinterpret_cast<const __m128i*>(HALF_PLACES.of[octet])));
}

// The result is in the lower eight bytes.
ACE_INLINE __m128i spread_octet(const uint8_t* from, uint64_t octet) {
    return _mm_shuffle_epi8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)), places_of_octet(octet));
}

// Two-byte values in the upper halves of words, which converts bf16 to fp32.
ACE_INLINE __m256i spread_upper_halves(const uint16_t* from, uint64_t octet) {
    const __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_shuffle_epi8(twice, _mm256_load_si256(reinterpret_cast<const __m256i*>(UPPER_HALF_PLACES.of[octet])));
}
#else
// For every four bits: the source byte, out of four four-byte values, for each byte of four elements; 0x80 for zero.
struct WordPlaces {
    uint8_t of[16][16];

    constexpr WordPlaces() : of() {
        for (int bits = 0; bits < 16; ++bits) {
            for (int k = 0, next = 0; k < 4; ++k) {
                const bool kept = bits >> k & 1;
                for (int byte = 0; byte < 4; ++byte) of[bits][4 * k + byte] = kept ? uint8_t(4 * next + byte) : 0x80;
                next += kept;
            }
        }
    }
};
alignas(64) constexpr WordPlaces WORD_PLACES;

// The number of set bits of an octet: the processor counts bits only in vector registers.
struct Counts {
    uint8_t of[256];

    constexpr Counts() : of() {
        for (int bits = 1; bits < 256; ++bits) of[bits] = uint8_t(of[bits / 2] + bits % 2);
    }
};
alignas(64) constexpr Counts COUNTS;

// Four values for four bits.
ACE_INLINE uint32x4_t spread_quartet(const uint32_t* from, uint64_t quartet) {
    const uint8x16_t values = vreinterpretq_u8_u32(vld1q_u32(from));
    return vreinterpretq_u32_u8(vqtbl1q_u8(values, vld1q_u8(WORD_PLACES.of[quartet])));
}

ACE_INLINE uint32x4x2_t spread_octet(const uint32_t* from, uint64_t octet) {
    const uint64_t first = octet & 15;
    return uint32x4x2_t{{spread_quartet(from, first), spread_quartet(from + COUNTS.of[first], octet >> 4)}};
}

ACE_INLINE uint16x8_t spread_octet(const uint16_t* from, uint64_t octet) {
    const uint8x16_t values = vreinterpretq_u8_u16(vld1q_u16(from));
    return vreinterpretq_u16_u8(vqtbl1q_u8(values, vld1q_u8(HALF_PLACES.of[octet])));
}

ACE_INLINE uint8x8_t spread_octet(const uint8_t* from, uint64_t octet) {
    return vtbl1_u8(vld1_u8(from), vld1_u8(PLACES.of[octet]));
}
#endif

}  // namespace
}  // namespace ace
#endif
