// Attention of any shape: over pages, and beside the queries.
#include "../harness/harness.h"
#include "attention_any.cu"

#include "../harness/heads.h"
#include "../harness/paged.h"

using namespace harness;

namespace {

struct Case {
    int q_heads;
    CacheShape cache;
    std::vector<int> contexts, tokens;
    int window;
    double cap;
    bool sinks;
};

std::vector<float> random_sinks(Random& random, int heads) {
    std::vector<float> sinks(heads);
    for (float& s : sinks) {
        s = random.normal() * 4;
    }
    return sinks;
}

// Heads of each row are as wanted, and what lies behind them is zero.
void check(const std::string& name, const std::vector<bf16>& out, const std::vector<double>& want, int width,
           int stride) {
    std::vector<bf16> got;
    bool zero = true;
    for (size_t i = 0; i < out.size(); i++) {
        if (static_cast<int>(i % stride) < width) {
            got.push_back(out[i]);
        } else {
            zero = zero && out[i].bits == 0;
        }
    }
    expect_close(name, got, want);
    expect(name + ", zero behind rows", zero);
}

void run(const Case& c) {
    Random random(c.q_heads * 1000 + c.cache.head_dim + c.contexts[0]);
    PagedCache cache(c.cache, c.contexts, random);
    cache.fill(random, 2.0f);
    const StepRows step(c.contexts, c.tokens);
    const int dim = c.cache.head_dim, value_dim = cache.value_dim(), group = c.q_heads / c.cache.kv_heads;
    const int stride = c.q_heads * dim + 3, width = c.q_heads * value_dim, out_stride = (width + 7) / 8 * 8;
    const auto q = random_bf16(random, static_cast<size_t>(step.count()) * stride, 1.5f);
    const auto sinks = random_sinks(random, c.q_heads);
    DeviceCache device(cache);
    const DeviceRows rows(step);
    Buffer<bf16> d_q(q), d_out(static_cast<size_t>(step.count()) * out_stride);
    Buffer<float> d_sinks(sinks);
    AttentionAnyArgs args{};
    args.q = d_q.get();
    args.out = d_out.get();
    args.sinks = c.sinks ? d_sinks.get() : nullptr;
    args.positions = rows.positions.get();
    args.token_rows = rows.token_rows.get();
    args.rows = rows.rows.get();
    args.kv = device.layer;
    args.scale = 1.0f / sqrtf(static_cast<float>(dim));
    args.cap = static_cast<float>(c.cap);
    args.window = static_cast<uint32_t>(c.window);
    args.q_stride = stride;
    args.out_stride = out_stride;
    args.q_heads = c.q_heads;
    args.kv_heads = c.cache.kv_heads;
    args.key_dim = dim;
    args.value_dim = value_dim;
    args.value_in_key = c.cache.values_are_keys;
    const dim3 grid(static_cast<unsigned>(step.count()), static_cast<unsigned>(c.q_heads));
    if (c.cache.codes) {
        LAUNCH(attention_any_e4m3, grid, kThreads, 0, args);
    } else {
        LAUNCH(attention_any_bf16, grid, kThreads, 0, args);
    }
    std::vector<double> want;
    const AttentionRule rule{args.scale, c.cap, c.window, true, c.sinks ? &sinks : nullptr};
    for (int t = 0; t < step.count(); t++) {
        for (int h = 0; h < c.q_heads; h++) {
            std::vector<double> query(dim);
            for (int d = 0; d < dim; d++) {
                query[d] = value(q[static_cast<size_t>(t) * stride + h * dim + d]);
            }
            const auto out = reference::attend(cache, step.token_rows[t], h, h / group,
                                               static_cast<int>(step.positions[t]), query, rule);
            want.insert(want.end(), out.begin(), out.end());
        }
    }
    check(
        "any dims " + std::to_string(dim) + " " + std::to_string(value_dim) + " codes " + std::to_string(c.cache.codes),
        d_out.download(), want, width, out_stride);
}

// Sequences that lie whole in rows [q | k | v].
void run_whole(int q_heads, int kv_heads, int key_dim, int value_dim, const std::vector<int>& lengths, int window,
               bool with_sinks) {
    Random random(q_heads + key_dim * 3);
    const int group = q_heads / kv_heads, k_at = q_heads * key_dim, v_at = k_at + kv_heads * key_dim;
    const int stride = v_at + kv_heads * value_dim + 1, width = q_heads * value_dim, out_stride = (width + 7) / 8 * 8;
    const StepRows step(lengths, lengths);
    const auto x = random_bf16(random, static_cast<size_t>(step.count()) * stride, 1.5f);
    const auto sinks = random_sinks(random, q_heads);
    const DeviceRows rows(step);
    Buffer<bf16> d_x(x), d_out(static_cast<size_t>(step.count()) * out_stride);
    Buffer<float> d_sinks(sinks);
    AttentionAnyArgs args{};
    args.q = d_x.get();
    args.out = d_out.get();
    args.sinks = with_sinks ? d_sinks.get() : nullptr;
    args.positions = rows.positions.get();
    args.token_rows = rows.token_rows.get();
    args.rows = rows.rows.get();
    args.scale = 0.2f;
    args.window = static_cast<uint32_t>(window);
    args.q_stride = stride;
    args.out_stride = out_stride;
    args.q_heads = q_heads;
    args.kv_heads = kv_heads;
    args.key_dim = key_dim;
    args.value_dim = value_dim;
    args.whole = 1;
    LAUNCH(attention_any_bf16, dim3(static_cast<unsigned>(step.count()), static_cast<unsigned>(q_heads)), kThreads, 0,
           args);
    std::vector<double> want;
    for (int t = 0; t < step.count(); t++) {
        const RowInfo& row = step.rows[step.token_rows[t]];
        const uint32_t position = step.positions[t];
        const auto at = [&](uint32_t token, int column) {
            return value(x[static_cast<size_t>(token) * stride + column]);
        };
        for (int h = 0; h < q_heads; h++) {
            std::vector<double> out(value_dim, 0.0);
            double sum = with_sinks ? exp(static_cast<double>(sinks[h])) : 0;
            for (uint32_t k = window && position + 1 > args.window ? position + 1 - args.window : 0; k < row.tokens;
                 k++) {
                double score = 0;
                for (int d = 0; d < key_dim; d++) {
                    score += at(static_cast<uint32_t>(t), h * key_dim + d) *
                             at(row.first + k, k_at + h / group * key_dim + d);
                }
                const double w = exp(score * static_cast<double>(args.scale));
                sum += w;
                for (int d = 0; d < value_dim; d++) {
                    out[d] += w * at(row.first + k, v_at + h / group * value_dim + d);
                }
            }
            for (double v : out) {
                want.push_back(v / sum);
            }
        }
    }
    check("whole dims " + std::to_string(key_dim) + " " + std::to_string(value_dim), d_out.download(), want, width,
          out_stride);
}

}  // namespace

int main() {
    //   q heads, {kv heads, key dim, codes, scales, value in key, value dim}, contexts, tokens, window, cap, sinks
    run({2, {1, 7, false, false}, {1, 20}, {1, 3}, 0, 0.0, false});
    run({3, {3, 24, false, false, false, 13}, {70}, {2}, 0, 0.0, true});
    run({2, {1, 80, true, true}, {67}, {1}, 65, 5.0, false});
    run_whole(2, 1, 6, 9, {5, 1}, 0, true);
    if (small()) {
        return report();
    }
    run({4, {1, 576, false, false, true, 512}, {130, 16}, {2, 1}, 0, 0.0, false});
    run({4, {1, 20, true, true, true, 17}, {64, 65}, {1, 1}, 0, 0.0, true});
    run({2, {2, 1024, false, false}, {18}, {1}, 0, 0.0, false});
    run({1, {1, 513, true, false, false, 1024}, {33}, {1}, 9, 0.0, true});
    run({6, {2, 64, false, false}, {200, 1, 31}, {5, 1, 31}, 33, 20.0, true});
    run({16, {1, 12, false, false, false, 257}, {129}, {1}, 1, 0.0, false});
    run_whole(4, 4, 28, 28, {70, 1, 3}, 0, false);
    run_whole(6, 3, 11, 300, {66}, 20, false);
    return report();
}
