// How much score a group of channels gains if a candidate joins it: like a matrix product, with max(s - t, 0) in place
// of s * t.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

// Groups whose sums stay in registers; they use half of the registers.
constexpr int GROUP_TILE = WIDTH == 16 ? 8 : 4;

// Adds rows begin..end to the gains of TILE groups, from group g on, for one vector of candidates. The order of
// additions does not depend on TILE, so neither does the result.
template <int TILE>
ACE_INLINE void add_gains(const JoinTask& task, int64_t pool, int64_t begin, int64_t end, int64_t g, int64_t y,
                          int lanes) {
    const float* scores = task.candidates + (pool * task.rows + begin) * task.n_candidates + y;
    const float* thresholds = task.thresholds + (pool * task.rows + begin) * task.groups + g;
    Floats strip[TILE];
    for (int k = 0; k < TILE; ++k) strip[k] = Floats::all(0.0f);
    for (int64_t i = begin; i < end; ++i) {
        const Floats s = load(scores, lanes);
        for (int k = 0; k < TILE; ++k) {
            strip[k] = strip[k] + max(s - Floats::all(thresholds[k]), Floats::all(0.0f));
        }
        scores += task.n_candidates;
        thresholds += task.groups;
    }
    for (int k = 0; k < TILE; ++k) {
        float* gains = task.gains + (pool * task.groups + g + k) * task.n_candidates + y;
        store(gains, begin ? load(gains, lanes) + strip[k] : strip[k], lanes);
    }
}

inline void join_gains(const JoinTask& task, int64_t pool, int64_t block) {
    const int64_t y = block * LANES;
    const int lanes = int(task.n_candidates - y < LANES ? task.n_candidates - y : LANES);
    for (int64_t begin = 0; begin < task.rows; begin += JOIN_ROWS) {
        const int64_t end = begin + JOIN_ROWS < task.rows ? begin + JOIN_ROWS : task.rows;
        int64_t g = 0;
        for (; g + GROUP_TILE <= task.groups; g += GROUP_TILE) {
            add_gains<GROUP_TILE>(task, pool, begin, end, g, y, lanes);
        }
        for (; g < task.groups; ++g) add_gains<1>(task, pool, begin, end, g, y, lanes);
    }
}

}  // namespace
}  // namespace ace
