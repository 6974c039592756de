// Channel sums over tokens, one strip of channels at a time. Each lane is a channel, so there are no sums across lanes.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Tokens that are summed in fp32 before their sum is added in fp64.
constexpr int64_t CHUNK = 128;
// Prefetch distance within a token, in bytes.
constexpr int TOKENS_AHEAD = 1024;

// All sums of sixteen channels are adjacent: separate arrays would compete with the tokens for the same cache sets.
struct alignas(64) ChannelSums {
    float shift[LANES], first[LANES], second[LANES], square[LANES];
};

struct alignas(64) ChannelMoments {
    double mean[LANES], deviation[LANES];
};

ACE_INLINE Floats median(const Floats& a, const Floats& b, const Floats& c) {
    return max(min(a, b), min(max(a, b), c));
}

// The output row for a sequence's sums of x^2; `begins` is true if this run is the first of its sequence.
struct SquareRow {
    float* row;
    bool begins;
};

ACE_INLINE void deliver(const Floats& square, const SquareRow& out, int j, int lanes) {
    if (out.begins) stream(out.row + j, square, lanes);
    else store(out.row + j, load(out.row + j, lanes) + square, lanes);
}

// Adds x^2, d = x - shift and d^2 of TILE tokens; near the strip's end it prefetches the next TILE tokens. The first
// tile of a chunk sets the shift to the median of three of its tokens, which one massive token does not affect. A tile
// that is not INSIDE its run opens the run, or closes it and writes its sums of x^2.
template <typename E, int TILE, bool OPENS, bool INSIDE>
ACE_INLINE void add_tokens(const void* const* tokens, int64_t from, int count, bool opens_run, bool closes_run,
                           ChannelSums* sums, const SquareRow& out) {
    constexpr int AHEAD = TOKENS_AHEAD / sizeof(typename E::Stored);
    const typename E::Stored *row[TILE], *next[TILE];
    for (int t = 0; t < TILE; ++t) {
        row[t] = static_cast<const typename E::Stored*>(tokens[t]) + from;
        next[t] = static_cast<const typename E::Stored*>(tokens[TILE + t]) + from;
    }
    const int ahead = count < AHEAD ? count : AHEAD;
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        ChannelSums& s = sums[j / LANES];
        const bool inside = j + ahead < count;
        const typename E::Stored* const* later = inside ? row : next;
        const int offset = j + ahead - (inside ? 0 : count);
        Floats x[TILE], squared[TILE];
        for (int t = 0; t < TILE; ++t) {
            __builtin_prefetch(later[t] + offset);
            x[t] = E::load(row[t] + j, lanes);
            squared[t] = x[t] * x[t];
        }
        Floats square = sum_of<TILE>(squared);
        if (INSIDE || !opens_run) square = load(s.square) + square;
        if (!INSIDE && closes_run) deliver(square, out, j, lanes);
        else store(s.square, square);
        const Floats shift = OPENS ? median(x[0], x[TILE / 2], x[TILE - 1]) : load(s.shift);
        for (int t = 0; t < TILE; ++t) {
            x[t] = x[t] - shift;
            squared[t] = x[t] * x[t];
        }
        if (OPENS) {
            store(s.shift, shift);
            store(s.first, sum_of<TILE>(x));
            store(s.second, sum_of<TILE>(squared));
        } else {
            store(s.first, load(s.first) + sum_of<TILE>(x));
            store(s.second, load(s.second) + sum_of<TILE>(squared));
        }
    });
}

template <typename E>
ACE_INLINE void add_run(const void* const* tokens, int64_t length, bool opens_chunk, int64_t from, int count,
                        ChannelSums* sums, const SquareRow& out) {
    for (int64_t t = 0, next; t < length; t = next) {
        const bool tile = t + TOKEN_TILE <= length, opens = opens_chunk && t == 0;
        next = t + (tile ? TOKEN_TILE : 1);
        const bool first = t == 0, last = next == length;
        const void* const* from_here = tokens + t;
        if (tile && opens) add_tokens<E, TOKEN_TILE, true, false>(from_here, from, count, true, last, sums, out);
        else if (opens) add_tokens<E, 1, true, false>(from_here, from, count, true, last, sums, out);
        else if (!tile) add_tokens<E, 1, false, false>(from_here, from, count, first, last, sums, out);
        else if (first || last) add_tokens<E, TOKEN_TILE, false, false>(from_here, from, count, first, last, sums, out);
        else add_tokens<E, TOKEN_TILE, false, true>(from_here, from, count, false, false, sums, out);
    }
}

// Merges a chunk of `length` tokens into the moments of the `before` tokens so far, by Chan's rule.
ACE_INLINE void merge_chunk(const ChannelSums* sums, double before, double length, int count,
                            ChannelMoments* merged) {
    const double share = 1 / length, weight = length / (before + length), between = before * weight;
    for (int j = 0; j < count; j += LANES) {
        const ChannelSums& s = sums[j / LANES];
        ChannelMoments& m = merged[j / LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const double first = s.first[lane], own = s.second[lane] - first * first * share;
            const double apart = s.shift[lane] + first * share - m.mean[lane];
            m.mean[lane] += apart * weight;
            m.deviation[lane] += (own > 0 ? own : 0.0) + apart * apart * between;
        }
    }
}

inline void moments(const MomentsTask& task, int64_t strip) {
    const int64_t from = strip * task.strip;
    const int count = int(task.channels - from < task.strip ? task.channels - from : task.strip);
    ChannelSums sums[MOST_CHANNELS / LANES] = {};
    ChannelMoments merged[MOST_CHANNELS / LANES] = {};
    with_element(task.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t chunk = 0; chunk < task.n_tokens; chunk += CHUNK) {
            const int64_t end = task.n_tokens - chunk < CHUNK ? task.n_tokens : chunk + CHUNK;
            for (int64_t run = chunk, next; run < end; run = next) {
                const int64_t sequence = task.sequence[run];
                const bool first_run = run == 0 || task.sequence[run - 1] != sequence;
                next = run + 1;
                while (next < end && task.sequence[next] == sequence) ++next;
                const SquareRow out = {task.sequence_square + sequence * task.channels + from, first_run};
                add_run<E>(task.tokens + run, next - run, run == chunk, from, count, sums, out);
            }
            merge_chunk(sums, double(chunk), double(end - chunk), count, merged);
        }
    });
    settle();
    for (int j = 0; j < count; ++j) {
        const ChannelMoments& m = merged[j / LANES];
        task.total[from + j] = m.mean[j % LANES] * double(task.n_tokens);
        task.deviation[from + j] = m.deviation[j % LANES];
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
    with_element(task.tokens.element, [&](auto element) ACE_INLINED {
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
