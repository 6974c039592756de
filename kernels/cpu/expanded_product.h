// Products of many bf16 tokens with a packed weight, on processors that multiply pairs of bf16 numbers. Kept weights,
// or the integers of quantized ones, are expanded to bf16, block by block, into the cache and multiplied there: by
// tiles (AMX) or vectors (AVX512-BF16).
#pragma once

#include "tasks.h"

#include <cstdint>

namespace ace {

// Rows and columns of a tile of 32-bit words, of which each is a pair of bf16 numbers: those of two neighboring inputs.
constexpr int64_t TILE = 16, TILE_WORDS = TILE * TILE, TILE_INPUTS = 2 * TILE;
constexpr int64_t CACHE_LINE = 64;

inline int64_t blocks_of(int64_t count) { return (count + TILE - 1) / TILE; }

// Tokens that are multiplied by one expansion of the weight.
constexpr int64_t MOST_EXPANDED_TOKENS = 512;
// The most outputs and steps of TILE_INPUTS inputs in a block of expanded weights. The steps of two blocks of tokens
// fit in the first-level cache (48 KB on processors with tiles); all tokens, the block and its sums in the second level
// (2 MB).
constexpr int64_t EXPANDED_OUTPUTS = 256, EXPANDED_STEPS = 20;
// The most outputs if they are multiplied by vectors: such processors may have a second-level cache of 1 MB.
constexpr int64_t VECTOR_OUTPUTS = 64;

// What the integers of a quantized weight are multiplied by; its packed rows are as in FewBitsWeight.
struct Scales {
    const uint16_t* absmax;  // bf16 [rows, ceil(cols / group)]
    int64_t group;           // a multiple of TILE_INPUTS
    int32_t bits;            // 8 or 4; 0 if the weight is not quantized
};

struct ExpandedTask {
    PackedWeight weight;  // bf16, or integers with scales
    Scales scales;
    const uint16_t* tokens;  // bf16 [n_tokens, weight.cols], rows `stride` elements apart
    int64_t n_tokens, stride;
    uint32_t* pairs;    // uint32 [token blocks, steps, TILE inputs, TILE tokens]: the tokens in pairs of inputs
    const float* bias;  // [weight.rows], or null
    uint16_t* out;      // bf16 [n_tokens, weight.rows]
    bool tiles;         // multiply by tiles, else by vectors
};

// What a thread works in: an expanded block, [output blocks, EXPANDED_STEPS, TILE outputs, TILE pairs], and the sums of
// its outputs, [output blocks, token blocks, TILE outputs, TILE tokens]. Both are aligned to 64 bytes.
struct ExpandedScratch {
    uint32_t* block;
    float* sums;
};

// Some steps of the inputs, of a block of outputs.
struct Block {
    int64_t first_output, outputs, first_step, steps;

    int64_t output_blocks() const { return blocks_of(outputs); }
};

constexpr int64_t ROW_BLOCK = EXPANDED_STEPS * TILE_WORDS;  // words of TILE outputs in a block

// True if this processor and this build multiply pairs of bf16 numbers and expand 16-bit numbers.
bool has_expanded_product();

// True if they also multiply tiles, and the system lets this process do so. The first call asks it.
bool has_tiles();

// Lays out a block of TILE tokens in pairs, with zeros past the last input and the last token.
void pair_tokens(const ExpandedTask& task, int64_t block);

// Computes outputs begin..end of all tokens. The order of additions depends on `tiles` only.
void expanded_product(const ExpandedTask& task, const ExpandedScratch& scratch, int64_t begin, int64_t end);

}  // namespace ace
