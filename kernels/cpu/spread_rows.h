// Integers of quantized weights as unsigned bytes, spread with AVX-512's expanding moves: each is its integer plus an
// offset. What the offset adds to a sum of products depends on the tokens alone.
#pragma once

#include "byte_inputs.h"
#include "magnitudes.h"
#include "nm_linear.h"

namespace ace {
namespace {

constexpr int BYTE_OFFSET = 128;
// Inputs whose weights fill a register, and inputs that are spread at once.
constexpr int CHUNK = 64, SPREAD = 256;

ACE_INLINE __m512i load_register(const void* from) { return _mm512_loadu_si512(from); }
ACE_INLINE __m512i all_bytes(int value) { return _mm512_set1_epi8(char(value)); }

// Values of a chunk in the order of inputs, if each has one; `spread` bytes are their integers plus OFFSET.
struct BytesOfEight {
    static constexpr int BITS = 8, LARGEST = 127, OFFSET = BYTE_OFFSET;
    static ACE_INLINE __m512i ordered(__m512i values) { return values; }
    static ACE_INLINE __m512i with_offset(__m512i v) { return _mm512_xor_si512(v, all_bytes(BYTE_OFFSET)); }
};

// Integers times 16: the upper halves of bytes, whose lower halves are cut off.
struct BytesOfFour {
    static constexpr int BITS = 4, LARGEST = 7 * 16, OFFSET = BYTE_OFFSET;
    static ACE_INLINE __m512i ordered(__m512i values) {
        const __m512i spaced = _mm512_cvtepu32_epi64(_mm512_castsi512_si256(values));
        const __m512i from_bits = _mm512_set1_epi64(0x1814100c0804003c);
        return _mm512_multishift_epi64_epi8(from_bits, spaced);
    }
    static ACE_INLINE __m512i with_offset(__m512i v) {
        constexpr int AND_XOR = 0x78;
        return _mm512_ternarylogic_epi64(all_bytes(BYTE_OFFSET), v, all_bytes(0xf0), AND_XOR);
    }
};

// The lower halves of 32 bytes, then the upper halves, for deinterleaved tokens.
struct BytesOfHalves {
    static constexpr int BITS = 4, LARGEST = 7, OFFSET = NIBBLE_OFFSET;
    static ACE_INLINE __m512i ordered(__m512i values) {
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        return _mm512_srlv_epi16(_mm512_broadcast_i64x4(_mm512_castsi512_si256(values)), shifts);
    }
    static ACE_INLINE __m512i with_offset(__m512i v) {
        return _mm512_ternarylogic_epi64(all_bytes(NIBBLE_OFFSET), v, all_bytes(15), XOR_AND);
    }
    // The same in two registers.
    static ACE_INLINE NibbleSteps halves(__m256i values) {
        const __m256i offset = _mm256_set1_epi8(NIBBLE_OFFSET), lower = _mm256_set1_epi8(15);
        return {_mm256_ternarylogic_epi64(offset, values, lower, XOR_AND),
                _mm256_ternarylogic_epi64(offset, _mm256_srli_epi16(values, 4), lower, XOR_AND)};
    }

private:
    static constexpr int XOR_AND = 0x28;
};

// A quantized weight's rows, from some row on. LAST is true if fewer bytes may be left to read than a load takes.
template <typename Bytes, bool PRUNED, bool LAST>
struct SpreadRows {
    using Kind = Bytes;
    static constexpr int WHOLE_BYTES = CHUNK * Bytes::BITS / 8;

    const uint8_t *values, *end;
    const uint32_t* meta;
    const FewBitsWeight& weight;
    int64_t first, stride, words, groups, chunk_bytes;

    // The 64 bytes of a chunk.
    ACE_INLINE __m512i spread(int r, int64_t chunk) const {
        const __m512i v = Bytes::ordered(load(values + r * stride + chunk * chunk_bytes));
        return Bytes::with_offset(PRUNED ? _mm512_maskz_expand_epi8(kept(r, chunk), v) : v);
    }
    ACE_INLINE NibbleSteps halves(int r, int64_t chunk) const {
        return Bytes::halves(_mm512_castsi512_si256(load(values + r * stride + chunk * chunk_bytes)));
    }
    template <int OUTPUTS>
    ACE_INLINE void ahead(int64_t j) const {
        const int64_t from = j / CHUNK * chunk_bytes, bytes = SPREAD / CHUNK * chunk_bytes;
        if (!PRUNED) return ask_whole_rows_ahead<OUTPUTS>(values, from, bytes, stride);
        for (int64_t line = 0; line < bytes; line += 64) {
            ask_rows_ahead<OUTPUTS>(values, from + PACKED_AHEAD + line, stride);
        }
        const char* next = reinterpret_cast<const char*>(meta + OUTPUTS * words) + j / 8 * OUTPUTS;
        for (int line = 0; line < SPREAD / 8 * OUTPUTS; line += 64) __builtin_prefetch(next + line);
    }

private:
    ACE_INLINE __m512i load(const uint8_t* from) const {
        if (LAST && end - from < WHOLE_BYTES) {
            const uint64_t some = end > from ? (uint64_t(1) << (end - from)) - 1 : 0;
            return _mm512_maskz_loadu_epi8(some, from);
        }
        if (WHOLE_BYTES == 64) return load_register(from);
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    ACE_INLINE uint64_t kept(int r, int64_t chunk) const {
        const uint32_t* from = meta + r * words + 2 * chunk;
        if (2 * chunk + 1 == words) return *from;
        uint64_t bits;
        memcpy(&bits, from, sizeof bits);
        return bits;
    }
};

// The largest magnitudes of four rows, side by side for each group.
template <int OUTPUTS>
class MagnitudesOfFour {
public:
    ACE_INLINE MagnitudesOfFour(const FewBitsWeight& weight, int64_t first, int64_t groups, int64_t blocks)
        : of_rows_(weight, first, groups, blocks) {}
    // Call it for each block in order.
    ACE_INLINE __m128 of(int64_t b) {
        of_rows_.go_to(b);
        float four[4] = {};
        for (int r = 0; r < OUTPUTS; ++r) four[r] = of_rows_.of(r);
        return _mm_loadu_ps(four);
    }

private:
    Magnitudes<OUTPUTS> of_rows_;
};

// Spread weights of OUTPUTS rows.
template <int OUTPUTS>
struct Spread {
    alignas(64) uint8_t of[OUTPUTS][SPREAD];

    // From input j on, in chunks up to `chunks`.
    template <typename Rows>
    ACE_INLINE void fill(const Rows& rows, int64_t j, int64_t chunks) {
        rows.template ahead<OUTPUTS>(j);
        const int64_t first = j / CHUNK, count = chunks - first < SPREAD / CHUNK ? chunks - first : SPREAD / CHUNK;
        for (int c = 0; c < count; ++c) {
            for (int r = 0; r < OUTPUTS; ++r) {
                _mm512_store_si512(of[r] + c * CHUNK, rows.spread(r, first + c));
            }
        }
    }
};

}  // namespace
}  // namespace ace
