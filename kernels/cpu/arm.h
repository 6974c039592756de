// ARM's extensions of NEON: whether this compiler builds them, and whether this processor has them. NEON itself is part
// of 64-bit ARM.
#pragma once

#if defined(__aarch64__) && !defined(__clang__)
#define ACE_ARM_EXTENSIONS (__GNUC__ >= 10)
#elif defined(__aarch64__) && defined(__apple_build_version__)
#define ACE_ARM_EXTENSIONS (__clang_major__ >= 15)
#elif defined(__aarch64__)
#define ACE_ARM_EXTENSIONS (__clang_major__ >= 16)
#else
#define ACE_ARM_EXTENSIONS 0
#endif

namespace ace {

// Products of four pairs of 8-bit integers per lane (FEAT_DotProd).
bool has_dot_product();

// Products of small bf16 matrices (FEAT_BF16).
bool has_bf16_matrices();

}  // namespace ace
