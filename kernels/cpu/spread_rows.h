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

// 64 values of a row, from an address on, as bytes: their integers plus OFFSET, in the order of inputs.
struct BytesOfEight {
    static constexpr int BITS = 8, LARGEST = 127, OFFSET = BYTE_OFFSET;
    using Loaded = __m512i;
    static ACE_INLINE __m512i bytes(Loaded values) { return _mm512_xor_si512(values, all_bytes(BYTE_OFFSET)); }
};

// Integers times 16: the upper halves of bytes, whose lower halves are cut off.
struct BytesOfFour {
    static constexpr int BITS = 4, LARGEST = 7 * 16, OFFSET = BYTE_OFFSET;
    using Loaded = __m256i;
    static ACE_INLINE __m512i bytes(Loaded values) {
        const __m512i from_bits = _mm512_set1_epi64(0x1814100c0804003c);
        const __m512i pairs = _mm512_multishift_epi64_epi8(from_bits, _mm512_cvtepu32_epi64(values));
        constexpr int AND_XOR = 0x78;
        return _mm512_ternarylogic_epi64(all_bytes(BYTE_OFFSET), pairs, all_bytes(0xf0), AND_XOR);
    }
};

// The lower halves of 32 bytes, then the upper halves, for deinterleaved tokens.
struct BytesOfHalves {
    static constexpr int BITS = 4, LARGEST = 7, OFFSET = NIBBLE_OFFSET;
    using Loaded = __m256i;
    static ACE_INLINE __m512i bytes(Loaded values) {
        const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
        const __m512i halves = _mm512_srlv_epi16(_mm512_broadcast_i64x4(values), shifts);
        return _mm512_ternarylogic_epi64(all_bytes(NIBBLE_OFFSET), halves, all_bytes(15), XOR_AND);
    }
    // The same in two registers.
    static ACE_INLINE NibbleSteps halves(Loaded values) {
        const __m256i offset = _mm256_set1_epi8(NIBBLE_OFFSET), lower = _mm256_set1_epi8(15);
        return {_mm256_ternarylogic_epi64(offset, values, lower, XOR_AND),
                _mm256_ternarylogic_epi64(offset, _mm256_srli_epi16(values, 4), lower, XOR_AND)};
    }

private:
    static constexpr int XOR_AND = 0x28;
};

// Spread bytes of neighboring chunks.
struct TwoChunks {
    __m512i first, second;

    ACE_INLINE void store(uint8_t* to) const {
        _mm512_store_si512(to, first);
        _mm512_store_si512(to + CHUNK, second);
    }
};

// Where the rows of a quantized weight are: bytes from one to the next, words of metadata, and bytes of a chunk.
struct RowPlaces {
    const int64_t stride, words, chunk_bytes;
    const int64_t safe;  // behind each row before this one, at least a register more can be read

    explicit RowPlaces(const FewBitsWeight& w)
        : stride((w.cols / w.m * w.n * w.bits + 7) / 8),
          words((w.cols + WORD_INPUTS - 1) / WORD_INPUTS),
          chunk_bytes(CHUNK / w.m * w.n * w.bits / 8),
          safe(stride > 0 ? w.rows - (CHUNK + stride - 1) / stride - 1 : 0) {}
};

// Which inputs have a value: all; at most half of each group, so that a load has the values of two chunks; or any.
enum class Kept { all, half, some };

// A quantized weight's row, from some chunk on. LAST is true if fewer bytes may be left to read than a load takes.
template <typename Bytes, Kept KEPT, bool LAST>
struct SpreadRow {
    static constexpr int WHOLE_BYTES = CHUNK * Bytes::BITS / 8;

    const uint8_t *from, *end;
    const uint32_t *bits, *last;  // of the chunk, and the row's last word of metadata
    const int64_t stride, words, chunk_bytes;

    ACE_INLINE void next() {
        from += stride;
        bits += words;
        last += words;
    }
    // The bytes of a chunk.
    ACE_INLINE __m512i one(int64_t c) const {
        const __m512i values = Bytes::bytes(loaded(c));
        return KEPT == Kept::all ? values : move(kept(c), values);
    }
    // Those of two chunks. Values of the second one go through memory: moving them in registers takes longer.
    ACE_INLINE TwoChunks two(int64_t c) const {
        if (KEPT != Kept::half) return {one(c), one(c + 1)};
        alignas(64) uint8_t of_two[CHUNK];
        const __m512i values = Bytes::bytes(loaded(c));
        _mm512_store_si512(of_two, values);
        const auto* second = reinterpret_cast<const __m256i*>(of_two + chunk_bytes * 8 / Bytes::BITS);
        const __m512i later = _mm512_zextsi256_si512(_mm256_loadu_si256(second));
        return {move(kept(c), values), move(kept(c + 1), later)};
    }
    ACE_INLINE typename Bytes::Loaded loaded(int64_t c) const {
        const uint8_t* at = from + c * chunk_bytes;
        typename Bytes::Loaded all;
        if (LAST && end - at < WHOLE_BYTES) {
            const uint64_t some = end > at ? (uint64_t(1) << (end - at)) - 1 : 0;
            const __m512i left = _mm512_maskz_loadu_epi8(some, at);
            memcpy(&all, &left, sizeof all);
        } else {
            memcpy(&all, at, sizeof all);
        }
        return all;
    }

private:
    // The bits of a chunk. Those past the end of a row are for inputs whose tokens are 0.
    ACE_INLINE uint64_t kept(int64_t c) const {
        if (LAST && bits + 2 * c == last) return *last;
        uint64_t both;
        memcpy(&both, bits + 2 * c, sizeof both);
        return both;
    }
    static ACE_INLINE __m512i move(uint64_t kept, __m512i values) {
        return _mm512_mask_expand_epi8(all_bytes(Bytes::OFFSET), kept, values);
    }
};

// The same for rows, from some row on.
template <typename Bytes, Kept KEPT, bool LAST>
struct SpreadRows {
    using Kind = Bytes;
    using Row = SpreadRow<Bytes, KEPT, LAST>;

    const uint8_t *values, *end;
    const uint32_t* meta;
    const FewBitsWeight& weight;
    int64_t first, stride, words, groups, chunk_bytes;

    template <int OUTPUTS>
    ACE_INLINE void ahead(int64_t j) const {
        const int64_t from = int64_t(uint64_t(j) / CHUNK) * chunk_bytes, bytes = SPREAD / CHUNK * chunk_bytes;
        if (KEPT == Kept::all) return ask_whole_rows_ahead<OUTPUTS>(values, from, bytes, stride);
        for (int64_t line = 0; line < bytes; line += 64) {
            ask_rows_ahead<OUTPUTS>(values, from + PACKED_AHEAD + line, stride);
        }
        const char* next = reinterpret_cast<const char*>(meta + OUTPUTS * words) + uint64_t(j) / 8 * OUTPUTS;
        for (int line = 0; line < SPREAD / 8 * OUTPUTS; line += 64) __builtin_prefetch(next + line);
    }

    // Row r from a chunk on.
    ACE_INLINE Row row(int r, int64_t chunk) const {
        const uint8_t* from = values + r * stride + chunk * chunk_bytes;
        if (KEPT == Kept::all) return Row{from, end, nullptr, nullptr, stride, 0, chunk_bytes};
        const uint32_t* of_row = meta + r * words;
        return Row{from, end, of_row + 2 * chunk, of_row + words - 1, stride, words, chunk_bytes};
    }
};

// The rows of a quantized weight from row i on; `groups` is their number in a row, for those who ask for magnitudes.
template <typename Bytes, Kept KEPT, bool LAST>
ACE_INLINE SpreadRows<Bytes, KEPT, LAST> rows_from(const FewBitsWeight& w, const RowPlaces& places, int64_t i,
                                                   int64_t groups) {
    return {w.values + i * places.stride,
            w.values + w.rows * places.stride,
            w.meta ? w.meta + i * places.words : nullptr,
            w,
            i,
            places.stride,
            places.words,
            groups,
            places.chunk_bytes};
}

// The largest magnitudes of OUTPUTS rows, at most four, side by side for each group.
template <int OUTPUTS>
class MagnitudesOfFour {
public:
    ACE_INLINE MagnitudesOfFour(const FewBitsWeight& weight, int64_t first, int64_t groups, int64_t blocks)
        : weight_(weight), groups_(groups), blocks_(blocks), from_(first * groups) {}
    // Those of block b: call it for each block in order.
    ACE_INLINE const float* of(int64_t b) {
        if (b == next_) {
            next_ += blocks_;
            at_ += 4;
            if (at_ == of_rows_[LANES]) widen();
        }
        return at_;
    }

private:
    ACE_INLINE void widen() {
        const int64_t left = groups_ - group_;
        const int lanes = int(left < LANES ? left : LANES);
        __m512 rows[4] = {};
        with_element(weight_.element, [&](auto element) ACE_INLINED {
            using E = decltype(element);
            const auto* absmax = static_cast<const typename E::Stored*>(weight_.absmax) + from_ + group_;
            for (int r = 0; r < OUTPUTS; ++r) rows[r] = (__m512)E::load(absmax + r * groups_, lanes).part[0];
        });
        const auto low = [](__m512 a, __m512 b) ACE_INLINED { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
        const auto high = [](__m512 a, __m512 b) ACE_INLINED { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
        const __m512d lows[] = {low(rows[0], rows[1]), low(rows[2], rows[3])};
        const __m512d highs[] = {high(rows[0], rows[1]), high(rows[2], rows[3])};
        // Lane k of `fours[r]` is for group 4 k + r.
        const __m512d fours[] = {_mm512_unpacklo_pd(lows[0], lows[1]), _mm512_unpackhi_pd(lows[0], lows[1]),
                                 _mm512_unpacklo_pd(highs[0], highs[1]), _mm512_unpackhi_pd(highs[0], highs[1])};
        for (int r = 0; r < 4; ++r) {
            const auto store = [&](int k, __m128 four) ACE_INLINED { _mm_store_ps(of_rows_[4 * k + r], four); };
            const __m512 lanes = _mm512_castpd_ps(fours[r]);
            store(0, _mm512_castps512_ps128(lanes));
            store(1, _mm512_extractf32x4_ps(lanes, 1));
            store(2, _mm512_extractf32x4_ps(lanes, 2));
            store(3, _mm512_extractf32x4_ps(lanes, 3));
        }
        group_ += LANES;
        at_ = of_rows_[0];
    }

    const FewBitsWeight& weight_;
    const int64_t groups_, blocks_, from_;
    int64_t next_ = 0, group_ = 0;  // the first block of the next group; the group to widen next
    alignas(64) float of_rows_[LANES][4];
    const float* at_ = of_rows_[LANES - 1];
};

// Spread weights of OUTPUTS rows.
template <int OUTPUTS>
struct Spread {
    alignas(64) uint8_t of[OUTPUTS][SPREAD];

    // From input j on, a multiple of SPREAD. This function and those that multiply are not inlined: the compiler keeps
    // their addresses in registers only if they are functions of their own.
    template <typename Rows>
    ACE_OUTLINED void fill(const Rows& rows, int64_t j) {
        rows.template ahead<OUTPUTS>(j);
        const int64_t first = j / CHUNK, left = (rows.words + 1) / 2 - first;
        auto row = rows.row(0, first);
        if (left >= SPREAD / CHUNK) {
            for (int r = 0; r < OUTPUTS; ++r, row.next()) {
                for (int c = 0; c < SPREAD / CHUNK; c += 2) row.two(c).store(of[r] + c * CHUNK);
            }
        } else {
            for (int r = 0; r < OUTPUTS; ++r, row.next()) {
                for (int c = 0; c < left; ++c) _mm512_store_si512(of[r] + c * CHUNK, row.one(c));
            }
        }
    }
};

}  // namespace
}  // namespace ace
