#if defined(__x86_64__)

#include "tasks.h"

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

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
