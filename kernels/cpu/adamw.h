// One AdamW step on fp32 values and moments, vector by vector.
#pragma once

#include "elements.h"

namespace ace {
namespace {

template <typename Slope, typename Rounded>
ACE_INLINE void adamw_of(const AdamWTask& task, int64_t begin, int count) {
    const auto* slope = static_cast<const typename Slope::Stored*>(task.gradient) + begin;
    auto* rounded = task.rounded ? static_cast<typename Rounded::Stored*>(task.rounded) + begin : nullptr;
    float *values = task.values + begin, *first = task.first + begin, *second = task.second + begin;
    const Floats factor = Floats::all(task.factor ? *task.factor : 1.0f), rate = Floats::all(task.rate);
    const Floats gain_first = Floats::all(task.gain_first), gain_second = Floats::all(task.gain_second);
    const Floats unbias = Floats::all(task.unbias), eps = Floats::all(task.eps);
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        Floats x = load(values + j, lanes), m = load(first + j, lanes), v = load(second + j, lanes);
        Floats g = Slope::load(slope + j, lanes) * factor;
        if (task.zeros_stay) g = unless_zero(x, g);
        m = m + gain_first * (g - m);
        v = v + gain_second * (g * g - v);
        x = x - rate * m / (square_root(v) * unbias + eps);
        store(values + j, x, lanes);
        store(first + j, m, lanes);
        store(second + j, v, lanes);
        if (rounded) Rounded::keep(rounded + j, x, lanes);
    });
}

// Updates `count` values, from `begin` on.
inline void adamw(const AdamWTask& task, int64_t begin, int count) {
    const auto of_gradient = [&](auto rounded) {
        using Rounded = decltype(rounded);
        switch (task.gradient_element) {
            case Element::fp16: return adamw_of<Fp16, Rounded>(task, begin, count);
            case Element::bf16: return adamw_of<Bf16, Rounded>(task, begin, count);
            default: return adamw_of<Fp32, Rounded>(task, begin, count);
        }
    };
    if (task.rounded_element == Element::bf16) of_gradient(Bf16{});
    else of_gradient(Fp32{});
}

}  // namespace
}  // namespace ace
