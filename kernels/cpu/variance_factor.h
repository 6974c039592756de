// VarP's factor of a channel: the mean over sequences of (1 - y)^(-power), from fp32 partial sums over a few sequences.
#pragma once

#include "score.h"

namespace ace {
namespace {

// Sequences per partial sum.
constexpr int64_t SEQUENCE_TILE = 64;

// The level of each row begin..end: its sum or its largest entry.
inline void variance_levels(const VarianceTask& task, int64_t begin, int64_t end) {
    const bool adding = task.norm == VarianceNorm::frobenius;
    for (int64_t s = begin; s < end; ++s) {
        const float* row = task.square + s * task.channels;
        double total = 0;
        Floats most = Floats::all(0.0f);
        for (int64_t from = 0; from < task.channels; from += CHANNEL_STRIP) {
            const int count = int(task.channels - from < CHANNEL_STRIP ? task.channels - from : CHANNEL_STRIP);
            Floats sums = Floats::all(0.0f);
            each_vector(count, [&](int j, int lanes) ACE_INLINED {
                const Floats v = load(row + from + j, lanes);
                sums = sums + v;
                most = max(most, v);
            });
            total += sum(sums);
        }
        task.levels[s] = adding ? float(total) : largest(most, 0);
    }
}

// Factors of one strip of LANES channels. Levels are at least `least`. `max` returns NaN if its second argument is NaN.
inline void variance_factor(const VarianceTask& task, int64_t strip) {
    const int64_t first = strip * LANES;
    const int lanes = int(task.channels - first < LANES ? task.channels - first : LANES);
    const auto square_of = [&](int64_t s) ACE_INLINED { return load(task.square + s * task.channels + first, lanes); };
    const Floats least = Floats::all(task.least), eps = Floats::all(task.eps);
    Floats own = least;
    if (task.norm == VarianceNorm::channel) {
        for (int64_t s = 0; s < task.n_sequences; ++s) own = max(own, square_of(s));
    }
    Floats total = Floats::all(0.0f);
    for (int64_t from = 0; from < task.n_sequences; from += SEQUENCE_TILE) {
        const int64_t end = from + SEQUENCE_TILE < task.n_sequences ? from + SEQUENCE_TILE : task.n_sequences;
        Floats part = Floats::all(0.0f);
        for (int64_t s = from; s < end; ++s) {
            const Floats v = square_of(s);
            const Floats level = task.levels ? max(least, Floats::all(task.levels[s])) : own;
            const Floats rest =
                task.norm == VarianceNorm::frobenius ? max(eps * level, level - v) : (level - v) + eps * v;
            Floats inverse = level / rest;
            if (task.power != 1) {
                float lane[LANES];
                store(lane, inverse);
                for (int k = 0; k < LANES; ++k) lane[k] = __builtin_powf(lane[k], task.power);
                inverse = load(lane);
            }
            part = part + inverse;
        }
        total = total + part;
    }
    store(task.factor + first, total / Floats::all(float(task.n_sequences)), lanes);
}

}  // namespace
}  // namespace ace
