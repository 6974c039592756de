// Packs the non-zeros of rows: one bit per weight, and the values in the order of their inputs, as many as there are.
#pragma once

#include "pack_nm.h"

namespace ace {
namespace {

inline void find_kept(const Matrix& w, uint32_t* meta, int64_t* counts, int64_t begin, int64_t end) {
    const int64_t words = (w.cols + 31) / 32;
    with_element(w.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t i = begin; i < end; ++i) {
            const auto* row = static_cast<const typename E::Stored*>(w.data) + i * w.stride;
            auto* bits = reinterpret_cast<uint16_t*>(meta + i * words);
            int64_t count = 0;
            if (w.cols % 32) meta[(i + 1) * words - 1] = 0;
            for (int64_t j = 0; j < w.cols; j += LANES) {
                __builtin_prefetch(row + j + PREFETCH);
                const int lanes = int(w.cols - j < LANES ? w.cols - j : LANES);
                const Ints magnitude = bits_of(E::load(row + j, lanes)) & Ints::all(0x7fffffff);
                const uint16_t kept = signs(Ints::all(0) - magnitude);
                memcpy(bits + j / LANES, &kept, sizeof kept);
                count += __builtin_popcount(kept);
            }
            counts[i] = count;
        }
    });
}

template <typename Stored>
inline void pack_rows_of(const Matrix& w, const uint32_t* meta, const int64_t* starts, Stored* values, int64_t begin,
                         int64_t end) {
    const int64_t words = (w.cols + 31) / 32;
    for (int64_t i = begin; i < end; ++i) {
        const auto* row = static_cast<const Stored*>(w.data) + i * w.stride;
        Stored* next = values + starts[i];
        for (int64_t j = 0; j < w.cols; j += LANES) {
            const uint16_t kept = uint16_t(meta[i * words + j / 32] >> (j % 32));
            compact(row + j, int(w.cols - j < LANES ? w.cols - j : LANES), kept, next);
            next += __builtin_popcount(kept);
        }
    }
}

inline void pack_rows(const Matrix& w, const uint32_t* meta, const int64_t* starts, void* values, int64_t begin,
                      int64_t end) {
    if (w.element == Element::fp32) return pack_rows_of(w, meta, starts, static_cast<uint32_t*>(values), begin, end);
    pack_rows_of(w, meta, starts, static_cast<uint16_t*>(values), begin, end);
}

}  // namespace
}  // namespace ace
