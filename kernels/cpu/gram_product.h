// Gram matrix of bf16 tokens, on processors that multiply pairs of bf16 numbers (AVX512-BF16, and BF16 on ARM).
#pragma once

#include <cstdint>

namespace ace {

// Columns per panel, and token pairs that are packed at once: an even number.
constexpr int64_t GRAM_PANEL = 48, GRAM_PAIRS = 512;

// One word of `packed`, uint32 [panels, pairs, GRAM_PANEL], holds the values of two tokens for one channel. There is
// room for an even number of pairs. On ARM, the values of four tokens for one channel are adjacent.
struct GramTask {
    const uint16_t* tokens;  // this chunk's tokens, bf16 [n_tokens, width], rows `stride` elements apart
    int64_t n_tokens, width, stride;
    uint32_t* packed;
    float* gram;  // fp32 [width, width]
};

// True if this processor and this build support such products.
bool has_bf16_pairs();

// Packs panel `panel` of the chunk, with zeros behind the last channel and the last token.
void pack_gram_panel(const GramTask& task, int64_t panel);

// Adds the chunk's products to the columns of `panel`, in all rows up to the panel's end.
void add_gram_panel(const GramTask& task, int64_t panel);

// Mirrors the columns of `panel` at the diagonal.
void mirror_gram_panel(float* gram, int64_t width, int64_t panel);

}  // namespace ace
