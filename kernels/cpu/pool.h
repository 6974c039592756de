// The pool of threads that the exported functions share.
#pragma once

namespace ace {

constexpr int MOST_SHARES = 0xffff;

// Calls share(context, k) for every k below `shares`, in threads of the pool and in the calling one, and returns once
// all are done. One call uses the pool at a time: a call from a share, or while another Python thread uses the pool,
// computes its shares one after the other. Throws std::bad_alloc if a share does.
void run_shares(int shares, void (*share)(void*, int), void* context);

}  // namespace ace
