// The products of few_bits.h with AVX-512's dot products of bytes, with the same results bit by bit: tokens of 30 bits
// are integers of four signed bytes, a plane of bytes each.
#pragma once

#include "round_tokens.h"
#include "spread_rows.h"

namespace ace {
namespace {

// Tokens whose four planes fill a register.
constexpr int UNIT = 16;

// The planes of sixteen integers, the lowest first. Each integer is the sum of its signed bytes times powers of 256.
ACE_INLINE __m512i planes_of(__m512i integers) {
    const __m512i carry = _mm512_set1_epi32(0x808080);
    const __m512i bytes = _mm512_xor_si512(_mm512_add_epi32(integers, carry), carry);
    const __m512i by_lane = _mm512_shuffle_epi8(
        bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), by_lane);
}

// Every second one of 32 integers, the even ones or the odd ones.
ACE_INLINE __m512i every_second(__m512i first, __m512i second, bool odd) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_epi32(first, odd ? _mm512_add_epi32(even, _mm512_set1_epi32(1)) : even, second);
}

// Tokens as round_tokens leaves them, in place: a register of planes for each sixteen. Deinterleaved, the even ones of
// 64 come first.
ACE_INLINE void store_planes(int16_t* tokens, bool deinterleaved) {
    __m512i whole[CHUNK / UNIT];
    for (int unit = 0; unit < CHUNK / UNIT; ++unit) {
        const auto* parts = reinterpret_cast<const __m256i*>(tokens + unit * 2 * UNIT);
        const __m512i upper = _mm512_cvtepi16_epi32(_mm256_loadu_si256(parts));
        const __m512i lower = _mm512_cvtepi16_epi32(_mm256_loadu_si256(parts + 1));
        whole[unit] = _mm512_add_epi32(_mm512_slli_epi32(upper, 16), lower);
    }
    for (int unit = 0; unit < CHUNK / UNIT; ++unit) {
        const int pair = unit % 2 * 2;
        const __m512i ordered =
            deinterleaved ? every_second(whole[pair], whole[pair + 1], unit >= 2) : whole[unit];
        _mm512_storeu_si512(tokens + unit * 2 * UNIT, planes_of(ordered));
    }
}

// Where round_to_planes puts what the weights' offset adds to the sums of each block, int64 [n_tokens, blocks].
ACE_INLINE int64_t* surplus_of(const int16_t* tokens, int64_t n_tokens, int64_t padded) {
    return reinterpret_cast<int64_t*>(const_cast<int16_t*>(tokens) + n_tokens * padded * 2);
}

inline void round_to_planes(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                            float* scales) {
    round_tokens(matrix, block, false, padded, out, scales);
    int64_t* surplus = surplus_of(out, matrix.rows, padded);
    const int64_t offset = deinterleaved ? NIBBLE_OFFSET : BYTE_OFFSET;
    for (int64_t t = 0; t < matrix.rows; ++t) {
        int16_t* const row = out + t * padded * 2;
        for (int64_t first = 0; first < matrix.cols; first += block) {
            const int64_t end = first + block < padded ? first + block : padded;
            Ints upper = Ints::all(0), lower = Ints::all(0);
            for (int64_t j = first; j < end; j += UNIT) {
                const auto* parts = reinterpret_cast<const __m256i*>(row + j * 2);
                upper = upper + Ints{{(NativeInts)_mm512_cvtepi16_epi32(_mm256_loadu_si256(parts))}};
                lower = lower + Ints{{(NativeInts)_mm512_cvtepi16_epi32(_mm256_loadu_si256(parts + 1))}};
            }
            *surplus++ = (sum(upper) * LOWER_STEPS + sum(lower)) * offset;
        }
        for (int64_t j = 0; j < padded; j += CHUNK) store_planes(row + j * 2, deinterleaved);
    }
}

// Sums of a block's products for four rows: lane q of four holds plane q.
template <int OUTPUTS>
struct PlaneSums {
    __m512i of[4];

    ACE_INLINE PlaneSums() {
        for (int r = 0; r < 4; ++r) of[r] = _mm512_setzero_si512();
    }
    // Sixteen inputs, from input j of the spread weights on.
    ACE_INLINE void add(const Spread<OUTPUTS>& weights, int64_t j, __m512i planes) {
        for (int r = 0; r < OUTPUTS; ++r) {
            const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(weights.of[r] + j));
            of[r] = _mm512_dpbusd_epi32(of[r], _mm512_broadcast_i32x4(sixteen), planes);
        }
    }
    // Lane q of four has the sums of plane q, of row 0 to 3.
    ACE_INLINE __m512i totals() const {
        const auto halves = [](__m512i a, __m512i b) ACE_INLINED {
            return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
        };
        const __m512i first = halves(of[0], of[1]), second = halves(of[2], of[3]);
        return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    }
};

// The sums of two blocks, or of two tokens, in fp32: each is rounded once.
ACE_INLINE __m256 values_of(__m512i one, __m512i other, int64_t surplus_of_one, int64_t surplus_of_other) {
    const __m512i low = _mm512_permutex2var_epi64(one, _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), other);
    const __m512i high = _mm512_permutex2var_epi64(one, _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15), other);
    const __m512i parts = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
    const __m512i lower = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(parts));
    const __m512i upper = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(parts, 1));
    const __m512i surplus = _mm512_mask_set1_epi64(_mm512_set1_epi64(surplus_of_one), 0xf0, surplus_of_other);
    const __m512i whole = _mm512_sub_epi64(_mm512_add_epi64(_mm512_slli_epi64(upper, 16), lower), surplus);
    return _mm256_mul_ps(_mm512_cvtepi64_ps(whole), _mm256_set1_ps(1.0f / LOWER_STEPS));
}

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_token_of_planes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                      const int64_t* surplus, float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Spread<OUTPUTS> weights;
    __m128 sum = _mm_setzero_ps();
    const int64_t chunks = (rows.words + 1) / 2;
    const auto totals_of = [&](int64_t j, int64_t from) ACE_INLINED {
        PlaneSums<OUTPUTS> block;
        const int64_t left = task.padded - j < task.block ? task.padded - j : task.block;
        if (left == MOST_OF_BLOCK) {
#pragma GCC unroll 8
            for (int k = 0; k < MOST_OF_BLOCK; k += UNIT) block.add(weights, from + k, load_register(x + (j + k) * 4));
        } else {
            for (int64_t k = 0; k < left; k += UNIT) block.add(weights, from + k, load_register(x + (j + k) * 4));
        }
        return block.totals();
    };
    for (int64_t first = 0, b = 0; b < task.blocks; first += SPREAD) {
        weights.fill(rows, first, chunks);
        for (int64_t j = first; j < first + SPREAD && b < task.blocks; j += 2 * task.block, b += 2) {
            const bool two = b + 1 < task.blocks;
            const __m512i one = totals_of(j, j - first);
            const __m512i other = two ? totals_of(j + task.block, j + task.block - first) : _mm512_setzero_si512();
            const __m256 values = values_of(one, other, surplus[b], two ? surplus[b + 1] : 0);
            const auto add = [&](__m128 four, int64_t block) ACE_INLINED {
                const __m128 factor = _mm_mul_ps(_mm_set1_ps(scales[block]), magnitudes.of(block));
                sum = _mm_add_ps(sum, _mm_mul_ps(four, factor));
            };
            add(_mm256_castps256_ps128(values), b);
            if (two) add(_mm256_extractf128_ps(values, 1), b + 1);
        }
    }
    _mm_storeu_ps(sums, sum);
}

// Several tokens: weights are spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_tokens_of_planes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                        const int64_t* surplus, int tokens, float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Spread<OUTPUTS> weights;
    __m128 sum[TOKENS_AT_ONCE];
    for (__m128& of_one : sum) of_one = _mm_setzero_ps();
    const int64_t chunks = (rows.words + 1) / 2, of_token = task.padded * 4;
    for (int64_t first = 0, b = 0; b < task.blocks; first += SPREAD) {
        weights.fill(rows, first, chunks);
        for (int64_t j = first; j < first + SPREAD && b < task.blocks; j += task.block, ++b) {
            const __m128 of_rows = magnitudes.of(b);
            const int64_t left = task.padded - j < task.block ? task.padded - j : task.block;
            const auto add = [&](__m128 four, int t) ACE_INLINED {
                const __m128 factor = _mm_mul_ps(_mm_set1_ps(scales[t * task.blocks + b]), of_rows);
                sum[t] = _mm_add_ps(sum[t], _mm_mul_ps(four, factor));
            };
            for (int t = 0; t < tokens; t += 2) {
                // If the number of tokens is odd, the last one is multiplied twice and added once.
                const int next = t + 1 < tokens ? t + 1 : t;
                PlaneSums<OUTPUTS> one, other;
                for (int64_t k = 0; k < left; k += UNIT) {
                    const int8_t* planes = x + (j + k) * 4;
                    one.add(weights, j - first + k, load_register(planes + t * of_token));
                    other.add(weights, j - first + k, load_register(planes + next * of_token));
                }
                const __m256 values = values_of(one.totals(), other.totals(), surplus[t * task.blocks + b],
                                                surplus[next * task.blocks + b]);
                add(_mm256_castps256_ps128(values), t);
                if (next > t) add(_mm256_extractf128_ps(values, 1), next);
            }
        }
    }
    for (int t = 0; t < tokens; ++t) _mm_storeu_ps(sums + 4 * t, sum[t]);
}

}  // namespace
}  // namespace ace
