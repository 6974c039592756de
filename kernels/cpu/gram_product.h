// Products of every two channels summed over tokens, of bf16 tokens, by processors that multiply bf16 in pairs.
#pragma once

#include <cstdint>

namespace ace {

// Columns of a panel, and token pairs that are packed at a time.
constexpr int64_t GRAM_PANEL = 48, GRAM_PAIRS = 512;

// Two tokens' values of a channel lie side by side in `packed`, uint32 [panels, pairs, GRAM_PANEL].
struct GramTask {
    const uint16_t* tokens;  // of this chunk, [n_tokens, width], bf16, rows `stride` apart
    int64_t n_tokens, width, stride;
    uint32_t* packed;
    float* gram;  // fp32 [width, width]
};

// Whether this processor and this build have them.
bool has_bf16_pairs();

// Panel `panel` of the chunk, zeros behind the last channel and the last token.
void pack_gram_panel(const GramTask& task, int64_t panel);

// Adds the chunk to columns of `panel` and the rows up to its end.
void add_gram_panel(const GramTask& task, int64_t panel);

// Rows below the diagonal become the columns beside it, for the columns of `panel`.
void mirror_gram_panel(float* gram, int64_t width, int64_t panel);

}  // namespace ace
