// The three element types; all are loaded as fp32. `exponent` is the mask of the exponent bits: only in NaN and
// infinity are all of them set. A Register holds as many raw elements as one machine register.
#pragma once

#include "tasks.h"
#include "vector.h"

namespace ace {
namespace {

struct Fp32 {
    using Stored = float;
    using Register = NativeInts;
    static constexpr int32_t exponent = 0x7f800000;
    static ACE_INLINE Floats load(const Stored* from, int lanes = LANES) { return ace::load(from, lanes); }
#if ACE_NEON
    // One register of numbers, or two.
    static ACE_INLINE NativeFloats load_part(const Stored* from) { return (NativeFloats)vld1q_f32(from); }
    static ACE_INLINE void load_parts(const Stored* from, NativeFloats* parts) {
        for (int p = 0; p < 2; ++p) parts[p] = load_part(from + p * WIDTH);
    }
#endif
    static ACE_INLINE void keep(Stored* to, const Floats& v, int lanes) { store(to, v, lanes); }
};

struct Bf16 {
    using Stored = uint16_t;
    using Register = NativeShorts;
    static constexpr int16_t exponent = 0x7f80;
    static ACE_INLINE Floats load(const Stored* from, int lanes = LANES) {
#if ACE_NEON
        if (lanes == LANES) {
            Floats v;
            load_parts(from, v.part);
            load_parts(from + 8, v.part + 2);
            return v;
        }
#endif
        return floats_of(widen(load_raw<Halves>(from, lanes)) << 16);
    }
#if ACE_NEON
    static ACE_INLINE NativeFloats load_part(const Stored* from) {
        return (NativeFloats)vshlq_n_u32(vmovl_u16(vld1_u16(from)), 16);
    }
    static ACE_INLINE void load_parts(const Stored* from, NativeFloats* parts) { split(vld1q_u16(from), parts); }
    static ACE_INLINE void split(uint16x8_t v, NativeFloats* parts) {
        parts[0] = (NativeFloats)vzip1q_u16(vdupq_n_u16(0), v);
        parts[1] = (NativeFloats)vzip2q_u16(vdupq_n_u16(0), v);
    }
#endif
    // Round to nearest, ties to even.
    static ACE_INLINE void keep(Stored* to, const Floats& v, int lanes) {
        Ints rounded = bits_of(v);
        for (int p = 0; p < PARTS; ++p) {
            const NativeInts bits = rounded.part[p], nan = (NativeInts)(v.part[p] != v.part[p]);
            rounded.part[p] = (bits + 0x7fff + ((bits >> 16) & 1)) | (nan & 0x7fc00000);
        }
        store_raw(to, narrow(rounded >> 16), lanes);
    }
};

struct Fp16 {
    using Stored = uint16_t;
    using Register = NativeShorts;
    static constexpr int16_t exponent = 0x7c00;
    static ACE_INLINE Floats load(const Stored* from, int lanes = LANES) {
        const Halves halves = load_raw<Halves>(from, lanes);
        Floats v;
        for (int p = 0; p < PARTS; ++p) {
#if ACE_WIDTH == 16
            v.part[p] = (NativeFloats)_mm512_maskz_cvtph_ps(0xffff, (__m256i)halves.part[p]);
#elif ACE_WIDTH == 8
            v.part[p] = (NativeFloats)_mm256_cvtph_ps((__m128i)halves.part[p]);
#elif ACE_NEON
            v.part[p] = (NativeFloats)vcvt_f32_f16((float16x4_t)halves.part[p]);
#else
            v.part[p] = from_bits(__builtin_convertvector(halves.part[p], NativeInts));
#endif
        }
        return v;
    }
#if ACE_NEON
    static ACE_INLINE NativeFloats load_part(const Stored* from) {
        return (NativeFloats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
    }
    static ACE_INLINE void load_parts(const Stored* from, NativeFloats* parts) { split(vld1q_u16(from), parts); }
    static ACE_INLINE void split(uint16x8_t v, NativeFloats* parts) {
        parts[0] = (NativeFloats)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(v)));
        parts[1] = (NativeFloats)vcvt_high_f32_f16(vreinterpretq_f16_u16(v));
    }
#endif

private:
    // Rebias the exponent by 112. A subnormal half gets the exponent of 2^-14; subtracting 2^-14 then gives its value.
    static ACE_INLINE NativeFloats from_bits(NativeInts half) {
        const NativeInts body = (half & 0x7fff) << 13, rebias = (112 << 23) - NativeInts{};
        const NativeFloats shifted = (NativeFloats)(body + rebias + (1 << 23));
        const NativeInts subnormal = (NativeInts)(shifted - 0x1p-14f);
        const NativeInts normal = body + rebias + ((body >= (0x7c00 << 13)) & rebias);
        return (NativeFloats)((body < (1 << 23) ? subnormal : normal) | ((half & 0x8000) << 16));
    }
};

template <typename Function>
ACE_INLINE auto with_element(Element element, Function function) {
    switch (element) {
        case Element::fp16: return function(Fp16{});
        case Element::bf16: return function(Bf16{});
        default: return function(Fp32{});
    }
}

}  // namespace
}  // namespace ace
