#include "chosen_pairs.h"

#include "token_pairs.h"

#if ACE_HAS_PAIRS

namespace ace {
namespace {

// Groups of inputs in a step.
constexpr int64_t STEP_GROUPS = TILE_INPUTS / 4;

int64_t groups_of(const ExpandedTask& task) { return steps_of(task) * STEP_GROUPS; }

// Blocks of tokens that are multiplied together: 2, and 1 if it is the last.
int64_t together(const ExpandedTask& task, int64_t first) {
    const int64_t left = blocks_of(task.n_tokens) - first;
    return left >= 2 ? 2 : 1;
}

uint32_t* pairs_of(const ExpandedTask& task, int64_t first) {
    return task.pairs + first * groups_of(task) * CHOICES * TILE;
}

// The place of a group's pair, by its four metadata bits. Invalid bits have place 0.
constexpr int64_t PLACES[16] = {0, 0, 0, 0, 0, 1, 3, 0, 0, 2, 4, 0, 5, 0, 0, 0};

// Groups first..end of the inputs, of ROWS outputs from i on, and COUNT blocks of tokens.
struct Part {
    const uint32_t* pairs;  // of the first group
    int64_t i, first, end;
    float* sums;  // those of the next block of tokens are TILE_WORDS on
};

template <int COUNT, int ROWS>
ACE_PAIRS inline void add(const ExpandedTask& task, const Part& part) {
    constexpr int64_t WORDS = COUNT * TILE;
    const PackedWeight& w = task.weight;
    const int64_t apart = w.cols / 4, meta_apart = steps_of(task) * int64_t(sizeof(uint32_t));
    const auto* values = static_cast<const uint32_t*>(w.values) + part.i * apart;
    const auto* meta = reinterpret_cast<const uint8_t*>(w.meta) + part.i * meta_apart;
    __m512 sums[ROWS][COUNT];
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < COUNT; ++v) {
            const float* place = part.sums + r * TILE + v * TILE_WORDS;
            sums[r][v] = part.first ? _mm512_load_ps(place) : _mm512_setzero_ps();
        }
        __builtin_prefetch(values + r * apart + part.end);
    }
    const uint32_t* pairs = part.pairs;
    for (int64_t g = part.first; g < part.end; ++g, pairs += CHOICES * WORDS) {
        for (int r = 0; r < ROWS; ++r) {
            const int bits = meta[r * meta_apart + g / 2] >> (g % 2 * 4) & 15;
            const uint32_t* chosen = pairs + PLACES[bits] * WORDS;
            const __m512bh left = (__m512bh)_mm512_set1_epi32(int(values[r * apart + g]));
            for (int v = 0; v < COUNT; ++v) {
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, (__m512bh)_mm512_load_si512(chosen + v * TILE));
            }
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        for (int v = 0; v < COUNT; ++v) _mm512_store_ps(part.sums + r * TILE + v * TILE_WORDS, sums[r][v]);
    }
}

// Adds up a block of outputs, for COUNT blocks of tokens from block t on: a part of the inputs at a time, whose pairs
// stay in the first-level cache.
template <int COUNT>
ACE_PAIRS void add_all(const ExpandedTask& task, int64_t t, int64_t i, int64_t outputs, float* all_sums) {
    constexpr int ROWS = 8;
    constexpr int64_t GROUPS = 64 / COUNT, WORDS = GROUPS * CHOICES * COUNT * TILE;
    const int64_t groups = task.weight.cols / 4, apart = blocks_of(task.n_tokens) * TILE_WORDS;
    for (int64_t first = 0; first < groups; first += GROUPS) {
        const int64_t end = first + GROUPS < groups ? first + GROUPS : groups;
        const uint32_t* pairs = pairs_of(task, t) + first * CHOICES * COUNT * TILE;
        const auto part = [&](int64_t r) {
            return Part{pairs, i + r, first, end, all_sums + r / TILE * apart + t * TILE_WORDS + r % TILE * TILE};
        };
        const uint32_t* ahead = pairs + WORDS;
        int64_t r = 0;
        for (; r + ROWS <= outputs; r += ROWS) {
            // The processor cannot foresee which of the next part's pairs are chosen first.
            for (int64_t k = 0; k < WORDS * ROWS / EXPANDED_OUTPUTS; k += TILE) __builtin_prefetch(ahead + k, 0, 2);
            ahead += WORDS * ROWS / EXPANDED_OUTPUTS;
            add<COUNT, ROWS>(task, part(r));
        }
        for (; r < outputs; ++r) add<COUNT, 1>(task, part(r));
    }
}

// Stores the six pairs of a group, from its first and its last two inputs.
ACE_PAIRS inline void store_choices(__m512i low, __m512i high, uint32_t* to, int64_t words) {
    const __m512i lower_half = _mm512_set1_epi32(0xffff);
    const __m512i evens[] = {_mm512_and_si512(low, lower_half), _mm512_srli_epi32(low, 16)};
    const __m512i odds[] = {_mm512_slli_epi32(high, 16), _mm512_andnot_si512(lower_half, high)};
    _mm512_store_si512(to, low);
    for (int k = 0; k < 4; ++k) _mm512_store_si512(to + (1 + k) * words, _mm512_or_si512(evens[k / 2], odds[k % 2]));
    _mm512_store_si512(to + 5 * words, high);
}

}  // namespace

bool takes_chosen_pairs(const ExpandedTask& task) {
    return !task.tiles && !task.scales.bits && !task.weight.starts && task.weight.n == 2 && task.weight.m == 4;
}

ACE_PAIRS void choose_pairs(const ExpandedTask& task, int64_t block) {
    const int64_t first = block / 2 * 2;
    const int64_t words = together(task, first) * TILE;
    uint32_t* to = pairs_of(task, first) + (block - first) * TILE;
    for (int64_t s = 0; s < steps_of(task); ++s) {
        __m512i rows[TILE];
        load_pairs(task, block, s, rows);
        for (int64_t g = 0; g < STEP_GROUPS; ++g, to += CHOICES * words) {
            store_choices(rows[2 * g], rows[2 * g + 1], to, words);
        }
    }
}

ACE_PAIRS void chosen_pairs_product(const ExpandedTask& task, float* sums, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += EXPANDED_OUTPUTS) {
        const int64_t outputs = end - i < EXPANDED_OUTPUTS ? end - i : EXPANDED_OUTPUTS;
        for (int64_t t = 0; t < blocks_of(task.n_tokens); t += together(task, t)) {
            if (together(task, t) == 2) add_all<2>(task, t, i, outputs, sums);
            else add_all<1>(task, t, i, outputs, sums);
        }
        deliver(task, sums, i, outputs);
    }
}

}  // namespace ace

#else

namespace ace {
bool takes_chosen_pairs(const ExpandedTask&) { return false; }
void choose_pairs(const ExpandedTask&, int64_t) {}
void chosen_pairs_product(const ExpandedTask&, float*, int64_t, int64_t) {}
}  // namespace ace

#endif
