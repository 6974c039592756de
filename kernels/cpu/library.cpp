// Operations on weights, and the choice of the instruction set; abi.h declares what this file exports.

#include "abi.h"
#include "arm.h"
#include "term_range.h"
#include "threads.h"

#include <atomic>
#include <cstring>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ace {
namespace {

const Bodies* const* all_bodies() {
    static const Bodies* const tables[] = {
#if defined(__x86_64__)
        &avx512_vnni_bodies, &avx512_bodies, &avx2_bodies,
#elif ACE_ARM_EXTENSIONS
        &neon_dotprod_bodies, &neon_bodies,
#elif defined(__aarch64__)
        &neon_bodies,
#endif
        &portable_bodies, nullptr};
    return tables;
}

bool runs_here(const Bodies& candidate) {
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (&candidate == &avx512_bodies) return avx512;
    if (&candidate == &avx512_vnni_bodies) {
        return avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512vbmi2");
    }
    // Every processor with AVX2 also has F16C.
    if (&candidate == &avx2_bodies) return __builtin_cpu_supports("avx2");
#elif ACE_ARM_EXTENSIONS
    if (&candidate == &neon_dotprod_bodies) return has_dot_product();
#endif
    return true;
}

const Bodies* best_bodies() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    const Bodies* const* candidate = all_bodies();
    while (!runs_here(**candidate)) ++candidate;
    return *candidate;
}

}  // namespace

std::atomic<const Bodies*> bodies_in_use{best_bodies()};
std::atomic<int32_t> input_bits{30};

namespace {

// The highest bin with at least `wanted` keys in it and above; `wanted` becomes the number of keys needed from it.
int32_t find_bin(const std::vector<int64_t>& bins, int64_t& wanted) {
    int32_t bin = int32_t(bins.size()) - 1;
    while (bin > 0 && bins[bin] < wanted) wanted -= bins[bin--];
    return bin;
}

// Finds the threshold of a whole layer with two histograms, of the upper 16 and the lower 15 bits of the keys.
Cut cut_layer(const Bodies& bodies, const Selection& s, int64_t k, int threads) {
    constexpr int32_t LOWER_BITS = 15, UPPER_MASK = 0xffff, LOWER_MASK = 0x7fff;
    const auto histogram = [&](const Histogram& h) {
        std::vector<std::vector<int64_t>> parts(threads, std::vector<int64_t>(h.bin_mask + 1));
        deal(s.weight.rows, threads, [&](int64_t begin, int64_t end, int thread) {
            bodies.count_keys(s, h, begin, end, parts[thread].data());
        });
        for (int thread = 1; thread < threads; ++thread) {
            for (int32_t bin = 0; bin <= h.bin_mask; ++bin) parts[0][bin] += parts[thread][bin];
        }
        return parts[0];
    };
    int64_t wanted = k;
    const int32_t upper = find_bin(histogram({0, 31, LOWER_BITS, UPPER_MASK}), wanted);
    const std::vector<int64_t> lower_bins = histogram({upper, LOWER_BITS, 0, LOWER_MASK});
    const int32_t lower = find_bin(lower_bins, wanted);
    const int32_t threshold = (upper << LOWER_BITS) | lower;
    if (lower_bins[lower] == wanted) return {threshold, 0};
    return {threshold, bodies.find_ties(s, threshold, wanted)};
}

Selection selection(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element, const float* row,
                    const float* col, const float* scale, const float* coupling, int32_t power, int32_t output,
                    void* delivered) {
    return {{weight, rows, cols, stride, Element(element)},
            {row, col, scale, coupling, power},
            Output(output),
            static_cast<uint8_t*>(delivered)};
}

int refused_term(const Selection& s, int threads) {
    const int64_t rows = s.weight.rows, cols = s.weight.cols;
    if (s.terms.row && !in_range(s.terms.row, rows)) return ACE_BAD_ROW;
    if (s.terms.col && !in_range(s.terms.col, cols)) return ACE_BAD_COL;
    if (s.terms.scale && !in_range(s.terms.scale, cols)) return ACE_BAD_SCALE;
    if (!s.terms.coupling) return 0;
    std::atomic<bool> so_far{true};
    deal(rows, threads_for(rows * cols * int64_t(sizeof(float)), rows, threads),
         [&](int64_t begin, int64_t end, int) {
             if (!in_range(s.terms.coupling + begin * cols, (end - begin) * cols)) so_far = false;
         });
    return so_far ? 0 : ACE_BAD_COUPLING;
}

// Calls work() unless a term is out of range; terms that are `checked` are not checked again.
template <typename Work>
int selecting(const Selection& s, int32_t checked, int threads, const Work& work) {
    int refusal = 0;
    const int failure = guarded([&] {
        refusal = checked ? 0 : refused_term(s, threads);
        if (!refusal) work();
    });
    return failure ? failure : refusal;
}

// Computes y = x W^T + b with `work(bodies, task, begin, end)` for shares of the outputs.
template <typename Work>
int linear(const Matrix& tokens, int64_t rows, int64_t weight_bytes, const float* bias, float* out, int threads,
           const Work& work) {
    const Bodies& bodies = *bodies_in_use;
    return guarded([&] {
        const int64_t padded = units(tokens.cols, 32) * 32;
        std::vector<float> widened(tokens.rows * padded);
        bodies.widen_rows(tokens, padded, widened.data());
        const LinearTask task = {widened.data(), tokens.rows, padded, bias, out, rows};
        const int shares = threads_for(cost_of(weight_bytes, tokens.rows), rows, threads);
        deal(rows, shares, [&](int64_t begin, int64_t end, int) { work(bodies, task, begin, end); });
    });
}

PackedWeight packed_nm(const void* values, const uint32_t* meta, int64_t rows, int64_t cols, int32_t n, int32_t m,
                       Element element) {
    return {values, meta, rows, cols, n, m, nullptr, rows * (cols / m * n), element};
}

int packed_linear(const Matrix& tokens, const PackedWeight& weight, const float* bias, float* out, int threads) {
    const int64_t bytes = bytes_of({nullptr, 1, weight.n_values, 0, weight.element});
    return linear(tokens, weight.rows, bytes, bias, out, threads,
                  [&](const Bodies& bodies, const LinearTask& task, int64_t begin, int64_t end) {
                      bodies.nm_linear(weight, task, begin, end);
                  });
}

int unpack(const PackedWeight& packed, int32_t bytes, void* weight, int threads) {
    const Unpacking task = {packed, bytes, weight};
    const Bodies& bodies = *bodies_in_use;
    return guarded([&] {
        deal(packed.rows, threads_for(packed.rows * packed.cols * bytes, packed.rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies.unpack_nm(task, begin, end); });
    });
}

}  // namespace
}  // namespace ace

using namespace ace;

extern "C" {

const char* ace_isa() { return bodies_in_use.load()->name; }

const char* ace_sources() { return ACE_SOURCES; }

int ace_use_isa(const char* name) {
    for (const Bodies* const* candidate = all_bodies(); *candidate; ++candidate) {
        if (strcmp((*candidate)->name, name) == 0 && runs_here(**candidate)) {
            bodies_in_use = *candidate;
            return 0;
        }
    }
    return 1;
}

int32_t ace_input_bits() { return input_bits; }

int ace_use_input_bits(int32_t bits) {
    if (bits != 30 && bits != 8) return 1;
    input_bits = bits;
    return 0;
}

int ace_threads_for(int64_t bytes, int64_t n_units, int32_t most) {
    return threads_for(bytes, n_units, most);
}

int ace_prefer_huge_pages(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 4096;
    const uintptr_t first = (uintptr_t(data) + PAGE - 1) / PAGE * PAGE, last = (uintptr_t(data) + bytes) / PAGE * PAGE;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
    return 0;
}

int ace_select_nm(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                  const float* row, const float* col, const float* scale, const float* coupling,
                  int32_t power, int32_t checked, int32_t output, void* delivered, int32_t n, int32_t m,
                  int32_t along_out, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Selection s =
        selection(weight, rows, cols, stride, element, row, col, scale, coupling, power, output, delivered);
    const Pattern pattern = {n, m, along_out != 0};
    return selecting(s, checked, threads, [&] {
        const int64_t n_units = along_out ? rows / m : rows;
        deal(n_units, threads_for(bytes_of(s.weight), n_units, threads),
             [&](int64_t begin, int64_t end, int) { bodies->select_nm(s, pattern, begin, end); });
    });
}

int ace_select_rows(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                    const float* row, const float* col, const float* scale, const float* coupling,
                    int32_t power, int32_t checked, int32_t output, void* delivered, int64_t k,
                    int32_t whole_layer, int32_t most_threads) {
    const Bodies* const bodies = bodies_in_use;
    const Selection s =
        selection(weight, rows, cols, stride, element, row, col, scale, coupling, power, output, delivered);
    // The selection takes eight times as long as reading the weight.
    const int threads = threads_for(8 * bytes_of(s.weight), rows, most_threads);
    return selecting(s, checked, most_threads, [&] {
        if (whole_layer) {
            const Cut cut = k == 0 ? Cut{INT32_MAX, 0} : cut_layer(*bodies, s, k, threads);
            deal(rows, threads, [&](int64_t begin, int64_t end, int) { bodies->apply_cut(s, cut, begin, end); });
            return;
        }
        const int64_t padded = units(cols, 16) * 16;
        std::vector<int32_t> keys(padded * threads);
        deal(rows, threads, [&](int64_t begin, int64_t end, int thread) {
            bodies->select_rows(s, k, begin, end, keys.data() + padded * thread);
        });
    });
}

int ace_join_gains(const float* candidates, const float* thresholds, int64_t n_pools, int64_t rows,
                   int64_t groups, int64_t n_candidates, float* gains, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const JoinTask task = {candidates, thresholds, rows, groups, n_candidates, gains};
    return guarded([&] {
        constexpr int64_t LANES = 16;
        const int64_t blocks = units(n_candidates, LANES);
        const int64_t work = n_pools * rows * groups * n_candidates;
        deal(n_pools * blocks, threads_for(work, n_pools * blocks, threads), [&](int64_t begin, int64_t end, int) {
            for (int64_t unit = begin; unit < end; ++unit) bodies->join_gains(task, unit / blocks, unit % blocks);
        });
    });
}

int ace_assign(const float* gains, int64_t n_pools, int64_t size, int32_t* joins, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    std::atomic<bool> so_far{true};
    const int failure = guarded([&] {
        const int64_t padded = units(size, 16) * 16;
        const int shares = threads_for(n_pools * size * size * int64_t(sizeof(float)), n_pools, threads);
        std::vector<float> reals(3 * padded * shares);
        std::vector<int32_t> indices(3 * padded * shares);
        deal(n_pools, shares, [&](int64_t begin, int64_t end, int thread) {
            float* real = reals.data() + 3 * padded * thread;
            int32_t* index = indices.data() + 3 * padded * thread;
            for (int64_t pool = begin; pool < end; ++pool) {
                if (!bodies->assign({gains + pool * size * size, size, joins + pool * size, real, real + padded,
                                     real + 2 * padded, index, index + padded, index + 2 * padded})) {
                    so_far = false;
                }
            }
        });
    });
    return failure ? failure : so_far ? 0 : ACE_BAD_GAINS;
}

int ace_pack_nm(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element,
                const float* row, const float* col, const float* scale, const float* coupling,
                int32_t power, int32_t checked, void* values, uint32_t* meta, int32_t by_score, int32_t n,
                int32_t m, int32_t threads, int32_t* whole) {
    const Bodies* const bodies = bodies_in_use;
    const Selection s = selection(weight, rows, cols, stride, element, row, col, scale, coupling, power,
                                  int32_t(Output::weight), nullptr);
    return selecting(s, checked, threads, [&] {
        std::atomic<bool> so_far{true};
        deal(rows, threads_for(bytes_of(s.weight), rows, threads), [&](int64_t begin, int64_t end, int) {
            if (!bodies->pack_nm(s, {n, m, false}, {values, meta, by_score != 0}, begin, end)) so_far = false;
        });
        *whole = so_far;
    });
}

int ace_kept_bits(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element, uint32_t* meta,
                  int64_t* starts, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Matrix w = {weight, rows, cols, stride, Element(element)};
    return guarded([&] {
        deal(rows, threads_for(bytes_of(w), rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies->find_kept(w, meta, starts + 1, begin, end); });
        starts[0] = 0;
        for (int64_t i = 0; i < rows; ++i) starts[i + 1] += starts[i];
    });
}

int ace_pack_rows(void* weight, int64_t rows, int64_t cols, int64_t stride, int32_t element, const uint32_t* meta,
                  const int64_t* starts, void* values, int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const Matrix w = {weight, rows, cols, stride, Element(element)};
    return guarded([&] {
        deal(rows, threads_for(bytes_of(w), rows, threads),
             [&](int64_t begin, int64_t end, int) { bodies->pack_rows(w, meta, starts, values, begin, end); });
    });
}

int ace_unpack_nm(const void* values, const uint32_t* meta, int64_t rows, int64_t cols, int32_t n,
                  int32_t m, int32_t bytes, void* weight, int32_t threads) {
    return unpack(packed_nm(values, meta, rows, cols, n, m, Element::fp32), bytes, weight, threads);
}

int ace_unpack_rows(const void* values, int64_t n_values, const uint32_t* meta, const int64_t* starts, int64_t rows,
                    int64_t cols, int32_t bytes, void* weight, int32_t threads) {
    return unpack({values, meta, rows, cols, 0, 0, starts, n_values, Element::fp32}, bytes, weight, threads);
}

int ace_nm_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                  const void* values, const uint32_t* meta, int64_t rows, int32_t n, int32_t m,
                  int32_t weight_element, const float* bias, float* out, int32_t threads) {
    return packed_linear({tokens, n_tokens, cols, stride, Element(element)},
                         packed_nm(values, meta, rows, cols, n, m, Element(weight_element)), bias, out, threads);
}

int ace_rows_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element, const void* values,
                    int64_t n_values, const uint32_t* meta, const int64_t* starts, int64_t rows,
                    int32_t weight_element, const float* bias, float* out, int32_t threads) {
    return packed_linear({tokens, n_tokens, cols, stride, Element(element)},
                         {values, meta, rows, cols, 0, 0, starts, n_values, Element(weight_element)}, bias, out,
                         threads);
}

int ace_few_bits_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                        const void* values, const uint32_t* meta, const void* absmax, int64_t rows, int32_t n,
                        int32_t m, int32_t bits, int64_t group, int32_t absmax_element, const float* bias, float* out,
                        int32_t threads) {
    const Bodies* const bodies = bodies_in_use;
    const FewBitsWeight weight = {static_cast<const uint8_t*>(values), meta, absmax, rows, cols, n, m, bits,
                                  Element(absmax_element)};
    const Matrix given = {tokens, n_tokens, cols, stride, Element(element)};
    const int32_t token_bits = input_bits;
    return guarded([&] {
        const int64_t block = rounded_block(group);
        const int64_t padded = units(cols, DEINTERLEAVED) * DEINTERLEAVED, blocks = units(cols, block);
        RoundedTokens rounded;
        std::vector<float> scales;
        round_inputs(*bodies, given, token_bits, block, deinterleaved_tokens(weight, block), padded, rounded, scales);
        const FewBitsTask task = {rounded.data(), scales.data(), n_tokens, padded, block,     blocks,
                                  group,          bias,          out,      rows,   token_bits};
        const int shares = threads_for(cost_of(weight, n_tokens), rows, threads);
        deal(rows, shares,
             [&](int64_t begin, int64_t end, int) { bodies->few_bits_linear(weight, task, begin, end); });
    });
}

int ace_dense_linear(void* tokens, int64_t n_tokens, int64_t cols, int64_t stride, int32_t element,
                     void* weight, int64_t rows, int64_t weight_stride, int32_t weight_element,
                     const float* bias, float* out, int32_t threads) {
    const Matrix w = {weight, rows, cols, weight_stride, Element(weight_element)};
    return linear({tokens, n_tokens, cols, stride, Element(element)}, rows, bytes_of(w), bias, out, threads,
                  [&](const Bodies& bodies, const LinearTask& task, int64_t begin, int64_t end) {
                      bodies.dense_linear(w, task, begin, end);
                  });
}

}  // extern "C"
