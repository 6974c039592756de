// y = x W^T for the few tokens of decoding, from n:m weights of 8 or 4 bits.
// Tokens are rounded to integers of 30 bits and a sign, block by block, and split into two parts of 16 bits. So small
// inputs beside a large one keep their precision, and sums of a block are exact. Blocks are added in order, in fp32. So
// results do not depend on the instruction set, the number of threads or the other tokens of the call.
#pragma once

#include "elements.h"
#include "nm_linear.h"
#include "round_tokens.h"

namespace ace {
namespace {

// Inputs that share a word of metadata, and the most inputs in a block of tokens.
constexpr int WORD_INPUTS = 32, MOST_OF_BLOCK = 128;

// Sixteen neighboring integers of a row, and sums of their products with tokens.
#if ACE_WIDTH >= 8
using Steps = __m256i;
using Products = __m256i;

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

ACE_INLINE __m128i step_places(uint32_t bits) {
    const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(STEP_PLACES.low[bits & 0xff]));
    return _mm_add_epi8(low, _mm_load_si128(reinterpret_cast<const __m128i*>(STEP_PLACES.high[bits >> 8])));
}

// Lane k is the next of the values, int8, if bit k of the sixteen bits is set, else 0.
ACE_INLINE Steps spread_steps(__m128i values, uint32_t bits) {
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(values, step_places(bits)));
}
// The same for values after the first `skipped` ones.
ACE_INLINE Steps spread_steps(__m128i values, uint32_t bits, int skipped) {
    const __m128i places = _mm_add_epi8(step_places(bits), _mm_set1_epi8(char(skipped)));
    return _mm256_cvtepi8_epi16(_mm_shuffle_epi8(values, places));
}

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

// Values of 8 bits; sixteen of them are read.
struct EightBits {
    static constexpr int BITS = 8, LARGEST = 127, BYTES_READ = 16;

#if ACE_WIDTH >= 8
    using Values = __m128i;
    static ACE_INLINE Values load(const uint8_t* from, int64_t) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    }
#else
    using Values = const int8_t*;
    static ACE_INLINE Values load(const uint8_t* from, int64_t) { return reinterpret_cast<const int8_t*>(from); }
#endif
};

// Values of 4 bits, in two's complement; sixteen of them are read and multiplied by 16. If ODD, the first value may be
// in the upper half of its byte.
template <bool ODD>
struct FourBits {
    static constexpr int BITS = 4, LARGEST = 7 * 16, BYTES_READ = ODD ? 9 : 8;

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
};

// The number at `index`, in fp32.
ACE_INLINE float widen_one(Element element, const void* from, int64_t index) {
    if (element == Element::fp32) return static_cast<const float*>(from)[index];
    const uint16_t* half = static_cast<const uint16_t*>(from) + index;
    if (element == Element::fp16) {
#if ACE_WIDTH == 8
        return _cvtsh_ss(*half);
#else
        return Fp16::load(half, 1).part[0][0];
#endif
    }
    const uint32_t bits = uint32_t(*half) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Sums of a block's products with both parts of a token, for OUTPUTS rows. In tokens, the upper parts of sixteen inputs
// come before their lower parts.
template <int OUTPUTS>
struct BlockSums {
    Products upper[OUTPUTS], lower[OUTPUTS];

    ACE_INLINE void clear() {
        for (int r = 0; r < OUTPUTS; ++r) upper[r] = lower[r] = no_products();
    }
    ACE_INLINE void add(int r, const Steps& w, const int16_t* x) {
        upper[r] = add_products(upper[r], w, x);
        lower[r] = add_products(lower[r], w, x + LANES);
    }
    // In fp32; each is rounded once.
    ACE_INLINE void values(float* out) const {
        int32_t of_upper[OUTPUTS], of_lower[OUTPUTS];
        totals<OUTPUTS>(upper, of_upper);
        totals<OUTPUTS>(lower, of_lower);
        for (int r = 0; r < OUTPUTS; ++r) {
            out[r] = float(int64_t(of_upper[r]) * LOWER_STEPS + of_lower[r]) * (1.0f / LOWER_STEPS);
        }
    }
};

// What a word of metadata, for 32 inputs, keeps: in `one_load` at most sixteen values, which are loaded at once; in
// `two_groups` a fixed number of each sixteen; in `one_group` any number of each sixteen.
enum class Word { one_load, two_groups, one_group };

// Quantized rows, from some row on. LAST is true if fewer bytes may be left to read than a load takes.
template <typename Few, Word WORD_OF, bool LAST>
struct FewBitsRows {
    const uint8_t *values, *end;
    const uint32_t* meta;
    const FewBitsWeight& weight;
    int64_t first, stride, words, groups;
    int n, log_m;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int64_t j) const {
        ask_rows_ahead<OUTPUTS>(values, (j >> log_m) * n * Few::BITS / 8 + PACKED_AHEAD, stride);
        __builtin_prefetch(reinterpret_cast<const char*>(meta + OUTPUTS * words) + j / 8 * OUTPUTS);
    }
    ACE_INLINE typename Few::Values load(int r, int64_t value, uint8_t* copy) const {
        const uint8_t* from = values + r * stride + value * Few::BITS / 8;
        if (LAST && end - from < Few::BYTES_READ) {
            memset(copy, 0, 16);
            if (end > from) memcpy(copy, from, end - from);
            from = copy;
        }
        return Few::load(from, value);
    }
    // Calls function(steps, index) for the sixteens `index` 0 and 1 of a word of metadata.
    template <typename Function>
    ACE_INLINE void word(int r, int64_t index, Function function) const {
        const uint32_t bits = meta[r * words + index], low = bits & 0xffff, high = bits >> 16;
        const int64_t value = (index * WORD_INPUTS >> log_m) * n;
        uint8_t copy[2][16];
        const auto first = load(r, value, copy[0]);
        function(spread_steps(first, low), 0);
        if (WORD_OF == Word::one_load) {
            const int skipped = log_m > 4 ? __builtin_popcount(low) : LANES / (1 << log_m) * n;
            function(spread_steps(first, high, skipped), 1);
            return;
        }
        int64_t second = (LANES >> log_m) * n;
        if (WORD_OF == Word::one_group && log_m > 4) {
            const int earlier = __builtin_popcount(low);
            second = earlier < n ? earlier : n;
        }
        function(spread_steps(load(r, value + second, copy[1]), high), 1);
    }
    ACE_INLINE float largest(int r, int64_t group) const {
        return widen_one(weight.element, weight.absmax, (first + r) * groups + group);
    }
};

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_rounded_token(const Rows& rows, const FewBitsTask& task, const int16_t* x, const float* scales,
                                    float* sums) {
    float sum[OUTPUTS] = {};
    const int64_t of_block = task.block / WORD_INPUTS, of_group = task.group / task.block;
    for (int64_t b = 0; b < task.blocks; ++b) {
        BlockSums<OUTPUTS> block;
        block.clear();
        const int64_t stop = (b + 1) * of_block < rows.words ? (b + 1) * of_block : rows.words;
        rows.template ahead<OUTPUTS>(b * task.block);
        for (int64_t w = b * of_block; w < stop; ++w) {
            for (int r = 0; r < OUTPUTS; ++r) {
                rows.word(r, w, [&](const Steps& steps, int half) ACE_INLINED {
                    block.add(r, steps, x + (w * 2 + half) * 2 * LANES);
                });
            }
        }
        float value[OUTPUTS];
        block.values(value);
        for (int r = 0; r < OUTPUTS; ++r) {
            sum[r] = sum[r] + value[r] * (scales[b] * rows.largest(r, b / of_group));
        }
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE] = sum[r];
}

// Several tokens: each block of weights is spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_rounded_tokens(const Rows& rows, const FewBitsTask& task, const int16_t* x, const float* scales,
                                      int tokens, float* sums) {
    for (int k = 0; k < OUTPUTS * TOKENS_AT_ONCE; ++k) sums[k] = 0.0f;
    const int64_t of_block = task.block / WORD_INPUTS, of_group = task.group / task.block;
    for (int64_t b = 0; b < task.blocks; ++b) {
        alignas(64) Steps tile[OUTPUTS][MOST_OF_BLOCK / LANES];
        const int64_t first = b * of_block, stop = first + of_block < rows.words ? first + of_block : rows.words;
        rows.template ahead<OUTPUTS>(b * task.block);
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int64_t w = first; w < stop; ++w) {
                rows.word(r, w, [&](const Steps& steps, int half) ACE_INLINED {
                    tile[r][(w - first) * 2 + half] = steps;
                });
            }
        }
        float largest[OUTPUTS];
        for (int r = 0; r < OUTPUTS; ++r) largest[r] = rows.largest(r, b / of_group);
        const int count = int(stop - first) * 2;
        for (int t = 0; t < tokens; ++t) {
            const int16_t* inputs = x + (t * task.padded + b * task.block) * 2;
            BlockSums<OUTPUTS> block;
            block.clear();
            for (int k = 0; k < count; ++k) {
                for (int r = 0; r < OUTPUTS; ++r) block.add(r, tile[r][k], inputs + k * 2 * LANES);
            }
            float value[OUTPUTS];
            block.values(value);
            for (int r = 0; r < OUTPUTS; ++r) {
                float& sum = sums[r * TOKENS_AT_ONCE + t];
                sum = sum + value[r] * (scales[t * task.blocks + b] * largest[r]);
            }
        }
    }
}

template <typename Few, int OUTPUTS, typename Rows>
ACE_INLINE void few_bits_outputs(const Rows& rows, int64_t n_rows, const FewBitsTask& task, int64_t i) {
    float sums[OUTPUTS * TOKENS_AT_ONCE];
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        const int16_t* x = task.tokens + first * task.padded * 2;
        const float* scales = task.scales + first * task.blocks;
        if (tokens == 1) one_rounded_token<OUTPUTS>(rows, task, x, scales, sums);
        else some_rounded_tokens<OUTPUTS>(rows, task, x, scales, tokens, sums);
        for (int t = 0; t < tokens; ++t) {
            for (int r = 0; r < OUTPUTS; ++r) {
                const float y = sums[r * TOKENS_AT_ONCE + t] * (1.0f / Few::LARGEST);
                task.out[(first + t) * n_rows + i + r] = task.bias ? y + task.bias[i + r] : y;
            }
        }
    }
}

template <typename Few, Word WORD_OF>
inline void few_bits_rows(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    const int log_m = __builtin_ctz(unsigned(w.m));
    const int64_t stride = ((w.cols >> log_m) * w.n * Few::BITS + 7) / 8;
    const int64_t words = (w.cols + WORD_INPUTS - 1) / WORD_INPUTS;
    const int64_t groups = (w.cols + task.group - 1) / task.group;
    // Behind each row before `safe`, at least sixteen more bytes can be read.
    const int64_t safe = stride > 0 ? w.rows - (LANES + stride - 1) / stride - 1 : 0;
    const int64_t middle = safe < begin ? begin : safe < end ? safe : end;
    const auto rows = [&](int64_t i, auto last) ACE_INLINED {
        return FewBitsRows<Few, WORD_OF, decltype(last)::value>{
            w.values + i * stride, w.values + w.rows * stride, w.meta + i * words, w, i, stride, words, groups, w.n,
            log_m};
    };
    int64_t i = begin;
    for (; i + OUTPUT_TILE <= middle; i += OUTPUT_TILE) {
        few_bits_outputs<Few, OUTPUT_TILE>(rows(i, std::false_type{}), w.rows, task, i);
    }
    for (; i < end; ++i) few_bits_outputs<Few, 1>(rows(i, std::true_type{}), w.rows, task, i);
}

inline void few_bits_linear(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    const bool half = 2 * w.n <= w.m;
    if (w.bits == 8) {
        if (w.m <= LANES) few_bits_rows<EightBits, Word::two_groups>(w, task, begin, end);
        else if (half) few_bits_rows<EightBits, Word::one_load>(w, task, begin, end);
        else few_bits_rows<EightBits, Word::one_group>(w, task, begin, end);
    } else if (half && (w.m <= LANES || w.n % 2 == 0)) {
        few_bits_rows<FourBits<false>, Word::one_load>(w, task, begin, end);
    } else {
        few_bits_rows<FourBits<true>, Word::one_group>(w, task, begin, end);
    }
}

}  // namespace
}  // namespace ace
