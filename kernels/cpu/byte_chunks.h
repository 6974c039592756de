// The products of byte_inputs.h with AVX-512's dot products of bytes: tokens of 8 bits and spread weights.
#pragma once

#include "spread_rows.h"

namespace ace {
namespace {

// 64 tokens in the order of inputs.
struct ChunkTokens {
    using Weights = __m512i;

    __m512i tokens, start;  // where sums of products start: less what the weights' offset adds
    __m512 scale;

    ACE_INLINE ChunkTokens(const int8_t* from, const float* scales)
        : tokens(load_register(from)),
          scale(_mm512_mask_broadcastss_ps(_mm512_set1_ps(scales[0]), 0xff00, _mm_load_ss(scales + 1))) {
        const __m512i none = _mm512_setzero_si512();
        start = _mm512_sub_epi32(none, _mm512_dpbusd_epi32(none, all_bytes(BYTE_OFFSET), tokens));
    }
    template <typename Rows>
    static ACE_INLINE Weights weights(const Rows& rows, int r, int64_t chunk) {
        return rows.spread(r, chunk);
    }
    // Adds the scaled products of the first word's lanes, then those of the second; or of one of them.
    ACE_INLINE Eight add(Eight sum, const Weights& weights) const {
        const __m512 words = scaled(weights);
        return sum + (Eight)_mm512_castps512_ps256(words) + (Eight)_mm512_extractf32x8_ps(words, 1);
    }
    ACE_INLINE Eight add_word(Eight sum, const Weights& weights, bool second) const {
        const __m512 words = scaled(weights);
        return sum + (second ? (Eight)_mm512_extractf32x8_ps(words, 1) : (Eight)_mm512_castps512_ps256(words));
    }

private:
    ACE_INLINE __m512 scaled(const Weights& weights) const {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, weights, tokens)), scale);
    }
};

// 64 deinterleaved tokens: both words in the same lanes.
struct ChunkHalves {
    using Weights = NibbleSteps;

    __m256i even, odd, start;
    Eight scale;

    ACE_INLINE ChunkHalves(const int8_t* from, const float* scales)
        : even(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))),
          odd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + CHUNK / 2))),
          scale(two_fours(scales[0], scales[1])) {
        const __m256i none = _mm256_setzero_si256(), offset = _mm256_set1_epi8(NIBBLE_OFFSET);
        start = _mm256_sub_epi32(none, _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(none, offset, even), offset, odd));
    }
    template <typename Rows>
    static ACE_INLINE Weights weights(const Rows& rows, int r, int64_t chunk) {
        return rows.halves(r, chunk);
    }
    ACE_INLINE Eight add(Eight sum, const Weights& weights) const {
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(start, weights.low, even), weights.high, odd);
        return sum + floats_of_eight((EightInts)sums) * scale;
    }
    ACE_INLINE Eight add_word(Eight sum, const Weights& weights, bool) const { return add(sum, weights); }
};

template <typename Rows>
using TokensOf = std::conditional_t<Rows::Kind::OFFSET == NIBBLE_OFFSET, ChunkHalves, ChunkTokens>;

// Adds the products of a block's tokens, from input j on; `weights(r, chunk)` are those of 64 inputs.
template <typename Tokens, int OUTPUTS, typename Weights>
ACE_INLINE void add_block(const FewBitsTask& task, int64_t j, const int8_t* x, const float* scales,
                          const Weights& weights, Eight* sums) {
    if (task.block == WORD_INPUTS) {
        const int64_t chunk = j / CHUNK, from = chunk * CHUNK;
        const Tokens inputs(x + from, scales + from / WORD_INPUTS);
        for (int r = 0; r < OUTPUTS; ++r) sums[r] = inputs.add_word(sums[r], weights(r, chunk), j > from);
        return;
    }
    const int64_t end = j + task.block < task.padded ? j + task.block : task.padded;
    for (int64_t from = j; from < end; from += CHUNK) {
        const Tokens inputs(x + from, scales + from / WORD_INPUTS);
        for (int r = 0; r < OUTPUTS; ++r) sums[r] = inputs.add(sums[r], weights(r, from / CHUNK));
    }
}

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_token_of_bytes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                     float* sums) {
    using Tokens = TokensOf<Rows>;
    Magnitudes<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Eight sum[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) sum[r] = eight(0.0f);
    const auto weights = [&](int r, int64_t chunk) ACE_INLINED { return Tokens::weights(rows, r, chunk); };
    for (int64_t b = 0; b < task.blocks; ++b) {
        const int64_t j = b * task.block;
        if (j % SPREAD == 0) rows.template ahead<OUTPUTS>(j);
        magnitudes.go_to(b);
        Eight of_block[OUTPUTS];
        for (int r = 0; r < OUTPUTS; ++r) of_block[r] = eight(0.0f);
        add_block<Tokens, OUTPUTS>(task, j, x, scales, weights, of_block);
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + of_block[r] * eight(magnitudes.of(r));
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r] = sum_of_eight(sum[r]);
}

// Several tokens: each block of weights is spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_tokens_of_bytes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                       int tokens, float* sums) {
    using Tokens = TokensOf<Rows>;
    Magnitudes<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Eight sum[TOKENS_AT_ONCE][OUTPUTS];
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) sum[t][r] = eight(0.0f);
    }
    for (int64_t b = 0; b < task.blocks; ++b) {
        typename Tokens::Weights spread[OUTPUTS][MOST_OF_BLOCK / CHUNK];
        const int64_t j = b * task.block, first = j / CHUNK;
        const int64_t end = j + task.block < task.padded ? j + task.block : task.padded;
        if (j % SPREAD == 0) rows.template ahead<OUTPUTS>(j);
        magnitudes.go_to(b);
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int64_t c = first; c * CHUNK < end; ++c) spread[r][c - first] = Tokens::weights(rows, r, c);
        }
        const auto weights = [&](int r, int64_t chunk) ACE_INLINED { return spread[r][chunk - first]; };
        for (int t = 0; t < tokens; ++t) {
            Eight of_block[OUTPUTS];
            for (int r = 0; r < OUTPUTS; ++r) of_block[r] = eight(0.0f);
            const int64_t from = t * task.padded;
            add_block<Tokens, OUTPUTS>(task, j, x + from, scales + from / WORD_INPUTS, weights, of_block);
            for (int r = 0; r < OUTPUTS; ++r) sum[t][r] = sum[t][r] + of_block[r] * eight(magnitudes.of(r));
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) sums[4 * t + r] = sum_of_eight(sum[t][r]);
    }
}

}  // namespace
}  // namespace ace
