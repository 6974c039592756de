// Optimal assignment of candidates to groups for the largest sum of gains: shortest augmenting paths over reduced costs
// (Jonker and Volgenant, 1987), without their row reduction. Prices and lengths are fp32, sixteen candidates at a time.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

constexpr float FAR = __builtin_inff();

struct Nearest {
    float length;
    int32_t candidate;
};

// In each lane, keeps the smaller length and its value.
ACE_INLINE void keep_smaller(const Floats& length, const Ints& value, Floats& least, Ints& of_least) {
    for (int p = 0; p < PARTS; ++p) {
        const auto closer = length.part[p] < least.part[p];
        least.part[p] = closer ? length.part[p] : least.part[p];
        of_least.part[p] = closer ? value.part[p] : of_least.part[p];
    }
}

// The candidate with the smallest length; on ties, the one with the lowest index.
ACE_INLINE Nearest nearest_of(const Floats& least, const Ints& candidate) {
    float length[LANES];
    int32_t index[LANES];
    store(length, least);
    store(index, candidate);
    Nearest nearest = {length[0], index[0]};
    for (int k = 1; k < LANES; ++k) {
        if (length[k] < nearest.length || (length[k] == nearest.length && index[k] < nearest.candidate)) {
            nearest = {length[k], index[k]};
        }
    }
    return nearest;
}

ACE_INLINE Ints counting() {
    int32_t k[LANES];
    for (int lane = 0; lane < LANES; ++lane) k[lane] = lane;
    return load(k);
}

// Extends paths over one group; `from` is the length of the path to it. `done` is FAR for finished candidates, else 0.
ACE_INLINE Nearest extend(const AssignmentTask& task, const float* gains, int32_t group, float from) {
    Floats least = Floats::all(FAR);
    Ints nearest = Ints::all(0), index = counting();
    each_vector(int(task.size), [&](int y, int lanes) ACE_INLINED {
        const Floats reduced = Floats::all(from) - load(gains + y, lanes) - load(task.price + y);
        Floats length = load(task.length + y);
        Ints before = load(task.before + y);
        keep_smaller(reduced + load(task.done + y), Ints::all(group), length, before);
        store(task.length + y, length);
        store(task.before + y, before);
        keep_smaller(length + load(task.done + y), index, least, nearest);
        index = index + Ints::all(LANES);
    });
    return nearest_of(least, nearest);
}

// Arrays of the task are padded to a multiple of 16; padding is marked as done. A path has at most `size` candidates.
// If lengths are not finite, there is no nearest candidate, and the search ends.
inline bool assign(const AssignmentTask& task) {
    const int32_t size = int32_t(task.size), padded = (size + LANES - 1) / LANES * LANES;
    for (int32_t y = 0; y < padded; ++y) {
        task.price[y] = FAR;
        task.done[y] = y < size ? 0.0f : FAR;
        task.group_of[y] = -1;
    }
    for (int32_t g = 0; g < size; ++g) {
        each_vector(size, [&](int y, int lanes) ACE_INLINED {
            const Floats cost = Floats::all(0.0f) - load(task.gains + g * task.size + y, lanes);
            store(task.price + y, min(cost, load(task.price + y)), lanes);
        });
    }
    for (int32_t y = size; y < padded; ++y) task.price[y] = 0.0f;
    for (int32_t g = 0; g < size; ++g) {
        const float* gains = task.gains + g * task.size;
        for (int32_t y = 0; y < padded; ++y) task.length[y] = FAR;
        Nearest end = extend(task, gains, g, 0.0f);
        task.joins[g] = -1;
        if (task.group_of[end.candidate] < 0) {
            task.group_of[end.candidate] = g;
            task.joins[g] = end.candidate;
        }
    }
    for (int32_t start = 0; start < size; ++start) {
        if (task.joins[start] >= 0) continue;
        for (int32_t y = 0; y < padded; ++y) task.length[y] = FAR;
        Nearest end = extend(task, task.gains + start * task.size, start, 0.0f);
        int32_t n_done = 0;
        while (task.group_of[end.candidate] >= 0) {
            if (n_done == size || !(end.length > -FAR && end.length < FAR)) return false;
            const int32_t group = task.group_of[end.candidate];
            const float* gains = task.gains + group * task.size;
            task.done[end.candidate] = FAR;
            task.path[n_done++] = end.candidate;
            end = extend(task, gains, group, end.length + gains[end.candidate] + task.price[end.candidate]);
        }
        for (int32_t k = 0; k < n_done; ++k) {
            const int32_t y = task.path[k];
            task.price[y] += task.length[y] - end.length;
            task.done[y] = 0.0f;
        }
        int32_t y = end.candidate;
        for (int32_t group = -1, steps = 0; group != start; ++steps) {
            if (steps > n_done) return false;
            group = task.before[y];
            task.group_of[y] = group;
            const int32_t next = task.joins[group];
            task.joins[group] = y;
            y = next;
        }
    }
    return true;
}

}  // namespace
}  // namespace ace
