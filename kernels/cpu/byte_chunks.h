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
    template <typename Row>
    static ACE_INLINE Weights weights(const Row& row, int64_t c) {
        return row.one(c);
    }
    // Those of two chunks of a row.
    template <typename Row>
    static ACE_INLINE void two_weights(const Row& row, int64_t c, Weights* two) {
        const TwoChunks both = row.two(c);
        two[0] = both.first;
        two[1] = both.second;
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
    template <typename Row>
    static ACE_INLINE Weights weights(const Row& row, int64_t c) {
        return BytesOfHalves::halves(row.loaded(c));
    }
    template <typename Row>
    static ACE_INLINE void two_weights(const Row& row, int64_t c, Weights* two) {
        for (int k = 0; k < 2; ++k) two[k] = weights(row, c + k);
    }
    ACE_INLINE Eight add(Eight sum, const Weights& weights) const {
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_dpbusd_epi32(start, weights.low, even), weights.high, odd);
        return sum + floats_of_eight((EightInts)sums) * scale;
    }
    ACE_INLINE Eight add_word(Eight sum, const Weights& weights, bool) const { return add(sum, weights); }
};

template <typename Rows>
using TokensOf = std::conditional_t<Rows::Kind::OFFSET == NIBBLE_OFFSET, ChunkHalves, ChunkTokens>;

// The weights of a block, from input j on.
template <int OUTPUTS, typename Rows>
struct BlockWeights {
    using Tokens = TokensOf<Rows>;
    typename Tokens::Weights of[OUTPUTS][MOST_OF_BLOCK / CHUNK];

    ACE_INLINE BlockWeights(const Rows& rows, const FewBitsTask& task, int64_t j) {
        auto row = rows.row(0, j / CHUNK);
        const bool two = task.block == MOST_OF_BLOCK && task.padded - j > CHUNK;
        for (int r = 0; r < OUTPUTS; ++r, row.next()) {
            if (two) Tokens::two_weights(row, 0, of[r]);
            else of[r][0] = Tokens::weights(row, 0);
        }
    }
    // Adds the products of a token's inputs to zeros.
    ACE_INLINE void multiply(const FewBitsTask& task, int64_t j, const int8_t* x, const float* scales,
                             Eight* sums) const {
        const int64_t from = j / CHUNK * CHUNK;
        const Tokens first(x + from, scales + from / WORD_INPUTS);
        for (int r = 0; r < OUTPUTS; ++r) {
            sums[r] = task.block == WORD_INPUTS ? first.add_word(eight(0.0f), of[r][0], j > from)
                                                : first.add(eight(0.0f), of[r][0]);
        }
        if (task.block != MOST_OF_BLOCK || task.padded - j <= CHUNK) return;
        const Tokens second(x + from + CHUNK, scales + (from + CHUNK) / WORD_INPUTS);
        for (int r = 0; r < OUTPUTS; ++r) sums[r] = second.add(sums[r], of[r][1]);
    }
};

// Adds the products of SPREAD inputs, from a chunk on, which have the scales of tokens and the magnitudes of rows of
// their blocks. Weights stay in registers.
template <int OUTPUTS, int BLOCK, typename Rows>
ACE_OUTLINED void add_spread(const Rows& rows, int64_t chunk, const int8_t* x, const float* scales,
                             const float (*magnitudes)[4], Eight* sums) {
    using Tokens = TokensOf<Rows>;
    constexpr int CHUNKS = SPREAD / CHUNK;
    rows.template ahead<OUTPUTS>(chunk * CHUNK);
    const auto tokens = [&](int c) ACE_INLINED { return Tokens(x + c * CHUNK, scales + c * CHUNK / WORD_INPUTS); };
    const Tokens inputs[] = {tokens(0), tokens(1), tokens(2), tokens(3)};
    auto row = rows.row(0, chunk);
    for (int r = 0; r < OUTPUTS; ++r, row.next()) {
        typename Tokens::Weights weights[CHUNKS];
        for (int c = 0; c < CHUNKS; c += 2) Tokens::two_weights(row, c, weights + c);
        const auto magnitude = [&](int block) ACE_INLINED { return eight(magnitudes[block][r]); };
        Eight sum = sums[r];
        for (int c = 0; c < CHUNKS; ++c) {
            if (BLOCK == WORD_INPUTS) {
                for (int k = 0; k < 2; ++k) {
                    sum = sum + inputs[c].add_word(eight(0.0f), weights[c], k) * magnitude(2 * c + k);
                }
            } else if (BLOCK == CHUNK) {
                sum = sum + inputs[c].add(eight(0.0f), weights[c]) * magnitude(c);
            } else if (c % 2 == 0) {
                const Eight first = inputs[c].add(eight(0.0f), weights[c]);
                sum = sum + inputs[c + 1].add(first, weights[c + 1]) * magnitude(c / 2);
            }
        }
        sums[r] = sum;
    }
}

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_token_of_bytes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                     float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Eight sum[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) sum[r] = eight(0.0f);
    const int64_t block = task.block, of_spread = SPREAD / block;
    const auto add_to = block == 128  ? add_spread<OUTPUTS, 128, Rows>
                        : block == 64 ? add_spread<OUTPUTS, 64, Rows>
                                      : add_spread<OUTPUTS, 32, Rows>;
    int64_t b = 0, j = 0;
    for (; j + SPREAD <= task.padded && b + of_spread <= task.blocks; j += SPREAD) {
        float of_blocks[SPREAD / WORD_INPUTS][4];
        for (int64_t k = 0; k < of_spread; ++k) _mm_storeu_ps(of_blocks[k], _mm_load_ps(magnitudes.of(b++)));
        add_to(rows, j / CHUNK, x + j, scales + j / WORD_INPUTS, of_blocks, sum);
    }
    for (; b < task.blocks; ++b, j += block) {
        const float* of_rows = magnitudes.of(b);
        Eight of_block[OUTPUTS];
        BlockWeights<OUTPUTS, Rows>(rows, task, j).multiply(task, j, x, scales, of_block);
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + of_block[r] * eight(of_rows[r]);
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r] = sum_of_eight(sum[r]);
}

// Several tokens: each block of weights is spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_tokens_of_bytes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                       int tokens, float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Eight sum[TOKENS_AT_ONCE][OUTPUTS];
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) sum[t][r] = eight(0.0f);
    }
    for (int64_t b = 0; b < task.blocks; ++b) {
        const int64_t j = b * task.block;
        if (j % SPREAD == 0) rows.template ahead<OUTPUTS>(j);
        const BlockWeights<OUTPUTS, Rows> weights(rows, task, j);
        const float* of_rows = magnitudes.of(b);
        for (int t = 0; t < tokens; ++t) {
            Eight of_block[OUTPUTS];
            const int64_t start = t * task.padded;
            weights.multiply(task, j, x + start, scales + start / WORD_INPUTS, of_block);
            for (int r = 0; r < OUTPUTS; ++r) sum[t][r] = sum[t][r] + of_block[r] * eight(of_rows[r]);
        }
    }
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) sums[4 * t + r] = sum_of_eight(sum[t][r]);
    }
}

}  // namespace
}  // namespace ace
