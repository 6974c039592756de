// y = x W^T from a weight packed 2:4, value by value. Sixteen values, two per group of four, gather their inputs by
// index, so pruned weights cost nothing. Lane l of an output's sum adds the values k with k % 16 = l.
#pragma once

#include "nm_linear.h"

namespace ace {
namespace {

// Weights per word of metadata, and per vector of values.
constexpr int WORD = 32;
// Inputs whose indices are computed at once for one token. This stalls memory reads, so short steps are best if a
// register of values fills a whole cache line.
template <typename E>
constexpr int ONE_TOKEN_TILE = WIDTH * sizeof(typename E::Stored) == 64 ? 128 : INPUT_TILE;
// Prefetch distances within a row, in bytes.
template <typename E>
constexpr int VALUES_AHEAD = sizeof(typename E::Stored) == 4 ? 1536 : 3072;
template <typename E>
constexpr int META_AHEAD = sizeof(typename E::Stored) == 4 ? 128 : 512;

// Converts words of 32 bits to words of sixteen 2-bit indices into groups, nibble by nibble. The lower index is 0 if
// bit 0 is set, else 1 if bit 1 is set, else 2. The higher index is 3, 2 or 1 by bits 3 and 2. Any bits give
// indices from 0 to 3.
constexpr uint32_t places_of(uint32_t bits) {
    const uint32_t down = bits >> 1, up = bits << 1;
    return (~bits & down & 0x11111111) | (~(bits | up) & 0x22222222) | ((down | ~bits) & 0x44444444) |
           ((bits | up) & 0x88888888);
}

#if ACE_NEON
// For four indices, of two groups: the source byte, out of their eight inputs, for each byte of the four inputs.
struct PlaceBytes {
    uint8_t of[256][16];

    constexpr PlaceBytes() : of() {
        for (int places = 0; places < 256; ++places) {
            for (int byte = 0; byte < 16; ++byte) {
                const int k = byte / 4, input = k / 2 * 4 + (places >> (2 * k) & 3);
                of[places][byte] = uint8_t(4 * input + byte % 4);
            }
        }
    }
};
alignas(64) constexpr PlaceBytes PLACE_BYTES;
#endif

// Gathers the inputs of sixteen values out of the 32 inputs at `x`.
struct Inputs {
#if ACE_WIDTH == 16
    __m512i index;
    ACE_INLINE explicit Inputs(uint32_t places) {
        const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        const __m512i shifted = _mm512_maskz_srlv_epi32(0xffff, _mm512_set1_epi32(int32_t(places)), shifts);
        constexpr int AND_OR = 0xea;
        index = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(3), groups, AND_OR);
    }
    ACE_INLINE Floats of(const float* x) const {
        return Floats{{(NativeFloats)_mm512_permutex2var_ps(_mm512_loadu_ps(x), index, _mm512_loadu_ps(x + LANES))}};
    }
#elif ACE_WIDTH == 8
    __m256i index[2];
    ACE_INLINE explicit Inputs(uint32_t places) {
        const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        index[0] = _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(places)), shifts);
        index[1] = _mm256_srlv_epi32(_mm256_set1_epi32(int32_t(places >> 16)), shifts);
    }
    // Four groups at a time; the first two fill the lower half of the register.
    ACE_INLINE Floats of(const float* x) const {
        Floats v;
        for (int p = 0; p < 2; ++p, x += LANES) {
            const __m256 even = _mm256_set_m128(_mm_loadu_ps(x + 8), _mm_loadu_ps(x));
            const __m256 odd = _mm256_set_m128(_mm_loadu_ps(x + 12), _mm_loadu_ps(x + 4));
            v.part[p] = (NativeFloats)_mm256_blend_ps(_mm256_permutevar_ps(even, index[p]),
                                                      _mm256_permutevar_ps(odd, index[p]), 0xcc);
        }
        return v;
    }
#elif ACE_NEON
    uint32_t places;
    ACE_INLINE explicit Inputs(uint32_t places) : places(places) {}
    ACE_INLINE Floats of(const float* x) const {
        Floats v;
        for (int p = 0; p < PARTS; ++p) v.part[p] = part(index(p), two_groups(x + 8 * p));
        return v;
    }
    // The same for the four values of part p, whose inputs are the eight of `two_groups`: a table of two adjacent
    // registers.
    ACE_INLINE uint8x16_t index(int p) const { return vld1q_u8(PLACE_BYTES.of[places >> (8 * p) & 0xff]); }
    static ACE_INLINE uint8x16x2_t two_groups(const float* x) {
        return vld1q_u8_x2(reinterpret_cast<const uint8_t*>(x));
    }
    static ACE_INLINE NativeFloats part(uint8x16_t index, uint8x16x2_t inputs) {
        return (NativeFloats)vqtbl2q_u8(inputs, index);
    }
#else
    uint32_t places;
    ACE_INLINE explicit Inputs(uint32_t places) : places(places) {}
    ACE_INLINE Floats of(const float* x) const {
        float v[LANES];
        for (int k = 0; k < LANES; ++k) v[k] = x[k / 2 * 4 + (places >> (2 * k) & 3)];
        return load(v);
    }
#endif
};

// Rows of a packed weight.
template <typename E>
struct TwoOfFour {
    const typename E::Stored* values;
    const uint32_t* meta;
    int64_t stride, words;
};

// Multiplies one word of OUTPUTS rows by TOKENS tokens; a row's last word may have only `lanes` values.
template <int OUTPUTS, int TOKENS, bool WHOLE, typename E, int TILE_WORDS>
ACE_INLINE void add_word(const typename E::Stored* const* row, int lanes, const uint32_t (*places)[TILE_WORDS], int k,
                         const float* x, int64_t padded, Floats (*sum)[TOKENS]) {
#if ACE_NEON
    // One token, half of the word at a time: few registers hold its inputs.
    if constexpr (WHOLE) {
        static_assert(TOKENS == 1, "several tokens are multiplied by parts");
        const auto add_half = [&](auto half) ACE_INLINED {
            constexpr int h = decltype(half)::value;
            const float* const from = x + k * WORD + h * LANES;
            const uint8x16x2_t first = Inputs::two_groups(from), second = Inputs::two_groups(from + 8);
            for (int r = 0; r < OUTPUTS; ++r) {
                NativeFloats values[2];
                E::load_parts(row[r] + k * LANES + h * 8, values);
                const Inputs inputs(places[r][k]);
                NativeFloats &left = sum[r][0].part[2 * h], &right = sum[r][0].part[2 * h + 1];
                left = left + values[0] * Inputs::part(inputs.index(2 * h), first);
                right = right + values[1] * Inputs::part(inputs.index(2 * h + 1), second);
            }
        };
        add_half(std::integral_constant<int, 0>{});
        add_half(std::integral_constant<int, 1>{});
        return;
    }
#endif
    for (int r = 0; r < OUTPUTS; ++r) {
        const Floats values = E::load(row[r] + k * LANES, WHOLE ? LANES : lanes);
        const Inputs inputs(places[r][k]);
        for (int t = 0; t < TOKENS; ++t) sum[r][t] = sum[r][t] + values * inputs.of(x + k * WORD + t * padded);
    }
}

#if ACE_NEON
// Multiplies one tile as add_tile does, part by part, so that the sums of all tokens fit in registers.
template <int OUTPUTS, int TOKENS, typename E, int TILE_WORDS>
ACE_INLINE void add_tile_by_parts(const TwoOfFour<E>& w, int64_t from, int count, const uint32_t (*places)[TILE_WORDS],
                                  const float* x, int64_t padded, Floats* sums) {
    for (int p = 0; p < PARTS; ++p) {
        const typename E::Stored* row[OUTPUTS];
        NativeFloats sum[OUTPUTS][TOKENS];
        for (int r = 0; r < OUTPUTS; ++r) {
            row[r] = w.values + r * w.stride + from / 2 + p * WIDTH;
            for (int t = 0; t < TOKENS; ++t) sum[r][t] = sums[r * TOKENS_AT_ONCE + t].part[p];
        }
        const auto add = [&](int k, const NativeFloats* values) ACE_INLINED {
            uint8x16_t index[OUTPUTS];
            for (int r = 0; r < OUTPUTS; ++r) index[r] = Inputs(places[r][k]).index(p);
            for (int t = 0; t < TOKENS; ++t) {
                const uint8x16x2_t inputs = Inputs::two_groups(x + from + t * padded + k * WORD + p * 2 * WIDTH);
                for (int r = 0; r < OUTPUTS; ++r) sum[r][t] = sum[r][t] + values[r] * Inputs::part(index[r], inputs);
            }
        };
        NativeFloats values[OUTPUTS];
        int k = 0;
        for (; (k + 1) * WORD <= count; ++k) {
            constexpr int SIZE = sizeof(typename E::Stored);
            if (p == 0) {
                ask_rows_ahead<OUTPUTS>(w.values, (from / 2 + k * LANES) * SIZE + VALUES_AHEAD<E>, w.stride * SIZE);
            }
            for (int r = 0; r < OUTPUTS; ++r) values[r] = E::load_part(row[r] + k * LANES);
            add(k, values);
        }
        const int left = (count - k * WORD) / 2 - p * WIDTH;
        if (left > 0) {
            for (int r = 0; r < OUTPUTS; ++r) {
                values[r] = E::load(row[r] + k * LANES, left < WIDTH ? left : WIDTH).part[0];
            }
            add(k, values);
        }
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS_AT_ONCE + t].part[p] = sum[r][t];
        }
    }
}
#endif

// Multiplies one tile of `count` inputs, from `from` on. One token leaves registers free, so the loop is unrolled and
// prefetches each cache line once.
template <int OUTPUTS, int TOKENS, typename E, int TILE_WORDS>
ACE_INLINE void add_tile(const TwoOfFour<E>& w, int64_t from, int count, const uint32_t (*places)[TILE_WORDS],
                         const float* x, int64_t padded, Floats* sums) {
    constexpr int SIZE = sizeof(typename E::Stored), LINE_WORDS = TOKENS == 1 ? 64 / (LANES * SIZE) : 1;
    const typename E::Stored* row[OUTPUTS];
    Floats sum[OUTPUTS][TOKENS];
    for (int r = 0; r < OUTPUTS; ++r) {
        row[r] = w.values + r * w.stride + from / 2;
        for (int t = 0; t < TOKENS; ++t) sum[r][t] = sums[r * TOKENS_AT_ONCE + t];
    }
    x += from;
    int k = 0;
    for (; (k + LINE_WORDS) * WORD <= count; k += LINE_WORDS) {
        ask_rows_ahead<OUTPUTS>(w.values, (from / 2 + k * LANES) * SIZE + VALUES_AHEAD<E>, w.stride * SIZE);
        for (int u = 0; u < LINE_WORDS; ++u) {
            add_word<OUTPUTS, TOKENS, true, E>(row, LANES, places, k + u, x, padded, sum);
        }
    }
    for (; (k + 1) * WORD <= count; ++k) add_word<OUTPUTS, TOKENS, true, E>(row, LANES, places, k, x, padded, sum);
    if (k * WORD < count) {
        add_word<OUTPUTS, TOKENS, false, E>(row, (count - k * WORD) / 2, places, k, x, padded, sum);
    }
    for (int r = 0; r < OUTPUTS; ++r) {
        for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS_AT_ONCE + t] = sum[r][t];
    }
}

// All inputs, TILE at a time; the number of words is a constant in every tile but the last.
template <int OUTPUTS, int TILE, typename E>
ACE_INLINE void add_row(const TwoOfFour<E>& w, int64_t cols, const float* x, int64_t padded, int tokens, Floats* sums) {
    const auto add = [&](int64_t from, int count) ACE_INLINED {
        uint32_t places[OUTPUTS][TILE / WORD];
        ask_rows_ahead<OUTPUTS>(w.meta, from / 8 + META_AHEAD<E>, w.words * 4);
        for (int r = 0; r < OUTPUTS; ++r) {
            const uint32_t* meta = w.meta + r * w.words + from / WORD;
            for (int k = 0; k * WORD < count; ++k) places[r][k] = places_of(meta[k]);
        }
        int t = 0;
        for (; t + 4 <= tokens; t += 4) {
#if ACE_NEON
            add_tile_by_parts<OUTPUTS, 4>(w, from, count, places, x + t * padded, padded, sums + t);
#else
            add_tile<OUTPUTS, 4>(w, from, count, places, x + t * padded, padded, sums + t);
#endif
        }
        for (; t < tokens; ++t) add_tile<OUTPUTS, 1>(w, from, count, places, x + t * padded, padded, sums + t);
    };
    int64_t from = 0;
    for (; from + TILE <= cols; from += TILE) add(from, TILE);
    if (from < cols) add(from, int(cols - from));
}

template <int OUTPUTS, typename E>
ACE_INLINE void two_of_four_outputs(const TwoOfFour<E>& w, const PackedWeight& whole, const LinearTask& task,
                                    int64_t i) {
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        const float* x = task.tokens + first * task.padded;
        Floats sums[OUTPUTS * TOKENS_AT_ONCE];
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int t = 0; t < tokens; ++t) sums[r * TOKENS_AT_ONCE + t] = Floats::all(0.0f);
        }
        if (ONE_TOKEN_TILE<E> < INPUT_TILE && tokens == 1) {
            add_row<OUTPUTS, ONE_TOKEN_TILE<E>>(w, whole.cols, x, task.padded, 1, sums);
        } else {
            add_row<OUTPUTS, INPUT_TILE>(w, whole.cols, x, task.padded, tokens, sums);
        }
        deliver_sums<OUTPUTS>(sums, tokens, first, task, i);
    }
}

inline void two_of_four_linear(const PackedWeight& w, const LinearTask& task, int64_t begin, int64_t end) {
    const int64_t stride = w.cols / 2, words = (w.cols + WORD - 1) / WORD;
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        const auto* values = static_cast<const typename E::Stored*>(w.values);
        const auto rows = [&](int64_t i) ACE_INLINED {
            return TwoOfFour<E>{values + i * stride, w.meta + i * words, stride, words};
        };
        int64_t i = begin;
        for (; i + OUTPUT_TILE <= end; i += OUTPUT_TILE) two_of_four_outputs<OUTPUT_TILE>(rows(i), w, task, i);
        for (; i < end; ++i) two_of_four_outputs<1>(rows(i), w, task, i);
    });
}

inline void nm_linear(const PackedWeight& w, const LinearTask& task, int64_t begin, int64_t end) {
    if (!w.starts && w.n == 2 && w.m == 4) two_of_four_linear(w, task, begin, end);
    else packed_linear(w, task, begin, end);
}

}  // namespace
}  // namespace ace
