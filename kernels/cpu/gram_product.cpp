#include "gram_product.h"

#include "arm.h"

#if defined(__x86_64__) && ((defined(__GNUC__) && __GNUC__ >= 10) || defined(__clang__))

#include <immintrin.h>

#define ACE_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace ace {
namespace {

// Rows and vectors of columns whose sums stay in registers: 24 of 32 registers. At two
// products per cycle, that hides their latency.
constexpr int TILE = 8, VECTORS = GRAM_PANEL / 16;

int64_t pairs_of(const GramTask& task) { return (task.n_tokens + 1) / 2; }

// Adds the chunk to TILE rows of the Gram matrix, from row i on; the order of additions depends only on the chunk.
ACE_PAIRS inline void add_tile(const GramTask& task, int64_t i, int64_t panel) {
    const int64_t pairs = pairs_of(task), step = pairs * GRAM_PANEL, j = panel * GRAM_PANEL;
    const uint32_t* row = task.packed + i / GRAM_PANEL * step + i % GRAM_PANEL;
    const uint32_t* col = task.packed + panel * step;
    __m512 sums[TILE][VECTORS];
    for (int r = 0; r < TILE; ++r) {
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
    }
    for (int64_t p = 0; p < pairs; ++p) {
        __m512bh right[VECTORS];
        for (int v = 0; v < VECTORS; ++v) right[v] = (__m512bh)_mm512_loadu_si512(col + 16 * v);
        for (int r = 0; r < TILE; ++r) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(int(row[r]));
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
        }
        row += GRAM_PANEL;
        col += GRAM_PANEL;
    }
    for (int r = 0; r < TILE && i + r < task.width; ++r) {
        for (int v = 0; v < VECTORS && j + 16 * v < task.width; ++v) {
            const int64_t left = task.width - j - 16 * v;
            const __mmask16 lanes = left < 16 ? __mmask16((1u << left) - 1) : __mmask16(0xffff);
            float* gram = task.gram + (i + r) * task.width + j + 16 * v;
            _mm512_mask_storeu_ps(gram, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, gram), sums[r][v]));
        }
    }
}

}  // namespace

bool has_bf16_pairs() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bf16");
}

void pack_gram_panel(const GramTask& task, int64_t panel) {
    const int64_t pairs = pairs_of(task), first = panel * GRAM_PANEL;
    const int64_t there = task.width - first < GRAM_PANEL ? task.width - first : GRAM_PANEL;
    uint32_t* packed = task.packed + panel * pairs * GRAM_PANEL;
    for (int64_t p = 0; p < pairs; ++p, packed += GRAM_PANEL) {
        const uint16_t* even = task.tokens + 2 * p * task.stride + first;
        const bool alone = 2 * p + 1 == task.n_tokens;
        const uint16_t* odd = alone ? even : even + task.stride;
        const uint32_t keep = alone ? 0u : 0xffffu;
        for (int64_t j = 0; j < there; ++j) packed[j] = even[j] | (odd[j] & keep) << 16;
        for (int64_t j = there; j < GRAM_PANEL; ++j) packed[j] = 0;
    }
}

ACE_PAIRS void add_gram_panel(const GramTask& task, int64_t panel) {
    const int64_t end = (panel + 1) * GRAM_PANEL < task.width ? (panel + 1) * GRAM_PANEL : task.width;
    for (int64_t i = 0; i < end; i += TILE) add_tile(task, i, panel);
}

}  // namespace ace

#elif !ACE_ARM_EXTENSIONS

namespace ace {
bool has_bf16_pairs() { return false; }
void pack_gram_panel(const GramTask&, int64_t) {}
void add_gram_panel(const GramTask&, int64_t) {}
}  // namespace ace

#endif

namespace ace {

void mirror_gram_panel(float* gram, int64_t width, int64_t panel) {
    const int64_t first = panel * GRAM_PANEL, end = first + GRAM_PANEL < width ? first + GRAM_PANEL : width;
    for (int64_t top = 0; top < end; top += GRAM_PANEL) {
        for (int64_t j = first; j < end; ++j) {
            const int64_t last = top + GRAM_PANEL < j ? top + GRAM_PANEL : j;
            for (int64_t i = top; i < last; ++i) gram[j * width + i] = gram[i * width + j];
        }
    }
}

}  // namespace ace
