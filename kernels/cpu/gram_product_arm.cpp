// The Gram matrix on ARM: BFMMLA multiplies two channels by two others, four tokens at a time.

#include "arm.h"
#include "gram_product.h"

#if ACE_ARM_EXTENSIONS

#include <arm_neon.h>
#include <cstring>

#if defined(__clang__)
#define ACE_MATRICES __attribute__((target("bf16")))
#else
#define ACE_MATRICES __attribute__((target("arch=armv8.2-a+bf16")))
#endif

namespace ace {
namespace {

// Tokens per product, and pairs of rows and of columns whose sums stay in registers: 24 of 32 registers.
constexpr int TOKENS = 4, ROW_PAIRS = 4, COL_PAIRS = 6;

int64_t steps_of(const GramTask& task) { return (task.n_tokens + TOKENS - 1) / TOKENS; }

// The packed values of one channel, for step after step.
uint16_t* packed_channel(const GramTask& task, int64_t channel) {
    auto* values = reinterpret_cast<uint16_t*>(task.packed);
    return values + (channel / GRAM_PANEL * steps_of(task) * GRAM_PANEL + channel % GRAM_PANEL) * TOKENS;
}

// Adds the chunk to a tile of the Gram matrix, from row i and column j on.
ACE_MATRICES void add_tile(const GramTask& task, int64_t i, int64_t j) {
    const uint16_t *rows = packed_channel(task, i), *cols = packed_channel(task, j);
    float32x4_t sums[ROW_PAIRS][COL_PAIRS];
    for (int r = 0; r < ROW_PAIRS; ++r) {
        for (int c = 0; c < COL_PAIRS; ++c) sums[r][c] = vdupq_n_f32(0.0f);
    }
    for (int64_t step = 0; step < steps_of(task); ++step) {
        bfloat16x8_t right[COL_PAIRS];
        for (int c = 0; c < COL_PAIRS; ++c) right[c] = vreinterpretq_bf16_u16(vld1q_u16(cols + c * 2 * TOKENS));
        for (int r = 0; r < ROW_PAIRS; ++r) {
            const bfloat16x8_t left = vreinterpretq_bf16_u16(vld1q_u16(rows + r * 2 * TOKENS));
            for (int c = 0; c < COL_PAIRS; ++c) sums[r][c] = vbfmmlaq_f32(sums[r][c], left, right[c]);
        }
        rows += GRAM_PANEL * TOKENS;
        cols += GRAM_PANEL * TOKENS;
    }
    for (int r = 0; r < ROW_PAIRS; ++r) {
        for (int c = 0; c < COL_PAIRS; ++c) {
            float products[4];
            vst1q_f32(products, sums[r][c]);
            for (int k = 0; k < 4; ++k) {
                const int64_t row = i + 2 * r + k / 2, col = j + 2 * c + k % 2;
                if (row < task.width && col < task.width) task.gram[row * task.width + col] += products[k];
            }
        }
    }
}

}  // namespace

bool has_bf16_pairs() { return has_bf16_matrices(); }

void pack_gram_panel(const GramTask& task, int64_t panel) {
    const int64_t first = panel * GRAM_PANEL;
    const int64_t there = task.width - first < GRAM_PANEL ? task.width - first : GRAM_PANEL;
    uint16_t* packed = packed_channel(task, first);
    for (int64_t step = 0; step < steps_of(task); ++step, packed += GRAM_PANEL * TOKENS) {
        memset(packed, 0, GRAM_PANEL * TOKENS * sizeof *packed);
        for (int k = 0; k < TOKENS && step * TOKENS + k < task.n_tokens; ++k) {
            const uint16_t* token = task.tokens + (step * TOKENS + k) * task.stride + first;
            for (int64_t j = 0; j < there; ++j) packed[j * TOKENS + k] = token[j];
        }
    }
}

void add_gram_panel(const GramTask& task, int64_t panel) {
    const int64_t first = panel * GRAM_PANEL;
    const int64_t end = first + GRAM_PANEL < task.width ? first + GRAM_PANEL : task.width;
    for (int64_t i = 0; i < end; i += 2 * ROW_PAIRS) {
        for (int64_t j = first; j < end; j += 2 * COL_PAIRS) add_tile(task, i, j);
    }
}

}  // namespace ace

#endif
