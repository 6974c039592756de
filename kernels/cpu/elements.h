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
    static ACE_INLINE void keep(Stored* to, const Floats& v, int lanes) { store(to, v, lanes); }
};

struct Bf16 {
    using Stored = uint16_t;
    using Register = NativeShorts;
    static constexpr int16_t exponent = 0x7f80;
    static ACE_INLINE Floats load(const Stored* from, int lanes = LANES) {
        return floats_of(widen(load_raw<Halves>(from, lanes)) << 16);
    }
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
#else
            v.part[p] = from_bits(__builtin_convertvector(halves.part[p], NativeInts));
#endif
        }
        return v;
    }

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
