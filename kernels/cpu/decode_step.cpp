// One token of each of several texts through all blocks of a decoder.

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
    Step(const Bodies& bodies, const AceDecoder& decoder, const AceCache* caches, int64_t n_texts, int32_t bits,
         int threads)
        : bodies_(bodies),
          of_(decoder),
          caches_(caches),
          n_texts_(n_texts),
          threads_(threads),
          n_joined_((decoder.heads + 2 * decoder.kv_heads) * decoder.head_size),
          hidden_(n_texts * decoder.hidden),
          normed_(bodies, n_texts, decoder.hidden, bits),
          attended_(bodies, n_texts, decoder.heads * decoder.head_size, bits),
          gated_(bodies, n_texts, decoder.intermediate, bits),
          joined_(n_texts * n_joined_),
          gates_(n_texts * 2 * decoder.intermediate),
          added_(n_texts * decoder.hidden) {}

    void run(const float* hidden, float* logits) {
        std::copy(hidden, hidden + n_texts_ * of_.hidden, hidden_.begin());
        for (int64_t b = 0; b < of_.n_blocks; ++b) {
            attention(b);
            feed_forward(of_.blocks[b]);
        }
        norm(of_.norm);
        multiply(of_.head, 1, normed_, logits, of_.head->rows);
    }

    Seconds seconds;

private:
    void attention(int64_t b) {
        const AceBlock& block = of_.blocks[b];
        norm(block.attention_norm);
        multiply(block.inputs, block.n_inputs, normed_, joined_.data(), n_joined_);
        {
            const Timed timed(seconds.attention);
            for (int64_t t = 0; t < n_texts_; ++t) position_heads(block, b, t);
            attend(b);
        }
        attended_.changed();
        multiply(block.output, 1, attended_, added_.data(), of_.hidden);
        add();
    }

    void feed_forward(const AceBlock& block) {
        norm(block.feed_norm);
        const int64_t n_gates = of_.intermediate;
        multiply(block.gates, block.n_gates, normed_, gates_.data(), 2 * n_gates);
        for (int64_t t = 0; t < n_texts_; ++t) {
            const float* gates = gates_.data() + t * 2 * n_gates;
            bodies_.gate(Activation(of_.activation), gates, gates + n_gates, n_gates, gated_.of(t));
        }
        gated_.changed();
        multiply(block.down, 1, gated_, added_.data(), of_.hidden);
        add();
    }

    void norm(const float* weight) {
        for (int64_t t = 0; t < n_texts_; ++t) {
            bodies_.rms_norm(hidden_.data() + t * of_.hidden, weight, of_.eps, of_.hidden, normed_.of(t));
        }
        normed_.changed();
    }

    void add() {
        for (size_t j = 0; j < hidden_.size(); ++j) hidden_[j] += added_[j];
    }

    // The outputs of `count` weights that read the same tokens: for each token, `stride` numbers, one weight after the
    // other.
    void multiply(const AceProduct* products, int64_t count, Tokens& tokens, float* out, int64_t stride) {
        const Timed timed(seconds.products);
        int64_t rows = 0, cost = 0;
        for (int64_t k = 0; k < count; ++k) {
            kind_of(products[k]).prepare(products[k], tokens);
            rows += products[k].rows;
            cost += kind_of(products[k]).cost(products[k], tokens.count());
        }
        const int64_t tiles = units(rows, ROWS_AT_ONCE);
        deal(tiles, threads_for(cost, tiles, threads_), [&](int64_t begin, int64_t end, int) {
            int64_t first = begin * ROWS_AT_ONCE, last = std::min(end * ROWS_AT_ONCE, rows);
            float* to = out;
            for (int64_t k = 0; k < count && last > 0; ++k) {
                const AceProduct& product = products[k];
                const int64_t from = std::max<int64_t>(first, 0), stop = std::min(last, product.rows);
                if (from < stop) kind_of(product).multiply(product, tokens, {to, stride}, from, stop);
                to += product.rows;
                first -= product.rows;
                last -= product.rows;
            }
        });
    }

    // A text's keys or values of a block, from its first head on.
    float* cached(float* of_text, const AceCache& cache, int64_t b) const {
        return of_text + b * of_.kv_heads * cache.capacity * of_.head_size;
    }

    // Norms and positions of a text's queries and keys; the new key and value go into its cache.
    void position_heads(const AceBlock& block, int64_t b, int64_t t) {
        const AceCache& cache = caches_[t];
        const int64_t size = of_.head_size, position = cache.position;
        const float* cosines = cache.cosines + position * of_.rotary_size;
        const float* sines = cache.sines + position * of_.rotary_size;
        float* joined = joined_.data() + t * n_joined_;
        for (int64_t h = 0; h < of_.heads + of_.kv_heads; ++h) {
            float* head = joined + h * size;
            const float* weight = h < of_.heads ? block.query_norm : block.key_norm;
            if (weight) bodies_.rms_norm(head, weight, of_.eps, size, head);
            bodies_.rotate_head(head, cosines, sines, of_.rotary_size);
        }
        const float *keys = joined + of_.heads * size, *values = keys + of_.kv_heads * size;
        const int64_t lane = position % ACE_CACHE_LANES, before = position - lane;
        float *all_keys = cached(cache.keys, cache, b), *all_values = cached(cache.values, cache, b);
        for (int64_t h = 0; h < of_.kv_heads; ++h) {
            float* to = all_keys + (h * cache.capacity + before) * size + lane;
            for (int64_t j = 0; j < size; ++j) to[j * ACE_CACHE_LANES] = keys[h * size + j];
            std::copy(values + h * size, values + (h + 1) * size, all_values + (h * cache.capacity + position) * size);
        }
    }

    void attend(int64_t b) {
        int64_t positions = 0;
        for (int64_t t = 0; t < n_texts_; ++t) positions += caches_[t].position + 1;
        const int64_t bytes = 2 * positions * of_.heads * of_.head_size * int64_t(sizeof(float));
        const int64_t heads = n_texts_ * of_.heads;
        deal(heads, threads_for(bytes, heads, threads_), [&](int64_t begin, int64_t end, int) {
            while (begin < end) {
                const int64_t t = begin / of_.heads, before = t * of_.heads, stop = std::min(end, before + of_.heads);
                bodies_.attend(attention_of(t, b), begin - before, stop - before);
                begin = stop;
            }
        });
    }

    AttentionTask attention_of(int64_t t, int64_t b) {
        const AceCache& cache = caches_[t];
        return {joined_.data() + t * n_joined_,
                cached(cache.keys, cache, b),
                cached(cache.values, cache, b),
                of_.heads,
                of_.kv_heads,
                of_.head_size,
                cache.position + 1,
                cache.capacity,
                of_.scaling,
                attended_.of(t)};
    }

    const Bodies& bodies_;
    const AceDecoder& of_;
    const AceCache* const caches_;
    const int64_t n_texts_;
    const int threads_;
    const int64_t n_joined_;
    std::vector<float> hidden_;
    Tokens normed_, attended_, gated_;
    std::vector<float> joined_, gates_, added_;
};

}  // namespace
}  // namespace ace

using namespace ace;

extern "C" {

int ace_decode_step(const struct AceDecoder* decoder, const struct AceCache* caches, int64_t n_texts,
                    const float* hidden, float* logits, double* seconds, int32_t threads) {
    return guarded([&] {
        const auto start = Clock::now();
        Step step(*bodies_in_use, *decoder, caches, n_texts, input_bits, threads);
        step.run(hidden, logits);
        seconds[0] = step.seconds.products;
        seconds[1] = step.seconds.attention;
        seconds[2] = std::chrono::duration<double>(Clock::now() - start).count();
    });
}

}  // extern "C"
