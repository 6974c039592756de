#if defined(__x86_64__)

#include "avx512_vnni.h"

#include <cstring>
#include <immintrin.h>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define ACE_WIDTH 16
#define ACE_ISA "avx512"
#define ACE_BODIES avx512_bodies
#include "bodies.h"

namespace ace {
namespace {

constexpr Bodies with_vnni(Bodies bodies) {
    bodies.name = "avx512_vnni";
    bodies.round_tokens = round_tokens_vnni;
    bodies.few_bits_linear = few_bits_linear_vnni;
    bodies.nm_linear = packed_linear_vnni;
    return bodies;
}

}  // namespace

const Bodies avx512_vnni_bodies = with_vnni(avx512_bodies);

}  // namespace ace

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
