// y = x W^T for weights of 8 or 4 bits and tokens rounded to 8 bits: an integer for each input and a scale for every 32.
// Lane k of eight sums inputs 4 k to 4 k + 3 of each 32, or inputs 8 k to 8 k + 7 of each 64 if tokens are deinterleaved.
// These sums are exact, and the lanes are added in order, in fp32. So results do not depend on the instruction set, the
// number of threads or the other tokens of the call.
#pragma once

#include "magnitudes.h"
#include "nm_linear.h"
#include "round_tokens.h"
#include "steps.h"

namespace ace {
namespace {

// Inputs that share a word of metadata, and a scale of tokens in 8 bits; and the most inputs in a block of tokens.
constexpr int WORD_INPUTS = 32, MOST_OF_BLOCK = 128;

using Eight = float __attribute__((vector_size(32)));
using EightInts = int32_t __attribute__((vector_size(32)));

ACE_INLINE Eight eight(float value) { return value - Eight{}; }

// Four lanes of each.
ACE_INLINE Eight two_fours(float first, float second) {
#if ACE_WIDTH >= 8
    return (Eight)_mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(first));
#else
    return Eight{first, first, first, first, second, second, second, second};
#endif
}

ACE_INLINE Eight floats_of_eight(EightInts v) {
#if ACE_WIDTH >= 8
    return (Eight)_mm256_cvtepi32_ps((__m256i)v);
#else
    return __builtin_convertvector(v, Eight);
#endif
}

// Adds the lanes, always in the same order.
ACE_INLINE float sum_of_eight(const Eight& v) {
    float lane[8];
    memcpy(lane, &v, sizeof lane);
    for (int step = 4; step > 0; step /= 2) {
        for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
    }
    return lane[0];
}

// INPUTS tokens, from -127 to 127, that meet a word of a row's values.
template <int INPUTS>
struct WordTokens;

template <>
struct WordTokens<WORD_INPUTS> {
    // The scale of each lane's tokens.
    static ACE_INLINE Eight scales(const float* scales, int64_t w) { return eight(scales[w]); }
#if ACE_WIDTH >= 8
    __m256i tokens, magnitudes;

    explicit ACE_INLINE WordTokens(const int8_t* from)
        : tokens(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), magnitudes(_mm256_abs_epi8(tokens)) {}
    // The sign of each token goes to its weight. Sums of two products fit in 16 bits.
    ACE_INLINE EightInts products(const WordSteps& w) const {
        const __m256i pairs = _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(w, tokens));
        return (EightInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#elif ACE_NEON
    int8x16_t half[2];

    explicit ACE_INLINE WordTokens(const int8_t* from) : half{vld1q_s8(from), vld1q_s8(from + LANES)} {}
    ACE_INLINE EightInts products(const WordSteps& w) const {
        int32x4_t sums[2];
        for (int h = 0; h < 2; ++h) {
#if ACE_DOTPROD
            sums[h] = vdotq_s32(vdupq_n_s32(0), w.half[h], half[h]);
#else
            const int16x8_t first = vmull_s8(vget_low_s8(w.half[h]), vget_low_s8(half[h]));
            sums[h] = vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(vmull_high_s8(w.half[h], half[h])));
#endif
        }
        EightInts all;
        memcpy(&all, sums, sizeof all);
        return all;
    }
#else
    const int8_t* tokens;

    explicit ACE_INLINE WordTokens(const int8_t* from) : tokens(from) {}
    ACE_INLINE EightInts products(const WordSteps& w) const {
        int32_t sums[8] = {};
        for (int j = 0; j < WORD_INPUTS; ++j) sums[j / 4] += int32_t(w.half[j / LANES].lane[j % LANES]) * tokens[j];
        EightInts all;
        memcpy(&all, sums, sizeof all);
        return all;
    }
#endif
};

template <>
struct WordTokens<DEINTERLEAVED> {
    static ACE_INLINE Eight scales(const float* scales, int64_t w) {
        return two_fours(scales[2 * w], scales[2 * w + 1]);
    }
#if ACE_WIDTH >= 8
    // Tokens that meet low and high steps, and what the steps' offset adds to sums of four products.
    __m256i even, odd, surplus;

    explicit ACE_INLINE WordTokens(const int8_t* from)
        : even(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))),
          odd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * LANES))) {
        const __m256i offset = _mm256_set1_epi8(NIBBLE_OFFSET);
        surplus = _mm256_add_epi16(_mm256_maddubs_epi16(offset, even), _mm256_maddubs_epi16(offset, odd));
    }
    // Sums of four products fit in 16 bits.
    ACE_INLINE EightInts products(const NibbleSteps& w) const {
        const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(w.low, even), _mm256_maddubs_epi16(w.high, odd));
        return (EightInts)_mm256_madd_epi16(_mm256_sub_epi16(sums, surplus), _mm256_set1_epi16(1));
    }
#elif ACE_NEON
    int8x16_t even[2], odd[2];

    explicit ACE_INLINE WordTokens(const int8_t* from)
        : even{vld1q_s8(from), vld1q_s8(from + LANES)}, odd{vld1q_s8(from + 2 * LANES), vld1q_s8(from + 3 * LANES)} {}
    ACE_INLINE EightInts products(const NibbleSteps& w) const {
        int32x4_t sums[2];
        for (int h = 0; h < 2; ++h) {
#if ACE_DOTPROD
            sums[h] = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.low[h], even[h]), w.high[h], odd[h]);
#else
            const int16x8_t first = vmlal_s8(vmull_s8(vget_low_s8(w.low[h]), vget_low_s8(even[h])),
                                             vget_low_s8(w.high[h]), vget_low_s8(odd[h]));
            const int16x8_t second = vmlal_high_s8(vmull_high_s8(w.low[h], even[h]), w.high[h], odd[h]);
            sums[h] = vpaddq_s32(vpaddlq_s16(first), vpaddlq_s16(second));
#endif
        }
        EightInts all;
        memcpy(&all, sums, sizeof all);
        return all;
    }
#else
    const int8_t *even, *odd;

    explicit ACE_INLINE WordTokens(const int8_t* from) : even(from), odd(from + DEINTERLEAVED / 2) {}
    ACE_INLINE EightInts products(const NibbleSteps& w) const {
        int32_t sums[8] = {};
        for (int j = 0; j < DEINTERLEAVED / 2; ++j) sums[j / 4] += int32_t(w.low[j]) * even[j] + w.high[j] * odd[j];
        EightInts all;
        memcpy(&all, sums, sizeof all);
        return all;
    }
#endif
};

// Rounds every 32 tokens of a row to integers from -127 to 127, with zeros up to `padded`. Their scale is 0 if all of
// them count as zeros, NaN if one is not finite.
inline void round_to_bytes(const Matrix& matrix, int64_t padded, bool deinterleaved, int8_t* out, float* scales) {
    with_element(matrix.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t t = 0; t < matrix.rows; ++t) {
            const auto* row = static_cast<const typename E::Stored*>(matrix.data) + t * matrix.stride;
            int8_t* const to = out + t * padded;
            uint8_t in_order[DEINTERLEAVED];
            for (int64_t j = 0; j < padded; j += WORD_INPUTS) {
                Floats half[2];
                for (int h = 0; h < 2; ++h) {
                    const int64_t first = j + h * LANES, left = matrix.cols - first;
                    half[h] = left <= 0      ? Floats::all(0.0f)
                              : left < LANES ? E::load(row + first, int(left))
                                             : E::load(row + first);
                }
                int32_t lane[LANES], bits = 0;
                store(lane, max(bits_of(magnitude(half[0])), bits_of(magnitude(half[1]))));
                for (int k = 0; k < LANES; ++k) bits = lane[k] > bits ? lane[k] : bits;
                float largest;
                memcpy(&largest, &bits, sizeof largest);
                const bool finite = bits < Fp32::exponent, rounded = finite && largest >= LEAST_TOKEN;
                scales[(t * padded + j) / WORD_INPUTS] = rounded ? largest / 127 : finite ? 0.0f : __builtin_nanf("");
                const Floats factor = Floats::all(rounded ? 127 / largest : 0.0f);
                uint8_t* const word = deinterleaved ? in_order + j % DEINTERLEAVED : reinterpret_cast<uint8_t*>(to) + j;
                for (int h = 0; h < 2; ++h) {
                    const Ints steps = rounded ? nearest(half[h] * factor) : Ints::all(0);
                    store_raw(word + h * LANES, narrow_to_bytes(steps), LANES);
                }
                if (deinterleaved && j % DEINTERLEAVED) {
                    deinterleave<2>(in_order, reinterpret_cast<uint8_t*>(to) + j - j % DEINTERLEAVED);
                }
            }
        }
    });
}

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_byte_token(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                 float* sums) {
    Eight sum[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) sum[r] = eight(0.0f);
    const int64_t of_block = task.block / Rows::INPUTS, words = rows.words;
    auto magnitudes = rows.template magnitudes<OUTPUTS>(task.group / task.block);
    for (int64_t b = 0, w = 0; b < task.blocks; ++b) {
        magnitudes.go_to(b);
        Eight of_words[OUTPUTS];
        for (int r = 0; r < OUTPUTS; ++r) of_words[r] = eight(0.0f);
        rows.template ahead<OUTPUTS>(b * task.block, task.block);
        for (const int64_t stop = w + of_block < words ? w + of_block : words; w < stop; ++w) {
            const WordTokens<Rows::INPUTS> tokens(x + w * Rows::INPUTS);
            const Eight scale = tokens.scales(scales, w);
            for (int r = 0; r < OUTPUTS; ++r) {
                of_words[r] = of_words[r] + floats_of_eight(tokens.products(rows.steps(r, w))) * scale;
            }
        }
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + of_words[r] * eight(magnitudes.of(r));
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE] = sum_of_eight(sum[r]);
}

// Several tokens: each block of weights is spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_byte_tokens(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                   int tokens, float* sums) {
    Eight sum[OUTPUTS * TOKENS_AT_ONCE];
    for (Eight& of_one : sum) of_one = eight(0.0f);
    const int64_t of_block = task.block / Rows::INPUTS, words = rows.words;
    auto magnitudes = rows.template magnitudes<OUTPUTS>(task.group / task.block);
    for (int64_t b = 0; b < task.blocks; ++b) {
        typename Rows::Word tile[OUTPUTS][MOST_OF_BLOCK / Rows::INPUTS];
        const int64_t first = b * of_block;
        const int count = int(first + of_block < words ? of_block : words - first);
        rows.template ahead<OUTPUTS>(b * task.block, task.block);
        magnitudes.go_to(b);
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int k = 0; k < count; ++k) tile[r][k] = rows.steps(r, first + k);
        }
        for (int t = 0; t < tokens; ++t) {
            Eight of_words[OUTPUTS];
            for (int r = 0; r < OUTPUTS; ++r) of_words[r] = eight(0.0f);
            for (int k = 0; k < count; ++k) {
                const WordTokens<Rows::INPUTS> inputs(x + t * task.padded + (first + k) * Rows::INPUTS);
                const Eight scale = inputs.scales(scales + t * (task.padded / WORD_INPUTS), first + k);
                for (int r = 0; r < OUTPUTS; ++r) {
                    of_words[r] = of_words[r] + floats_of_eight(inputs.products(tile[r][k])) * scale;
                }
            }
            for (int r = 0; r < OUTPUTS; ++r) {
                Eight& of_one = sum[r * TOKENS_AT_ONCE + t];
                of_one = of_one + of_words[r] * eight(magnitudes.of(r));
            }
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE + t] = sum_of_eight(sum[r * TOKENS_AT_ONCE + t]);
    }
}

}  // namespace
}  // namespace ace
