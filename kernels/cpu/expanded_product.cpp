#include "expanded_product.h"

#include "expanded_integers.h"
#include "token_pairs.h"

#if ACE_HAS_PAIRS

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define ACE_TILES __attribute__((target("amx-tile,amx-bf16")))

namespace ace {
namespace {

// Expands `steps` words of metadata of a row; returns the place behind the last value that was used. INSIDE is true if
// no metadata can lead past the values; else what is missing is 0.
template <bool INSIDE>
ACE_PAIRS inline int64_t expand_row(const PackedWeight& w, int64_t next, const uint32_t* meta, int64_t steps,
                                    uint32_t* to) {
    const uint16_t* values = static_cast<const uint16_t*>(w.values);
    for (int64_t s = 0; s < steps; ++s, to += TILE_WORDS) {
        const int64_t count = __builtin_popcount(meta[s]), left = w.n_values - next;
        const __mmask32 there = INSIDE || left >= TILE_INPUTS ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        const __m512i some =
            INSIDE ? _mm512_loadu_si512(values + next) : _mm512_maskz_loadu_epi16(there, values + next);
        _mm512_store_si512(to, _mm512_maskz_expand_epi16(meta[s], some));
        next += INSIDE || count < left ? count : left;
    }
    return next;
}

// The place of row i's first value. Row starts are bounded, because a file may be damaged.
ACE_PAIRS inline int64_t start_of(const PackedWeight& w, int64_t i) {
    const int64_t start = w.starts ? w.starts[i] : i * (w.cols / w.m * w.n);
    return start < 0 ? 0 : start < w.n_values ? start : w.n_values;
}

// Expands a block of bf16 values; `next` has the place of each row's next value. Prefetches the row's values of the
// next block of inputs or, behind the last one, those of the row that follows in its place.
ACE_PAIRS void expand(const ExpandedTask& task, const Block& block, int64_t* next, uint32_t* to) {
    const PackedWeight& w = task.weight;
    const int64_t words = steps_of(task), most = (block.steps + 1) * TILE_INPUTS;
    const int64_t usual = w.n_values / w.rows * block.steps / words;
    const bool last = block.first_step + block.steps == words;
    for (int64_t r = 0; r < block.outputs; ++r) {
        const int64_t i = block.first_output + r, below = i + block.outputs;
        const uint32_t* meta = w.meta + i * words + block.first_step;
        uint32_t* row = to + r / TILE * ROW_BLOCK + r % TILE * TILE;
        const int64_t after = last && below < w.rows ? start_of(w, below) : next[r] + usual;
        prefetch_block(static_cast<const uint16_t*>(w.values) + after, usual * int64_t(sizeof(uint16_t)));
        next[r] = next[r] + most <= w.n_values ? expand_row<true>(w, next[r], meta, block.steps, row)
                                               : expand_row<false>(w, next[r], meta, block.steps, row);
    }
}

// What a kernel adds up: tiles of weights and tokens, and where the sums are.
struct Operands {
    const uint32_t *weights, *tokens;
    int64_t steps, tokens_apart;  // from a block of tokens to the next one
    float* sums;
    int64_t sums_apart;  // from a block of outputs to the next one
    bool first;          // the sums begin here
};

// Tiles 0 to 3 are sums of 4 / TOKENS blocks of outputs with TOKENS blocks of tokens. Loads that stream leave the
// tokens, which the next blocks of outputs need, in the first-level cache. GCC does not know that tiles read and write
// memory.
template <int TOKENS>
ACE_TILES inline void add_tiles(const Operands& x) {
    constexpr int64_t BYTES = TILE * 4;
    float* sums[4];
    for (int k = 0; k < 4; ++k) sums[k] = x.sums + k / TOKENS * x.sums_apart + k % TOKENS * TILE_WORDS;
    __asm__ volatile("" ::: "memory");
    if (x.first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_stream_loadd(0, sums[0], BYTES);
        _tile_stream_loadd(1, sums[1], BYTES);
        _tile_stream_loadd(2, sums[2], BYTES);
        _tile_stream_loadd(3, sums[3], BYTES);
    }
    const uint32_t *w = x.weights, *t = x.tokens;
    for (int64_t s = 0; s < x.steps; ++s, w += TILE_WORDS, t += TILE_WORDS) {
        if constexpr (TOKENS == 1) {
            _tile_loadd(4, t, BYTES);
            _tile_stream_loadd(5, w, BYTES);
            _tile_dpbf16ps(0, 5, 4);
            _tile_stream_loadd(6, w + ROW_BLOCK, BYTES);
            _tile_dpbf16ps(1, 6, 4);
            _tile_stream_loadd(7, w + 2 * ROW_BLOCK, BYTES);
            _tile_dpbf16ps(2, 7, 4);
            _tile_stream_loadd(5, w + 3 * ROW_BLOCK, BYTES);
            _tile_dpbf16ps(3, 5, 4);
        } else {
            _tile_stream_loadd(4, w, BYTES);
            _tile_stream_loadd(5, w + ROW_BLOCK, BYTES);
            _tile_loadd(6, t, BYTES);
            _tile_loadd(7, t + x.tokens_apart, BYTES);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums[0], BYTES);
    _tile_stored(1, sums[1], BYTES);
    _tile_stored(2, sums[2], BYTES);
    _tile_stored(3, sums[3], BYTES);
    __asm__ volatile("" ::: "memory");
}

// The same for one block of outputs, TOKENS blocks of tokens.
template <int TOKENS>
ACE_PAIRS inline void add_vectors(const Operands& x) {
    constexpr int ROWS = TILE / TOKENS;
    for (int first = 0; first < TILE; first += ROWS) {
        __m512 sums[ROWS][TOKENS];
        float* place = x.sums + first * TILE;
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < TOKENS; ++v) {
                sums[r][v] = x.first ? _mm512_setzero_ps() : _mm512_load_ps(place + r * TILE + v * TILE_WORDS);
            }
        }
        const uint32_t *w = x.weights + first * TILE, *t = x.tokens;
        for (int64_t s = 0; s < x.steps; ++s, w += TILE_WORDS, t += TILE_WORDS) {
            for (int p = 0; p < TILE; ++p) {
                __m512bh right[TOKENS];
                for (int v = 0; v < TOKENS; ++v) {
                    right[v] = (__m512bh)_mm512_load_si512(t + v * x.tokens_apart + p * TILE);
                }
                for (int r = 0; r < ROWS; ++r) {
                    const __m512bh left = (__m512bh)_mm512_set1_epi32(int(w[r * TILE + p]));
                    for (int v = 0; v < TOKENS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], right[v], left);
                }
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int v = 0; v < TOKENS; ++v) _mm512_store_ps(place + r * TILE + v * TILE_WORDS, sums[r][v]);
        }
    }
}

// Adds the products of a block of expanded weights with TOKENS blocks of tokens, from block `first` on.
template <int TOKENS>
ACE_PAIRS inline void add_group(const ExpandedTask& task, const ExpandedScratch& scratch, const Block& block,
                                int64_t first) {
    const int64_t token_blocks = blocks_of(task.n_tokens), steps = steps_of(task);
    const int64_t apart = token_blocks * TILE_WORDS, at_once = task.tiles ? 4 / TOKENS : 1;
    for (int64_t o = 0; o < block.output_blocks(); o += at_once) {
        const Operands x = {scratch.block + o * ROW_BLOCK,
                            task.pairs + (first * steps + block.first_step) * TILE_WORDS,
                            block.steps,
                            steps * TILE_WORDS,
                            scratch.sums + o * apart + first * TILE_WORDS,
                            apart,
                            block.first_step == 0};
        if constexpr (TOKENS <= 2) {
            if (task.tiles) {
                add_tiles<TOKENS>(x);
                continue;
            }
        }
        add_vectors<TOKENS>(x);
    }
}

// Adds the products of a block of expanded weights with all tokens.
ACE_PAIRS void add(const ExpandedTask& task, const ExpandedScratch& scratch, const Block& block) {
    const int64_t token_blocks = blocks_of(task.n_tokens);
    int64_t t = 0;
    if (!task.tiles) {
        for (; t + 4 <= token_blocks; t += 4) add_group<4>(task, scratch, block, t);
    }
    for (; t + 2 <= token_blocks; t += 2) add_group<2>(task, scratch, block, t);
    if (t < token_blocks) add_group<1>(task, scratch, block, t);
}

// Eight tiles of TILE rows, 64 bytes each.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
};
constexpr TileShapes TILE_SHAPES;

ACE_TILES void begin_tiles() { _tile_loadconfig(&TILE_SHAPES); }
ACE_TILES void end_tiles() { _tile_release(); }

bool processor_has_tiles() {
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILES);
}

// Linux saves the tiles of a process only if it has asked for them.
bool system_allows_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_expanded_product() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2");
}

bool has_tiles() {
    static const bool found = has_expanded_product() && processor_has_tiles() && system_allows_tiles();
    return found;
}

ACE_PAIRS void pair_tokens(const ExpandedTask& task, int64_t block) {
    const int64_t steps = steps_of(task);
    uint32_t* to = task.pairs + block * steps * TILE_WORDS;
    for (int64_t s = 0; s < steps; ++s, to += TILE_WORDS) {
        __m512i rows[TILE];
        load_pairs(task, block, s, rows);
        for (int64_t k = 0; k < TILE; ++k) _mm512_store_si512(to + k * TILE, rows[k]);
    }
}

ACE_PAIRS void expanded_product(const ExpandedTask& task, const ExpandedScratch& scratch, int64_t begin, int64_t end) {
    if (task.tiles) begin_tiles();
    const int64_t steps = steps_of(task);
    const int64_t parts = (steps + EXPANDED_STEPS - 1) / EXPANDED_STEPS;
    const int64_t at_once = ((steps + parts - 1) / parts + 1) / 2 * 2;  // Even, as expand_integers needs.
    const int64_t most = task.tiles ? EXPANDED_OUTPUTS : VECTOR_OUTPUTS;
    int64_t next[EXPANDED_OUTPUTS];
    for (int64_t i = begin; i < end; i += most) {
        const int64_t outputs = end - i < most ? end - i : most;
        for (int64_t r = 0; r < outputs; ++r) next[r] = start_of(task.weight, i + r);
        for (int64_t s = 0; s < steps; s += at_once) {
            const Block block = {i, outputs, s, steps - s < at_once ? steps - s : at_once};
            if (task.scales.bits) expand_integers(task, block, scratch.block);
            else expand(task, block, next, scratch.block);
            add(task, scratch, block);
        }
        deliver(task, scratch.sums, i, outputs);
    }
    if (task.tiles) end_tiles();
}

}  // namespace ace

#else

namespace ace {
bool has_expanded_product() { return false; }
bool has_tiles() { return false; }
void pair_tokens(const ExpandedTask&, int64_t) {}
void expanded_product(const ExpandedTask&, const ExpandedScratch&, int64_t, int64_t) {}
}  // namespace ace

#endif
