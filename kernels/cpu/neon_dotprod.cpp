#include "neon_dotprod.h"

#if ACE_ARM_EXTENSIONS

#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define ACE_WIDTH 4
#define ACE_NEON 1
#define ACE_DOTPROD 1
#include "few_bits.h"

namespace ace {

void round_tokens_dotprod(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                          float* scales) {
    round_tokens(matrix, block, deinterleaved, padded, out, scales);
}

void few_bits_linear_dotprod(const FewBitsWeight& weight, const FewBitsTask& task, int64_t begin, int64_t end) {
    few_bits_linear(weight, task, begin, end);
}

}  // namespace ace

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
