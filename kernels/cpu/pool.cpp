// Threads that stay between calls: starting and joining one costs more than a small operation.

#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ace {
namespace {

// Looks at a variable this often, for some ten microseconds, before a thread sleeps. The operations of one layer follow
// each other faster than a sleeping thread wakes.
constexpr int SPINS = 1000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(const Condition& met) {
    for (int spin = 0; spin < SPINS; ++spin) {
        if (met()) return true;
        pause();
    }
    return met();
}

// True in a thread that computes a share: it may not wait for other shares.
thread_local bool inside = false;

// One call at a time. `tickets` holds the number of the call, its number of shares and the next share to take, so that
// a thread that takes a share from an old call fails. A call's other fields stay until all of its shares are done.
class Pool {
public:
    void run(int shares, void (*share)(void*, int), void* context) {
        grow(shares - 1);
        share_ = share;
        context_ = context;
        out_of_memory_ = false;
        left_ = shares;
        const uint64_t call = (tickets_ >> CALL) + 1;
        tickets_ = call << CALL | uint64_t(shares) << SHARES;
        wake(shares - 1);
        while (take()) {
        }
        const auto done = [&] { return left_ == 0; };
        if (!spin_until(done)) {
            std::unique_lock<std::mutex> lock(mutex_);
            done_.wait(lock, done);
        }
        if (out_of_memory_) throw std::bad_alloc();
    }

    bool claim() { return !claimed_.exchange(true); }
    void release() { claimed_ = false; }

private:
    static constexpr int SHARES = 16, CALL = 32;
    static constexpr uint64_t MASK = 0xffff;

    static bool open(uint64_t tickets) { return (tickets & MASK) < (tickets >> SHARES & MASK); }

    // Computes one share of the call, if any is left.
    bool take() {
        uint64_t tickets = tickets_;
        do {
            if (!open(tickets)) return false;
        } while (!tickets_.compare_exchange_weak(tickets, tickets + 1));
        inside = true;
        try {
            share_(context_, int(tickets & MASK));
        } catch (const std::bad_alloc&) {
            out_of_memory_ = true;
        }
        inside = false;
        if (--left_ == 0) {
            // With the lock, so that the caller is not between its last look and its sleep.
            std::lock_guard<std::mutex> lock(mutex_);
            done_.notify_one();
        }
        return true;
    }

    // Shares without a thread of their own are computed by the caller and the other threads.
    void grow(int threads) {
        try {
            for (; threads_ < threads; ++threads_) std::thread([this] { work(); }).detach();
        } catch (const std::system_error&) {
        }
    }

    void wake(int threads) {
        std::lock_guard<std::mutex> lock(mutex_);
        for (int k = 0; k < threads && k < sleeping_; ++k) given_.notify_one();
    }

    void work() {
        const auto given = [&] { return open(tickets_); };
        while (true) {
            if (!spin_until(given)) {
                std::unique_lock<std::mutex> lock(mutex_);
                ++sleeping_;
                given_.wait(lock, given);
                --sleeping_;
            }
            while (take()) {
            }
        }
    }

    std::atomic<bool> claimed_{false}, out_of_memory_{false};
    std::atomic<uint64_t> tickets_{0};
    std::atomic<int> left_{0};
    void (*share_)(void*, int) = nullptr;
    void* context_ = nullptr;
    int threads_ = 0;
    std::mutex mutex_;
    std::condition_variable given_, done_;
    int sleeping_ = 0;
};

// Never destroyed: its threads may run until the process ends.
std::atomic<Pool*> pool{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// A forked child has none of the parent's threads, and perhaps a lock that one of them held: it makes its own pool.
void forget_pool() {
    pool = nullptr;
    inside = false;
}

[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, forget_pool);
#endif

// Without a lock, which a child could inherit locked.
Pool& the_pool() {
    Pool* there = pool;
    if (there) return *there;
    Pool* const made = new Pool;
    if (pool.compare_exchange_strong(there, made)) return *made;
    delete made;
    return *there;
}

}  // namespace

void run_shares(int shares, void (*share)(void*, int), void* context) {
    if (shares > 1 && shares <= MOST_SHARES && !inside) {
        Pool& used = the_pool();
        if (used.claim()) {
            const struct Release {
                Pool& pool;
                ~Release() { pool.release(); }
            } release{used};
            return used.run(shares, share, context);
        }
    }
    for (int k = 0; k < shares; ++k) share(context, k);
}

}  // namespace ace
