// Where the values of a packed weight's rows begin.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

// Values per row of a weight n:m; unused if the weight has row starts.
ACE_INLINE int64_t row_stride(const PackedWeight& w) { return w.starts ? 0 : w.cols / w.m * w.n; }

// The place of row i's first value. Row starts are bounded, because a file may be damaged.
ACE_INLINE int64_t first_value(const PackedWeight& w, int64_t stride, int64_t i) {
    if (!w.starts) return i * stride;
    const int64_t start = w.starts[i];
    return start < 0 ? 0 : start < w.n_values ? start : w.n_values;
}

}  // namespace
}  // namespace ace
