/* The C ABI of the CPU library: every function that Python calls, in plain C types. Nothing else states it: the C++
 * sources include this file, so the compiler checks their definitions, and kernels/cpu_abi.py reads the signatures for
 * ctypes from it.
 *
 * A matrix has contiguous rows; `stride` is the number of elements from row to row. `element` is the type of its
 * elements: 0 for fp32, 1 for fp16, 2 for bf16. `threads` is the largest number of threads to use. The functions do not
 * check their arguments, except where a value of AceFailure says so. They return 0 or a value of AceFailure, unless
 * their comment says otherwise.
 */
#ifndef ACE_ABI_H
#define ACE_ABI_H

#include <stdint.h>

#define ACE_EXPORT __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Out of memory, or the argument that is out of range; then nothing was written. */
enum AceFailure {
    ACE_OUT_OF_MEMORY = 1,
    ACE_BAD_ROW = 2,
    ACE_BAD_COL = 3,
    ACE_BAD_SCALE = 4,
    ACE_BAD_COUPLING = 5,
    ACE_BAD_GAINS = 6
};

/* How the weight of a product is stored. */
enum AceProductKind {
    ACE_DENSE = 0,
    ACE_PACKED = 1,
    ACE_FEW_BITS = 2
};

/* y = x W^T + b for a weight [rows, cols]. Fields that the kind does not use are 0.
 *
 * ACE_DENSE: `values` has rows of `stride` elements. ACE_PACKED: `n_values` values as in ace_nm_linear or, if `starts`
 * is not null, as in ace_rows_linear. ACE_FEW_BITS: as in ace_few_bits_linear, with absmax of type `element`. */
struct AceProduct {
    int32_t kind;
    int32_t element;
    int32_t n;
    int32_t m;
    int32_t bits;
    int64_t rows;
    int64_t cols;
    int64_t stride;
    int64_t n_values;
    int64_t group;
    const void* values;
    const uint32_t* meta;
    const void* absmax;
    const int64_t* starts;
    const float* bias;
};

/* Positions whose keys lie side by side in a cache. */
enum AceCacheLayout { ACE_CACHE_LANES = 16 };

/* A block of a decoder: norm, attention and residual, norm, gated feed-forward and residual.
 *
 * `inputs` give queries, keys and values, in this order, from one weight or several; `gates` give the gates, then what
 * they multiply. `query_norm` and `key_norm`, [head_size], are null if the block has none. */
struct AceBlock {
    const float* attention_norm;
    const float* feed_norm;
    const float* query_norm;
    const float* key_norm;
    const struct AceProduct* inputs;
    const struct AceProduct* output;
    const struct AceProduct* gates;
    const struct AceProduct* down;
    int64_t n_inputs;
    int64_t n_gates;
};

/* A decoder: its blocks, a last norm and the head. `activation`: 0 for silu, 1 for gelu, 2 for gelu by tanh. */
struct AceDecoder {
    const struct AceBlock* blocks;
    const struct AceProduct* head;
    const float* norm;
    int64_t n_blocks;
    int64_t hidden;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_size;
    int64_t rotary_size;
    int64_t intermediate;
    float eps;
    float scaling;
    int32_t activation;
};

/* The cache of a text, fp32: for each block `values` [kv_heads, capacity, head_size] and `keys` [kv_heads,
 * capacity / 16, head_size, 16]. `capacity`, a multiple of 16, is the number of positions for which there is room, and
 * `position` that of the next token. `cosines` and `sines` are [positions, rotary_size]. */
struct AceCache {
    float* keys;
    float* values;
    const float* cosines;
    const float* sines;
    int64_t capacity;
    int64_t position;
};

/* The name of the instruction set in use. */
ACE_EXPORT const char* ace_isa(void);

/* The digest of the sources of this build, as kernels/cpu_sources.py computes it. */
ACE_EXPORT const char* ace_sources(void);

/* Selects another instruction set; returns 1 if the name is unknown or the processor does not support it. */
ACE_EXPORT int ace_use_isa(const char* name);

/* The bits to which products with quantized weights round their inputs: 30 and a sign, or 8 in all. */
ACE_EXPORT int32_t ace_input_bits(void);

/* Selects 30 or 8; returns 1 for other numbers. A call that runs in another thread keeps the number it began with. */
ACE_EXPORT int ace_use_input_bits(int32_t bits);

/* Returns the number of threads, at most `most`, for a call that reads and writes `bytes` in `n_units` units of work. */
ACE_EXPORT int ace_threads_for(int64_t bytes, int64_t n_units, int32_t most);

/* Requests huge pages for a large output before it is written: its page faults can cost more than its computation. */
ACE_EXPORT int ace_prefer_huge_pages(void* data, int64_t bytes);

/* The score is |w|^power * (row_i + col_j) * scale_j * coupling_ij; null factors are left out. The factors are checked
 * unless `checked`. `output`: 0 prunes the weight in place; 1 writes bool [rows, cols] and 2 writes bits
 * [rows, ceil(cols / 8)] to `delivered`. Groups of m lie along the rows, or along the columns if `along_out`. */
ACE_EXPORT int ace_select_nm(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                             const float* row, const float* col, const float* scale, const float* coupling,
                             int32_t power, int32_t checked, int32_t output, void* delivered, int32_t n, int32_t m,
                             int32_t along_out, int32_t threads);

/* Score and output as in ace_select_nm. Keeps k weights of each row, or of the whole layer. */
ACE_EXPORT int ace_select_rows(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                               const float* row, const float* col, const float* scale, const float* coupling,
                               int32_t power, int32_t checked, int32_t output, void* delivered, int64_t k,
                               int32_t whole_layer, int32_t threads);

/* Row and column sums or their inverses and, if `scale` is not null, the column scale. `found` becomes 1 if one of
 * these is NaN or infinite, or if the scale is negative, else 0. */
ACE_EXPORT int ace_weight_sums(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                               float* row_sums, float* col_sums, int32_t inverse, const double* square,
                               double inverse_divisor, const float* base, const float* factor, int32_t sign,
                               int32_t quarters, float* scale, int32_t* found, int32_t threads);

/* `found` becomes 1 if the scale contains NaN, infinity or a negative number, else 0. */
ACE_EXPORT int ace_column_scale(int64_t cols, const double* square, double inverse_divisor, const float* base,
                                const float* factor, int32_t sign, int32_t quarters, float* scale,
                                int32_t* found);

/* `norm`: 0 for max_layer, 1 for max_sequence, 2 for channel, 3 for frobenius. */
ACE_EXPORT int ace_variance_factor(const float* square, int64_t n_sequences, int64_t channels, int32_t norm,
                                   float power, float eps, float* factor, int32_t threads);

/* Logits, wanted logits and gradient have the same element type; `loss` has one entry per row. */
ACE_EXPORT int ace_divergence(void* logits, int64_t rows, int64_t cols, int64_t stride, int32_t element, void* wanted,
                              int64_t wanted_stride, void* gradient, int64_t gradient_stride, float* loss,
                              int32_t threads);

/* `size` values with two moments each; `rounded` (fp32 or bf16) and `factor` may be null. */
ACE_EXPORT int ace_adamw(float* values, float* first, float* second, int64_t size, const void* gradient,
                         int32_t gradient_element, void* rounded, int32_t rounded_element, const float* factor,
                         float rate, float gain_first, float gain_second, float unbias, float eps, int32_t zeros_stay,
                         int32_t threads);

/* `norms` has one entry per row. */
ACE_EXPORT int ace_token_norms(void* outputs, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                               float* norms, int32_t threads);

/* `finite` becomes 0 if an element is NaN or infinite or, for fp32 with `not_below_zero`, negative; else 1. */
ACE_EXPORT int ace_all_finite(const void* data, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                              int32_t not_below_zero, int32_t threads, int32_t* finite);

/* `valid` is null or has one byte per token; `count` has one number per sequence. */
ACE_EXPORT int ace_moments(const void* tokens, int64_t n_sequences, int64_t length, int64_t channels,
                           int64_t sequence_stride, int64_t token_stride, int32_t element, const uint8_t* valid,
                           double* total, double* deviation, float* sequence_square, int64_t* count, int32_t threads);

/* `weights` is [n_layers, n_tokens], `out` [n_layers, channels]. */
ACE_EXPORT int ace_weighted_squares(void* tokens, int64_t n_tokens, int64_t channels, int64_t stride, int32_t element,
                                    const float* weights, int64_t n_layers, float* out, int32_t threads);

/* `candidates` is [n_pools, rows, n_candidates], `thresholds` [n_pools, rows, groups] and `gains`
 * [n_pools, groups, n_candidates]. */
ACE_EXPORT int ace_join_gains(const float* candidates, const float* thresholds, int64_t n_pools, int64_t rows,
                              int64_t groups, int64_t n_candidates, float* gains, int32_t threads);

/* `gains` is [n_pools, size, size]: of each group (row) with each candidate; `joins` is [n_pools, size]. */
ACE_EXPORT int ace_assign(const float* gains, int64_t n_pools, int64_t size, int32_t* joins, int32_t threads);

/* Returns 1 if ace_gram_product can run on this processor with the instruction set in use, else 0. */
ACE_EXPORT int ace_has_gram_product(void);

/* Adds the products of bf16 tokens to a symmetric matrix, fp32 [width, width]. */
ACE_EXPORT int ace_gram_product(const uint16_t* tokens, int64_t n_tokens, int64_t width, int64_t stride, float* gram,
                                int32_t threads);

/* Score as in ace_select_nm, used if `by_score`. `whole` becomes 0 if, without scores, a group has more than n
 * non-zeros, else 1. */
ACE_EXPORT int ace_pack_nm(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element, const float* row,
                           const float* col, const float* scale, const float* coupling, int32_t power,
                           int32_t checked, void* values, uint32_t* meta, int32_t by_score, int32_t n, int32_t m,
                           int32_t threads, int32_t* whole);

/* `meta` gets a bit for each non-zero, [rows, ceil(cols / 32)]; `starts` [rows + 1] gets the number of non-zeros before
 * each row, and of all. */
ACE_EXPORT int ace_kept_bits(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element, uint32_t* meta,
                             int64_t* starts, int32_t threads);

/* `meta` and `starts` are those of ace_kept_bits for the same weight; `values` is [starts[rows]]. */
ACE_EXPORT int ace_pack_rows(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                             const uint32_t* meta, const int64_t* starts, void* values, int32_t threads);

/* `bytes`: size of an element, 1, 2 or 4. */
ACE_EXPORT int ace_unpack_nm(const void* values, const uint32_t* meta, int64_t rows, int64_t cols, int32_t n,
                             int32_t m, int32_t bytes, void* weight, int32_t threads);

/* Row i has the values from starts[i] on, of `n_values`. Any starts and metadata are safe. */
ACE_EXPORT int ace_unpack_rows(const void* values, int64_t n_values, const uint32_t* meta, const int64_t* starts,
                               int64_t rows, int64_t cols, int32_t bytes, void* weight, int32_t threads);

/* `bias` may be null; `out` is fp32 [n_tokens, rows]. */
ACE_EXPORT int ace_nm_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                             const void* values, const uint32_t* meta, int64_t rows, int32_t n, int32_t m,
                             int32_t weight_element, const float* bias, float* out, int32_t threads);

/* The same for a weight with row starts, as in ace_unpack_rows. */
ACE_EXPORT int ace_rows_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                               const void* values, int64_t n_values, const uint32_t* meta, const int64_t* starts,
                               int64_t rows, int32_t weight_element, const float* bias, float* out, int32_t threads);

/* Returns 1 if ace_expanded_linear can run on this processor with the instruction set in use, else 0. */
ACE_EXPORT int ace_has_expanded_product(void);

/* Returns 1 if ace_expanded_linear multiplies by tiles (AMX), else 0. */
ACE_EXPORT int ace_has_tiles(void);

/* Lets ace_expanded_linear use tiles, or not; returns 1 if the processor or the system has none. */
ACE_EXPORT int ace_use_tiles(int32_t tiles);

/* bf16 tokens and weights, bf16 outputs [n_tokens, rows]. `starts` is null for a weight n:m, else as in ace_unpack_rows;
 * n and m are unused then. `bias` may be null. The last bits depend on whether tiles are used. */
ACE_EXPORT int ace_expanded_linear(const uint16_t* tokens, int64_t n_tokens, int64_t cols, int64_t stride,
                                   const void* values, int64_t n_values, const uint32_t* meta, const int64_t* starts,
                                   int64_t rows, int32_t n, int32_t m, const float* bias, uint16_t* out,
                                   int32_t threads);

/* The same for a quantized weight, as in ace_few_bits_linear, with absmax in bf16. It is rounded to bf16, as if it were
 * unpacked. */
ACE_EXPORT int ace_expanded_few_bits_linear(const uint16_t* tokens, int64_t n_tokens, int64_t cols, int64_t stride,
                                            const void* values, const uint32_t* meta, const uint16_t* absmax,
                                            int64_t rows, int32_t n, int32_t m, int32_t bits, int64_t group,
                                            const float* bias, uint16_t* out, int32_t threads);

/* Quantized weights: `values` has `bits` (8 or 4) bits per kept weight, `absmax` is [rows, ceil(cols / group)] of type
 * `absmax_element`, and `group` is a multiple of 32. `meta` is null, with n = m = 1, if every input has a value; each
 * row begins with a whole byte. `bias` may be null; `out` is fp32 [n_tokens, rows]. */
ACE_EXPORT int ace_few_bits_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                                   const void* values, const uint32_t* meta, const void* absmax, int64_t rows,
                                   int32_t n, int32_t m, int32_t bits, int64_t group, int32_t absmax_element,
                                   const float* bias, float* out, int32_t threads);

/* The same loop over a dense weight, as a baseline. */
ACE_EXPORT int ace_dense_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                                void* weight, int64_t rows, int64_t weight_stride, int32_t weight_element,
                                const float* bias, float* out, int32_t threads);

/* One token of each of `n_texts` texts; each weight is read once for all of them. `hidden` is fp32 [n_texts, hidden], as
 * the embedding gives it. The position of each text is below its capacity; keys and values are added to the caches, which
 * must differ. `logits` is [n_texts, rows of the head], and the same as if each text were alone. `seconds` gets the time
 * of the products, of the attention and of everything. */
ACE_EXPORT int ace_decode_step(const struct AceDecoder* decoder, const struct AceCache* caches, int64_t n_texts,
                               const float* hidden, float* logits, double* seconds, int32_t threads);

/* Rounds `values` [rows, cols] to `bits` (8 or 4) bits, with a scale of type `scale_element` for every `group` of a row;
 * `into`, fp32 or bf16, may be `values`. */
ACE_EXPORT int ace_round_groups(const float* values, int64_t rows, int64_t cols, int32_t bits, int64_t group,
                                int32_t scale_element, void* into, int32_t into_element, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
