// Shared code of the exported functions: how they distribute units of work to threads and report that memory ran out.
#pragma once

#include "abi.h"
#include "pool.h"
#include "tasks.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

namespace ace {

// The functions for the instruction set in use, and the bits to which products with quantized weights round tokens: 30
// or 8. Another thread may change both at any time, so each call of the library reads them once.
extern std::atomic<const Bodies*> bodies_in_use;
extern std::atomic<int32_t> input_bits;

namespace {

// Bytes that one thread reads in the time that it takes to wake another one and to wait for it.
constexpr int64_t BYTES_PER_THREAD = 1 << 17;

int64_t bytes_of(const Matrix& m) { return m.rows * m.cols * (m.element == Element::fp32 ? 4 : 2); }

int64_t units(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

// What a product of a weight of `bytes` costs: a token takes half as long as reading the weight from memory.
inline int64_t cost_of(int64_t bytes, int64_t n_tokens) { return bytes * (1 + n_tokens) / 2; }

// The same for a weight of few bits: spreading it takes as long as reading about twice its bytes, and so do two tokens.
inline int64_t cost_of(const FewBitsWeight& w, int64_t n_tokens) {
    return (w.rows * w.cols * w.n / w.m * w.bits / 8 + (w.meta ? w.rows * w.cols / 8 : 0)) * (2 + n_tokens);
}

// The number of threads for `bytes` of memory to read or write; slower work counts as more bytes. Threads wake one
// after the other, so t threads cost bytes / t + BYTES_PER_THREAD t. The minimum is at
// t = sqrt(bytes / BYTES_PER_THREAD).
int threads_for(int64_t bytes, int64_t n_units, int most) {
    const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(most, n_units));
    int64_t threads = 1;
    while (threads < limit && (threads + 1) * (threads + 1) * BYTES_PER_THREAD <= bytes) ++threads;
    return int(threads);
}

// Calls work(begin, end, share) for equal shares of n_units, one per thread.
template <typename Work>
void deal(int64_t n_units, int threads, const Work& work) {
    const auto share = [&](int k) { work(n_units * k / threads, n_units * (k + 1) / threads, k); };
    const auto call = [](void* context, int k) { (*static_cast<decltype(share)*>(context))(k); };
    run_shares(threads, call, const_cast<void*>(static_cast<const void*>(&share)));
}

// Memory that begins with a cache line.
template <typename Stored>
struct LineAllocator {
    using value_type = Stored;
    static constexpr std::align_val_t LINE{64};

    LineAllocator() = default;
    template <typename Other>
    LineAllocator(const LineAllocator<Other>&) {}
    Stored* allocate(size_t count) { return static_cast<Stored*>(::operator new(count * sizeof(Stored), LINE)); }
    void deallocate(Stored* memory, size_t) { ::operator delete(memory, LINE); }
    bool operator==(const LineAllocator&) const { return true; }
    bool operator!=(const LineAllocator&) const { return false; }
};

using RoundedTokens = std::vector<int16_t, LineAllocator<int16_t>>;

// Tokens rounded to `bits` bits, 30 or 8, and their scales, as in FewBitsTask.
inline void round_inputs(const Bodies& bodies, const Matrix& tokens, int32_t bits, int64_t block, bool deinterleaved,
                         int64_t padded, RoundedTokens& rounded, std::vector<float>& scales) {
    if (bits == 8) {
        rounded.resize(tokens.rows * padded / 2);
        scales.resize(tokens.rows * padded / 32);
        auto* const bytes = reinterpret_cast<int8_t*>(rounded.data());
        bodies.round_to_bytes(tokens, padded, deinterleaved, bytes, scales.data());
    } else {
        const int64_t blocks = tokens.rows * units(tokens.cols, block);
        rounded.resize(tokens.rows * padded * 2 + blocks * BLOCK_START);
        scales.resize(blocks);
        bodies.round_tokens(tokens, block, deinterleaved, padded, rounded.data(), scales.data());
    }
}

template <typename Work>
int guarded(const Work& work) {
    try {
        work();
        return 0;
    } catch (const std::bad_alloc&) {
        return ACE_OUT_OF_MEMORY;
    }
}

}  // namespace
}  // namespace ace
