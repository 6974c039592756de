#if defined(__x86_64__)

#include "tasks.h"

#include <cstring>
#include <immintrin.h>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#define ACE_WIDTH 8
#define ACE_ISA "avx2"
#define ACE_BODIES avx2_bodies
#include "bodies.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
