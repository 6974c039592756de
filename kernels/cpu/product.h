// Products of weights of any kind with one token. A new kind of weight is one more entry of PRODUCT_KINDS.
#pragma once

#include "abi.h"
#include "threads.h"

namespace ace {
namespace {

// One token, fp32, with zeros up to a multiple of 32 inputs; and the same token rounded to `bits` bits, for products
// that ask for it.
class Token {
public:
    Token(int64_t size, int32_t bits) : cols_(size), bits_(bits), values_(units(size, 32) * 32) {}

    float* data() { return values_.data(); }
    // Forgets the rounded token, after the values have changed.
    void changed() { block_ = 0; }
    void round(int64_t block) {
        if (block == block_) return;
        round_inputs({values_.data(), 1, cols_, cols_, Element::fp32}, bits_, block, padded(), rounded_, scales_);
        block_ = block;
    }
    LinearTask task(const float* bias, float* out) const { return {values_.data(), 1, padded(), bias, out}; }
    FewBitsTask rounded_task(int64_t block, int64_t group, const float* bias, float* out) const {
        return {rounded_.data(), scales_.data(), 1,    padded(), block, units(cols_, block),
                group,           bias,           out,  bits_};
    }

private:
    int64_t padded() const { return int64_t(values_.size()); }

    const int64_t cols_;
    const int32_t bits_;
    int64_t block_ = 0;
    std::vector<float> values_;
    std::vector<int16_t> rounded_;
    std::vector<float> scales_;
};

// One kind of weight.
struct ProductKind {
    // What a product costs, in bytes of memory that take as long to read.
    int64_t (*cost)(const AceProduct&);
    // Prepares a token, before any thread reads it.
    void (*prepare)(const AceProduct&, Token&);
    // Outputs begin..end, to out[begin..end].
    void (*multiply)(const AceProduct&, const Token&, float* out, int64_t begin, int64_t end);
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
    {[](const AceProduct& p) { return bytes_of(dense_of(p)); },
     [](const AceProduct&, Token&) {},
     [](const AceProduct& p, const Token& token, float* out, int64_t begin, int64_t end) {
         bodies->dense_linear(dense_of(p), token.task(p.bias, out), begin, end);
     }},
    {[](const AceProduct& p) { return bytes_of({nullptr, 1, p.n_values, 0, Element(p.element)}); },
     [](const AceProduct&, Token&) {},
     [](const AceProduct& p, const Token& token, float* out, int64_t begin, int64_t end) {
         bodies->nm_linear(packed_of(p), token.task(p.bias, out), begin, end);
     }},
    // Spreading the weights and multiplying takes as long as reading about three times their bytes.
    {[](const AceProduct& p) {
         const int64_t places = p.meta ? p.rows * p.cols / 8 : 0;
         return 3 * (p.rows * p.cols * p.n / p.m * p.bits / 8 + places);
     },
     [](const AceProduct& p, Token& token) { token.round(rounded_block(p.group)); },
     [](const AceProduct& p, const Token& token, float* out, int64_t begin, int64_t end) {
         const FewBitsTask task = token.rounded_task(rounded_block(p.group), p.group, p.bias, out);
         bodies->few_bits_linear(few_bits_of(p), task, begin, end);
     }},
};

const ProductKind& kind_of(const AceProduct& p) { return PRODUCT_KINDS[p.kind]; }

}  // namespace
}  // namespace ace
