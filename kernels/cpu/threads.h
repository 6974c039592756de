// Shared code of the exported functions: how they distribute units of work to threads and report that memory ran out.
#pragma once

#include "abi.h"
#include "tasks.h"

#include <algorithm>
#include <cstdint>
#include <exception>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace ace {

// The functions for the instruction set in use.
extern const Bodies* bodies;

namespace {

// Bytes that one thread reads in the time in which another one starts: 60 us on a busy machine.
constexpr int64_t BYTES_PER_START = 1 << 20;

int64_t bytes_of(const Matrix& m) { return m.rows * m.cols * (m.element == Element::fp32 ? 4 : 2); }

int64_t units(int64_t size, int64_t unit) { return (size + unit - 1) / unit; }

// The number of threads for `bytes` of memory to read or write; slower work counts as more bytes. Threads start one
// after the other, so t threads cost bytes / t + BYTES_PER_START t. The minimum is at
// t = sqrt(bytes / BYTES_PER_START).
int threads_for(int64_t bytes, int64_t n_units, int most) {
    const int64_t limit = std::max<int64_t>(1, std::min<int64_t>(most, n_units));
    int64_t threads = 1;
    while (threads < limit && (threads + 1) * (threads + 1) * BYTES_PER_START <= bytes) ++threads;
    return int(threads);
}

// Calls work(begin, end, thread) for equal shares of n_units. The calling thread does the first share, and all shares
// for which the system could not start a thread.
template <typename Work>
void deal(int64_t n_units, int threads, const Work& work) {
    const auto share = [&](int thread) { work(n_units * thread / threads, n_units * (thread + 1) / threads, thread); };
    std::vector<std::thread> started;
    started.reserve(threads);
    int next = 1;
    try {
        for (; next < threads; ++next) started.emplace_back(share, next);
    } catch (const std::system_error&) {
    }
    share(0);
    for (; next < threads; ++next) share(next);
    for (std::thread& thread : started) thread.join();
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
