// Channel sums over tokens, one strip of channels at a time. Lanes are channels, so nothing is summed across lanes.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Tokens whose sums are kept in fp32 before they go to fp64.
constexpr int64_t CHUNK = 128;
constexpr int TOKEN_TILE = 8;

struct ChannelSums {
    alignas(64) float shift[CHANNEL_STRIP], first[CHANNEL_STRIP], second[CHANNEL_STRIP], square[CHANNEL_STRIP];
};

template <typename E, int TILE>
ACE_INLINE void add_tokens(const void* const* tokens, int64_t from, int count, ChannelSums& sums) {
    const typename E::Stored* row[TILE];
    for (int t = 0; t < TILE; ++t) row[t] = static_cast<const typename E::Stored*>(tokens[t]) + from;
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        const Floats shift = load(sums.shift + j);
        Floats first = load(sums.first + j), second = load(sums.second + j), square = load(sums.square + j);
        for (int t = 0; t < TILE; ++t) {
            const Floats x = E::load(row[t] + j, lanes), d = x - shift;
            first = first + d;
            second = second + d * d;
            square = square + x * x;
        }
        store(sums.first + j, first);
        store(sums.second + j, second);
        store(sums.square + j, square);
    });
}

template <typename E>
ACE_INLINE void add_run(const void* const* tokens, int64_t length, int64_t from, int count, ChannelSums& sums) {
    int64_t t = 0;
    for (; t + TOKEN_TILE <= length; t += TOKEN_TILE) add_tokens<E, TOKEN_TILE>(tokens + t, from, count, sums);
    for (; t < length; ++t) add_tokens<E, 1>(tokens + t, from, count, sums);
}

// The median of three tokens of the chunk: one massive token among them does not spoil the shift.
template <typename E>
ACE_INLINE void set_shift(const void* const* tokens, int64_t length, int64_t from, int count, float* shift) {
    const auto row = [&](int64_t t) { return static_cast<const typename E::Stored*>(tokens[t]) + from; };
    const auto *a = row(0), *b = row(length / 2), *c = row(length - 1);
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        const Floats x = E::load(a + j, lanes), y = E::load(b + j, lanes), z = E::load(c + j, lanes);
        store(shift + j, max(min(x, y), min(max(x, y), z)));
    });
}

// Chan's rule: a chunk's own deviation, and what its mean adds to that of the tokens before it.
ACE_INLINE void merge_chunk(const ChannelSums& sums, double before, double length, int count, double* total,
                            double* deviation) {
    for (int j = 0; j < count; ++j) {
        const double first = sums.first[j], own = sums.second[j] - first * first / length;
        const double mean = sums.shift[j] + first / length;
        const double apart = before > 0 ? mean - total[j] / before : 0.0;
        total[j] += mean * length;
        deviation[j] += (own > 0 ? own : 0.0) + apart * apart * (before * length / (before + length));
    }
}

inline void moments(const MomentsTask& task, int64_t strip) {
    const int64_t from = strip * CHANNEL_STRIP;
    const int count = int(task.channels - from < CHANNEL_STRIP ? task.channels - from : CHANNEL_STRIP);
    ChannelSums sums;
    double total[CHANNEL_STRIP] = {}, deviation[CHANNEL_STRIP] = {};
    const auto add_squares = [&](int64_t sequence) {
        float* out = task.sequence_square + sequence * task.channels + from;
        for (int j = 0; j < count; ++j) out[j] += sums.square[j];
        memset(sums.square, 0, sizeof sums.square);
    };
    memset(sums.square, 0, sizeof sums.square);
    with_element(task.element, [&](auto element) {
        using E = decltype(element);
        for (int64_t chunk = 0; chunk < task.n_tokens; chunk += CHUNK) {
            const int64_t end = task.n_tokens - chunk < CHUNK ? task.n_tokens : chunk + CHUNK;
            set_shift<E>(task.tokens + chunk, end - chunk, from, count, sums.shift);
            memset(sums.first, 0, sizeof sums.first);
            memset(sums.second, 0, sizeof sums.second);
            for (int64_t t = chunk; t < end;) {
                int64_t next = t;
                while (next < end && task.sequence[next] == task.sequence[t]) ++next;
                add_run<E>(task.tokens + t, next - t, from, count, sums);
                add_squares(task.sequence[t]);
                t = next;
            }
            merge_chunk(sums, double(chunk), double(end - chunk), count, total, deviation);
        }
    });
    for (int j = 0; j < count; ++j) {
        task.total[from + j] = float(total[j]);
        task.deviation[from + j] = float(deviation[j]);
    }
}

template <typename E, int TILE>
ACE_INLINE void add_weighted(const void* const* tokens, const float* weights, int64_t from, int count, float* sums) {
    const typename E::Stored* row[TILE];
    for (int t = 0; t < TILE; ++t) row[t] = static_cast<const typename E::Stored*>(tokens[t]) + from;
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        Floats total = load(sums + j);
        for (int t = 0; t < TILE; ++t) {
            const Floats x = E::load(row[t] + j, lanes);
            total = total + Floats::all(weights[t]) * (x * x);
        }
        store(sums + j, total);
    });
}

inline void weighted_squares(const SquaresTask& task, int64_t strip) {
    const int64_t channels = task.tokens.cols, n_tokens = task.tokens.rows, from = strip * CHANNEL_STRIP;
    const int count = int(channels - from < CHANNEL_STRIP ? channels - from : CHANNEL_STRIP);
    alignas(64) float sums[CHANNEL_STRIP];
    double total[8][CHANNEL_STRIP];
    memset(total, 0, task.n_layers * sizeof total[0]);
    with_element(task.tokens.element, [&](auto element) {
        using E = decltype(element);
        for (int64_t chunk = 0; chunk < n_tokens; chunk += CHUNK) {
            const int64_t end = n_tokens - chunk < CHUNK ? n_tokens : chunk + CHUNK;
            for (int64_t layer = 0; layer < task.n_layers; ++layer) {
                const void* used[CHUNK];
                float weights[CHUNK];
                int n_used = 0;
                for (int64_t t = chunk; t < end; ++t) {
                    const float weight = task.weights[layer * n_tokens + t];
                    if (weight == 0.0f) continue;
                    used[n_used] = static_cast<const typename E::Stored*>(task.tokens.data) + t * task.tokens.stride;
                    weights[n_used++] = weight;
                }
                memset(sums, 0, sizeof sums);
                int t = 0;
                for (; t + TOKEN_TILE <= n_used; t += TOKEN_TILE) {
                    add_weighted<E, TOKEN_TILE>(used + t, weights + t, from, count, sums);
                }
                for (; t < n_used; ++t) add_weighted<E, 1>(used + t, weights + t, from, count, sums);
                for (int j = 0; j < count; ++j) total[layer][j] += sums[j];
            }
        }
    });
    for (int64_t layer = 0; layer < task.n_layers; ++layer) {
        for (int j = 0; j < count; ++j) task.out[layer * channels + from + j] = float(total[layer][j]);
    }
}

}  // namespace
}  // namespace ace
