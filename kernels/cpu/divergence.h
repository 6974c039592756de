// KL divergence of next-token distributions, row by row of logits. Sums are fp32 within strips, fp64 across strips.
#pragma once

#include "elements.h"

namespace ace {
namespace {

constexpr int64_t LOGIT_STRIP = 1024;
// Below this exponent, e^x is not a normal fp32 number.
constexpr float LEAST_EXPONENT = -87.3f;

// e^x for x <= 0, as 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes). 0 below LEAST_EXPONENT, NaN for NaN.
ACE_INLINE Floats exp_of_negative(const Floats& x) {
    constexpr float ROUNDS = 0x1.8p23f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
    constexpr float TERMS[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const Floats shifted = x * Floats::all(1.44269504f) + Floats::all(ROUNDS);
    const Floats n = shifted - Floats::all(ROUNDS);
    const Floats rest = x - n * Floats::all(LN2_HIGH) - n * Floats::all(LN2_LOW);
    Floats sum = Floats::all(TERMS[0]);
    for (int k = 1; k < 6; ++k) sum = sum * rest + Floats::all(TERMS[k]);
    Ints power = bits_of(shifted) << 23;
    for (int p = 0; p < PARTS; ++p) power.part[p] += 0x3f800000;
    const Floats value = (sum * rest * rest + rest + Floats::all(1.0f)) * floats_of(power);
    Ints bits = bits_of(value);
    for (int p = 0; p < PARTS; ++p) bits.part[p] &= ~(NativeInts)(x.part[p] < LEAST_EXPONENT);
    return floats_of(bits);
}

// Logits past the end of a row are -inf, so their probability is 0.
template <typename E>
ACE_INLINE Floats load_logits(const typename E::Stored* from, int lanes) {
    const Floats logits = E::load(from, lanes);
    if (lanes == LANES) return logits;
    float lane[LANES];
    store(lane, logits);
    for (int k = lanes; k < LANES; ++k) lane[k] = -__builtin_inff();
    return load(lane);
}

// Normalizers of one row: its softmax is e^(x - largest) / total.
struct Softmax {
    float largest;
    double total;
};

// Calls part(from, count) for every strip of a row and returns the sum of the results.
template <typename Part>
ACE_INLINE double over_strips(int64_t cols, Part part) {
    double total = 0;
    for (int64_t from = 0; from < cols; from += LOGIT_STRIP) {
        total += sum(part(from, int(cols - from < LOGIT_STRIP ? cols - from : LOGIT_STRIP)));
    }
    return total;
}

template <typename E>
ACE_INLINE Softmax softmax_of(const typename E::Stored* row, int64_t cols) {
    Floats most = Floats::all(-__builtin_inff());
    int64_t j = 0;
    for (; j + LANES <= cols; j += LANES) most = max(most, E::load(row + j));
    if (j < cols) most = max(most, load_logits<E>(row + j, int(cols - j)));
    const float highest = largest(most, -__builtin_inff());
    const double total = over_strips(cols, [&](int64_t from, int count) ACE_INLINED {
        Floats part = Floats::all(0.0f);
        each_vector(count, [&](int k, int lanes) ACE_INLINED {
            part = part + exp_of_negative(load_logits<E>(row + from + k, lanes) - Floats::all(highest));
        });
        return part;
    });
    return {highest, total};
}

template <typename E>
ACE_INLINE void divergence_of_rows(const DivergenceTask& task, int64_t begin, int64_t end) {
    using Stored = typename E::Stored;
    const auto row_of = [](const Matrix& m, int64_t t) { return static_cast<Stored*>(m.data) + t * m.stride; };
    const int64_t cols = task.logits.cols;
    for (int64_t t = begin; t < end; ++t) {
        const Stored *logits = row_of(task.logits, t), *wanted = row_of(task.wanted, t);
        Stored* gradient = row_of(task.gradient, t);
        const Softmax got = softmax_of<E>(logits, cols), aim = softmax_of<E>(wanted, cols);
        const Floats of_got = Floats::all(float(1 / got.total)), of_aim = Floats::all(float(1 / aim.total));
        // log p - log q is `apart` plus the difference of the logits, each relative to its row's largest logit.
        const Floats apart = Floats::all(float(__builtin_log(got.total) - __builtin_log(aim.total)));
        task.loss[t] = float(over_strips(cols, [&](int64_t from, int count) ACE_INLINED {
            Floats part = Floats::all(0.0f);
            each_vector(count, [&](int k, int lanes) ACE_INLINED {
                const Floats x = load_logits<E>(logits + from + k, lanes) - Floats::all(got.largest);
                const Floats y = load_logits<E>(wanted + from + k, lanes) - Floats::all(aim.largest);
                const Floats q = exp_of_negative(x) * of_got, p = exp_of_negative(y) * of_aim;
                part = part + unless_zero(p, p * ((y - x) + apart));
                E::keep(gradient + from + k, q - p, lanes);
            });
            return part;
        }));
    }
}

// Rows begin..end of fp32 or bf16 logits. Entries with a target probability of 0 add nothing to the loss.
inline void divergence(const DivergenceTask& task, int64_t begin, int64_t end) {
    if (task.logits.element == Element::bf16) divergence_of_rows<Bf16>(task, begin, end);
    else divergence_of_rows<Fp32>(task, begin, end);
}

}  // namespace
}  // namespace ace
