// y = x W^T for the few tokens of decoding, from a weight packed n:m or, to measure against, a dense one.
// Lane l of an output's sum takes the inputs j with j % 16 = l, one after the other, whatever the instruction set, the
// number of threads or the other tokens of the call; then the lanes are added up as a tree.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Outputs that share a load of the tokens, tokens that share a load of the weights, and inputs of a tile of unpacked
// weights; a tile and its sixteen tokens stay in the first-level cache.
constexpr int OUTPUT_TILE = 4, TOKENS_AT_ONCE = 16, INPUT_TILE = 512;
// Bytes between what is read of a row and what memory is asked for meanwhile: those that each loop is fastest with.
template <typename E>
constexpr int DENSE_AHEAD = sizeof(typename E::Stored) == 4 ? 1536 : 2048;

// Asks for the byte at `ahead` of a row of `bytes`: past its end, of the row OUTPUTS below.
template <int OUTPUTS>
ACE_INLINE void ask_ahead(const void* row, int64_t ahead, int64_t bytes) {
    __builtin_prefetch(static_cast<const char*>(row) + (ahead < bytes ? ahead : ahead + (OUTPUTS - 1) * bytes));
}

ACE_INLINE float tree_sum(const Floats& v) {
    float lane[LANES];
    store(lane, v);
    for (int step = LANES / 2; step > 0; step /= 2) {
        for (int k = 0; k < step; ++k) lane[k] += lane[k + step];
    }
    return lane[0];
}

// Vectors of the weights of a row, by their first input; rows are counted from the first.
template <typename E>
struct DenseRows {
    const typename E::Stored* first;
    int64_t stride;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int r, int64_t j) const {
        constexpr int SIZE = sizeof(typename E::Stored);
        ask_ahead<OUTPUTS>(first + r * stride, j * SIZE + DENSE_AHEAD<E>, stride * SIZE);
    }
    ACE_INLINE Floats at(int r, int64_t j, int lanes) const { return E::load(first + r * stride + j, lanes); }
};

// Bits of sixteen neighbouring weights; words of metadata are little-endian, as is every machine this is built for.
ACE_INLINE uint16_t kept_bits(const uint32_t* meta, int64_t j) {
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(meta) + j / 8, sizeof bits);
    return bits;
}

// Lane k is the next of the first `count` values where bit k is set, else 0.
ACE_INLINE Floats spread(const Floats& values, int count, uint16_t bits) {
#if ACE_WIDTH == 16
    (void)count;
    return Floats{{(NativeFloats)_mm512_maskz_expand_ps(bits, (__m512)values.part[0])}};
#else
    float from[LANES + 1], to[LANES];
    store(from, values);
    from[LANES] = 0;
    for (int k = 0, next = 0; k < LANES; ++k) {
        const bool kept = bits >> k & 1;
        to[k] = from[kept && next < count ? next : LANES];
        next += kept;
    }
    return load(to);
#endif
}

template <typename E>
struct PackedRows {
    const typename E::Stored* values;
    const uint32_t* meta;
    int64_t stride, words;
    int n, m;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int, int64_t) const {}
    ACE_INLINE Floats at(int r, int64_t j, int lanes) const {
        const uint16_t bits = kept_bits(meta + r * words, j);
        int64_t from = j / m * n;
        int count = (lanes + m - 1) / m * n;
        if (m > LANES) {
            const int earlier = j % m ? __builtin_popcount(kept_bits(meta + r * words, j - LANES)) : 0;
            from += earlier < n ? earlier : n;
            count -= earlier < n ? earlier : n;
        }
        if (count > LANES) count = LANES;
        return spread(E::load(values + r * stride + from, count), count, bits);
    }
};

// One token: weights go from memory to products in registers.
template <int OUTPUTS, typename Rows>
ACE_INLINE void one_token(const Rows& rows, int64_t cols, const float* x, Floats* sums) {
    Floats sum[OUTPUTS];
    for (int r = 0; r < OUTPUTS; ++r) sum[r] = Floats::all(0.0f);
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) {
        const Floats v = load(x + j);
        for (int r = 0; r < OUTPUTS; ++r) {
            rows.template ahead<OUTPUTS>(r, j);
            sum[r] = sum[r] + rows.at(r, j, LANES) * v;
        }
    }
    if (j < cols) {
        for (int r = 0; r < OUTPUTS; ++r) sum[r] = sum[r] + rows.at(r, j, int(cols - j)) * load(x + j);
    }
    for (int r = 0; r < OUTPUTS; ++r) sums[r * TOKENS_AT_ONCE] = sum[r];
}

// TOKENS more tokens by a tile of unpacked weights; their sums lie TOKENS_AT_ONCE an output apart.
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

// Several tokens: each tile of weights is unpacked once.
template <int OUTPUTS, typename Rows>
ACE_INLINE void some_tokens(const Rows& rows, int64_t cols, const float* x, int64_t padded, int tokens, Floats* sums) {
    alignas(64) float tile[OUTPUTS][INPUT_TILE];
    for (int k = 0; k < OUTPUTS * TOKENS_AT_ONCE; ++k) sums[k] = Floats::all(0.0f);
    for (int64_t from = 0; from < cols; from += INPUT_TILE) {
        const int count = int(cols - from < INPUT_TILE ? cols - from : INPUT_TILE);
        for (int r = 0; r < OUTPUTS; ++r) {
            each_vector(count, [&](int j, int lanes) ACE_INLINED {
                rows.template ahead<OUTPUTS>(r, from + j);
                store(tile[r] + j, rows.at(r, from + j, lanes));
            });
        }
        int t = 0;
        for (; t + 4 <= tokens; t += 4) add_tile<OUTPUTS, 4>(tile, count, x + t * padded + from, padded, sums + t);
        for (; t < tokens; ++t) add_tile<OUTPUTS, 1>(tile, count, x + t * padded + from, padded, sums + t);
    }
}

// The outputs i .. of `tokens` tokens from `first` on.
template <int OUTPUTS>
ACE_INLINE void deliver_sums(const Floats* sums, int tokens, int64_t first, int64_t n_rows, const LinearTask& task,
                             int64_t i) {
    for (int t = 0; t < tokens; ++t) {
        for (int r = 0; r < OUTPUTS; ++r) {
            const float y = tree_sum(sums[r * TOKENS_AT_ONCE + t]);
            task.out[(first + t) * n_rows + i + r] = task.bias ? y + task.bias[i + r] : y;
        }
    }
}

template <int OUTPUTS, typename Rows>
ACE_INLINE void outputs_of(const Rows& rows, int64_t n_rows, int64_t cols, const LinearTask& task, int64_t i) {
    Floats sums[OUTPUTS * TOKENS_AT_ONCE];
    for (int64_t first = 0; first < task.n_tokens; first += TOKENS_AT_ONCE) {
        const int tokens = int(task.n_tokens - first < TOKENS_AT_ONCE ? task.n_tokens - first : TOKENS_AT_ONCE);
        const float* x = task.tokens + first * task.padded;
        if (tokens == 1) one_token<OUTPUTS>(rows, cols, x, sums);
        else some_tokens<OUTPUTS>(rows, cols, x, task.padded, tokens, sums);
        deliver_sums<OUTPUTS>(sums, tokens, first, n_rows, task, i);
    }
}

// rows_from(i) are the rows from i on.
template <typename RowsFrom>
ACE_INLINE void linear(RowsFrom rows_from, int64_t n_rows, int64_t cols, const LinearTask& task, int64_t begin,
                       int64_t end) {
    int64_t i = begin;
    for (; i + OUTPUT_TILE <= end; i += OUTPUT_TILE) {
        outputs_of<OUTPUT_TILE>(rows_from(i), n_rows, cols, task, i);
    }
    for (; i < end; ++i) outputs_of<1>(rows_from(i), n_rows, cols, task, i);
}

inline void packed_linear(const PackedWeight& w, const LinearTask& task, int64_t begin, int64_t end) {
    const int64_t stride = w.cols / w.m * w.n, words = (w.cols + 31) / 32;
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        const auto* values = static_cast<const typename E::Stored*>(w.values);
        const auto rows = [&](int64_t i) ACE_INLINED {
            return PackedRows<E>{values + i * stride, w.meta + i * words, stride, words, w.n, w.m};
        };
        linear(rows, w.rows, w.cols, task, begin, end);
    });
}

inline void dense_linear(const Matrix& w, const LinearTask& task, int64_t begin, int64_t end) {
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        const auto* first = static_cast<const typename E::Stored*>(w.data);
        const auto rows = [&](int64_t i) ACE_INLINED { return DenseRows<E>{first + i * w.stride, w.stride}; };
        linear(rows, w.rows, w.cols, task, begin, end);
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
