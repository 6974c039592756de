// The operations that differ if the processor has dot products and expanding moves of bytes (AVX-512 VNNI and VBMI2):
// those of quantized weights, and those of other packed weights whose pattern is not 2:4.
#pragma once

#include "tasks.h"

namespace ace {

#if defined(__x86_64__)
void round_tokens_vnni(const Matrix& matrix, int64_t block, bool deinterleaved, int64_t padded, int16_t* out,
                       float* scales);
void few_bits_linear_vnni(const FewBitsWeight& weight, const FewBitsTask& task, int64_t begin, int64_t end);
void packed_linear_vnni(const PackedWeight& weight, const LinearTask& task, int64_t begin, int64_t end);
#endif

}  // namespace ace
