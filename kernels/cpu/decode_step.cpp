// One token through all blocks of a decoder.

#include "product.h"

#include <chrono>

namespace ace {
namespace {

using Clock = std::chrono::steady_clock;

// Adds the time until its end to a sum of seconds.
class Timed {
public:
    explicit Timed(double& seconds) : seconds_(seconds), start_(Clock::now()) {}
    ~Timed() { seconds_ += std::chrono::duration<double>(Clock::now() - start_).count(); }

private:
    double& seconds_;
    const Clock::time_point start_;
};

// Rows of a share are a multiple of this, so that products take several at once.
constexpr int64_t ROWS_AT_ONCE = 8;

struct Seconds {
    double products = 0, attention = 0;
};

class Step {
public:
    // Products with quantized weights round tokens to `bits` bits.
    Step(const AceDecoder& decoder, int64_t position, int32_t bits, int threads)
        : of_(decoder),
          position_(position),
          threads_(threads),
          hidden_(decoder.hidden),
          normed_(decoder.hidden, bits),
          attended_(decoder.heads * decoder.head_size, bits),
          gated_(decoder.intermediate, bits),
          joined_((decoder.heads + 2 * decoder.kv_heads) * decoder.head_size),
          gates_(2 * decoder.intermediate),
          added_(decoder.hidden) {}

    void run(const float* hidden, float* logits) {
        std::copy(hidden, hidden + of_.hidden, hidden_.begin());
        for (int64_t b = 0; b < of_.n_blocks; ++b) {
            attention(of_.blocks[b]);
            feed_forward(of_.blocks[b]);
        }
        norm(of_.norm);
        multiply(of_.head, 1, normed_, logits);
    }

    Seconds seconds;

private:
    void attention(const AceBlock& block) {
        norm(block.attention_norm);
        multiply(block.inputs, block.n_inputs, normed_, joined_.data());
        {
            const Timed timed(seconds.attention);
            position_heads(block);
            attend(block);
        }
        attended_.changed();
        multiply(block.output, 1, attended_, added_.data());
        add();
    }

    void feed_forward(const AceBlock& block) {
        norm(block.feed_norm);
        multiply(block.gates, block.n_gates, normed_, gates_.data());
        bodies->gate(Activation(of_.activation), gates_.data(), gates_.data() + of_.intermediate, of_.intermediate,
                     gated_.data());
        gated_.changed();
        multiply(block.down, 1, gated_, added_.data());
        add();
    }

    void norm(const float* weight) {
        bodies->rms_norm(hidden_.data(), weight, of_.eps, of_.hidden, normed_.data());
        normed_.changed();
    }

    void add() {
        for (int64_t j = 0; j < of_.hidden; ++j) hidden_[j] += added_[j];
    }

    // The outputs of `count` weights that read the same token, one after the other.
    void multiply(const AceProduct* products, int64_t count, Token& token, float* out) {
        const Timed timed(seconds.products);
        int64_t rows = 0, cost = 0;
        for (int64_t k = 0; k < count; ++k) {
            kind_of(products[k]).prepare(products[k], token);
            rows += products[k].rows;
            cost += kind_of(products[k]).cost(products[k]);
        }
        const int64_t tiles = units(rows, ROWS_AT_ONCE);
        deal(tiles, threads_for(cost, tiles, threads_), [&](int64_t begin, int64_t end, int) {
            int64_t first = begin * ROWS_AT_ONCE, last = std::min(end * ROWS_AT_ONCE, rows);
            float* to = out;
            for (int64_t k = 0; k < count && last > 0; ++k) {
                const AceProduct& product = products[k];
                const int64_t stop = std::min(last, product.rows);
                if (first < stop) kind_of(product).multiply(product, token, to, std::max<int64_t>(first, 0), stop);
                to += product.rows;
                first -= product.rows;
                last -= product.rows;
            }
        });
    }

    // Norms and positions of queries and keys; the new key and value go into the cache.
    void position_heads(const AceBlock& block) {
        const int64_t size = of_.head_size;
        const float* cosines = of_.cosines + position_ * of_.rotary_size;
        const float* sines = of_.sines + position_ * of_.rotary_size;
        float* keys = joined_.data() + of_.heads * size;
        const float* values = keys + of_.kv_heads * size;
        for (int64_t h = 0; h < of_.heads + of_.kv_heads; ++h) {
            float* head = joined_.data() + h * size;
            const float* weight = h < of_.heads ? block.query_norm : block.key_norm;
            if (weight) bodies->rms_norm(head, weight, of_.eps, size, head);
            bodies->rotate_head(head, cosines, sines, of_.rotary_size);
        }
        const int64_t lane = position_ % ACE_CACHE_LANES, before = position_ - lane;
        for (int64_t h = 0; h < of_.kv_heads; ++h) {
            float* to = block.keys + (h * of_.capacity + before) * size + lane;
            for (int64_t j = 0; j < size; ++j) to[j * ACE_CACHE_LANES] = keys[h * size + j];
            std::copy(values + h * size, values + (h + 1) * size, block.values + (h * of_.capacity + position_) * size);
        }
    }

    void attend(const AceBlock& block) {
        const int64_t length = position_ + 1;
        const AttentionTask task = {joined_.data(), block.keys,    block.values, of_.heads, of_.kv_heads, of_.head_size,
                                    length,         of_.capacity,  of_.scaling,  attended_.data()};
        const int64_t bytes = 2 * length * of_.heads * of_.head_size * int64_t(sizeof(float));
        deal(of_.heads, threads_for(bytes, of_.heads, threads_),
             [&](int64_t begin, int64_t end, int) { bodies->attend(task, begin, end); });
    }

    const AceDecoder& of_;
    const int64_t position_;
    const int threads_;
    std::vector<float> hidden_;
    Token normed_, attended_, gated_;
    std::vector<float> joined_, gates_, added_;
};

}  // namespace
}  // namespace ace

using namespace ace;

extern "C" {

int ace_decode_step(const struct AceDecoder* decoder, const float* hidden, int64_t position, float* logits,
                    double* seconds, int32_t threads) {
    return guarded([&] {
        const auto start = Clock::now();
        Step step(*decoder, position, input_bits, threads);
        step.run(hidden, logits);
        seconds[0] = step.seconds.products;
        seconds[1] = step.seconds.attention;
        seconds[2] = std::chrono::duration<double>(Clock::now() - start).count();
    });
}

}  // extern "C"
