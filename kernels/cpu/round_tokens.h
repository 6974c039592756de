// Tokens as integers in two parts of 16 bits, for products with quantized weights.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// A token is (upper + lower / LOWER_STEPS) * scale, and `upper` is at most 2^UPPER_BITS. Sums of 128 products of either
// part and an integer of 8 bits fit in 32 bits.
constexpr int UPPER_BITS = 14, LOWER_STEPS = 1 << 16;
// Blocks whose largest magnitude is below LEAST_TOKEN count as zeros.
constexpr float LEAST_TOKEN = 0x1p-100f;

ACE_INLINE float power_of_two(int exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return power;
}

// Adding it rounds magnitudes below 2^22 to the nearest integers, ties to even, in the lower bits.
constexpr float TO_INTEGER = 0x1.8p23f;

ACE_INLINE Ints nearest(const Floats& v) {
    const Floats to_integer = Floats::all(TO_INTEGER);
    return bits_of(v + to_integer) - bits_of(to_integer);
}

// Stores a part of sixteen tokens. For dot products of bytes, the upper bytes come first, then the lower bytes less
// 128: all of them are signed.
ACE_INLINE void store_part(uint16_t* to, const Halves& part) {
#if ACE_DOTPROD
    uint8x16x2_t bytes;
    memcpy(&bytes, &part, sizeof part);
    uint8_t* const first = reinterpret_cast<uint8_t*>(to);
    vst1q_u8(first, vuzp2q_u8(bytes.val[0], bytes.val[1]));
    vst1q_u8(first + LANES, veorq_u8(vuzp1q_u8(bytes.val[0], bytes.val[1]), vdupq_n_u8(0x80)));
#else
    store_raw(to, part, LANES);
#endif
}

// Products read tokens by sixteens: neighbors, or every TOKEN_WAYS-th of 64 if they are deinterleaved. Products of 16
// bits find four values of 4 bits in a lane, products of 8 bits find two.
constexpr int TOKEN_WAYS = ACE_WIDTH >= 8 ? 4 : 2;

// Puts every WAYS-th of 64 tokens side by side: first token 0 and those WAYS apart, then token 1 and those, and so on.
template <int WAYS, typename Token>
ACE_INLINE void deinterleave(const Token* from, Token* to) {
    constexpr int SIZE = DEINTERLEAVED / WAYS;
    for (int way = 0; way < WAYS; ++way) {
        for (int k = 0; k < SIZE; ++k) to[way * SIZE + k] = from[k * WAYS + way];
    }
}

// 64 tokens, the two parts of each sixteen side by side, from the order of inputs to the order that products read.
ACE_INLINE void arrange(uint16_t* parts, bool deinterleaved) {
    constexpr int UNITS = DEINTERLEAVED / LANES;
    uint16_t of_part[2][DEINTERLEAVED], ordered[DEINTERLEAVED];
    for (int k = 0; k < 2 * UNITS; ++k) memcpy(of_part[k % 2] + k / 2 * LANES, parts + k * LANES, 2 * LANES);
    for (int part = 0; part < 2; ++part) {
        if (deinterleaved) deinterleave<TOKEN_WAYS>(of_part[part], ordered);
        else memcpy(ordered, of_part[part], sizeof ordered);
        for (int unit = 0; unit < UNITS; ++unit) {
            store_part(parts + (2 * unit + part) * LANES, load_raw<Halves>(ordered + unit * LANES, LANES));
        }
    }
}

// Rounds each block of a row's tokens to integers in two parts; the block's scale is a power of two, 0 if all of its
// tokens count as zeros, NaN if one is not finite.
inline void round_tokens(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                         float* scales) {
    const int64_t blocks = (matrix.cols + block - 1) / block;
    with_element(matrix.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t t = 0; t < matrix.rows; ++t) {
            const auto* row = static_cast<const typename E::Stored*>(matrix.data) + t * matrix.stride;
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t first = b * block, left = matrix.cols - first;
                const int count = int(left < block ? left : block);
                Ints most = Ints::all(0);
                each_vector(count, [&](int j, int lanes) ACE_INLINED {
                    most = max(most, bits_of(magnitude(E::load(row + first + j, lanes))));
                });
                int32_t lane[LANES], bits = 0;
                store(lane, most);
                for (int k = 0; k < LANES; ++k) bits = lane[k] > bits ? lane[k] : bits;
                float largest;
                memcpy(&largest, &bits, sizeof largest);
                const bool finite = bits < Fp32::exponent, rounded = finite && largest >= LEAST_TOKEN;
                // All tokens of the block are below 2^exponent.
                const int exponent = (bits >> 23) - 126;
                const float scale = rounded ? power_of_two(exponent - UPPER_BITS) : 0.0f;
                scales[t * blocks + b] = finite ? scale : __builtin_nanf("");
                const Floats factor = Floats::all(rounded ? power_of_two(UPPER_BITS - exponent) : 0.0f);
                each_vector(count, [&](int j, int lanes) ACE_INLINED {
                    const Floats v = rounded ? E::load(row + first + j, lanes) * factor : Floats::all(0.0f);
                    const Floats rest = v - (v + Floats::all(TO_INTEGER) - Floats::all(TO_INTEGER));
                    const Ints lower = nearest(rest * Floats::all(LOWER_STEPS));
                    auto* parts = reinterpret_cast<uint16_t*>(out) + (t * padded + first + j) * 2;
                    store_raw(parts, narrow(nearest(v)), LANES);
                    store_raw(parts + LANES, narrow(min(lower, Ints::all(INT16_MAX))), LANES);
                });
            }
            // Zeros up to `padded`: weights without metadata are read past the end of a row.
            for (int64_t j = (matrix.cols + LANES - 1) / LANES * LANES; j < padded; j += LANES) {
                auto* parts = reinterpret_cast<uint16_t*>(out) + (t * padded + j) * 2;
                memset(parts, 0, 2 * LANES * sizeof *parts);
            }
#if !ACE_DOTPROD
            if (!deinterleaved) continue;
#endif
            for (int64_t j = 0; j < padded; j += DEINTERLEAVED) {
                arrange(reinterpret_cast<uint16_t*>(out) + (t * padded + j) * 2, deinterleaved);
            }
        }
    });
}

}  // namespace
}  // namespace ace
