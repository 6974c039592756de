// Checks score terms: they must be finite and not negative.
#pragma once

#include <cfloat>
#include <cstdint>

namespace ace {
namespace {

// A comparison with NaN is false; -0.0 passes.
inline bool in_range(const float* values, int64_t count) {
    int32_t outside = 0;
    for (int64_t k = 0; k < count; ++k) outside |= !(values[k] >= 0.0f) | !(values[k] <= FLT_MAX);
    return !outside;
}

}  // namespace
}  // namespace ace
