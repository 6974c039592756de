// What one call asks for, in plain pointers and counts, and the table of bodies that serve it.
// Each instruction set compiles the same bodies into its own table; library.cpp picks one and splits the work.
#pragma once

#include <cstdint>

namespace ace {

enum class Element : int32_t { fp32, fp16, bf16 };
enum class Output : int32_t { weight, mask, bits };

// A matrix whose rows are contiguous; stride counts elements from row to row.
struct Matrix {
    void* data;
    int64_t rows, cols, stride;
    Element element;
};

// score = |w|^power * (row_i + col_j) * scale_j * coupling_ij, a null factor left out.
struct Terms {
    const float *row, *col, *scale, *coupling;
    int32_t power;
};

struct Selection {
    Matrix weight;
    Terms terms;
    Output output;
    uint8_t* delivered;  // bool [rows, cols] or bits [rows, ceil(cols / 8)]; unused when the weight is written
};

struct Pattern {
    int32_t n, m;
    bool along_out;
};

// A key survives above the threshold, and at it from flat index `ties_from` on.
struct Cut {
    int32_t threshold;
    int64_t ties_from;
};

// Rows of the weight share one histogram: keys whose bits above `prefix_shift` equal `prefix`, by their next bits.
struct Histogram {
    int32_t prefix, prefix_shift, bin_shift, bin_mask;
};

struct MomentsTask {
    const void* const* tokens;  // a row pointer for each token that counts, in order, then TOKEN_TILE to spare
    const int64_t* sequence;    // which sequence each of them belongs to
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
    float power, eps, least;  // least: the level that a smaller one counts as
    float* levels;                    // [n_sequences]: what each row is divided by; null for a channel's own
    float* factor;                    // [channels]
};

struct DivergenceTask {
    Matrix logits, wanted, gradient;  // of one shape and element; the gradient may lie over the logits
    float* loss;                      // [rows]
};

struct AdamWTask {
    float *values, *first, *second;
    const void* gradient;
    void* rounded;        // a copy of the new values, or null; fp32 or bf16
    const float* factor;  // of the gradient; null for 1
    Element gradient_element, rounded_element;
    float rate, gain_first, gain_second, unbias, eps;
    bool zeros_stay;
};

struct JoinTask {
    const float *candidates, *thresholds;  // [n_pools, rows, n_candidates] and [n_pools, rows, groups]
    int64_t rows, groups, n_candidates;
    float* gains;  // [n_pools, groups, n_candidates]
};

struct AssignmentTask {
    const float* gains;  // [size, size]: of a group with a candidate
    int64_t size;
    int32_t* joins;  // [size]: the candidate of each group
    // For work, [size rounded up to 16]:
    float *price, *length, *done;
    int32_t *before, *group_of, *path;
};

// n of every m along contiguous rows: values one after the other, and a bit a weight in words of 32, lowest first.
struct PackedWeight {
    const void* values;
    const uint32_t* meta;
    int64_t rows, cols;
    int32_t n, m;
    Element element;
};

// Where a packed weight goes to, by the bytes of an element.
struct Unpacking {
    const void* values;
    const uint32_t* meta;
    int64_t rows, cols;
    int32_t n, m, bytes;
    void* weight;  // [rows, cols]
};

// Where a selection packs to: by score, or by what of a pruned weight is not 0.
struct Packing {
    void* values;
    uint32_t* meta;
    bool by_score;
};

struct LinearTask {
    const float* tokens;  // [n_tokens, padded], zeros past the last input
    int64_t n_tokens, padded;
    const float* bias;  // [rows], or null
    float* out;         // [n_tokens, rows]
};

// Rows of a unit of summing: column sums do not depend on how units are dealt to threads.
constexpr int64_t SUM_ROWS = 128;
// Tokens whose channels are summed at a time, and the most channels of a strip of moments.
constexpr int64_t TOKEN_TILE = 8, MOST_CHANNELS = 4096;
constexpr int64_t CHANNEL_STRIP = 1024;
// Rows that join_gains sums on their own.
constexpr int64_t JOIN_ROWS = 128;
// Selection works strip by strip, so that keys stay in the first-level cache.
constexpr int64_t KEY_STRIP = 1024;

struct Bodies {
    const char* name;
    // Groups of rows begin..end: single rows along the inputs, m rows along the outputs.
    void (*select_nm)(const Selection&, const Pattern&, int64_t begin, int64_t end);
    // Rows begin..end, k survivors in each; `keys` holds a row rounded up to 16.
    void (*select_rows)(const Selection&, int64_t k, int64_t begin, int64_t end, int32_t* keys);
    void (*count_keys)(const Selection&, const Histogram&, int64_t begin, int64_t end, int64_t* bins);
    // The flat index of the first of the last `wanted` keys equal to `threshold`.
    int64_t (*find_ties)(const Selection&, int32_t threshold, int64_t wanted);
    void (*apply_cut)(const Selection&, const Cut&, int64_t begin, int64_t end);
    // Row sums of one block of SUM_ROWS rows, and the block's own column sums.
    void (*weight_sums)(const Matrix&, int64_t block, float* row_sums, float* block_cols);
    void (*token_norms)(const Matrix&, int64_t begin, int64_t end, float* norms);
    bool (*all_finite)(Element, const void* data, int64_t count);
    // Channels of one strip, as wide as the task says.
    void (*moments)(const MomentsTask&, int64_t strip);
    // Channels of one strip of CHANNEL_STRIP.
    void (*weighted_squares)(const SquaresTask&, int64_t strip);
    // Levels of rows begin..end, and the factors of one vector of channels.
    void (*variance_levels)(const VarianceTask&, int64_t begin, int64_t end);
    void (*variance_factor)(const VarianceTask&, int64_t strip);
    void (*divergence)(const DivergenceTask&, int64_t begin, int64_t end);
    void (*adamw)(const AdamWTask&, int64_t begin, int count);
    // One vector of one pool's candidates; zero rows leave the gains unwritten.
    void (*join_gains)(const JoinTask&, int64_t pool, int64_t block);
    // False if sums of gains leave the range of fp32.
    bool (*assign)(const AssignmentTask&);
    // Rows begin..end; false where a group of a pruned weight has more than n that are not 0.
    bool (*pack_nm)(const Selection&, const Pattern&, const Packing&, int64_t begin, int64_t end);
    // Rows begin..end.
    void (*unpack_nm)(const Unpacking&, int64_t begin, int64_t end);
    // fp32 copies of rows, `padded` apart, zeros behind them.
    void (*widen_rows)(const Matrix&, int64_t padded, float* out);
    // Outputs begin..end of all tokens.
    void (*nm_linear)(const PackedWeight&, const LinearTask&, int64_t begin, int64_t end);
    void (*dense_linear)(const Matrix&, const LinearTask&, int64_t begin, int64_t end);
};

extern const Bodies portable_bodies;
#if defined(__x86_64__)
extern const Bodies avx2_bodies, avx512_bodies;
#endif

}  // namespace ace
