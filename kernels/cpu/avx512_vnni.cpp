#if defined(__x86_64__)

#include "avx512_vnni.h"

#include <cstring>
#include <immintrin.h>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2")
// Of the undefined registers in GCC 12's own headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define ACE_WIDTH 16
#define ACE_EXPANDS_HALVES 1
#include "byte_chunks.h"
#include "byte_planes.h"

namespace ace {
namespace {

template <int OUTPUTS, typename Rows>
ACE_INLINE void spread_outputs(const Rows& rows, const FewBitsTask& task, int64_t i) {
    float sums[4 * TOKENS_AT_ONCE];
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        if (task.input_bits == 8) {
            const int8_t* x = reinterpret_cast<const int8_t*>(task.tokens) + first * task.padded;
            const float* scales = task.scales + first * (task.padded / WORD_INPUTS);
            if (tokens == 1) one_token_of_bytes<OUTPUTS>(rows, task, x, scales, sums);
            else some_tokens_of_bytes<OUTPUTS>(rows, task, x, scales, tokens, sums);
        } else {
            const int8_t* x = reinterpret_cast<const int8_t*>(task.tokens + first * task.padded * 2);
            const float* scales = task.scales + first * task.blocks;
            const int32_t* all = starts_of(task.tokens, task.n_tokens, task.padded);
            const int32_t* starts = all + first * task.blocks * STARTS;
            if (tokens == 1) one_token_of_planes<OUTPUTS>(rows, task, x, scales, starts, sums);
            else some_tokens_of_planes<OUTPUTS>(rows, task, x, scales, starts, tokens, sums);
        }
        for (int t = 0; t < tokens; ++t) {
            for (int r = 0; r < OUTPUTS; ++r) {
                const float y = sums[4 * t + r] * (1.0f / Rows::Kind::LARGEST);
                task.out[(first + t) * task.out_stride + i + r] = task.bias ? y + task.bias[i + r] : y;
            }
        }
    }
}

template <typename Bytes, Kept KEPT>
inline void spread_linear(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    const RowPlaces places(w);
    const int64_t groups = (w.cols + task.group - 1) / task.group;
    const int64_t middle = places.safe < begin ? begin : places.safe < end ? places.safe : end;
    const auto rows = [&](int64_t i, auto last) ACE_INLINED {
        return rows_from<Bytes, KEPT, decltype(last)::value>(w, places, i, groups);
    };
    int64_t i = begin;
    for (; i + OUTPUT_TILE <= middle; i += OUTPUT_TILE) {
        spread_outputs<OUTPUT_TILE>(rows(i, std::false_type{}), task, i);
    }
    for (; i < end; ++i) spread_outputs<1>(rows(i, std::true_type{}), task, i);
}

template <typename Bytes>
inline void pruned_or_whole(const FewBitsWeight& w, const FewBitsTask& task, int64_t begin, int64_t end) {
    if (!w.meta) spread_linear<Bytes, Kept::all>(w, task, begin, end);
    else if (2 * w.n <= w.m) spread_linear<Bytes, Kept::half>(w, task, begin, end);
    else spread_linear<Bytes, Kept::some>(w, task, begin, end);
}

}  // namespace

void round_tokens_vnni(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                       float* scales) {
    round_to_planes(matrix, block, deinterleaved, padded, out, scales);
}

void few_bits_linear_vnni(const FewBitsWeight& weight, const FewBitsTask& task, int64_t begin, int64_t end) {
    if (weight.bits == 8) pruned_or_whole<BytesOfEight>(weight, task, begin, end);
    else if (!deinterleaved_tokens(weight, task.block)) pruned_or_whole<BytesOfFour>(weight, task, begin, end);
    else spread_linear<BytesOfHalves, Kept::all>(weight, task, begin, end);
}

void packed_linear_vnni(const PackedWeight& weight, const LinearTask& task, int64_t begin, int64_t end) {
    if (!weight.starts && weight.n == 2 && weight.m == 4) avx512_bodies.nm_linear(weight, task, begin, end);
    else packed_linear(weight, task, begin, end);
}

}  // namespace ace

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
