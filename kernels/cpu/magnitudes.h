// The largest magnitudes of the groups of a quantized weight, in fp32.
#pragma once

#include "elements.h"

namespace ace {
namespace {

// Those of OUTPUTS rows, block by block of inputs. A few groups of each row are widened at once.
template <int OUTPUTS>
class Magnitudes {
public:
    // Rows from `first` on, with `groups` of `blocks` blocks each.
    ACE_INLINE Magnitudes(const FewBitsWeight& weight, int64_t first, int64_t groups, int64_t blocks)
        : weight_(weight),
          blocks_(blocks),
          from_(first * groups),
          end_(weight.rows * groups),
          hop_(groups < LANES ? LANES : groups),
          at_once_(groups < LANES ? int(groups) : LANES),
          lane_(at_once_ - 1) {}

    // Goes to block `b`: call it for each block in order.
    ACE_INLINE void go_to(int64_t b) {
        if (b != next_) return;
        next_ += blocks_;
        if (++lane_ == at_once_) widen();
    }
    ACE_INLINE float of(int r) const { return values_[r * at_once_ + lane_]; }

private:
    // Rows of few groups are one run of numbers.
    ACE_INLINE void widen() {
        with_element(weight_.element, [&](auto element) ACE_INLINED {
            using E = decltype(element);
            const auto* absmax = static_cast<const typename E::Stored*>(weight_.absmax);
            for (int k = 0; k < OUTPUTS * at_once_; k += LANES) {
                const int64_t from = from_ + k / LANES * hop_, left = end_ - from;
                store(values_ + k, left < LANES ? E::load(absmax + from, int(left)) : E::load(absmax + from));
            }
        });
        from_ += LANES;
        lane_ = 0;
    }

    const FewBitsWeight& weight_;
    const int64_t blocks_;
    int64_t next_ = 0, from_;  // the first block of the next group; where to widen next
    const int64_t end_, hop_;
    const int at_once_;
    int lane_;
    float values_[OUTPUTS * LANES];
};

}  // namespace
}  // namespace ace
