// Channel sums over tokens, one strip of channels at a time. Lanes are channels, so nothing is summed across lanes.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Tokens whose sums are kept in fp32 before they go to fp64.
constexpr int64_t CHUNK = 128;
// Bytes between a token element that is read and the one of the same token that memory is asked for meanwhile.
constexpr int TOKENS_AHEAD = 1024;

// Sums of sixteen channels lie side by side: strips of their own would compete with the tokens for the same cache sets.
struct alignas(64) ChannelSums {
    float shift[LANES], first[LANES], second[LANES];
};

struct alignas(64) ChannelMoments {
    double mean[LANES], deviation[LANES];
};

template <int COUNT>
ACE_INLINE Floats sum_of(const Floats* terms) {
    return sum_of<COUNT / 2>(terms) + sum_of<COUNT / 2>(terms + COUNT / 2);
}

template <>
ACE_INLINE Floats sum_of<1>(const Floats* terms) {
    return terms[0];
}

// Adds d = x - shift and d^2 of TILE tokens; near the strip's end memory is asked for the TILE tokens after them.
template <typename E, int TILE>
ACE_INLINE void add_tokens(const void* const* tokens, int64_t from, int count, ChannelSums* sums) {
    const typename E::Stored *row[TILE], *next[TILE];
    for (int t = 0; t < TILE; ++t) {
        row[t] = static_cast<const typename E::Stored*>(tokens[t]) + from;
        next[t] = static_cast<const typename E::Stored*>(tokens[TILE + t]) + from;
    }
    constexpr int AHEAD = TOKENS_AHEAD / sizeof(typename E::Stored);
    const int ahead = count < AHEAD ? count : AHEAD;
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        ChannelSums& s = sums[j / LANES];
        const bool inside = j + ahead < count;
        const typename E::Stored* const* later = inside ? row : next;
        const int offset = j + ahead - (inside ? 0 : count);
        const Floats shift = load(s.shift);
        Floats d[TILE], squared[TILE];
        for (int t = 0; t < TILE; ++t) {
            __builtin_prefetch(later[t] + offset);
            d[t] = E::load(row[t] + j, lanes) - shift;
            squared[t] = d[t] * d[t];
        }
        store(s.first, load(s.first) + sum_of<TILE>(d));
        store(s.second, load(s.second) + sum_of<TILE>(squared));
    });
}

// Sets out for a chunk, about the median of three of its tokens: one massive token does not spoil that.
template <typename E>
ACE_INLINE void start_chunk(const void* const* tokens, int64_t length, int64_t from, int count, ChannelSums* sums) {
    const auto row = [&](int64_t t) { return static_cast<const typename E::Stored*>(tokens[t]) + from; };
    const auto *a = row(0), *b = row(length / 2), *c = row(length - 1);
    each_vector(count, [&](int j, int lanes) ACE_INLINED {
        const Floats x = E::load(a + j, lanes), y = E::load(b + j, lanes), z = E::load(c + j, lanes);
        ChannelSums& s = sums[j / LANES];
        store(s.shift, max(min(x, y), min(max(x, y), z)));
        store(s.first, Floats::all(0.0f));
        store(s.second, Floats::all(0.0f));
    });
}

// Chan's rule, for `length` tokens after `before` of them; `square` gets their sum of x^2.
ACE_INLINE void merge_chunk(const ChannelSums* sums, double before, double length, int count,
                            ChannelMoments* merged, float* square) {
    const double share = 1 / length, weight = length / (before + length), between = before * weight;
    for (int j = 0; j < count; j += LANES) {
        const ChannelSums& s = sums[j / LANES];
        ChannelMoments& m = merged[j / LANES];
        float squares[LANES];
        for (int lane = 0; lane < LANES; ++lane) {
            const double shift = s.shift[lane], first = s.first[lane], second = s.second[lane];
            const double own = second - first * first * share, apart = shift + first * share - m.mean[lane];
            m.mean[lane] += apart * weight;
            m.deviation[lane] += (own > 0 ? own : 0.0) + apart * apart * between;
            squares[lane] = float(second + shift * (2 * first + length * shift));
        }
        const int lanes = count - j < LANES ? count - j : LANES;
        store(square + j, load(square + j, lanes) + load(squares), lanes);
    }
}

inline void moments(const MomentsTask& task, int64_t strip) {
    const int64_t from = strip * task.strip;
    const int count = int(task.channels - from < task.strip ? task.channels - from : task.strip);
    ChannelSums sums[MOST_CHANNELS / LANES];
    ChannelMoments merged[MOST_CHANNELS / LANES] = {};
    with_element(task.element, [&](auto element) ACE_INLINED {
        using E = decltype(element);
        for (int64_t begin = 0, end; begin < task.n_tokens; begin = end) {
            const int64_t sequence = task.sequence[begin];
            end = begin + 1;
            while (end < task.n_tokens && end - begin < CHUNK && task.sequence[end] == sequence) ++end;
            start_chunk<E>(task.tokens + begin, end - begin, from, count, sums);
            int64_t t = begin;
            for (; t + TOKEN_TILE <= end; t += TOKEN_TILE) {
                add_tokens<E, TOKEN_TILE>(task.tokens + t, from, count, sums);
            }
            for (; t < end; ++t) add_tokens<E, 1>(task.tokens + t, from, count, sums);
            merge_chunk(sums, double(begin), double(end - begin), count, merged,
                        task.sequence_square + sequence * task.channels + from);
        }
    });
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
