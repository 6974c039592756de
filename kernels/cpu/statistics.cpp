// Operations that sum over tokens, sequences or a whole weight, and those of a recovery step; abi.h declares what this
// file exports.

#include "abi.h"
#include "gram_product.h"
#include "term_range.h"
#include "threads.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

namespace ace {
namespace {

// scale_j = (base_j sqrt(square_j * inverse) factor_j^sign)^(quarters / 4), for 2, 3 or 4 quarters; null factors are
// left out.
struct ColumnScale {
    const double* square;
    double inverse;
    const float *base, *factor;
    int32_t sign, quarters;
};

// Computes the scale; returns whether all of it is finite and not negative.
bool scale_columns(const ColumnScale& of, int64_t cols, float* scale) {
    for (int64_t j = 0; j < cols; ++j) scale[j] = of.base ? of.base[j] : 1;
    if (of.square) {
        for (int64_t j = 0; j < cols; ++j) scale[j] *= sqrtf(float(of.square[j] * of.inverse));
    }
    if (of.factor && of.sign > 0) {
        for (int64_t j = 0; j < cols; ++j) scale[j] *= of.factor[j];
    } else if (of.factor) {
        for (int64_t j = 0; j < cols; ++j) scale[j] /= of.factor[j];
    }
    if (of.quarters < 4) {
        for (int64_t j = 0; j < cols; ++j) {
            const float root = sqrtf(scale[j]);
            scale[j] = of.quarters == 2 ? root : root * sqrtf(root);
        }
    }
    return in_range(scale, cols);
}

// Inverts sums. The inverse of 0 is finite; the inverse of a sum that is not finite is NaN.
void invert(float* sums, int64_t count) {
    constexpr float SMALLEST = std::numeric_limits<float>::min();
    // The second summand is 0 for finite sums and NaN for others.
    for (int64_t k = 0; k < count; ++k) sums[k] = 1 / (sums[k] > SMALLEST ? sums[k] : SMALLEST) + (sums[k] - sums[k]);
}

}  // namespace
}  // namespace ace

using namespace ace;

extern "C" {

int ace_weight_sums(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                    float* row_sums, float* col_sums, int32_t inverse, const double* square,
                    double inverse_divisor, const float* base, const float* factor, int32_t sign,
                    int32_t quarters, float* scale, int32_t* found, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Matrix w = {weight, rows, cols, stride, Element(element)};
    return guarded([&] {
        const int64_t blocks = units(rows, SUM_ROWS);
        std::vector<float> block_cols(blocks * cols);
        deal(blocks, threads_for(bytes_of(w), blocks, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t b = begin; b < end; ++b) bodies->weight_sums(w, b, row_sums, block_cols.data() + b * cols);
        });
        std::vector<double> totals(cols);
        for (int64_t b = 0; b < blocks; ++b) {
            for (int64_t j = 0; j < cols; ++j) totals[j] += block_cols[b * cols + j];
        }
        for (int64_t j = 0; j < cols; ++j) col_sums[j] = float(totals[j]);
        bool finite = bodies->all_finite(Element::fp32, row_sums, rows);
        finite &= bodies->all_finite(Element::fp32, col_sums, cols);
        if (inverse) {
            invert(row_sums, rows);
            invert(col_sums, cols);
        }
        if (scale) finite &= scale_columns({square, inverse_divisor, base, factor, sign, quarters}, cols, scale);
        *found = !finite;
    });
}

int ace_column_scale(int64_t cols, const double* square, double inverse_divisor, const float* base,
                     const float* factor, int32_t sign, int32_t quarters, float* scale, int32_t* found) {
    *found = !scale_columns({square, inverse_divisor, base, factor, sign, quarters}, cols, scale);
    return 0;
}

int ace_variance_factor(const float* square, int64_t n_sequences, int64_t channels, int32_t norm,
                        float power, float eps, float* factor, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    return guarded([&] {
        const auto kind = VarianceNorm(norm);
        std::vector<float> levels(n_sequences);
        const float least = std::numeric_limits<float>::min() / eps;
        const VarianceTask task = {square, n_sequences, channels, kind, power, eps, least,
                                   kind == VarianceNorm::channel ? nullptr : levels.data(), factor};
        const int64_t bytes = n_sequences * channels * int64_t(sizeof(float)), strips = units(channels, 16);
        if (task.levels) {
            deal(n_sequences, threads_for(bytes, n_sequences, threads),
                 [&](int64_t begin, int64_t end, int) { bodies->variance_levels(task, begin, end); });
        }
        if (kind == VarianceNorm::max_layer) {
            const float largest = n_sequences ? *std::max_element(levels.begin(), levels.end()) : 0;
            std::fill(levels.begin(), levels.end(), largest);
        }
        deal(strips, threads_for(bytes, strips, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t strip = begin; strip < end; ++strip) bodies->variance_factor(task, strip);
        });
    });
}

int ace_divergence(void* logits, int64_t rows, int64_t cols, int64_t stride, int32_t element, void* wanted,
                   int64_t wanted_stride, void* gradient, int64_t gradient_stride, float* loss,
                   int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Element kind = Element(element);
    const DivergenceTask task = {{logits, rows, cols, stride, kind},
                                 {wanted, rows, cols, wanted_stride, kind},
                                 {gradient, rows, cols, gradient_stride, kind},
                                 loss};
    return guarded([&] {
        deal(rows, threads_for(bytes_of(task.logits), rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies->divergence(task, begin, end); });
    });
}

int ace_adamw(float* values, float* first, float* second, int64_t size, const void* gradient,
              int32_t gradient_element, void* rounded, int32_t rounded_element, const float* factor,
              float rate, float gain_first, float gain_second, float unbias, float eps, int32_t zeros_stay,
              int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const AdamWTask task = {values, first, second, gradient, rounded, factor, Element(gradient_element),
                            Element(rounded_element), rate, gain_first, gain_second, unbias, eps, zeros_stay != 0};
    return guarded([&] {
        constexpr int64_t UNIT = 1 << 14, BYTES = 28;
        const int64_t n_units = units(size, UNIT);
        deal(n_units, threads_for(size * BYTES, n_units, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t from = begin * UNIT; from < std::min(end * UNIT, size); from += UNIT) {
                bodies->adamw(task, from, int(std::min(UNIT, size - from)));
            }
        });
    });
}

int ace_round_groups(const float* values, int64_t rows, int64_t cols, int32_t bits, int64_t group,
                     int32_t scale_element, void* into, int32_t into_element, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const RoundTask task = {values, cols, group, bits, Element(scale_element), Element(into_element), into};
    return guarded([&] {
        deal(rows, threads_for(rows * cols * int64_t(sizeof(float)), rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies->round_groups(task, begin, end); });
    });
}

int ace_token_norms(void* outputs, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                    float* norms, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Matrix a = {outputs, rows, cols, stride, Element(element)};
    return guarded([&] {
        deal(rows, threads_for(bytes_of(a), rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies->token_norms(a, begin, end, norms); });
    });
}

int ace_all_finite(const void* data, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                   int32_t not_below_zero, int32_t threads, int32_t* finite) {
    const Bodies* const bodies = bodies_in_use;
    const Matrix m = {const_cast<void*>(data), rows, cols, stride, Element(element)};
    return guarded([&] {
        constexpr int64_t UNIT = 1 << 16;
        const int64_t per_row = units(cols, UNIT), size = m.element == Element::fp32 ? 4 : 2;
        std::atomic<bool> so_far{true};
        deal(rows * per_row, threads_for(bytes_of(m), rows * per_row, threads),
             [&](int64_t begin, int64_t end, int) {
                 for (int64_t unit = begin; unit < end && so_far.load(std::memory_order_relaxed); ++unit) {
                     const int64_t i = unit / per_row, from = unit % per_row * UNIT;
                     const char* first = static_cast<const char*>(data) + (i * stride + from) * size;
                     const int64_t count = std::min(UNIT, cols - from);
                     const bool good = not_below_zero ? in_range(reinterpret_cast<const float*>(first), count)
                                                      : bodies->all_finite(m.element, first, count);
                     if (!good) so_far = false;
                 }
             });
        *finite = so_far;
    });
}

int ace_moments(const void* tokens, int64_t n_sequences, int64_t length, int64_t channels,
                int64_t sequence_stride, int64_t token_stride, int32_t element, const uint8_t* valid,
                double* total, double* deviation, float* sequence_square, int64_t* count,
                int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    return guarded([&] {
        const int64_t size = Element(element) == Element::fp32 ? 4 : 2;
        std::vector<const void*> rows;
        std::vector<int64_t> sequences;
        rows.reserve(n_sequences * length + TOKEN_TILE);
        sequences.reserve(n_sequences * length);
        for (int64_t s = 0; s < n_sequences; ++s) {
            count[s] = 0;
            for (int64_t t = 0; t < length; ++t) {
                if (valid && !valid[s * length + t]) continue;
                rows.push_back(static_cast<const char*>(tokens) + (s * sequence_stride + t * token_stride) * size);
                sequences.push_back(s);
                ++count[s];
            }
            if (count[s] == 0) std::fill_n(sequence_square + s * channels, channels, 0.0f);
        }
        if (channels == 0) return;
        const int64_t n_tokens = int64_t(rows.size());
        rows.insert(rows.end(), TOKEN_TILE, tokens);
        const int most_threads = threads_for(n_tokens * channels * size, units(channels, 16), threads);
        const int64_t shares = std::max<int64_t>(most_threads, units(channels, MOST_CHANNELS));
        const int64_t strip = units(units(channels, shares), 16) * 16, strips = units(channels, strip);
        const MomentsTask task = {rows.data(),      sequences.data(), n_tokens,  channels,       strip,
                                  Element(element), total,            deviation, sequence_square};
        deal(strips, int(std::min<int64_t>(most_threads, strips)), [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) bodies->moments(task, unit);
        });
    });
}

int ace_weighted_squares(void* tokens, int64_t n_tokens, int64_t channels, int64_t stride,
                         int32_t element, const float* weights, int64_t n_layers, float* out,
                         int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const SquaresTask task = {{tokens, n_tokens, channels, stride, Element(element)}, weights, n_layers, out};
    return guarded([&] {
        const int64_t strips = units(channels, CHANNEL_STRIP);
        deal(strips, threads_for(bytes_of(task.tokens), strips, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t strip = begin; strip < end; ++strip) bodies->weighted_squares(task, strip);
        });
    });
}

// AVX2 and portable code do not stand for such a processor, even if it is one.
int ace_has_gram_product() {
    const char* const isa = ace_isa();
    return (strncmp(isa, "avx512", 6) == 0 || strncmp(isa, "neon", 4) == 0) && has_bf16_pairs();
}

// Panels are distributed to threads from both ends, because later ones have more rows.
int ace_gram_product(const uint16_t* tokens, int64_t n_tokens, int64_t width, int64_t stride, float* gram,
                     int32_t threads) {
    return guarded([&] {
        const int64_t panels = units(width, GRAM_PANEL);
        // Sixteen products take as long as reading a byte.
        const int shares = threads_for(n_tokens * width * width / 2 / 16, panels, threads);
        std::vector<uint32_t> packed(panels * GRAM_PANEL * std::min(GRAM_PAIRS, 2 * units(n_tokens, 4)));
        const auto each = [&](const auto& work) {
            deal(panels, shares, [&](int64_t begin, int64_t end, int) {
                for (int64_t k = begin; k < end; ++k) work(k % 2 ? panels - 1 - k / 2 : k / 2);
            });
        };
        for (int64_t first = 0; first < n_tokens; first += 2 * GRAM_PAIRS) {
            const int64_t count = std::min(2 * GRAM_PAIRS, n_tokens - first);
            const GramTask task = {tokens + first * stride, count, width, stride, packed.data(), gram};
            each([&](int64_t panel) { pack_gram_panel(task, panel); });
            each([&](int64_t panel) { add_gram_panel(task, panel); });
        }
        each([&](int64_t panel) { mirror_gram_panel(gram, width, panel); });
    });
}

}  // extern "C"
