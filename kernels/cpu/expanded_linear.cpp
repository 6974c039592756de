// Exported products of many bf16 tokens: threads, buffers, and the choice of tiles or vectors.

#include "abi.h"
#include "chosen_pairs.h"
#include "expanded_product.h"
#include "threads.h"

#include <cstring>

namespace ace {
namespace {

std::atomic<bool> tiles_allowed{true};

// Memory for `count` words that begins with a cache line and holds anything.
class Words {
public:
    explicit Words(int64_t count) : count_(count), words_(LineAllocator<uint32_t>().allocate(count)) {}
    Words(const Words&) = delete;
    Words& operator=(const Words&) = delete;
    ~Words() { LineAllocator<uint32_t>().deallocate(words_, count_); }

    uint32_t* data() { return words_; }

private:
    const int64_t count_;
    uint32_t* const words_;
};

// The product of all tokens; `all.pairs` is unused.
int multiply(const ExpandedTask& all, int32_t threads) {
    const int64_t rows = all.weight.rows, cols = all.weight.cols, n_tokens = all.n_tokens;
    return guarded([&] {
        const bool chosen = takes_chosen_pairs(all);
        const int64_t most = std::min(n_tokens, chosen ? MOST_CHOSEN_TOKENS : MOST_EXPANDED_TOKENS);
        const int64_t token_blocks = units(most, TILE);
        const int64_t bytes = bytes_of({nullptr, 1, all.weight.n_values, 0, Element::bf16});
        const int shares = threads_for(bytes * (1 + token_blocks), units(rows, TILE), threads);
        const int64_t of_block = EXPANDED_OUTPUTS * EXPANDED_STEPS * TILE;
        const int64_t of_share = of_block + EXPANDED_OUTPUTS * token_blocks * TILE;
        Words scratch(shares * of_share);
        Words pairs(token_blocks * units(cols, TILE_INPUTS) * TILE_WORDS * (chosen ? CHOSEN_WORDS : 1));
        for (int64_t first = 0; first < n_tokens; first += most) {
            ExpandedTask task = all;
            task.tokens += first * all.stride;
            task.n_tokens = std::min(n_tokens - first, most);
            task.pairs = pairs.data();
            task.out += first * rows;
            const int64_t blocks = units(task.n_tokens, TILE);
            deal(blocks, std::min<int64_t>(shares, blocks), [&](int64_t begin, int64_t end, int) {
                for (int64_t block = begin; block < end; ++block) {
                    if (chosen) choose_pairs(task, block);
                    else pair_tokens(task, block);
                }
            });
            deal(units(rows, TILE), shares, [&](int64_t begin, int64_t end, int share) {
                uint32_t* const own = scratch.data() + share * of_share;
                auto* const sums = reinterpret_cast<float*>(own + of_block);
                const int64_t first_output = begin * TILE, last = std::min(end * TILE, rows);
                if (chosen) chosen_pairs_product(task, sums, first_output, last);
                else expanded_product(task, {own, sums}, first_output, last);
            });
        }
    });
}

}  // namespace
}  // namespace ace

using namespace ace;

extern "C" {

int ace_has_expanded_product() { return strncmp(ace_isa(), "avx512", 6) == 0 && has_expanded_product(); }

int ace_has_tiles() { return ace_has_expanded_product() && tiles_allowed && has_tiles(); }

int ace_use_tiles(int32_t tiles) {
    if (tiles && !has_tiles()) return 1;
    tiles_allowed = tiles != 0;
    return 0;
}

int ace_expanded_linear(const uint16_t* tokens, int64_t n_tokens, int64_t cols, int64_t stride, const void* values,
                        int64_t n_values, const uint32_t* meta, const int64_t* starts, int64_t rows, int32_t n,
                        int32_t m, const float* bias, uint16_t* out, int32_t threads) {
    const PackedWeight weight = {values, meta, rows, cols, n, m, starts, n_values, Element::bf16};
    return multiply({weight, {}, tokens, n_tokens, stride, nullptr, bias, out, ace_has_tiles() != 0}, threads);
}

int ace_expanded_few_bits_linear(const uint16_t* tokens, int64_t n_tokens, int64_t cols, int64_t stride,
                                 const void* values, const uint32_t* meta, const uint16_t* absmax, int64_t rows,
                                 int32_t n, int32_t m, int32_t bits, int64_t group, const float* bias, uint16_t* out,
                                 int32_t threads) {
    const PackedWeight weight = {values, meta, rows, cols, n, m, nullptr, rows * (cols / m * n), Element::bf16};
    const Scales scales = {absmax, group, bits};
    return multiply({weight, scales, tokens, n_tokens, stride, nullptr, bias, out, ace_has_tiles() != 0}, threads);
}

}  // extern "C"
