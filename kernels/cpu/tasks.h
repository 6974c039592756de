// The arguments of each operation as plain pointers and counts, and the table of functions that implement them.
// Each instruction set compiles the same functions into its own table; library.cpp selects one and splits the work.
#pragma once

#include <cstdint>

namespace ace {

enum class Element : int32_t { fp32, fp16, bf16 };
enum class Output : int32_t { weight, mask, bits };

// A matrix with contiguous rows; `stride` is the number of elements from row to row.
struct Matrix {
    void* data;
    int64_t rows, cols, stride;
    Element element;
};

// score = |w|^power * (row_i + col_j) * scale_j * coupling_ij; null factors are left out.
struct Terms {
    const float *row, *col, *scale, *coupling;
    int32_t power;
};

struct Selection {
    Matrix weight;
    Terms terms;
    Output output;
    uint8_t* delivered;  // bool [rows, cols] or bits [rows, ceil(cols / 8)]; unused if the output is the weight
};

struct Pattern {
    int32_t n, m;
    bool along_out;
};

// Keys above the threshold are kept, and keys equal to it from flat index `ties_from` on.
struct Cut {
    int32_t threshold;
    int64_t ties_from;
};

// One histogram for all rows: it counts keys whose bits above `prefix_shift` equal `prefix`, by their next bits.
struct Histogram {
    int32_t prefix, prefix_shift, bin_shift, bin_mask;
};

struct MomentsTask {
    const void* const* tokens;  // a row pointer per valid token, in order, then TOKEN_TILE spare pointers
    const int64_t* sequence;    // the sequence of each token
    int64_t n_tokens, channels, strip;
    Element element;
    double *total, *deviation;
    float* sequence_square;
};

struct SquaresTask {
    Matrix tokens;
    const float* weights;  // [n_layers, n_tokens]
    int64_t n_layers;
    float* out;  // [n_layers, channels]
};

enum class VarianceNorm : int32_t { max_layer, max_sequence, channel, frobenius };

struct VarianceTask {
    const float* square;  // [n_sequences, channels]
    int64_t n_sequences, channels;
    VarianceNorm norm;
    float power, eps, least;  // least: smallest level; smaller ones are raised to it
    float* levels;                    // [n_sequences]: each row's divisor; null if each channel has its own level
    float* factor;                    // [channels]
};

struct DivergenceTask {
    Matrix logits, wanted, gradient;  // same shape and element type; the gradient may overwrite the logits
    float* loss;                      // [rows]
};

struct AdamWTask {
    float *values, *first, *second;
    const void* gradient;
    void* rounded;        // receives a copy of the new values, fp32 or bf16; may be null
    const float* factor;  // multiplies the gradient; null for 1
    Element gradient_element, rounded_element;
    float rate, gain_first, gain_second, unbias, eps;
    bool zeros_stay;
};

struct RoundTask {
    const float* values;  // [rows, cols]
    int64_t cols, group;  // group: values of a row that share a scale
    int32_t bits;
    Element scale_element, into_element;
    void* into;  // [rows, cols], fp32 or bf16
};

struct JoinTask {
    const float *candidates, *thresholds;  // [n_pools, rows, n_candidates] and [n_pools, rows, groups]
    int64_t rows, groups, n_candidates;
    float* gains;  // [n_pools, groups, n_candidates]
};

struct AssignmentTask {
    const float* gains;  // [size, size]: gain of each group (row) with each candidate
    int64_t size;
    int32_t* joins;  // [size]: the candidate of each group
    // Working buffers, [size rounded up to 16]:
    float *price, *length, *done;
    int32_t *before, *group_of, *path;
};

// A packed weight with contiguous rows: the kept values in order, and one bit per weight in 32-bit words, lowest first.
// n of every m are kept, or row i's values are those from starts[i] to starts[i + 1]; the pattern is unused then.
struct PackedWeight {
    const void* values;
    const uint32_t* meta;
    int64_t rows, cols;
    int32_t n, m;
    const int64_t* starts;  // [rows + 1], or null
    int64_t n_values;
    Element element;
};

// The output of unpacking a weight, for elements of a given number of bytes; `packed.element` is unused.
struct Unpacking {
    PackedWeight packed;
    int32_t bytes;
    void* weight;  // [rows, cols]
};

// The output of packing, by score or by the non-zeros of a pruned weight.
struct Packing {
    void* values;
    uint32_t* meta;
    bool by_score;
};

// A weight of 8 or 4 bits: n:m with metadata as in PackedWeight, or 1:1 without metadata, with a value for each input.
struct FewBitsWeight {
    const uint8_t* values;
    const uint32_t* meta;  // null if every input has a value
    const void* absmax;    // [rows, ceil(cols / group)]
    int64_t rows, cols;
    int32_t n, m, bits;
    Element element;  // of absmax
};

// Numbers of 16 bits, a cache line, that byte_planes.h needs for each token and block.
constexpr int64_t BLOCK_START = 32;

struct FewBitsTask {
    // With 30 input bits, [n_tokens, padded / 16, 2, 16]: upper and lower parts, zeros past the last input; with dot
    // products of bytes, the bytes of each part as store_part or planes_of orders them. Behind them is room for
    // BLOCK_START numbers per token and block. With 8 input bits, int8 [n_tokens, padded].
    // In the order of inputs, or deinterleaved.
    const int16_t* tokens;
    const float* scales;    // [n_tokens, blocks], or with 8 input bits [n_tokens, padded / 32]: what a step stands for
    int64_t n_tokens, padded;
    int64_t block, blocks;  // inputs in a block, which divides the group; and blocks in a row
    int64_t group;          // inputs that share an entry of absmax
    const float* bias;      // [rows], or null
    float* out;             // outputs of a token; those of the next one are `out_stride` numbers on
    int64_t out_stride;
    int32_t input_bits;     // 30 or 8
};

// Tokens for a weight of 4 bits without metadata are deinterleaved, 64 at once, if a block is a multiple of 64: inputs
// whose values are in the same half of their bytes lie side by side. So the values need not be moved.
constexpr int DEINTERLEAVED = 64;
constexpr bool deinterleaved_tokens(const FewBitsWeight& w, int64_t block) {
    return !w.meta && w.bits == 4 && block % DEINTERLEAVED == 0;
}

// Inputs in a block of rounded tokens: the most that divide the group, up to 128, so that sums fit in 32 bits.
constexpr int64_t rounded_block(int64_t group) { return group % 128 == 0 ? 128 : group % 64 == 0 ? 64 : 32; }

struct LinearTask {
    const float* tokens;  // [n_tokens, padded], zeros past the last input
    int64_t n_tokens, padded;
    const float* bias;  // [rows], or null
    float* out;         // outputs of a token; those of the next one are `out_stride` numbers on
    int64_t out_stride;
};

// Attention of one token. Keys are [kv_heads, capacity / 16, head_size, 16] and values [kv_heads, capacity, head_size];
// `length` positions are there.
struct AttentionTask {
    const float *queries, *keys, *values;
    int64_t heads, kv_heads, head_size, length, capacity;
    float scaling;
    float* out;  // [heads, head_size]
};

enum class Activation : int32_t { silu, gelu, gelu_tanh };

// Rows per unit of summing: column sums do not depend on how units are distributed to threads.
constexpr int64_t SUM_ROWS = 128;
// Tokens that are summed at once, and the largest number of channels in a strip of moments.
constexpr int64_t TOKEN_TILE = 8, MOST_CHANNELS = 4096;
constexpr int64_t CHANNEL_STRIP = 1024;
// Rows per partial sum of join_gains.
constexpr int64_t JOIN_ROWS = 128;
// Columns per strip of a selection, so that keys stay in the first-level cache.
constexpr int64_t KEY_STRIP = 1024;

struct Bodies {
    const char* name;
    // Groups of rows begin..end: a group is one row along the inputs, or m rows along the outputs.
    void (*select_nm)(const Selection&, const Pattern&, int64_t begin, int64_t end);
    // Keeps k weights in each of the rows begin..end; `keys` has room for a row rounded up to 16.
    void (*select_rows)(const Selection&, int64_t k, int64_t begin, int64_t end, int32_t* keys);
    void (*count_keys)(const Selection&, const Histogram&, int64_t begin, int64_t end, int64_t* bins);
    // The flat index of the first of the last `wanted` keys equal to `threshold`.
    int64_t (*find_ties)(const Selection&, int32_t threshold, int64_t wanted);
    void (*apply_cut)(const Selection&, const Cut&, int64_t begin, int64_t end);
    // Row sums of one block of SUM_ROWS rows, and the column sums of that block.
    void (*weight_sums)(const Matrix&, int64_t block, float* row_sums, float* block_cols);
    void (*token_norms)(const Matrix&, int64_t begin, int64_t end, float* norms);
    bool (*all_finite)(Element, const void* data, int64_t count);
    // Channels of one strip; the task holds the strip's width.
    void (*moments)(const MomentsTask&, int64_t strip);
    // Channels of one strip of CHANNEL_STRIP.
    void (*weighted_squares)(const SquaresTask&, int64_t strip);
    // Levels of rows begin..end, and the factors of one vector of channels.
    void (*variance_levels)(const VarianceTask&, int64_t begin, int64_t end);
    void (*variance_factor)(const VarianceTask&, int64_t strip);
    void (*divergence)(const DivergenceTask&, int64_t begin, int64_t end);
    void (*adamw)(const AdamWTask&, int64_t begin, int count);
    // One vector of candidates of one pool; without rows, nothing is written.
    void (*join_gains)(const JoinTask&, int64_t pool, int64_t block);
    // False if sums of gains overflow fp32.
    bool (*assign)(const AssignmentTask&);
    // Rows begin..end; false if a group of a pruned weight has more than n non-zeros.
    bool (*pack_nm)(const Selection&, const Pattern&, const Packing&, int64_t begin, int64_t end);
    // Rows begin..end: a bit for each non-zero, and the number of non-zeros.
    void (*find_kept)(const Matrix&, uint32_t* meta, int64_t* counts, int64_t begin, int64_t end);
    // Rows begin..end: the values of the set bits, row i's from starts[i] on.
    void (*pack_rows)(const Matrix&, const uint32_t* meta, const int64_t* starts, void* values, int64_t begin,
                      int64_t end);
    // Rows begin..end.
    void (*unpack_nm)(const Unpacking&, int64_t begin, int64_t end);
    // fp32 copies of rows, `padded` elements apart and padded with zeros.
    void (*widen_rows)(const Matrix&, int64_t padded, float* out);
    // Outputs begin..end of all tokens.
    void (*nm_linear)(const PackedWeight&, const LinearTask&, int64_t begin, int64_t end);
    void (*dense_linear)(const Matrix&, const LinearTask&, int64_t begin, int64_t end);
    // Rows rounded by blocks to integers in two parts of 16 bits, as in FewBitsTask, and the blocks' scales.
    void (*round_tokens)(const Matrix&, int64_t block, bool deinterleaved, int64_t padded, int16_t* out, float* scales);
    // Rows rounded to 8 bits, with a scale for every 32 inputs.
    void (*round_to_bytes)(const Matrix&, int64_t padded, bool deinterleaved, int8_t* out, float* scales);
    // Outputs begin..end of all tokens.
    void (*few_bits_linear)(const FewBitsWeight&, const FewBitsTask&, int64_t begin, int64_t end);
    void (*rms_norm)(const float* x, const float* weight, float eps, int64_t size, float* out);
    void (*rotate_head)(float* head, const float* cosines, const float* sines, int64_t size);
    // Query heads begin..end.
    void (*attend)(const AttentionTask&, int64_t begin, int64_t end);
    void (*gate)(Activation, const float* gates, const float* ups, int64_t size, float* out);
    // Rows begin..end.
    void (*round_groups)(const RoundTask&, int64_t begin, int64_t end);
};

extern const Bodies portable_bodies;
#if defined(__x86_64__)
extern const Bodies avx2_bodies, avx512_bodies, avx512_vnni_bodies;
#elif defined(__aarch64__)
extern const Bodies neon_bodies, neon_dotprod_bodies;
#endif

}  // namespace ace
