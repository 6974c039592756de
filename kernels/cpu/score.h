// Scores as integer keys, and the output of a selection.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Non-negative floats sort like their bits. All NaN become one key above infinity, so a key is at most HIGHEST_KEY. The
// difference of two keys cannot overflow; its sign tells which is larger.
constexpr int32_t HIGHEST_KEY = 0x7f800001;

ACE_INLINE Ints key_of(const Floats& score) {
    return min(bits_of(score) & Ints::all(0x7fffffff), Ints::all(HIGHEST_KEY));
}

// Prefetch distance of weights, in elements.
constexpr int PREFETCH = 4096;

// Scores with only a scale (Wanda) and scores with a sum and a scale (RIA) have specialized loops.
enum class Form { scale, sum_and_scale, any };

ACE_INLINE Form form_of(const Terms& terms) {
    if (terms.coupling || terms.power != 1 || !terms.scale) return Form::any;
    if (terms.row && terms.col) return Form::sum_and_scale;
    return terms.row || terms.col ? Form::any : Form::scale;
}

// Keys of row i from column `from` on, sixteen at a time.
template <typename E, Form FORM>
struct Scorer {
    const typename E::Stored* weight;
    const float *col, *scale, *coupling;
    bool has_row, squared;
    Floats row;

    ACE_INLINE Scorer(const Selection& s, int64_t i, int64_t from)
        : weight(static_cast<const typename E::Stored*>(s.weight.data) + i * s.weight.stride + from),
          col(s.terms.col ? s.terms.col + from : nullptr),
          scale(s.terms.scale ? s.terms.scale + from : nullptr),
          coupling(s.terms.coupling ? s.terms.coupling + i * s.weight.cols + from : nullptr),
          has_row(s.terms.row),
          squared(s.terms.power == 2),
          row(Floats::all(s.terms.row ? s.terms.row[i] : 0.0f)) {}

    ACE_INLINE Ints operator()(int j, int lanes) const {
        __builtin_prefetch(weight + j + PREFETCH);
        Floats v = magnitude(E::load(weight + j, lanes));
        if (FORM == Form::any) {
            if (squared) v = v * v;
            if (col) v = v * (row + load(col + j, lanes));
            else if (has_row) v = v * row;
            if (scale) v = v * load(scale + j, lanes);
            if (coupling) v = v * load(coupling + j, lanes);
        } else {
            if (FORM == Form::sum_and_scale) v = v * (row + load(col + j, lanes));
            v = v * load(scale + j, lanes);
        }
        return key_of(v);
    }
};

// Calls use(scorer) with the scorer for the weight's dtype and the form of the terms.
template <typename Use>
ACE_INLINE void with_scorer(const Selection& s, int64_t i, int64_t from, Use use) {
    with_element(s.weight.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        switch (form_of(s.terms)) {
            case Form::scale: return use(Scorer<E, Form::scale>(s, i, from));
            case Form::sum_and_scale: return use(Scorer<E, Form::sum_and_scale>(s, i, from));
            default: return use(Scorer<E, Form::any>(s, i, from));
        }
    });
}

// Writes whole vectors, so the length of `keys` must be a multiple of 16.
inline void score_keys(const Selection& s, int64_t i, int64_t from, int count, int32_t* keys) {
    with_scorer(s, i, from, [&](const auto& score) {
        each_vector(count, [&](int j, int lanes) ACE_INLINED { store(keys + j, score(j, lanes)); });
    });
}

// Writes the output of a selection; `keep(j, lanes)` is all ones in lanes whose column from + j + lane is kept, else 0.
template <typename Keep>
ACE_INLINE void deliver(const Selection& s, int64_t i, int64_t from, int count, Keep keep) {
    const int64_t cols = s.weight.cols;
    if (s.output == Output::bits) {
        uint8_t* out = s.delivered + i * ((cols + 7) / 8) + from / 8;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            const uint16_t bits = signs(keep(j, lanes)) & ((1u << lanes) - 1);
            const uint8_t bytes[2] = {uint8_t(bits), uint8_t(bits >> 8)};
            memcpy(out + j / 8, bytes, (lanes + 7) / 8);
        });
    } else if (s.output == Output::mask) {
        uint8_t* out = s.delivered + i * cols + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            store_raw(out + j, narrow_to_bytes(keep(j, lanes) & Ints::all(1)), lanes);
        });
    } else if (s.weight.element == Element::fp32) {
        auto* weight = static_cast<int32_t*>(s.weight.data) + i * s.weight.stride + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            store(weight + j, load(weight + j, lanes) & keep(j, lanes), lanes);
        });
    } else {
        auto* weight = static_cast<uint16_t*>(s.weight.data) + i * s.weight.stride + from;
        each_vector(count, [&](int j, int lanes) ACE_INLINED {
            Halves halves = load_raw<Halves>(weight + j, lanes);
            const Halves kept = narrow(keep(j, lanes));
            for (int p = 0; p < PARTS; ++p) halves.part[p] &= kept.part[p];
            store_raw(weight + j, halves, lanes);
        });
    }
}

}  // namespace
}  // namespace ace
