// Products of weights of any kind with a few tokens. A new kind of weight is one more entry of PRODUCT_KINDS.
#pragma once

#include "abi.h"
#include "threads.h"

namespace ace {
namespace {

// Where a product puts its outputs: `stride` numbers from token to token.
struct Outputs {
    float* to;
    int64_t stride;
};

// Tokens, fp32, with zeros up to a multiple of 64 inputs; and the same tokens rounded to `bits` bits, for products that
// ask for them.
class Tokens {
public:
    Tokens(const Bodies& bodies, int64_t count, int64_t size, int32_t bits)
        : bodies_(bodies),
          count_(count),
          cols_(size),
          padded_(units(size, DEINTERLEAVED) * DEINTERLEAVED),
          bits_(bits),
          values_(count * padded_) {}

    // The functions that multiply them.
    const Bodies& bodies() const { return bodies_; }

    float* of(int64_t t) { return values_.data() + t * padded_; }
    int64_t count() const { return count_; }
    // Forgets the rounded tokens, after the values have changed.
    void changed() {
        for (Rounded& one : rounded_) one.valid = false;
    }
    // Rounds them as the weight reads them. Weights that read the same tokens may need several forms of them.
    void round_for(const FewBitsWeight& weight, int64_t group) {
        const int64_t block = rounded_block(group);
        const bool deinterleaved = deinterleaved_tokens(weight, block);
        Rounded* one = find(block, deinterleaved);
        if (!one) {
            rounded_.push_back({block, deinterleaved, false, {}, {}});
            one = &rounded_.back();
        }
        if (one->valid) return;
        const Matrix matrix = {values_.data(), count_, cols_, padded_, Element::fp32};
        round_inputs(bodies_, matrix, bits_, block, deinterleaved, padded_, one->tokens, one->scales);
        one->valid = true;
    }
    LinearTask task(const float* bias, const Outputs& out) const {
        return {values_.data(), count_, padded_, bias, out.to, out.stride};
    }
    // After round_for of the same weight.
    FewBitsTask rounded_task(const FewBitsWeight& weight, int64_t group, const float* bias, const Outputs& out) const {
        const int64_t block = rounded_block(group);
        const Rounded& one = *const_cast<Tokens*>(this)->find(block, deinterleaved_tokens(weight, block));
        return {one.tokens.data(), one.scales.data(), count_, padded_,    block, units(cols_, block),
                group,             bias,              out.to, out.stride, bits_};
    }

private:
    struct Rounded {
        int64_t block;
        bool deinterleaved, valid;
        RoundedTokens tokens;
        std::vector<float> scales;
    };

    Rounded* find(int64_t block, bool deinterleaved) {
        for (Rounded& one : rounded_) {
            if (one.block == block && one.deinterleaved == deinterleaved) return &one;
        }
        return nullptr;
    }

    const Bodies& bodies_;
    const int64_t count_, cols_, padded_;
    const int32_t bits_;
    std::vector<float> values_;
    std::vector<Rounded> rounded_;
};

// One kind of weight.
struct ProductKind {
    // What a product with a number of tokens costs, in bytes of memory that take as long to read.
    int64_t (*cost)(const AceProduct&, int64_t n_tokens);
    // Prepares tokens, before any thread reads them.
    void (*prepare)(const AceProduct&, Tokens&);
    // Outputs begin..end of each token.
    void (*multiply)(const AceProduct&, const Tokens&, const Outputs&, int64_t begin, int64_t end);
};

PackedWeight packed_of(const AceProduct& p) {
    return {p.values, p.meta, p.rows, p.cols, p.n, p.m, p.starts, p.n_values, Element(p.element)};
}
FewBitsWeight few_bits_of(const AceProduct& p) {
    return {static_cast<const uint8_t*>(p.values), p.meta, p.absmax, p.rows, p.cols, p.n, p.m, p.bits,
            Element(p.element)};
}
Matrix dense_of(const AceProduct& p) {
    return {const_cast<void*>(p.values), p.rows, p.cols, p.stride, Element(p.element)};
}

// In the order of AceProductKind.
const ProductKind PRODUCT_KINDS[] = {
    {[](const AceProduct& p, int64_t n_tokens) { return cost_of(bytes_of(dense_of(p)), n_tokens); },
     [](const AceProduct&, Tokens&) {},
     [](const AceProduct& p, const Tokens& tokens, const Outputs& out, int64_t begin, int64_t end) {
         tokens.bodies().dense_linear(dense_of(p), tokens.task(p.bias, out), begin, end);
     }},
    {[](const AceProduct& p, int64_t n_tokens) {
         return cost_of(bytes_of({nullptr, 1, p.n_values, 0, Element(p.element)}), n_tokens);
     },
     [](const AceProduct&, Tokens&) {},
     [](const AceProduct& p, const Tokens& tokens, const Outputs& out, int64_t begin, int64_t end) {
         tokens.bodies().nm_linear(packed_of(p), tokens.task(p.bias, out), begin, end);
     }},
    {[](const AceProduct& p, int64_t n_tokens) { return cost_of(few_bits_of(p), n_tokens); },
     [](const AceProduct& p, Tokens& tokens) { tokens.round_for(few_bits_of(p), p.group); },
     [](const AceProduct& p, const Tokens& tokens, const Outputs& out, int64_t begin, int64_t end) {
         const FewBitsWeight weight = few_bits_of(p);
         tokens.bodies().few_bits_linear(weight, tokens.rounded_task(weight, p.group, p.bias, out), begin, end);
     }},
};

const ProductKind& kind_of(const AceProduct& p) { return PRODUCT_KINDS[p.kind]; }

}  // namespace
}  // namespace ace
