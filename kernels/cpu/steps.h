// Integers of quantized weights: sixteen of a row are loaded, spread to the set bits of their metadata, and multiplied
// by the parts of tokens.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

#if ACE_WIDTH >= 8 || ACE_NEON
// For every octet: in the first half of `low`, the index of the value for each element, 0x80 for none; in its second
// half, the number of values in each byte. `high` has the first half of `low` in its second half. So `low` of an octet
// and `high` of the next one add to places for sixteen elements.
struct StepPlaces {
    uint8_t low[256][16], high[256][16];

    constexpr StepPlaces() : low(), high() {
        for (int bits = 0; bits < 256; ++bits) {
            int next = 0;
            for (int k = 0; k < 8; ++k) {
                low[bits][k] = high[bits][k + 8] = bits >> k & 1 ? uint8_t(next++) : uint8_t(0x80);
            }
            for (int k = 8; k < 16; ++k) low[bits][k] = uint8_t(next);
        }
    }
};
alignas(64) constexpr StepPlaces STEP_PLACES;
#endif

// Sixteen neighboring integers of a row, and sums of their products with tokens.
#if ACE_WIDTH >= 8
using Steps = __m256i;
using Products = __m256i;

ACE_INLINE __m128i step_places(uint32_t bits) {
    const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(STEP_PLACES.low[bits & 0xff]));
    return _mm_add_epi8(low, _mm_load_si128(reinterpret_cast<const __m128i*>(STEP_PLACES.high[bits >> 8])));
}

// Lane k is the next of the values, int8, if bit k of the sixteen bits is set, else 0.
ACE_INLINE __m128i spread_steps(__m128i values, uint32_t bits) {
    return _mm_shuffle_epi8(values, step_places(bits));
}
// The same for values after the first `skipped` ones.
ACE_INLINE __m128i spread_steps(__m128i values, uint32_t bits, int skipped) {
    return _mm_shuffle_epi8(values, _mm_add_epi8(step_places(bits), _mm_set1_epi8(char(skipped))));
}
// Lane k is value k.
ACE_INLINE __m128i all_steps(__m128i values) { return values; }

ACE_INLINE Steps widen_steps(__m128i bytes) { return _mm256_cvtepi8_epi16(bytes); }
ACE_INLINE Steps widen_steps(Steps steps) { return steps; }

// 32 neighboring integers of a row, in 8 bits.
using WordSteps = __m256i;
ACE_INLINE WordSteps join_steps(__m128i first, __m128i second) { return _mm256_set_m128i(second, first); }

ACE_INLINE Products no_products() { return _mm256_setzero_si256(); }
ACE_INLINE Products add_products(Products sum, Steps w, const int16_t* x) {
    const __m256i tokens = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(w, tokens));
}
ACE_INLINE int32_t total(Products sum) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1)));
}
// The totals of OUTPUTS sums.
template <int OUTPUTS>
ACE_INLINE void totals(const Products* sums, int32_t* out) {
    if constexpr (OUTPUTS == 4) {
        const __m256i first = _mm256_hadd_epi32(sums[0], sums[1]), second = _mm256_hadd_epi32(sums[2], sums[3]);
        const __m256i halves = _mm256_hadd_epi32(first, second);
        const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), all);
    } else {
        for (int r = 0; r < OUTPUTS; ++r) out[r] = total(sums[r]);
    }
}
#elif ACE_NEON
using Products = int32x4_t;

ACE_INLINE uint8x16_t step_places(uint32_t bits) {
    return vaddq_u8(vld1q_u8(STEP_PLACES.low[bits & 0xff]), vld1q_u8(STEP_PLACES.high[bits >> 8]));
}

ACE_INLINE Products no_products() { return vdupq_n_s32(0); }

#if ACE_DOTPROD
using Steps = int8x16_t;

ACE_INLINE Steps widen_steps(int8x16_t bytes) { return bytes; }
// Of the upper or the lower bytes of a part of the tokens.
ACE_INLINE Products add_products(Products sum, Steps w, const int8_t* x) {
    return vdotq_s32(sum, w, vld1q_s8(x));
}
#else
struct Steps {
    int16x8_t half[2];
};

ACE_INLINE Steps widen_steps(int8x16_t bytes) { return Steps{{vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes)}}; }
ACE_INLINE Products add_products(Products sum, const Steps& w, const int16_t* x) {
    for (int h = 0; h < 2; ++h) {
        const int16x8_t tokens = vld1q_s16(x + 8 * h);
        sum = vmlal_s16(sum, vget_low_s16(w.half[h]), vget_low_s16(tokens));
        sum = vmlal_high_s16(sum, w.half[h], tokens);
    }
    return sum;
}
#endif

// Lane k is the next of the values, int8, if bit k of the sixteen bits is set, else 0.
ACE_INLINE int8x16_t spread_steps(int8x16_t values, uint32_t bits) { return vqtbl1q_s8(values, step_places(bits)); }
// The same for values after the first `skipped` ones.
ACE_INLINE int8x16_t spread_steps(int8x16_t values, uint32_t bits, int skipped) {
    return vqtbl1q_s8(values, vaddq_u8(step_places(bits), vdupq_n_u8(uint8_t(skipped))));
}
// Lane k is value k.
ACE_INLINE int8x16_t all_steps(int8x16_t values) { return values; }

// 32 neighboring integers of a row, in 8 bits.
struct WordSteps {
    int8x16_t half[2];
};
ACE_INLINE WordSteps join_steps(int8x16_t first, int8x16_t second) { return {{first, second}}; }

// The totals of OUTPUTS sums.
template <int OUTPUTS>
ACE_INLINE void totals(const Products* sums, int32_t* out) {
    if constexpr (OUTPUTS == 4) {
        vst1q_s32(out, vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3])));
    } else {
        for (int r = 0; r < OUTPUTS; ++r) out[r] = vaddvq_s32(sums[r]);
    }
}
#else
struct Steps {
    int16_t lane[LANES];
};
using Products = int32_t;

// Lane k is the next of sixteen values, after the first `skipped` ones, if bit k of the sixteen bits is set, else 0.
template <typename Values>
ACE_INLINE Steps spread_steps(const Values& values, uint32_t bits, int skipped = 0) {
    Steps steps = {};
    for (int next = skipped; bits; bits &= bits - 1) steps.lane[__builtin_ctz(bits)] = values[next++ % LANES];
    return steps;
}

// Lane k is value k.
template <typename Values>
ACE_INLINE Steps all_steps(const Values& values) {
    Steps steps;
    for (int k = 0; k < LANES; ++k) steps.lane[k] = values[k];
    return steps;
}

ACE_INLINE const Steps& widen_steps(const Steps& steps) { return steps; }

// 32 neighboring integers of a row.
struct WordSteps {
    Steps half[2];
};
ACE_INLINE WordSteps join_steps(const Steps& first, const Steps& second) { return {{first, second}}; }

ACE_INLINE Products no_products() { return 0; }
ACE_INLINE Products add_products(Products sum, const Steps& w, const int16_t* x) {
    for (int k = 0; k < LANES; ++k) sum += int32_t(w.lane[k]) * x[k];
    return sum;
}
template <int OUTPUTS>
ACE_INLINE void totals(const Products* sums, int32_t* out) {
    for (int r = 0; r < OUTPUTS; ++r) out[r] = sums[r];
}
#endif

// upper + lower / steps for four pairs of integers, with `steps` a power of two; each is rounded once.
ACE_INLINE void join_parts(const int32_t* upper, const int32_t* lower, int64_t steps, float* out) {
#if ACE_WIDTH >= 8
    // Both integers and their sum are exact in fp64.
    const __m256d above = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(upper)));
    const __m256d below = _mm256_cvtepi32_pd(_mm_loadu_si128(reinterpret_cast<const __m128i*>(lower)));
    const __m256d whole = _mm256_add_pd(above, _mm256_mul_pd(below, _mm256_set1_pd(1.0 / double(steps))));
    _mm_storeu_ps(out, _mm256_cvtpd_ps(whole));
#else
    for (int k = 0; k < 4; ++k) out[k] = float(int64_t(upper[k]) * steps + lower[k]) * (1.0f / float(steps));
#endif
}

// Values of 8 bits; sixteen of them are read, or 32 as two vectors.
struct EightBits {
    static constexpr int BITS = 8, LARGEST = 127, BYTES_READ = 16, INPUTS = 32, ROWS_AT_ONCE = 4;

#if ACE_WIDTH >= 8
    using Values = __m128i;
    static ACE_INLINE Values load(const uint8_t* from, int64_t) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
    static ACE_INLINE WordSteps load_word(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
#elif ACE_NEON
    using Values = int8x16_t;
    static ACE_INLINE Values load(const uint8_t* from, int64_t) { return vreinterpretq_s8_u8(vld1q_u8(from)); }
#else
    using Values = const int8_t*;
    static ACE_INLINE Values load(const uint8_t* from, int64_t) { return reinterpret_cast<const int8_t*>(from); }
#endif
#if ACE_WIDTH < 8
    static ACE_INLINE WordSteps load_word(const uint8_t* from) {
        return join_steps(all_steps(load(from, 0)), all_steps(load(from + LANES, 0)));
    }
#endif
    // Calls function(steps, unit) for both sixteens of a word.
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        for (int unit = 0; unit < 2; ++unit) function(all_steps(load(from + unit * LANES, 0)), unit);
    }
};

// Values of 4 bits, in two's complement; sixteen of them are read and multiplied by 16. If ODD, the first value may be
// in the upper half of its byte.
template <bool ODD>
struct FourBits {
    static constexpr int BITS = 4, LARGEST = 7 * 16, BYTES_READ = ODD ? 9 : 8, INPUTS = 32, ROWS_AT_ONCE = 4;

    static ACE_INLINE uint64_t pairs_at(const uint8_t* from, int64_t value) {
        uint64_t pairs;
        memcpy(&pairs, from, sizeof pairs);
        if (!ODD) return pairs;
        const int shift = int(value % 2) * 4;
        return pairs >> shift | uint64_t(from[8]) << 1 << (63 - shift);
    }
#if ACE_WIDTH >= 8
    using Values = __m128i;
    static ACE_INLINE Values load(const uint8_t* from, int64_t value) {
        const __m128i pairs = _mm_cvtsi64_si128(int64_t(pairs_at(from, value))), upper = _mm_set1_epi8(-16);
        return _mm_unpacklo_epi8(_mm_and_si128(_mm_slli_epi16(pairs, 4), upper), _mm_and_si128(pairs, upper));
    }
    static ACE_INLINE WordSteps load_word(const uint8_t* from) {
        const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256i both = _mm256_or_si256(_mm256_slli_epi16(pairs, 4), _mm256_slli_epi16(pairs, 8));
        return _mm256_and_si256(both, _mm256_set1_epi8(-16));
    }
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), upper = _mm_set1_epi8(-16);
        const __m128i first = _mm_and_si128(_mm_slli_epi16(pairs, 4), upper), second = _mm_and_si128(pairs, upper);
        function(_mm_unpacklo_epi8(first, second), 0);
        function(_mm_unpackhi_epi8(first, second), 1);
    }
#elif ACE_NEON
    using Values = int8x16_t;
    static ACE_INLINE Values load(const uint8_t* from, int64_t value) {
        const uint8x8_t pairs = vcreate_u8(pairs_at(from, value)), upper = vand_u8(pairs, vdup_n_u8(0xf0));
        const uint8x8x2_t values = vzip_u8(vshl_n_u8(pairs, 4), upper);
        return vreinterpretq_s8_u8(vcombine_u8(values.val[0], values.val[1]));
    }
#else
    struct Values {
        int8_t lane[LANES];
        ACE_INLINE int8_t operator[](int k) const { return lane[k]; }
    };
    static ACE_INLINE Values load(const uint8_t* from, int64_t value) {
        const uint64_t pairs = pairs_at(from, value);
        Values values;
        for (int k = 0; k < LANES; ++k) values.lane[k] = int8_t(uint8_t(pairs >> 4 * k << 4));
        return values;
    }
#endif
#if ACE_WIDTH < 8
    static ACE_INLINE WordSteps load_word(const uint8_t* from) {
        return join_steps(all_steps(load(from, 0)), all_steps(load(from + LANES / 2, 0)));
    }
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        for (int unit = 0; unit < 2; ++unit) function(all_steps(load(from + unit * LANES / 2, 0)), unit);
    }
#endif
};

// The 64 values of 32 bytes as two vectors of bytes, the lower halves of the bytes and the upper ones.
struct NibbleSteps {
#if ACE_WIDTH >= 8
    __m256i low, high;  // plus NIBBLE_OFFSET
#elif ACE_NEON
    int8x16_t low[2], high[2];
#else
    int8_t low[32], high[32];
#endif
};
constexpr int NIBBLE_OFFSET = 8;

// As FourBits, for 64 values in the order of deinterleaved tokens, so they need not be interleaved. The sums of more rows
// at once would not fit in registers beside the tokens.
struct DeinterleavedFourBits {
    static constexpr int BITS = 4, LARGEST = 7, INPUTS = DEINTERLEAVED, ROWS_AT_ONCE = 2;

#if ACE_WIDTH >= 8
    static ACE_INLINE __m256i load(const uint8_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    }
    static ACE_INLINE NibbleSteps load_word(const uint8_t* from) {
        const __m256i pairs = _mm256_xor_si256(load(from), _mm256_set1_epi8(char(NIBBLE_OFFSET * 0x11)));
        const __m256i lower = _mm256_set1_epi8(15);
        return {_mm256_and_si256(pairs, lower), _mm256_and_si256(_mm256_srli_epi16(pairs, 4), lower)};
    }
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        const __m256i four = load(from);
        function(_mm256_srai_epi16(_mm256_slli_epi16(four, 12), 12), 0);
        function(_mm256_srai_epi16(_mm256_slli_epi16(four, 8), 12), 1);
        function(_mm256_srai_epi16(_mm256_slli_epi16(four, 4), 12), 2);
        function(_mm256_srai_epi16(four, 12), 3);
    }
#elif ACE_NEON
    static ACE_INLINE NibbleSteps load_word(const uint8_t* from) {
        NibbleSteps steps;
        for (int half = 0; half < 2; ++half) {
            const int8x16_t pairs = vreinterpretq_s8_u8(vld1q_u8(from + half * LANES));
            steps.low[half] = vshrq_n_s8(vshlq_n_s8(pairs, 4), 4);
            steps.high[half] = vshrq_n_s8(pairs, 4);
        }
        return steps;
    }
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        const NibbleSteps steps = load_word(from);
        for (int half = 0; half < 2; ++half) function(steps.low[half], half);
        for (int half = 0; half < 2; ++half) function(steps.high[half], 2 + half);
    }
#else
    static ACE_INLINE NibbleSteps load_word(const uint8_t* from) {
        NibbleSteps steps;
        for (int k = 0; k < INPUTS / 2; ++k) {
            steps.low[k] = int8_t(int8_t(uint8_t(from[k] << 4)) >> 4);
            steps.high[k] = int8_t(int8_t(from[k]) >> 4);
        }
        return steps;
    }
    template <typename Function>
    static ACE_INLINE void load_units(const uint8_t* from, Function function) {
        const NibbleSteps steps = load_word(from);
        for (int half = 0; half < 2; ++half) function(all_steps(steps.low + half * LANES), half);
        for (int half = 0; half < 2; ++half) function(all_steps(steps.high + half * LANES), 2 + half);
    }
#endif
};

}  // namespace
}  // namespace ace
