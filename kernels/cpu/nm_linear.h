// y = x W^T for the few tokens of decoding, from a packed weight or, as a baseline, a dense one.
// Lane l of an output's sum adds the inputs j with j % 16 = l in order; then a tree adds the lanes. So results do not
// depend on the instruction set, the number of threads or the other tokens of the call.
// The including file may set ACE_EXPANDS_HALVES, for AVX-512's expanding moves of 16-bit values (VBMI2).
#pragma once

#include "elements.h"
#include "octets.h"
#include "packed_weight.h"

namespace ace {
namespace {

// Outputs that share a load of the tokens, tokens that share a load of the weights, and inputs per tile of unpacked
// weights; a tile and its sixteen tokens fit in the first-level cache.
constexpr int OUTPUT_TILE = 4, TOKENS_AT_ONCE = 16, INPUT_TILE = 512;
// Prefetch distances within a row, in bytes: the fastest for each loop.
template <typename E>
constexpr int DENSE_AHEAD = sizeof(typename E::Stored) == 4 ? 1536 : 2048;
constexpr int PACKED_AHEAD = 2048;

// Prefetches the byte at `offset` in ROWS consecutive rows of `bytes` each; past their end, in the next ROWS rows.
template <int ROWS>
ACE_INLINE void ask_rows_ahead(const void* first, int64_t offset, int64_t bytes) {
    const char* asked = static_cast<const char*>(first) + (offset < bytes ? offset : offset + (ROWS - 1) * bytes);
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(asked + r * bytes);
}

// Prefetch distance of short rows without metadata, in bytes.
constexpr int WHOLE_AHEAD = 4096;

// Prefetches for `bytes` bytes at `offset` in ROWS rows that follow each other without gaps: those of short rows are
// prefetched as one run.
template <int ROWS>
ACE_INLINE void ask_whole_rows_ahead(const uint8_t* first, int64_t offset, int64_t bytes, int64_t stride) {
    if (stride * ROWS <= WHOLE_AHEAD) {
        const uint8_t* asked = first + offset * ROWS + WHOLE_AHEAD;
        for (int64_t line = 0; line < bytes * ROWS; line += 64) __builtin_prefetch(asked + line);
        return;
    }
    for (int64_t line = 0; line < bytes; line += 64) ask_rows_ahead<ROWS>(first, offset + PACKED_AHEAD + line, stride);
}

ACE_INLINE float tree_sum(const Floats& v) {
    float lane[LANES];
    store(lane, v);
    for (int step = LANES / 2; step > 0; step /= 2) {
        for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
    }
    return lane[0];
}

// Vectors of weights, by row (relative to the first) and first input.
template <typename E, int OUTPUTS>
struct DenseRows {
    static constexpr int SIZE = sizeof(typename E::Stored), STEP = 64 / SIZE;
    static constexpr bool BY_TWO = false;

    const typename E::Stored* first;
    int64_t stride;

    ACE_INLINE void ahead(int64_t j) const {
        ask_rows_ahead<OUTPUTS>(first, j * SIZE + DENSE_AHEAD<E>, stride * SIZE);
    }
    ACE_INLINE Floats at(int r, int64_t j, int lanes) const { return E::load(first + r * stride + j, lanes); }
};

#if ACE_WIDTH == 8
ACE_INLINE NativeFloats spread_octet(Fp32, const float* from, uint64_t octet) {
    return (NativeFloats)spread_octet(reinterpret_cast<const uint32_t*>(from), octet);
}
ACE_INLINE NativeFloats spread_octet(Fp16, const uint16_t* from, uint64_t octet) {
    return (NativeFloats)_mm256_cvtph_ps(spread_octet(from, octet));
}
ACE_INLINE NativeFloats spread_octet(Bf16, const uint16_t* from, uint64_t octet) {
    return (NativeFloats)spread_upper_halves(from, octet);
}
#elif ACE_NEON
// Puts eight weights in parts p and p + 1; returns how many values they are.
ACE_INLINE int64_t spread_octet(Fp32, const float* from, uint64_t octet, Floats& v, int p) {
    const uint32x4x2_t words = spread_octet(reinterpret_cast<const uint32_t*>(from), octet);
    v.part[p] = (NativeFloats)words.val[0];
    v.part[p + 1] = (NativeFloats)words.val[1];
    return COUNTS.of[octet];
}
template <typename E>
ACE_INLINE int64_t spread_octet(E, const uint16_t* from, uint64_t octet, Floats& v, int p) {
    E::split(spread_octet(from, octet), v.part + p);
    return COUNTS.of[octet];
}
#endif

// Metadata bits of sixteen neighboring weights. Words are little-endian, as are all machines that this is built for.
ACE_INLINE uint64_t kept_bits(const uint32_t* meta, int64_t j) {
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(meta) + j / 8, sizeof bits);
    return bits;
}

ACE_INLINE uint64_t count_bits(uint64_t bits) { return uint32_t(__builtin_popcountll(bits)); }

// Sixteen weights of a row: lane k is the next value, from `from` on, if bit k is set, else 0. Sixteen values are read,
// and `from` moves on by those that were used. The portable code is slow, because its element stores do not forward to
// the vector load.
template <typename E>
ACE_INLINE Floats spread(const typename E::Stored*& from, uint64_t bits) {
#if ACE_WIDTH == 16
    const Floats values = E::load(from);
    from += count_bits(bits);
    return Floats{{(NativeFloats)_mm512_maskz_expand_ps(uint16_t(bits), (__m512)values.part[0])}};
#elif ACE_WIDTH == 8
    Floats v;
    const uint64_t octet[] = {bits & 0xff, bits >> 8};
    for (int p = 0; p < PARTS; ++p) {
        v.part[p] = spread_octet(E{}, from, octet[p]);
        from += count_bits(octet[p]);
    }
    return v;
#elif ACE_NEON
    Floats v;
    from += spread_octet(E{}, from, bits & 0xff, v, 0);
    from += spread_octet(E{}, from, bits >> 8, v, 2);
    return v;
#else
    float lane[LANES] = {}, value[LANES];
    store(value, E::load(from));
    int next = 0;
    for (; bits; bits &= bits - 1) lane[__builtin_ctzll(bits)] = value[next++];
    from += next;
    return load(lane);
#endif
}

#if ACE_EXPANDS_HALVES
// The same for 32 weights: the second half of the bits is for lanes of the second vector. 32 values are read.
ACE_INLINE void spread_two(Bf16, __m512i values, uint32_t bits, Floats* v) {
    // Lane l of both halves side by side, which are the upper halves of fp32 numbers.
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(LANES));
    const __m512i order = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    const __m512i pairs = _mm512_permutexvar_epi16(order, _mm512_maskz_expand_epi16(bits, values));
    v[0].part[0] = (NativeFloats)_mm512_slli_epi32(pairs, 16);
    v[1].part[0] = (NativeFloats)_mm512_and_si512(pairs, _mm512_set1_epi32(int32_t(0xffff0000)));
}
ACE_INLINE void spread_two(Fp16, __m512i values, uint32_t bits, Floats* v) {
    const __m512i halves = _mm512_maskz_expand_epi16(bits, values);
    v[0].part[0] = (NativeFloats)_mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    v[1].part[0] = (NativeFloats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
#endif

// OUTPUTS packed rows, from some row on, read from the first input to the last. Values follow each other without gaps,
// so a row's next value is behind those that it has read. `end` is the end of all values. LAST is true if a row with
// damaged metadata could read past it; the row then reads zeros.
template <typename E, int OUTPUTS, bool LAST>
struct PackedRows {
    using Stored = typename E::Stored;
    // At half of the weights kept, a row reads one cache line per step.
    static constexpr int STEP = 128 / sizeof(Stored);

    const Stored *next[OUTPUTS], *first, *end;
    const uint32_t* meta;
    int64_t words, row_bytes;  // of metadata per row, and of values in an average row

    ACE_INLINE void ahead(int64_t j) const {
        const int64_t read = reinterpret_cast<const char*>(next[0]) - reinterpret_cast<const char*>(first);
        ask_rows_ahead<OUTPUTS>(first, read + PACKED_AHEAD, row_bytes);
        // The metadata of these rows is short and contiguous: prefetch that of the next rows, an equal share each time.
        __builtin_prefetch(reinterpret_cast<const char*>(meta + OUTPUTS * words) + j / 8 * OUTPUTS);
    }
    ACE_INLINE Floats at(int r, int64_t j, int) {
        const uint64_t bits = kept_bits(meta + r * words, j);
        const Stored* from = next[r];
        if (LAST && end - from < LANES) {
            Stored some[LANES] = {};
            memcpy(some, from, (end - from) * sizeof *some);
            const uint32_t count = count_bits(bits);
            next[r] = end - from < count ? end : from + count;
            from = some;
            return spread<E>(from, bits);
        }
        return spread<E>(next[r], bits);
    }
#if ACE_EXPANDS_HALVES
    // Whether 32 inputs are read at once.
    static constexpr bool BY_TWO = !LAST && sizeof(Stored) == 2;

    // 32 inputs from a multiple of 32 on.
    ACE_INLINE void two_at(int r, int64_t j, Floats* v) {
        const uint32_t bits = meta[r * words + j / 32];
        spread_two(E{}, _mm512_loadu_si512(next[r]), bits, v);
        next[r] += count_bits(bits);
    }
#endif
};

// One token: weights are multiplied directly as they are loaded. This function and some_tokens are not inlined: the
// compiler keeps a whole loop in registers only if the loop is in a function of its own.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void one_token(const Rows& of, int64_t cols, const float* x, Floats* sums) {
    Rows rows = of;
    Floats sum[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) sum[r] = Floats::all(0.0f);
    int64_t j = 0;
    for (; j + Rows::STEP <= cols; j += Rows::STEP) {
        rows.ahead(j);
#if ACE_EXPANDS_HALVES
        if constexpr (Rows::BY_TWO) {
            for (int k = 0; k < Rows::STEP; k += 2 * LANES) {
                const Floats v[] = {load(x + j + k), load(x + j + k + LANES)};
                for (int r = 0; r < OUTPUTS; ++r) {
                    Floats weights[2];
                    rows.two_at(r, j + k, weights);
                    sum[r] = sum[r] + weights[0] * v[0] + weights[1] * v[1];
                }
            }
            continue;
        }
#endif
        for (int k = 0; k < Rows::STEP; k += LANES) {
            const Floats v = load(x + j + k);
            for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + rows.at(r, j + k, LANES) * v;
        }
    }
    for (; j + LANES <= cols; j += LANES) {
        const Floats v = load(x + j);
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + rows.at(r, j, LANES) * v;
    }
    if (j < cols) {
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + rows.at(r, j, int(cols - j)) * load(x + j);
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE] = sum[r];
}

// Multiplies TOKENS tokens by a tile of unpacked weights; each output has TOKENS_AT_ONCE sums.
template <int OUTPUTS, int TOKENS>
ACE_INLINE void add_tile(const float (*tile)[INPUT_TILE], int count, const float* x, int64_t padded, Floats* sums) {
    Floats sum[OUTPUTS][TOKENS];
    for (int r = 0; r < OUTPUTS; ++r) {
        for (int t = 0; t < TOKENS; ++t) sum[r][t] = sums[r * TOKENS_AT_ONCE + t];
    }
    for (int j = 0; j < count; j += LANES) {
        Floats w[OUTPUTS];
        for (int r = 0; r < OUTPUTS; ++r) w[r] = load(tile[r] + j);
        for (int t = 0; t < TOKENS; ++t) {
            const Floats v = load(x + t * padded + j);
            for (int r = 0; r < OUTPUTS; ++r) sum[r][t] = sum[r][t] + w[r] * v;
        }
    }
    for (int r = 0; r < OUTPUTS; ++r) {
        for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS_AT_ONCE + t] = sum[r][t];
    }
}

// The same part by part, for vectors of four registers: otherwise the sums of several tokens do not fit in registers.
template <int OUTPUTS, int TOKENS>
ACE_INLINE void add_tile_by_parts(const float (*tile)[INPUT_TILE], int count, const float* x, int64_t padded,
                                  Floats* sums) {
    for (int p = 0; p < PARTS; ++p) {
        NativeFloats sum[OUTPUTS][TOKENS];
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int t = 0; t < TOKENS; ++t) sum[r][t] = sums[r * TOKENS_AT_ONCE + t].part[p];
        }
        for (int j = p * WIDTH; j < count; j += LANES) {
            NativeFloats w[OUTPUTS], v;
            for (int r = 0; r < OUTPUTS; ++r) memcpy(&w[r], tile[r] + j, sizeof v);
            for (int t = 0; t < TOKENS; ++t) {
                memcpy(&v, x + t * padded + j, sizeof v);
                for (int r = 0; r < OUTPUTS; ++r) sum[r][t] = sum[r][t] + w[r] * v;
            }
        }
        for (int r = 0; r < OUTPUTS; ++r) {
            for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS_AT_ONCE + t].part[p] = sum[r][t];
        }
    }
}

// Several tokens: each tile of weights is unpacked once.
template <int OUTPUTS, typename Rows>
ACE_OUTLINED void some_tokens(const Rows& of, int64_t cols, const float* x, int64_t padded, int tokens, Floats* sums) {
    Rows rows = of;
    alignas(64) float tile[OUTPUTS][INPUT_TILE];
    for (int k = 0; k < OUTPUTS * TOKENS_AT_ONCE; ++k) sums[k] = Floats::all(0.0f);
    for (int64_t from = 0; from < cols; from += INPUT_TILE) {
        const int count = int(cols - from < INPUT_TILE ? cols - from : INPUT_TILE);
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            if (j % Rows::STEP == 0) rows.ahead(from + j);
            for (int r = 0; r < OUTPUTS; ++r) store(tile[r] + j, rows.at(r, from + j, lanes));
        });
        int t = 0;
        for (; t + 4 <= tokens; t += 4) {
            const float* inputs = x + t * padded + from;
            if constexpr (PARTS == 4) add_tile_by_parts<OUTPUTS, 4>(tile, count, inputs, padded, sums + t);
            else add_tile<OUTPUTS, 4>(tile, count, inputs, padded, sums + t);
        }
        for (; t < tokens; ++t) add_tile<OUTPUTS, 1>(tile, count, x + t * padded + from, padded, sums + t);
    }
}

// Stores OUTPUTS outputs, from output i on, for `tokens` tokens from `first` on.
template <int OUTPUTS>
ACE_INLINE void deliver_sums(const Floats* sums, int tokens, int64_t first, const LinearTask& task, int64_t i) {
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) {
            const float y = tree_sum(sums[r * TOKENS_AT_ONCE + t]);
            task.out[(first + t) * task.out_stride + i + r] = task.bias ? y + task.bias[i + r] : y;
        }
    }
}

template <int OUTPUTS, typename Rows>
ACE_INLINE void outputs_of(const Rows& rows, int64_t cols, const LinearTask& task, int64_t i) {
    Floats sums[OUTPUTS * TOKENS_AT_ONCE];
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        const float* x = task.tokens + first * task.padded;
        if (tokens == 1) one_token<OUTPUTS>(rows, cols, x, sums);
        else some_tokens<OUTPUTS>(rows, cols, x, task.padded, tokens, sums);
        deliver_sums<OUTPUTS>(sums, tokens, first, task, i);
    }
}

// Computes outputs begin..end, MOST at a time; rows_from(i, count) returns `count` rows, a constant, from i on.
template <int MOST, typename RowsFrom>
ACE_INLINE void linear(RowsFrom rows_from, int64_t cols, const LinearTask& task, int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + MOST <= end; i += MOST) {
        outputs_of<MOST>(rows_from(i, std::integral_constant<int, MOST>{}), cols, task, i);
    }
    for (; i < end; ++i) outputs_of<1>(rows_from(i, std::integral_constant<int, 1>{}), cols, task, i);
}

// Whether rows from..to read no value past the end, whatever their metadata are: a row reads at most one value for each
// of its inputs, and a register more.
ACE_INLINE bool read_inside(const PackedWeight& w, int64_t stride, int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
        if (first_value(w, stride, i) + w.cols + LANES > w.n_values) return false;
    }
    return true;
}

inline void packed_linear(const PackedWeight& w, const LinearTask& task, int64_t begin, int64_t end) {
    const int64_t words = (w.cols + 31) / 32, stride = row_stride(w);
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        using Stored = typename E::Stored;
        const auto* values = static_cast<const Stored*>(w.values);
        const auto rows = [&](int64_t i, auto count, auto last) ACE_INLINED {
            constexpr int COUNT = decltype(count)::value;
            PackedRows<E, COUNT, decltype(last)::value> made;
            for (int r = 0; r < COUNT; ++r) made.next[r] = values + first_value(w, stride, i + r);
            made.first = made.next[0];
            made.end = values + w.n_values;
            made.meta = w.meta + i * words;
            made.words = words;
            made.row_bytes = (made.next[COUNT - 1] - made.first) / (COUNT > 1 ? COUNT - 1 : 1) * int64_t(sizeof(Stored));
            return made;
        };
        const auto inside = [&](int64_t i, auto count) ACE_INLINED { return rows(i, count, std::false_type{}); };
        const auto last = [&](int64_t i, auto count) ACE_INLINED { return rows(i, count, std::true_type{}); };
        int64_t i = begin;
        while (i < end) {
            const int64_t count = end - i < OUTPUT_TILE ? 1 : OUTPUT_TILE;
            if (read_inside(w, stride, i, i + count)) linear<OUTPUT_TILE>(inside, w.cols, task, i, i + count);
            else linear<1>(last, w.cols, task, i, i + count);
            i += count;
        }
    });
}

inline void dense_linear(const Matrix& w, const LinearTask& task, int64_t begin, int64_t end) {
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        const auto* first = static_cast<const typename E::Stored*>(w.data);
        const auto rows = [&](int64_t i, auto count) ACE_INLINED {
            return DenseRows<E, decltype(count)::value>{first + i * w.stride, w.stride};
        };
        linear<OUTPUT_TILE>(rows, w.cols, task, begin, end);
    });
}

inline void widen_rows(const Matrix& matrix, int64_t padded, float* out) {
    with_element(matrix.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t t = 0; t < matrix.rows; ++t) {
            const auto* row = static_cast<const typename E::Stored*>(matrix.data) + t * matrix.stride;
            for (int64_t j = 0; j < matrix.cols; j += LANES) {
                const int lanes = int(matrix.cols - j < LANES ? matrix.cols - j : LANES);
                store(out + t * padded + j, E::load(row + j, lanes));
            }
        }
    });
}

}  // namespace
}  // namespace ace
