// Vectors of sixteen lanes for any register width, so results are the same on every instruction set.
// The including file sets ACE_WIDTH, the number of 32-bit lanes per register: 16, 8 or 4. On 64-bit ARM it may set
// ACE_NEON, for NEON's own instructions if the compiler's vector types take several.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#elif ACE_NEON
#include <arm_neon.h>
#endif

#define ACE_INLINED __attribute__((always_inline))
#define ACE_INLINE inline ACE_INLINED
#define ACE_OUTLINED __attribute__((noinline))

namespace ace {
namespace {

constexpr int LANES = 16;
constexpr int WIDTH = ACE_WIDTH;
constexpr int PARTS = LANES / WIDTH;

using NativeFloats = float __attribute__((vector_size(4 * WIDTH)));
using NativeInts = int32_t __attribute__((vector_size(4 * WIDTH)));
using NativeShorts = int16_t __attribute__((vector_size(4 * WIDTH)));
using NativeHalves = uint16_t __attribute__((vector_size(2 * WIDTH)));
using NativeBytes = uint8_t __attribute__((vector_size(WIDTH)));

template <typename Native, typename Scalar>
struct Vector {
    Native part[PARTS];

    static ACE_INLINE Vector all(Scalar value) {
        Vector v;
        for (int p = 0; p < PARTS; ++p) v.part[p] = value - Native{};
        return v;
    }
    friend ACE_INLINE Vector operator+(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] += b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator-(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] -= b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator*(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] *= b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator/(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] /= b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator&(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] &= b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator|(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] |= b.part[p];
        return a;
    }
    friend ACE_INLINE Vector operator>>(Vector a, int bits) {
        for (int p = 0; p < PARTS; ++p) a.part[p] >>= bits;
        return a;
    }
    friend ACE_INLINE Vector operator<<(Vector a, int bits) {
        for (int p = 0; p < PARTS; ++p) a.part[p] <<= bits;
        return a;
    }
    friend ACE_INLINE Vector min(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
        return a;
    }
    friend ACE_INLINE Vector max(Vector a, const Vector& b) {
        for (int p = 0; p < PARTS; ++p) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
        return a;
    }
};

using Floats = Vector<NativeFloats, float>;
using Ints = Vector<NativeInts, int32_t>;

ACE_INLINE Ints bits_of(const Floats& v) {
    Ints bits;
    for (int p = 0; p < PARTS; ++p) bits.part[p] = (NativeInts)v.part[p];
    return bits;
}

ACE_INLINE Floats floats_of(const Ints& v) {
    Floats floats;
    for (int p = 0; p < PARTS; ++p) floats.part[p] = (NativeFloats)v.part[p];
    return floats;
}

ACE_INLINE Floats magnitude(const Floats& v) { return floats_of(bits_of(v) & Ints::all(0x7fffffff)); }

ACE_INLINE Floats square_root(Floats v) {
    for (int p = 0; p < PARTS; ++p) {
#if ACE_WIDTH == 16
        v.part[p] = (NativeFloats)_mm512_maskz_sqrt_ps(0xffff, (__m512)v.part[p]);
#elif ACE_WIDTH == 8
        v.part[p] = (NativeFloats)_mm256_sqrt_ps((__m256)v.part[p]);
#elif ACE_NEON
        v.part[p] = (NativeFloats)vsqrtq_f32((float32x4_t)v.part[p]);
#else
        for (int lane = 0; lane < WIDTH; ++lane) v.part[p][lane] = __builtin_sqrtf(v.part[p][lane]);
#endif
    }
    return v;
}

// 0 if `v` is 0, even if `other` is not finite; else `other`.
ACE_INLINE Floats unless_zero(const Floats& v, const Floats& other) {
    Ints bits = bits_of(other);
    for (int p = 0; p < PARTS; ++p) bits.part[p] &= (NativeInts)(v.part[p] != 0);
    return floats_of(bits);
}

// Loads or stores the first `lanes` of a vector. Other lanes are 0, and their memory is not accessed. Whole vectors are
// copied register by register: one copy of all parts would go through the stack, without store forwarding.
template <typename Loaded, typename Stored>
ACE_INLINE Loaded load_raw(const Stored* from, int lanes) {
    static_assert(sizeof(Loaded) == LANES * sizeof(Stored), "one element a lane");
    Loaded v;
    if (lanes == LANES) {
        for (int p = 0; p < PARTS; ++p) memcpy(&v.part[p], from + p * WIDTH, sizeof v.part[p]);
    } else {
#if ACE_WIDTH == 16
        if constexpr (sizeof(Stored) == 4) {
            const __m512i some = _mm512_maskz_loadu_epi32(uint16_t((1u << lanes) - 1), from);
            memcpy(&v, &some, sizeof v);
            return v;
        } else if constexpr (sizeof(Stored) == 2) {
            const __m256i some = _mm256_maskz_loadu_epi16(uint16_t((1u << lanes) - 1), from);
            memcpy(&v, &some, sizeof v);
            return v;
        }
#endif
        memset(&v, 0, sizeof v);
        memcpy(&v, from, lanes * sizeof(Stored));
    }
    return v;
}

template <typename Stored, typename Kept>
ACE_INLINE void store_raw(Stored* to, const Kept& v, int lanes) {
    static_assert(sizeof(Kept) == LANES * sizeof(Stored), "one element a lane");
    if (lanes == LANES) {
        for (int p = 0; p < PARTS; ++p) memcpy(to + p * WIDTH, &v.part[p], sizeof v.part[p]);
    } else {
        memcpy(to, &v, lanes * sizeof(Stored));
    }
}

ACE_INLINE Ints load(const int32_t* from, int lanes = LANES) { return load_raw<Ints>(from, lanes); }
ACE_INLINE Floats load(const float* from, int lanes = LANES) { return load_raw<Floats>(from, lanes); }
ACE_INLINE void store(int32_t* to, const Ints& v, int lanes = LANES) { store_raw(to, v, lanes); }
ACE_INLINE void store(float* to, const Floats& v, int lanes = LANES) { store_raw(to, v, lanes); }

struct Halves {
    NativeHalves part[PARTS];
};

struct Bytes {
    NativeBytes part[PARTS];
};

ACE_INLINE Ints widen(const Halves& halves) {
    Ints v;
    for (int p = 0; p < PARTS; ++p) {
        // GCC 12 compiles __builtin_convertvector to several instructions here.
#if ACE_WIDTH == 16
        v.part[p] = (NativeInts)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)halves.part[p]);
#elif ACE_WIDTH == 8
        v.part[p] = (NativeInts)_mm256_cvtepu16_epi32((__m128i)halves.part[p]);
#elif ACE_NEON
        v.part[p] = (NativeInts)vmovl_u16((uint16x4_t)halves.part[p]);
#else
        v.part[p] = __builtin_convertvector(halves.part[p], NativeInts);
#endif
    }
    return v;
}

// For lanes that fit in 16 bits, including the sign.
ACE_INLINE Halves narrow(const Ints& v) {
    Halves halves;
    for (int p = 0; p < PARTS; ++p) {
#if ACE_WIDTH == 8
        const __m256i part = (__m256i)v.part[p];
        halves.part[p] =
            (NativeHalves)_mm_packs_epi32(_mm256_castsi256_si128(part), _mm256_extracti128_si256(part, 1));
#elif ACE_NEON
        halves.part[p] = (NativeHalves)vmovn_s32((int32x4_t)v.part[p]);
#else
        halves.part[p] = __builtin_convertvector(v.part[p], NativeHalves);
#endif
    }
    return halves;
}

// For lanes that fit in eight bits.
ACE_INLINE Bytes narrow_to_bytes(const Ints& v) {
    Bytes bytes;
#if ACE_NEON
    const Halves halves = narrow(v);
    const uint8x8_t first = vmovn_u16(vcombine_u16((uint16x4_t)halves.part[0], (uint16x4_t)halves.part[1]));
    const uint8x8_t second = vmovn_u16(vcombine_u16((uint16x4_t)halves.part[2], (uint16x4_t)halves.part[3]));
    vst1q_u8(reinterpret_cast<uint8_t*>(&bytes), vcombine_u8(first, second));
#else
    for (int p = 0; p < PARTS; ++p) bytes.part[p] = __builtin_convertvector(v.part[p], NativeBytes);
#endif
    return bytes;
}

// Stores around the caches if whole registers are aligned: data that is not read soon displaces nothing, and its memory
// is not read first. Call `settle` before another thread reads the data.
ACE_INLINE void stream(float* to, const Floats& v, int lanes) {
#if ACE_WIDTH > 4
    if (lanes == LANES && reinterpret_cast<uintptr_t>(to) % sizeof(v.part[0]) == 0) {
        for (int p = 0; p < PARTS; ++p) {
#if ACE_WIDTH == 16
            _mm512_stream_ps(to + p * WIDTH, (__m512)v.part[p]);
#else
            _mm256_stream_ps(to + p * WIDTH, (__m256)v.part[p]);
#endif
        }
        return;
    }
#endif
    store(to, v, lanes);
}

ACE_INLINE void settle() {
#if ACE_WIDTH > 4
    _mm_sfence();
#endif
}

// Lane k of the result is lane (k + BY) % GROUP of k's own group of GROUP lanes.
template <int GROUP, int BY>
struct Rotation {
    static constexpr int source(int lane) { return lane - lane % GROUP + (lane % GROUP + BY) % GROUP; }

    // Each result register needs at most two source registers: those of its first and of its last lane.
    template <int PART, int... LANE>
    static ACE_INLINE NativeInts gather(const Ints& v, std::integer_sequence<int, LANE...>) {
        constexpr int first = source(PART * WIDTH) / WIDTH, last = source(PART * WIDTH + WIDTH - 1) / WIDTH;
        const NativeInts a = v.part[first], b = v.part[last];
#if defined(__clang__)
        return __builtin_shufflevector(a, b, pick(PART * WIDTH + LANE, first)...);
#else
        return __builtin_shuffle(a, b, NativeInts{pick(PART * WIDTH + LANE, first)...});
#endif
    }
    static constexpr int pick(int lane, int first) {
        return source(lane) % WIDTH + (source(lane) / WIDTH == first ? 0 : WIDTH);
    }
    template <int... PART>
    static ACE_INLINE Ints apply(const Ints& v, std::integer_sequence<int, PART...>) {
        return Ints{{gather<PART>(v, std::make_integer_sequence<int, WIDTH>{})...}};
    }
};

template <int GROUP, int BY>
ACE_INLINE Ints rotate(const Ints& v) {
    return Rotation<GROUP, BY>::apply(v, std::make_integer_sequence<int, PARTS>{});
}

// Bit k is the sign of lane k.
ACE_INLINE uint16_t signs(const Ints& v) {
#if ACE_NEON
    // The upper halves of words and the upper halves of those keep the signs.
    const uint16x8_t first = vuzp2q_u16((uint16x8_t)v.part[0], (uint16x8_t)v.part[1]);
    const uint16x8_t second = vuzp2q_u16((uint16x8_t)v.part[2], (uint16x8_t)v.part[3]);
    const int8x16_t bytes = vreinterpretq_s8_u8(vuzp2q_u8(vreinterpretq_u8_u16(first), vreinterpretq_u8_u16(second)));
    const uint8x16_t values = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
    uint8x16_t sums = vandq_u8(vreinterpretq_u8_s8(vshrq_n_s8(bytes, 7)), values);
    for (int step = 0; step < 3; ++step) sums = vpaddq_u8(sums, sums);
    return vgetq_lane_u16(vreinterpretq_u16_u8(sums), 0);
#else
    uint32_t bits = 0;
    for (int p = 0; p < PARTS; ++p) {
#if ACE_WIDTH == 16
        bits = _mm512_movepi32_mask((__m512i)v.part[p]);
#elif ACE_WIDTH == 8
        bits |= uint32_t(_mm256_movemask_ps((__m256)v.part[p])) << (p * WIDTH);
#elif defined(__x86_64__)
        bits |= uint32_t(_mm_movemask_ps((__m128)v.part[p])) << (p * WIDTH);
#else
        for (int lane = 0; lane < WIDTH; ++lane) bits |= uint32_t(v.part[p][lane] < 0) << (p * WIDTH + lane);
#endif
    }
    return uint16_t(bits);
#endif
}

// Adds vectors, a power of two of them, as a tree, which has less latency and rounding error than a chain.
template <int COUNT>
ACE_INLINE Floats sum_of(const Floats* terms) {
    return sum_of<COUNT / 2>(terms) + sum_of<COUNT / 2>(terms + COUNT / 2);
}

template <>
ACE_INLINE Floats sum_of<1>(const Floats* terms) {
    return terms[0];
}

// Adds the lanes, always in the same order.
ACE_INLINE double sum(const Floats& v) {
    float lane[LANES];
    store(lane, v);
    double total = 0;
    for (int k = 0; k < LANES; ++k) total += lane[k];
    return total;
}

// The largest of the lanes and `least`; NaN is ignored.
ACE_INLINE float largest(const Floats& v, float least) {
    float lane[LANES];
    store(lane, v);
    for (int k = 0; k < LANES; ++k) least = lane[k] > least ? lane[k] : least;
    return least;
}

ACE_INLINE int64_t sum(const Ints& v) {
    int32_t lane[LANES];
    store(lane, v);
    int64_t total = 0;
    for (int k = 0; k < LANES; ++k) total += lane[k];
    return total;
}

// Calls function(j, lanes) for every vector of `count` elements; the last vector may be partial.
template <typename Function>
ACE_INLINE void each_vector(int count, Function function) {
    int j = 0;
    for (; j + LANES <= count; j += LANES) function(j, LANES);
    if (j < count) function(j, count - j);
}

}  // namespace
}  // namespace ace
