// The operations that differ if the processor has dot products of 8-bit integers: those of quantized weights.
#pragma once

#include "arm.h"
#include "tasks.h"

namespace ace {

#if ACE_ARM_EXTENSIONS
void round_tokens_dotprod(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                          float* scales);
void few_bits_linear_dotprod(const FewBitsWeight& weight, const FewBitsTask& task, int64_t begin, int64_t end);
#endif

}  // namespace ace
