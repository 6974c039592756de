// y = x W^T for the few tokens of decoding, from weights of 8 or 4 bits: n:m, or all of a row.
// Tokens are rounded to integers of 30 bits and a sign, block by block, and split into two parts of 16 bits. So small
// inputs beside a large one keep their precision, and sums of a block are exact. Blocks are added in order, in fp32. So
// results do not depend on the instruction set, the number of threads or the other tokens of the call.
#pragma once

#include "byte_inputs.h"
#include "elements.h"
#include "nm_linear.h"
#include "round_tokens.h"
#include "steps.h"

namespace ace {
namespace {

// Sums of a block's products with both parts of a token, for OUTPUTS rows. In tokens, the upper parts of sixteen inputs
// come before their lower parts.
template <int OUTPUTS>
struct BlockSums {
#if ACE_DOTPROD
    // The sums for the upper and the lower bytes of either part, and of the weights.
    Products high[2][OUTPUTS], low[2][OUTPUTS], weights[OUTPUTS];

    ACE_INLINE void clear() {
        for (int r = 0; r < OUTPUTS; ++r) {
            weights[r] = no_products();
            for (int part = 0; part < 2; ++part) high[part][r] = low[part][r] = no_products();
        }
    }
    ACE_INLINE void add(int r, const Steps& w, const int16_t* x) {
        const int8_t* bytes = reinterpret_cast<const int8_t*>(x);
        for (int part = 0; part < 2; ++part) {
            high[part][r] = add_products(high[part][r], w, bytes + part * 2 * LANES);
            low[part][r] = add_products(low[part][r], w, bytes + part * 2 * LANES + LANES);
        }
        weights[r] = vdotq_s32(weights[r], w, vdupq_n_s8(1));
    }
    // The sums of part 0 or 1. They fit in 32 bits, so it does not matter if a summand does not.
    ACE_INLINE void totals_of(int part, int32_t* out) const {
        Products sums[OUTPUTS];
        for (int r = 0; r < OUTPUTS; ++r) {
            sums[r] = vaddq_s32(vshlq_n_s32(high[part][r], 8), vaddq_s32(low[part][r], vshlq_n_s32(weights[r], 7)));
        }
        totals<OUTPUTS>(sums, out);
    }
#else
    Products sums[2][OUTPUTS];

    ACE_INLINE void clear() {
        for (int r = 0; r < OUTPUTS; ++r) sums[0][r] = sums[1][r] = no_products();
    }
    ACE_INLINE void add(int r, const Steps& w, const int16_t* x) {
        for (int part = 0; part < 2; ++part) sums[part][r] = add_products(sums[part][r], w, x + part * LANES);
    }
    ACE_INLINE void totals_of(int part, int32_t* out) const { totals<OUTPUTS>(sums[part], out); }
#endif
    // In fp32; each is rounded once.
    ACE_INLINE void values(float* out) const {
        int32_t of_upper[OUTPUTS], of_lower[OUTPUTS];
        totals_of(0, of_upper);
        totals_of(1, of_lower);
        if constexpr (OUTPUTS == 4) return join_parts(of_upper, of_lower, LOWER_STEPS, out);
        for (int r = 0; r < OUTPUTS; ++r) {
            out[r] = float(int64_t(of_upper[r]) * LOWER_STEPS + of_lower[r]) * (1.0f / LOWER_STEPS);
        }
    }
};

// Quantized rows, from some row on. A word of metadata is for 32 inputs, and keeps `of_word` values. If AT_ONCE they are
// at most sixteen and loaded at once. Else the second sixteen inputs have a load of their own. If COUNTED, any number of
// the values may belong to the first sixteen inputs; else half of them do. LAST is true if fewer bytes may be left to read than a load takes.
template <typename Few, bool AT_ONCE, bool COUNTED, bool LAST>
struct FewBitsRows {
    using Word = WordSteps;
    static constexpr int ROWS_AT_ONCE = Few::ROWS_AT_ONCE, INPUTS = WORD_INPUTS, UNITS = INPUTS / LANES;

    const uint8_t *values, *end;
    const uint32_t* meta;
    const FewBitsWeight& weight;
    int64_t first, stride, words, groups, of_word;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int64_t j, int64_t) const {
        ask_rows_ahead<OUTPUTS>(values, j / WORD_INPUTS * of_word * Few::BITS / 8 + PACKED_AHEAD, stride);
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
    ACE_INLINE WordSteps steps(int r, int64_t index) const {
        decltype(spread_steps(load(0, 0, nullptr), 0)) half[2];
        word(r, index, [&](const auto& steps, int h) ACE_INLINED { half[h] = steps; });
        return join_steps(half[0], half[1]);
    }
    // Calls function(steps, unit), with steps in 8 bits, for the units of sixteen inputs of a word of metadata.
    template <typename Function>
    ACE_INLINE void word(int r, int64_t index, Function function) const {
        const uint32_t bits = meta[r * words + index], low = bits & 0xffff, high = bits >> 16;
        const int64_t value = index * of_word;
        uint8_t copy[2][16];
        const auto first = load(r, value, copy[0]);
        function(spread_steps(first, low), 0);
        if (AT_ONCE) {
            function(spread_steps(first, high, COUNTED ? __builtin_popcount(low) : int(of_word / 2)), 1);
        } else {
            const int64_t second = COUNTED ? __builtin_popcount(low) : of_word / 2;
            function(spread_steps(load(r, value + second, copy[1]), high), 1);
        }
    }
    template <int OUTPUTS>
    ACE_INLINE Magnitudes<OUTPUTS> magnitudes(int64_t blocks) const {
        return {weight, first, groups, blocks};
    }
};

// Quantized rows without metadata, from some row on: every input has a value. Values past the end of a row are those of
// the next one, and meet tokens that are 0.
template <typename Few, bool LAST>
struct WholeRows {
    using Word = decltype(Few::load_word(nullptr));
    static constexpr int ROWS_AT_ONCE = Few::ROWS_AT_ONCE, INPUTS = Few::INPUTS, UNITS = INPUTS / LANES;
    static constexpr int BYTES = INPUTS * Few::BITS / 8;

    const uint8_t *values, *end;
    const FewBitsWeight& weight;
    int64_t first, stride, words, groups;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int64_t j, int64_t inputs) const {
        ask_whole_rows_ahead<OUTPUTS>(values, j * Few::BITS / 8, inputs * Few::BITS / 8, stride);
    }
    // The address of a word's values, or of a copy that has zeros past the end.
    ACE_INLINE const uint8_t* word_at(int r, int64_t index, uint8_t* copy) const {
        const uint8_t* from = values + r * stride + index * BYTES;
        if (!LAST || end - from >= BYTES) return from;
        memset(copy, 0, BYTES);
        if (end > from) memcpy(copy, from, end - from);
        return copy;
    }
    ACE_INLINE Word steps(int r, int64_t index) const {
        uint8_t copy[BYTES];
        return Few::load_word(word_at(r, index, copy));
    }
    // As in FewBitsRows.
    template <typename Function>
    ACE_INLINE void word(int r, int64_t index, Function function) const {
        uint8_t copy[BYTES];
        Few::load_units(word_at(r, index, copy), function);
    }
    template <int OUTPUTS>
    ACE_INLINE Magnitudes<OUTPUTS> magnitudes(int64_t blocks) const {
        return {weight, first, groups, blocks};
    }
};

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_rounded_token(const Rows& rows, const FewBitsTask& task, const int16_t* x, const float* scales,
                                    float* sums) {
    float sum[OUTPUTS] = {};
    const int64_t of_block = task.block / Rows::INPUTS;
    auto magnitudes = rows.template magnitudes<OUTPUTS>(task.group / task.block);
    for (int64_t b = 0; b < task.blocks; ++b) {
        BlockSums<OUTPUTS> block;
        block.clear();
        const int64_t stop = (b + 1) * of_block < rows.words ? (b + 1) * of_block : rows.words;
        rows.template ahead<OUTPUTS>(b * task.block, task.block);
        magnitudes.go_to(b);
        const auto add = [&](int r, int64_t w) ACE_INLINED {
            rows.word(r, w, [&](const auto& steps, int unit) ACE_INLINED {
                block.add(r, widen_steps(steps), x + (w * Rows::UNITS + unit) * 2 * LANES);
            });
        };
#pragma GCC unroll 4
        for (int first = 0; first < OUTPUTS; first += Rows::ROWS_AT_ONCE) {
            for (int64_t w = b * of_block; w < stop; ++w) {
                for (int r = first; r < first + Rows::ROWS_AT_ONCE && r < OUTPUTS; ++r) add(r, w);
            }
        }
        float value[OUTPUTS];
        block.values(value);
        for (int r = 0; r < OUTPUTS; ++r) {
            sum[r] = sum[r] + value[r] * (scales[b] * magnitudes.of(r));
        }
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE] = sum[r];
}

// Several tokens: each block of weights is spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_rounded_tokens(const Rows& rows, const FewBitsTask& task, const int16_t* x, const float* scales,
                                      int tokens, float* sums) {
    for (int k = 0; k < OUTPUTS * TOKENS_AT_ONCE; ++k) sums[k] = 0.0f;
    const int64_t of_block = task.block / Rows::INPUTS;
    auto magnitudes = rows.template magnitudes<OUTPUTS>(task.group / task.block);
    for (int64_t b = 0; b < task.blocks; ++b) {
        alignas(64) Steps tile[OUTPUTS][MOST_OF_BLOCK / LANES];
        const int64_t first = b * of_block, stop = first + of_block < rows.words ? first + of_block : rows.words;
        rows.template ahead<OUTPUTS>(b * task.block, task.block);
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int64_t w = first; w < stop; ++w) {
                rows.word(r, w, [&](const auto& steps, int unit) ACE_INLINED {
                    tile[r][(w - first) * Rows::UNITS + unit] = widen_steps(steps);
                });
            }
        }
        magnitudes.go_to(b);
        const int count = int(stop - first) * Rows::UNITS;
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
                sum = sum + value[r] * (scales[t * task.blocks + b] * magnitudes.of(r));
            }
        }
    }
}

template <typename Few, int OUTPUTS, typename Rows>
ACE_INLINE void few_bits_outputs(const Rows& rows, const FewBitsTask& task, int64_t i) {
    float sums[OUTPUTS * TOKENS_AT_ONCE];
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        if (task.input_bits == 8) {
            const int8_t* x = reinterpret_cast<const int8_t*>(task.tokens) + first * task.padded;
            const float* scales = task.scales + first * (task.padded / WORD_INPUTS);
            if (tokens == 1) one_byte_token<OUTPUTS>(rows, task, x, scales, sums);
            else some_byte_tokens<OUTPUTS>(rows, task, x, scales, tokens, sums);
        } else {
            const int16_t* x = task.tokens + first * task.padded * 2;
            const float* scales = task.scales + first * task.blocks;
            if (tokens == 1) one_rounded_token<OUTPUTS>(rows, task, x, scales, sums);
            else some_rounded_tokens<OUTPUTS>(rows, task, x, scales, tokens, sums);
        }
        for (int t = 0; t < tokens; ++t) {
            for (int r = 0; r < OUTPUTS; ++r) {
                const float y = sums[r * TOKENS_AT_ONCE + t] * (1.0f / Few::LARGEST);
                task.out[(first + t) * task.out_stride + i + r] = task.bias ? y + task.bias[i + r] : y;
            }
        }
    }
}

template <typename Few, bool AT_ONCE, bool COUNTED>
inline void few_bits_rows(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    const int64_t stride = (w.cols / w.m * w.n * Few::BITS + 7) / 8;
    const int64_t words = (w.cols + WORD_INPUTS - 1) / WORD_INPUTS;
    const int64_t groups = (w.cols + task.group - 1) / task.group;
    // Behind each row before `safe`, at least a word more can be read.
    const int64_t safe = stride > 0 ? w.rows - (WORD_INPUTS + stride - 1) / stride - 1 : 0;
    const int64_t middle = safe < begin ? begin : safe < end ? safe : end;
    const auto rows = [&](int64_t i, auto last) ACE_INLINED {
        return FewBitsRows<Few, AT_ONCE, COUNTED, decltype(last)::value>{
            w.values + i * stride, w.values + w.rows * stride, w.meta + i * words, w, i, stride, words, groups,
            WORD_INPUTS / w.m * w.n};
    };
    int64_t i = begin;
    for (; i + OUTPUT_TILE <= middle; i += OUTPUT_TILE) {
        few_bits_outputs<Few, OUTPUT_TILE>(rows(i, std::false_type{}), task, i);
    }
    for (; i < end; ++i) few_bits_outputs<Few, 1>(rows(i, std::true_type{}), task, i);
}

template <typename Few>
inline void whole_rows(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    const int64_t stride = (w.cols * Few::BITS + 7) / 8;
    const int64_t words = (w.cols + Few::INPUTS - 1) / Few::INPUTS;
    const int64_t groups = (w.cols + task.group - 1) / task.group;
    // Behind each row before `safe`, at least a word more can be read.
    constexpr int BYTES = WholeRows<Few, true>::BYTES;
    const int64_t safe = stride > 0 ? w.rows - (BYTES + stride - 1) / stride - 1 : 0;
    const int64_t middle = safe < begin ? begin : safe < end ? safe : end;
    const auto rows = [&](int64_t i, auto last) ACE_INLINED {
        return WholeRows<Few, decltype(last)::value>{
            w.values + i * stride, w.values + w.rows * stride, w, i, stride, words, groups};
    };
    int64_t i = begin;
    for (; i + OUTPUT_TILE <= middle; i += OUTPUT_TILE) {
        few_bits_outputs<Few, OUTPUT_TILE>(rows(i, std::false_type{}), task, i);
    }
    for (; i < end; ++i) few_bits_outputs<Few, 1>(rows(i, std::true_type{}), task, i);
}

inline void few_bits_linear(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    if (!w.meta) {
        if (w.bits == 8) whole_rows<EightBits>(w, task, begin, end);
        else if (deinterleaved_tokens(w, task.block)) whole_rows<DeinterleavedFourBits>(w, task, begin, end);
        else whole_rows<FourBits<false>>(w, task, begin, end);
        return;
    }
    const bool counted = w.m > LANES, at_once = 2 * w.n <= w.m, even = WORD_INPUTS / w.m * w.n % 2 == 0;
    if (w.bits == 8) {
        if (counted) few_bits_rows<EightBits, false, true>(w, task, begin, end);
        else few_bits_rows<EightBits, false, false>(w, task, begin, end);
    } else if (at_once && even) {
        if (counted) few_bits_rows<FourBits<false>, true, true>(w, task, begin, end);
        else few_bits_rows<FourBits<false>, true, false>(w, task, begin, end);
    } else {
        few_bits_rows<FourBits<true>, false, true>(w, task, begin, end);
    }
}

}  // namespace
}  // namespace ace
