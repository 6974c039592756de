// What one token of a decoder needs beside its products: norms, rotary positions, attention over a cache, and gates.
// Results do not depend on the instruction set or the number of threads.
#pragma once

#include "divergence.h"
#include "elements.h"

namespace ace {
namespace {

// Query heads that read a key together.
constexpr int HEADS_AT_ONCE = 4;

// weight * x / sqrt(mean(x^2) + eps); `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float eps, int64_t size, float* out) {
    Floats squares = Floats::all(0.0f);
    each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
        const Floats v = load(x + j, lanes);
        squares = squares + v * v;
    });
    const float mean = float(sum(squares) / double(size));
    const Floats factor = Floats::all(1.0f / __builtin_sqrtf(mean + eps));
    each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
        store(out + j, load(weight + j, lanes) * (load(x + j, lanes) * factor), lanes);
    });
}

// Turns the first `size` numbers of a head: number i and number i + size / 2 are a pair.
inline void rotate_head(float* head, const float* cosines, const float* sines, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

// COUNT query heads with the same keys and values. The cache is read once, sixteen positions at a time; if a larger
// score comes, the earlier sums are scaled down.
template <int COUNT>
ACE_OUTLINED void attend_heads(const AttentionTask& task, int64_t first, int64_t kv_head) {
    const int64_t size = task.head_size, blocks = (task.length + LANES - 1) / LANES;
    const float* keys = task.keys + kv_head * task.capacity * size;
    const float* values = task.values + kv_head * task.capacity * size;
    const float* queries = task.queries + first * size;
    float* out = task.out + first * size;
    // Each head's largest score so far, and the sums of exponentials relative to it.
    float most[COUNT];
    Floats totals[COUNT];
    for (int g = 0; g < COUNT; ++g) most[g] = -__builtin_inff(), totals[g] = Floats::all(0.0f);
    for (int64_t j = 0; j < COUNT * size; ++j) out[j] = 0.0f;
    for (int64_t b = 0; b < blocks; ++b) {
        const int count = int(task.length - b * LANES < LANES ? task.length - b * LANES : LANES);
        const float* block = keys + b * LANES * size;
        Floats scores[COUNT];
        for (int g = 0; g < COUNT; ++g) scores[g] = Floats::all(0.0f);
        for (int64_t j = 0; j < size; ++j) {
            const Floats key = load(block + j * LANES);
            for (int g = 0; g < COUNT; ++g) scores[g] = scores[g] + key * Floats::all(queries[g * size + j]);
        }
        float weights[COUNT][LANES];
        for (int g = 0; g < COUNT; ++g) {
            float lane[LANES];
            store(lane, scores[g] * Floats::all(task.scaling));
            for (int t = count; t < LANES; ++t) lane[t] = -__builtin_inff();
            const Floats kept = load(lane);
            const float highest = largest(kept, most[g]);
            if (highest > most[g]) {
                const Floats factor = exp_of_negative(Floats::all(most[g] - highest));
                totals[g] = totals[g] * factor;
                if (b > 0) {
                    each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
                        store(out + g * size + j, load(out + g * size + j, lanes) * factor, lanes);
                    });
                }
                most[g] = highest;
            }
            const Floats weight = exp_of_negative(kept - Floats::all(highest));
            totals[g] = totals[g] + weight;
            store(weights[g], weight);
        }
        const float* rows = values + b * LANES * size;
        each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
            Floats sums[COUNT];
            for (int g = 0; g < COUNT; ++g) sums[g] = load(out + g * size + j, lanes);
            for (int t = 0; t < count; ++t) {
                const Floats value = load(rows + t * size + j, lanes);
                for (int g = 0; g < COUNT; ++g) sums[g] = sums[g] + value * Floats::all(weights[g][t]);
            }
            for (int g = 0; g < COUNT; ++g) store(out + g * size + j, sums[g], lanes);
        });
    }
    for (int g = 0; g < COUNT; ++g) {
        const Floats total = Floats::all(float(sum(totals[g])));
        each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
            store(out + g * size + j, load(out + g * size + j, lanes) / total, lanes);
        });
    }
}

inline void attend(const AttentionTask& task, int64_t begin, int64_t end) {
    const int64_t shared = task.heads / task.kv_heads;
    while (begin < end) {
        const int64_t kv_head = begin / shared, next = (kv_head + 1) * shared;
        const int64_t left = (next < end ? next : end) - begin;
        switch (left < HEADS_AT_ONCE ? left : HEADS_AT_ONCE) {
            case 1: attend_heads<1>(task, begin, kv_head), begin += 1; break;
            case 2: attend_heads<2>(task, begin, kv_head), begin += 2; break;
            case 3: attend_heads<3>(task, begin, kv_head), begin += 3; break;
            default: attend_heads<4>(task, begin, kv_head), begin += 4;
        }
    }
}

// 1 / (1 + e^-x).
ACE_INLINE Floats sigmoid(const Floats& x) {
    const Floats small = exp_of_negative(Floats::all(0.0f) - magnitude(x)), one = Floats::all(1.0f);
    Floats above = small;
    for (int p = 0; p < PARTS; ++p) above.part[p] = x.part[p] < 0 ? small.part[p] : one.part[p];
    return above / (one + small);
}

// activation(gate) * up
inline void gate(Activation activation, const float* gates, const float* ups, int64_t size, float* out) {
    if (activation == Activation::gelu) {
        for (int64_t j = 0; j < size; ++j) {
            out[j] = 0.5f * gates[j] * (1.0f + __builtin_erff(gates[j] * 0.70710678f)) * ups[j];
        }
        return;
    }
    each_vector(int(size), [&](int j, int lanes) ACE_INLINED {
        const Floats x = load(gates + j, lanes);
        Floats inner = x;
        if (activation == Activation::gelu_tanh) {
            // 1 + tanh(u) is twice the sigmoid of 2 u.
            const Floats cube = x * x * x * Floats::all(0.044715f);
            inner = (x + cube) * Floats::all(2.0f * 0.79788456f);
        }
        store(out + j, x * sigmoid(inner) * load(ups + j, lanes), lanes);
    });
}

}  // namespace
}  // namespace ace
