// Sums over rows and columns, and the check for NaN and infinity. Sums are fp32 within a strip, fp64 across strips.
#pragma once

#include "score.h"

namespace ace {
namespace {

constexpr int ROW_TILE = 8;
// Prefetch distance within a row, in bytes.
constexpr int ROWS_AHEAD = 2048;

// True if element j's vector is the first in its 64-byte cache line, so that each line is prefetched once.
template <typename E>
ACE_INLINE bool first_of_line(int j) {
    return j % int(64 / sizeof(typename E::Stored)) < LANES;
}

// Adds |w| of TILE rows to the column sums, and each row's sum to `rows`; near the end of the rows it prefetches the
// next TILE rows.
template <typename E, int TILE>
ACE_INLINE void add_magnitudes(const typename E::Stored* weight, const Matrix& w, float* cols, double* rows) {
    constexpr int AHEAD = ROWS_AHEAD / sizeof(typename E::Stored);
    for (int64_t from = 0; from < w.cols; from += CHANNEL_STRIP) {
        const int count = int(w.cols - from < CHANNEL_STRIP ? w.cols - from : CHANNEL_STRIP);
        Floats row[TILE];
        for (int r = 0; r < TILE; ++r) row[r] = Floats::all(0.0f);
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            const int64_t ahead = from + j + AHEAD;
            const auto* later = weight + (ahead < w.cols ? ahead : TILE * w.stride + ahead - w.cols);
            Floats v[TILE];
            for (int r = 0; r < TILE; ++r) {
                if (first_of_line<E>(j)) __builtin_prefetch(later + r * w.stride);
                v[r] = magnitude(E::load(weight + r * w.stride + from + j, lanes));
                row[r] = row[r] + v[r];
            }
            store(cols + from + j, load(cols + from + j, lanes) + sum_of<TILE>(v), lanes);
        });
        for (int r = 0; r < TILE; ++r) rows[r] += sum(row[r]);
    }
}

inline void weight_sums(const Matrix& w, int64_t block, float* row_sums, float* block_cols) {
    const int64_t top = block * SUM_ROWS;
    const int height = int(w.rows - top < SUM_ROWS ? w.rows - top : SUM_ROWS);
    double rows[SUM_ROWS] = {};
    memset(block_cols, 0, w.cols * sizeof(float));
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        const auto* weight = static_cast<const typename E::Stored*>(w.data) + top * w.stride;
        int r = 0;
        for (; r + ROW_TILE <= height; r += ROW_TILE) {
            add_magnitudes<E, ROW_TILE>(weight + r * w.stride, w, block_cols, rows + r);
        }
        for (; r < height; ++r) add_magnitudes<E, 1>(weight + r * w.stride, w, block_cols, rows + r);
    });
    for (int r = 0; r < height; ++r) row_sums[top + r] = float(rows[r]);
}

inline void token_norms(const Matrix& outputs, int64_t begin, int64_t end, float* norms) {
    with_element(outputs.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t t = begin; t < end; ++t) {
            const auto* row = static_cast<const typename E::Stored*>(outputs.data) + t * outputs.stride;
            double total = 0;
            for (int64_t from = 0; from < outputs.cols; from += CHANNEL_STRIP) {
                const int count = int(outputs.cols - from < CHANNEL_STRIP ? outputs.cols - from : CHANNEL_STRIP);
                Floats even = Floats::all(0.0f), odd = even;
                each_vector(count, [&](int j, int lanes) ACE_INLINED {
                    const Floats v = E::load(row + from + j, lanes);
                    (j & LANES ? odd : even) = (j & LANES ? odd : even) + v * v;
                });
                total += sum(even + odd);
            }
            norms[t] = float(total);
        }
    });
}

// Finds the largest exponent: only NaN and infinity have all exponent bits set.
inline bool all_finite(Element element, const void* data, int64_t count) {
    return with_element(element, [&](auto tag) ACE_INLINED {
        using E = decltype(tag);
        using Register = typename E::Register;
        constexpr int STEP = sizeof(Register) / sizeof(typename E::Stored), UNROLL = 4;
        const auto* elements = static_cast<const typename E::Stored*>(data);
        const Register exponent = E::exponent - Register{};
        Register highest[UNROLL] = {};
        int64_t j = 0;
        for (; j + UNROLL * STEP <= count; j += UNROLL * STEP) {
            for (int u = 0; u < UNROLL; ++u) {
                Register v;
                memcpy(&v, elements + j + u * STEP, sizeof v);
                v &= exponent;
                highest[u] = v > highest[u] ? v : highest[u];
            }
        }
        for (int u = 0; j < count; j += STEP, u = (u + 1) % UNROLL) {
            Register v = {};
            memcpy(&v, elements + j, (count - j < STEP ? count - j : STEP) * sizeof(typename E::Stored));
            v &= exponent;
            highest[u] = v > highest[u] ? v : highest[u];
        }
        bool finite = true;
        for (int u = 0; u < UNROLL; ++u) {
            for (int lane = 0; lane < STEP; ++lane) finite &= highest[u][lane] != E::exponent;
        }
        return finite;
    });
}

}  // namespace
}  // namespace ace
