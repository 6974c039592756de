// Values rounded to those that 8 or 4 bits can store, group by group of neighbors.
#pragma once

#include "elements.h"
#include "round_tokens.h"

namespace ace {
namespace {

// The largest magnitude of `count` values, as bits; those of NaN and infinity are the largest.
ACE_INLINE int32_t largest_bits(const float* values, int count) {
    Ints most = Ints::all(0);
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        most = max(most, bits_of(magnitude(load(values + j, lanes))));
    });
    int32_t lane[LANES], bits = 0;
    store(lane, most);
    for (int k = 0; k < LANES; ++k) bits = lane[k] > bits ? lane[k] : bits;
    return bits;
}

ACE_INLINE float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// A finite magnitude as it is stored, to the nearest, ties to even, and no larger than the largest number.
ACE_INLINE float as_stored(int32_t bits, Element element) {
    if (element == Element::bf16) {
        constexpr int32_t LARGEST_BF16 = 0x7f7f0000;
        const int32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
        return float_of(rounded < LARGEST_BF16 ? rounded : LARGEST_BF16);
    }
    if (element == Element::fp16) {
        constexpr float LARGEST_FP16 = 65504.0f, LEAST_NORMAL = 0x1p-14f;
        const float value = float_of(bits);
        if (value < LEAST_NORMAL) return (value + 0.5f) - 0.5f;  // Numbers from 0.5 on are steps of 2^-24 apart.
        const float rounded = float_of((bits + 0xfff + ((bits >> 13) & 1)) & ~0x1fff);
        return rounded < LARGEST_FP16 ? rounded : LARGEST_FP16;
    }
    return float_of(bits);
}

template <typename Into>
ACE_INLINE void round_group(const float* values, typename Into::Stored* into, int count, const RoundTask& task) {
    const int32_t bits = largest_bits(values, count);
    const float stored = bits < Fp32::exponent ? as_stored(bits, task.scale_element) : float_of(0x7fc00000);
    const Floats scale = Floats::all(stored), divisor = Floats::all(stored == 0 ? 1 : stored);
    const float q = task.bits == 8 ? 127 : 7;
    const Floats most = Floats::all(q), least = Floats::all(-q), to_integer = Floats::all(TO_INTEGER);
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        const Floats steps = min(max(load(values + j, lanes) / divisor * most, least), most);
        Into::keep(into + j, ((steps + to_integer) - to_integer) / most * scale + Floats::all(0), lanes);
    });
}

template <typename Into>
ACE_INLINE void round_rows(const RoundTask& task, int64_t begin, int64_t end) {
    auto* const into = static_cast<typename Into::Stored*>(task.into);
    for (int64_t row = begin; row < end; ++row) {
        for (int64_t from = 0; from < task.cols; from += task.group) {
            const int64_t left = task.cols - from, place = row * task.cols + from;
            round_group<Into>(task.values + place, into + place, int(left < task.group ? left : task.group), task);
        }
    }
}

// Rounds the rows begin..end.
inline void round_groups(const RoundTask& task, int64_t begin, int64_t end) {
    if (task.into_element == Element::bf16) round_rows<Bf16>(task, begin, end);
    else round_rows<Fp32>(task, begin, end);
}

}  // namespace
}  // namespace ace
