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

// Where the sums of a block's products start, [n_tokens, blocks] registers of STARTS integers behind the tokens: less
// what the weights' offset adds to them.
constexpr int STARTS = BLOCK_START * sizeof(int16_t) / sizeof(int32_t);
ACE_INLINE int32_t* starts_of(const int16_t* tokens, int64_t n_tokens, int64_t padded) {
    return reinterpret_cast<int32_t*>(const_cast<int16_t*>(tokens) + n_tokens * padded * 2);
}

inline void round_to_planes(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                            float* scales) {
    round_tokens(matrix, block, false, padded, out, scales);
    int32_t* starts = starts_of(out, matrix.rows, padded);
    const __m512i offset = all_bytes(deinterleaved ? NIBBLE_OFFSET : BYTE_OFFSET);
    for (int64_t t = 0; t < matrix.rows; ++t) {
        int16_t* const row = out + t * padded * 2;
        for (int64_t j = 0; j < padded; j += CHUNK) store_planes(row + j * 2, deinterleaved);
        for (int64_t first = 0; first < matrix.cols; first += block, starts += STARTS) {
            const int64_t end = first + block < padded ? first + block : padded;
            __m512i added = _mm512_setzero_si512();
            for (int64_t j = first; j < end; j += UNIT) {
                added = _mm512_dpbusd_epi32(added, offset, load_register(row + j * 2));
            }
            _mm512_storeu_si512(starts, _mm512_sub_epi32(_mm512_setzero_si512(), added));
        }
    }
}

// Sums of a block's products for four rows: lane q of four holds plane q.
template <int OUTPUTS>
struct PlaneSums {
    __m512i of[4];

    explicit ACE_INLINE PlaneSums(const int32_t* starts) {
        for (int r = 0; r < 4; ++r) of[r] = r < OUTPUTS ? load_register(starts) : _mm512_setzero_si512();
    }
    // Sixteen inputs, with rows of spread weights.
    ACE_INLINE void add(const uint8_t* weights, __m512i planes) {
        for (int r = 0; r < OUTPUTS; ++r) {
            const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(weights + r * SPREAD));
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
ACE_INLINE __m256 values_of(__m512i one, __m512i other) {
    // The integers of planes 0 and 1, then those of planes 2 and 3, side by side for each sum.
    const __m512i even = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 16, 24, 17, 25, 18, 26, 19, 27);
    const __m512i low = _mm512_permutex2var_epi32(one, even, other);
    const __m512i high = _mm512_permutex2var_epi32(one, _mm512_add_epi32(even, _mm512_set1_epi32(4)), other);
    const __m512i parts = _mm512_add_epi32(low, _mm512_slli_epi32(high, 8));
    const __m512i upper = _mm512_mul_epi32(_mm512_srli_epi64(parts, 32), _mm512_set1_epi64(LOWER_STEPS));
    const __m512i whole = _mm512_add_epi64(upper, _mm512_mul_epi32(parts, _mm512_set1_epi64(1)));
    return _mm256_mul_ps(_mm512_cvtepi64_ps(whole), _mm256_set1_ps(1.0f / LOWER_STEPS));
}

// Sums of two blocks, or of two tokens, of `inputs` inputs: those of OUTPUTS rows in four lanes each. `weights` are
// spread; `to_weights` and so on say how far away those of the second are.
template <int OUTPUTS>
ACE_OUTLINED __m256 two_sums(const uint8_t* weights, const int8_t* planes, const int32_t* starts, int64_t to_weights,
                             int64_t to_planes, int64_t to_starts, int64_t inputs) {
    PlaneSums<OUTPUTS> one(starts), other(starts + to_starts);
    for (int64_t k = 0; k < inputs; k += 2 * UNIT) {
        for (int64_t unit = k; unit < k + 2 * UNIT; unit += UNIT) {
            one.add(weights + unit, load_register(planes + unit * 4));
            other.add(weights + to_weights + unit, load_register(planes + to_planes + unit * 4));
        }
    }
    return values_of(one.totals(), other.totals());
}

// Sums of the blocks of SPREAD inputs, four lanes each. Between their products the rows' next weights are spread, from
// chunk `later` on: products that wait for their own weights would fill the processor's queue.
template <int OUTPUTS, int BLOCK, typename Rows>
ACE_OUTLINED void sums_of_spread(const Spread<OUTPUTS>& weights, const int8_t* planes, const int32_t* starts,
                                 Spread<OUTPUTS>& next, const Rows& rows, int64_t later, float* sums) {
    constexpr int STEPS = BLOCK / UNIT, PAIRS = SPREAD / (2 * BLOCK), TWO_CHUNKS = 2 * CHUNK;
    rows.template ahead<OUTPUTS>(later * CHUNK);
    auto row = rows.row(0, later);
#pragma GCC unroll 4
    for (int pair = 0; pair < PAIRS; ++pair) {
        PlaneSums<OUTPUTS> one(starts + 2 * pair * STARTS), other(starts + (2 * pair + 1) * STARTS);
#pragma GCC unroll 8
        for (int k = 0; k < STEPS; ++k) {
            const int first = 2 * pair * BLOCK + k * UNIT, second = first + BLOCK, step = pair * STEPS + k;
            one.add(weights.of[0] + first, load_register(planes + first * 4));
            other.add(weights.of[0] + second, load_register(planes + second * 4));
            if (step < 2 * OUTPUTS) row.two(step % 2 * 2).store(next.of[step / 2] + step % 2 * TWO_CHUNKS);
            if (step % 2) row.next();
        }
        _mm256_storeu_ps(sums + 8 * pair, values_of(one.totals(), other.totals()));
    }
}

// One token: sums of OUTPUTS rows, without the factor 1 / LARGEST.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_token_of_planes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                      const int32_t* starts, float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Spread<OUTPUTS> two[2];
    __m128 sum = _mm_setzero_ps();
    const int64_t block = task.block, blocks = task.blocks, padded = task.padded;
    const auto add = [&](__m128 four, int64_t b) ACE_INLINED {
        const __m128 factor = _mm_mul_ps(_mm_set1_ps(scales[b]), _mm_load_ps(magnitudes.of(b)));
        sum = _mm_add_ps(sum, _mm_mul_ps(four, factor));
    };
    two[0].fill(rows, 0);
    int64_t b = 0, j = 0;
    const auto sums_of = block == 128  ? sums_of_spread<OUTPUTS, 128, Rows>
                         : block == 64 ? sums_of_spread<OUTPUTS, 64, Rows>
                                       : sums_of_spread<OUTPUTS, 32, Rows>;
    const int64_t of_spread = SPREAD / block;
    int now = 0;
    for (; j + 2 * SPREAD <= padded; j += SPREAD, now ^= 1) {
        float of_blocks[SPREAD / WORD_INPUTS * 4];
        sums_of(two[now], x + j * 4, starts + b * STARTS, two[now ^ 1], rows, j / CHUNK + SPREAD / CHUNK, of_blocks);
        for (int64_t k = 0; k < of_spread; ++k) add(_mm_loadu_ps(of_blocks + 4 * k), b++);
    }
    for (const int64_t filled = j + SPREAD; b < blocks;) {
        if (j == filled) two[now].fill(rows, j);
        const int64_t left = padded - j, inputs = left < block ? left : block;
        const int64_t other = b + 1 < blocks && left >= 2 * block ? block : 0;
        const __m256 values = two_sums<OUTPUTS>(two[now].of[0] + j % SPREAD, x + j * 4, starts + b * STARTS, other,
                                                other * 4, other ? STARTS : 0, inputs);
        add(_mm256_castps256_ps128(values), b++);
        if (other) add(_mm256_extractf128_ps(values, 1), b++);
        j += inputs + other;
    }
    _mm_storeu_ps(sums, sum);
}

// Several tokens: weights are spread once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_tokens_of_planes(const Rows& rows, const FewBitsTask& task, const int8_t* x, const float* scales,
                                        const int32_t* starts, int tokens, float* sums) {
    MagnitudesOfFour<OUTPUTS> magnitudes(rows.weight, rows.first, rows.groups, task.group / task.block);
    Spread<OUTPUTS> weights;
    __m128 sum[TOKENS_AT_ONCE];
    for (__m128& of_one : sum) of_one = _mm_setzero_ps();
    const int64_t block = task.block, blocks = task.blocks, padded = task.padded;
    for (int64_t b = 0, j = 0; b < blocks; ++b, j += block) {
        if (j % SPREAD == 0) weights.fill(rows, j);
        const __m128 of_rows = _mm_load_ps(magnitudes.of(b));
        const uint8_t* of_block = weights.of[0] + j % SPREAD;
        const int64_t inputs = padded - j < block ? padded - j : block;
        for (int t = 0; t < tokens; t += 2) {
            const int64_t next = t + 1 < tokens ? 1 : 0;
            const __m256 values =
                two_sums<OUTPUTS>(of_block, x + (t * padded + j) * 4, starts + (t * blocks + b) * STARTS, 0,
                                  next * padded * 4, next * blocks * STARTS, inputs);
            const auto add = [&](__m128 four, int64_t token) ACE_INLINED {
                const __m128 factor = _mm_mul_ps(_mm_set1_ps(scales[token * blocks + b]), of_rows);
                sum[token] = _mm_add_ps(sum[token], _mm_mul_ps(four, factor));
            };
            add(_mm256_castps256_ps128(values), t);
            if (next) add(_mm256_extractf128_ps(values, 1), t + 1);
        }
    }
    for (int t = 0; t < tokens; ++t) _mm_storeu_ps(sums + 4 * t, sum[t]);
}

}  // namespace
}  // namespace ace
