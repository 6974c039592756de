#include "expanded_integers.h"

#include "token_pairs.h"

#if ACE_HAS_PAIRS

#include <cstring>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2")
// Of the undefined registers in GCC 12's own headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define ACE_WIDTH 16
#include "spread_rows.h"

namespace ace {
namespace {

constexpr int CHUNK_STEPS = CHUNK / TILE_INPUTS;
// The steps whose bf16 scales fill a register.
constexpr int SCALES = 2 * TILE;
static_assert(CHUNK_STEPS == 2 && EXPANDED_STEPS <= SCALES, "a register has the scales of a block's steps");

// Integers of a chunk as floats. Byte b in bits 8 to 15 of the float 2^15 makes it 2^15 + b.
class IntegersOfBytes {
public:
    ACE_INLINE IntegersOfBytes()
        : places_(_mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 8)) {}

    // Those of inputs 16 QUARTER to 16 QUARTER + 15.
    template <int QUARTER>
    ACE_INLINE __m512 quarter(__m512i bytes) const {
        constexpr __mmask64 SECOND_BYTES = 0x2222222222222222;
        const __m512i places = _mm512_add_epi32(places_, _mm512_set1_epi32(QUARTER * TILE << 8));
        const __m512i offset = _mm512_castps_si512(_mm512_set1_ps(0x1p15f));
        const __m512i floats = _mm512_mask_permutexvar_epi8(offset, SECOND_BYTES, places, bytes);
        return _mm512_sub_ps(_mm512_castsi512_ps(floats), _mm512_set1_ps(0x1p15f + BYTE_OFFSET));
    }

private:
    const __m512i places_;  // bits 8 to 15 of lane k are k
};

// What the integers of each step of a block are multiplied by.
class StepScales {
public:
    ACE_INLINE StepScales(const ExpandedTask& task, const Block& block, float largest)
        : absmax_(task.scales.absmax), factor_(_mm512_set1_ps(1.0f / largest)) {
        const int64_t group = task.scales.group, first = block.first_step * TILE_INPUTS / group;
        of_row_ = (task.weight.cols + group - 1) / group;
        from_ = block.first_output * of_row_ + first;
        alignas(64) uint16_t groups[SCALES] = {};
        for (int64_t s = 0; s < block.steps; ++s) {
            groups[s] = uint16_t((block.first_step + s) * TILE_INPUTS / group - first);
        }
        groups_ = _mm512_load_si512(groups);
        there_ = ~__mmask32(0) >> (SCALES - 1 - groups[block.steps - 1]);
    }
    // Those of row r of the block, as fp32; `to` has room for SCALES.
    ACE_INLINE void store(int64_t r, float* to) const {
        const __m512i absmax = _mm512_maskz_loadu_epi16(there_, absmax_ + from_ + r * of_row_);
        const __m512i of_steps = _mm512_permutexvar_epi16(groups_, absmax);
        const __m256i halves[] = {_mm512_castsi512_si256(of_steps), _mm512_extracti64x4_epi64(of_steps, 1)};
        for (int h = 0; h < 2; ++h) {
            const __m512i widened = _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves[h]), 16);
            _mm512_store_ps(to + h * TILE, _mm512_mul_ps(_mm512_castsi512_ps(widened), factor_));
        }
    }

private:
    const uint16_t* absmax_;
    const __m512 factor_;
    int64_t of_row_, from_;  // groups of a row; the place of the block's first one
    __m512i groups_;         // each step's group, counted from the block's first one
    __mmask32 there_;
};

// Expands chunks of a row. An integer times a bf16 absmax has at most 15 bits. Its quotient by 127 or 7 is then too far
// from the middle of two bf16 numbers for the fp32 errors here to change how it is rounded.
template <typename Row>
ACE_INLINE void expand_row(const Row& row, const float* scales, int64_t chunks, uint32_t* to) {
    const IntegersOfBytes integers;
    for (int64_t c = 0; c < chunks; ++c, to += CHUNK_STEPS * TILE_WORDS) {
        const __m512i bytes = row.one(c);
        const __m512 scale[] = {_mm512_set1_ps(scales[2 * c]), _mm512_set1_ps(scales[2 * c + 1])};
        const __m512 quarters[] = {_mm512_mul_ps(integers.quarter<0>(bytes), scale[0]),
                                   _mm512_mul_ps(integers.quarter<1>(bytes), scale[0]),
                                   _mm512_mul_ps(integers.quarter<2>(bytes), scale[1]),
                                   _mm512_mul_ps(integers.quarter<3>(bytes), scale[1])};
        _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(quarters[1], quarters[0]));
        _mm512_store_si512(to + TILE_WORDS, (__m512i)_mm512_cvtne2ps_pbh(quarters[3], quarters[2]));
    }
}

template <typename Bytes, Kept KEPT>
inline void expand_block(const ExpandedTask& task, const Block& block, uint32_t* to) {
    const PackedWeight& w = task.weight;
    const FewBitsWeight few = {static_cast<const uint8_t*>(w.values), w.meta, task.scales.absmax, w.rows, w.cols,
                               w.n, w.m, Bytes::BITS, Element::bf16};
    const RowPlaces places(few);
    const int64_t first = block.first_step / CHUNK_STEPS, chunks = (block.steps + 1) / CHUNK_STEPS;
    const bool last = block.first_step + block.steps == places.words;
    const StepScales scales(task, block, Bytes::LARGEST);
    const auto row = [&](int64_t i, auto ends) ACE_INLINED {
        return rows_from<Bytes, KEPT, decltype(ends)::value>(few, places, i, 0).row(0, first);
    };
    for (int64_t r = 0; r < block.outputs; ++r) {
        // The next block of inputs or, behind the last one, the row that follows in this one's place.
        const int64_t i = block.first_output + r, below = i + block.outputs;
        const int64_t later = last ? below * places.stride : i * places.stride + (first + chunks) * places.chunk_bytes;
        prefetch_block(few.values + later, chunks * places.chunk_bytes + CACHE_LINE);
        if (KEPT != Kept::all) {
            const int64_t next = last ? below * places.words : i * places.words + block.first_step + block.steps;
            prefetch_block(w.meta + next, block.steps * 4 + CACHE_LINE);
        }
        alignas(64) float of_steps[SCALES];
        scales.store(r, of_steps);
        uint32_t* const place = to + r / TILE * ROW_BLOCK + r % TILE * TILE;
        if (i < places.safe) expand_row(row(i, std::false_type{}), of_steps, chunks, place);
        else expand_row(row(i, std::true_type{}), of_steps, chunks, place);
    }
}

}  // namespace

void expand_integers(const ExpandedTask& task, const Block& block, uint32_t* to) {
    if (task.scales.bits == 8) {
        if (task.weight.meta) expand_block<BytesOfEight, Kept::some>(task, block, to);
        else expand_block<BytesOfEight, Kept::all>(task, block, to);
    } else {
        if (task.weight.meta) expand_block<BytesOfFour, Kept::some>(task, block, to);
        else expand_block<BytesOfFour, Kept::all>(task, block, to);
    }
}

}  // namespace ace

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
