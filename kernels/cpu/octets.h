// Spreads values to the set bits of an octet with a table, for AVX2: element k is the next value if bit k is set,
// else 0. Eight values are always read.
#pragma once

#include "vector.h"

#if ACE_WIDTH == 8
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

}  // namespace
}  // namespace ace
#endif
