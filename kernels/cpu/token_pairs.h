// What the products of pairs of bf16 numbers share: tokens laid out in pairs of inputs, and sums rounded to outputs.
#pragma once

#include "expanded_product.h"

#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : defined(__GNUC__) && __GNUC__ >= 11)
#define ACE_HAS_PAIRS 1

#include <immintrin.h>

#define ACE_PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi2,popcnt")))

namespace ace {
namespace {

inline int64_t steps_of(const ExpandedTask& task) { return (task.weight.cols + TILE_INPUTS - 1) / TILE_INPUTS; }

// Asks for a row's part of the next block in the second-level cache.
inline void prefetch_block(const void* from, int64_t bytes) {
    constexpr int SECOND_LEVEL = 2;
    for (int64_t k = 0; k < bytes; k += CACHE_LINE) {
        __builtin_prefetch(static_cast<const uint8_t*>(from) + k, 0, SECOND_LEVEL);
    }
}

// Transposes 16 x 16 words.
ACE_PAIRS inline void transpose(__m512i (&rows)[TILE]) {
    __m512i mixed[TILE];
    for (int r = 0; r < TILE; r += 2) {
        mixed[r] = _mm512_unpacklo_epi32(rows[r], rows[r + 1]);
        mixed[r + 1] = _mm512_unpackhi_epi32(rows[r], rows[r + 1]);
    }
    // Quarter q of rows[4 g + k] gets words 4 g to 4 g + 3 of column 4 q + k.
    for (int r = 0; r < TILE; r += 4) {
        for (int k = 0; k < 2; ++k) {
            rows[r + 2 * k] = _mm512_unpacklo_epi64(mixed[r + k], mixed[r + k + 2]);
            rows[r + 2 * k + 1] = _mm512_unpackhi_epi64(mixed[r + k], mixed[r + k + 2]);
        }
    }
    for (int k = 0; k < 4; ++k) {
        const __m512i even[] = {_mm512_shuffle_i32x4(rows[k], rows[4 + k], 0x88),
                                _mm512_shuffle_i32x4(rows[8 + k], rows[12 + k], 0x88)};
        const __m512i odd[] = {_mm512_shuffle_i32x4(rows[k], rows[4 + k], 0xdd),
                               _mm512_shuffle_i32x4(rows[8 + k], rows[12 + k], 0xdd)};
        mixed[k] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
        mixed[4 + k] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
        mixed[8 + k] = _mm512_shuffle_i32x4(even[0], even[1], 0xdd);
        mixed[12 + k] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
    }
    for (int r = 0; r < TILE; ++r) rows[r] = mixed[r];
}

// Loads a step of the inputs of a block of tokens: rows[p] has the pair p of inputs of each token, with zeros past the
// last input and the last token.
ACE_PAIRS inline void load_pairs(const ExpandedTask& task, int64_t block, int64_t step, __m512i (&rows)[TILE]) {
    const int64_t left = task.weight.cols - step * TILE_INPUTS;
    const __mmask32 there = left < TILE_INPUTS ? (__mmask32(1) << left) - 1 : ~__mmask32(0);
    const uint16_t* tokens = task.tokens + block * TILE * task.stride + step * TILE_INPUTS;
    for (int64_t k = 0; k < TILE; ++k) {
        rows[k] = block * TILE + k < task.n_tokens ? _mm512_maskz_loadu_epi16(there, tokens + k * task.stride)
                                                   : _mm512_setzero_si512();
    }
    transpose(rows);
}

// Words of a register that has 16 numbers of an output and then 16 of the next one: the two numbers of each token.
alignas(64) constexpr uint16_t BY_TOKEN[2 * TILE] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};

// Rounds 16 x 16 sums and transposes them: quarter q of [h][k] gets outputs 8 h to 8 h + 7 of token 4 q + k.
ACE_PAIRS inline void round_tile(const float* sums, const float* bias, __m512i (&quarters)[2][4]) {
    const __m512i by_token = _mm512_load_si512(BY_TOKEN);
    for (int h = 0; h < 2; ++h) {
        __m512i words[4];
        for (int p = 0; p < 4; ++p) {
            const int i = 8 * h + 2 * p;
            const __m512 even = _mm512_add_ps(_mm512_load_ps(sums + i * TILE), _mm512_set1_ps(bias[i]));
            const __m512 odd = _mm512_add_ps(_mm512_load_ps(sums + (i + 1) * TILE), _mm512_set1_ps(bias[i + 1]));
            words[p] = _mm512_permutexvar_epi16(by_token, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
        }
        const __m512i low[] = {_mm512_unpacklo_epi32(words[0], words[1]), _mm512_unpacklo_epi32(words[2], words[3])};
        const __m512i high[] = {_mm512_unpackhi_epi32(words[0], words[1]), _mm512_unpackhi_epi32(words[2], words[3])};
        quarters[h][0] = _mm512_unpacklo_epi64(low[0], low[1]);
        quarters[h][1] = _mm512_unpackhi_epi64(low[0], low[1]);
        quarters[h][2] = _mm512_unpacklo_epi64(high[0], high[1]);
        quarters[h][3] = _mm512_unpackhi_epi64(high[0], high[1]);
    }
}

// Delivers a tile of sums: of outputs from i on, and of the block's tokens from t on.
ACE_PAIRS inline void deliver_tile(const ExpandedTask& task, const float* sums, int64_t i, int64_t t) {
    const int64_t left = task.weight.rows - i, tokens = task.n_tokens - t;
    const __mmask16 outputs = left < TILE ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
    alignas(64) float bias[TILE] = {};
    if (task.bias) _mm512_store_ps(bias, _mm512_maskz_loadu_ps(outputs, task.bias + i));
    __m512i quarters[2][4];
    round_tile(sums, bias, quarters);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int k = 0; k < 4; ++k) {
        const __m512i a = _mm512_permutex2var_epi64(quarters[0][k], first, quarters[1][k]);
        const __m512i b = _mm512_permutex2var_epi64(quarters[0][k], second, quarters[1][k]);
        const __m256i four[] = {_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1), _mm512_castsi512_si256(b),
                                _mm512_extracti64x4_epi64(b, 1)};
        for (int q = 0; q < 4 && 4 * q + k < tokens; ++q) {
            _mm256_mask_storeu_epi16(task.out + (t + 4 * q + k) * task.weight.rows + i, outputs, four[q]);
        }
    }
}

// Delivers `outputs` outputs of all tokens, from output i on; their sums are as in ExpandedScratch. A token's outputs are
// written side by side, while their cache lines are near.
ACE_PAIRS inline void deliver(const ExpandedTask& task, const float* sums, int64_t i, int64_t outputs) {
    const int64_t apart = blocks_of(task.n_tokens) * TILE_WORDS;
    for (int64_t t = 0; t < task.n_tokens; t += TILE, sums += TILE_WORDS) {
        for (int64_t o = 0; o < outputs; o += TILE) deliver_tile(task, sums + o / TILE * apart, i + o, t);
    }
}

}  // namespace
}  // namespace ace

#else
#define ACE_HAS_PAIRS 0
#endif
