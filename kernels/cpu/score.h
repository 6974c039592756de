// Scores of a strip as integer keys, and survivors of a strip delivered.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// A non-negative float orders as its own bits. Every NaN counts as one value above infinity, so a key is at most
// HIGHEST_KEY, and a - b of two keys cannot overflow: its sign says which is larger.
constexpr int32_t HIGHEST_KEY = 0x7f800001;

ACE_INLINE Ints key_of(const Floats& score) {
    return min(bits_of(score) & Ints::all(0x7fffffff), Ints::all(HIGHEST_KEY));
}

// The metrics that are all scale (Wanda) or sum and scale (RIA) get loops of their own.
enum class Form { scale, sum_and_scale, any };

ACE_INLINE Form form_of(const Terms& terms) {
    if (terms.coupling || terms.power != 1 || !terms.scale) return Form::any;
    if (terms.row && terms.col) return Form::sum_and_scale;
    return terms.row || terms.col ? Form::any : Form::scale;
}

template <typename E, Form FORM>
ACE_INLINE void score_strip(const Selection& s, int64_t i, int64_t from, int count, int32_t* keys) {
    const Terms& terms = s.terms;
    const auto* weight = static_cast<const typename E::Stored*>(s.weight.data) + i * s.weight.stride + from;
    const float* coupling = terms.coupling ? terms.coupling + i * s.weight.cols + from : nullptr;
    const float* col = terms.col ? terms.col + from : nullptr;
    const float* scale = terms.scale ? terms.scale + from : nullptr;
    const Floats row = Floats::all(terms.row ? terms.row[i] : 0.0f);

    const auto score = [&](int j, int lanes) ACE_INLINED {
        Floats v = magnitude(E::load(weight + j, lanes));
        if (FORM == Form::any) {
            if (terms.power == 2) v = v * v;
            if (col) v = v * (row + load(col + j, lanes));
            else if (terms.row) v = v * row;
            if (scale) v = v * load(scale + j, lanes);
            if (coupling) v = v * load(coupling + j, lanes);
        } else {
            if (FORM == Form::sum_and_scale) v = v * (row + load(col + j, lanes));
            v = v * load(scale + j, lanes);
        }
        store(keys + j, key_of(v));
    };
    int j = 0;
    for (; j + LANES <= count; j += LANES) score(j, LANES);
    if (j < count) score(j, count - j);
}

// Keys of columns from .. from + count of row i; writes whole vectors, so `keys` is a multiple of 16 long.
inline void score_keys(const Selection& s, int64_t i, int64_t from, int count, int32_t* keys) {
    with_element(s.weight.element, [&](auto element) {
        using E = decltype(element);
        switch (form_of(s.terms)) {
            case Form::scale: return score_strip<E, Form::scale>(s, i, from, count, keys);
            case Form::sum_and_scale: return score_strip<E, Form::sum_and_scale>(s, i, from, count, keys);
            default: return score_strip<E, Form::any>(s, i, from, count, keys);
        }
    });
}

template <typename Function>
ACE_INLINE void each_vector(int count, Function function) {
    int j = 0;
    for (; j + LANES <= count; j += LANES) function(j, LANES);
    if (j < count) function(j, count - j);
}

// `keep(j)` gives lanes of all ones where column from + j + lane survives, 0 elsewhere.
template <typename Keep>
ACE_INLINE void deliver(const Selection& s, int64_t i, int64_t from, int count, Keep keep) {
    const int64_t cols = s.weight.cols;
    if (s.output == Output::bits) {
        uint8_t* out = s.delivered + i * ((cols + 7) / 8) + from / 8;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            const uint16_t bits = signs(keep(j)) & ((1u << lanes) - 1);
            const uint8_t bytes[2] = {uint8_t(bits), uint8_t(bits >> 8)};
            memcpy(out + j / 8, bytes, (lanes + 7) / 8);
        });
    } else if (s.output == Output::mask) {
        uint8_t* out = s.delivered + i * cols + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            const Ints kept = keep(j) & Ints::all(1);
            NativeBytes bytes[PARTS];
            for (int p = 0; p < PARTS; ++p) bytes[p] = __builtin_convertvector(kept.part[p], NativeBytes);
            store_raw(out + j, bytes, lanes);
        });
    } else if (s.weight.element == Element::fp32) {
        auto* weight = static_cast<int32_t*>(s.weight.data) + i * s.weight.stride + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED { store(weight + j, load(weight + j, lanes) & keep(j), lanes); });
    } else {
        auto* weight = static_cast<uint16_t*>(s.weight.data) + i * s.weight.stride + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            Halves halves = load_raw<Halves>(weight + j, lanes);
            const Ints kept = keep(j);
            for (int p = 0; p < PARTS; ++p) halves.part[p] &= __builtin_convertvector(kept.part[p], NativeHalves);
            store_raw(weight + j, halves, lanes);
        });
    }
}

}  // namespace
}  // namespace ace
