// Prefill attention over ragged chunks of prompts.
#include "../harness/harness.h"
#include "attention_prefill.cu"

#include "../harness/paged.h"

using namespace harness;

namespace {

struct Chunk {
    int context, tokens;
};

struct Case {
    int q_heads;
    CacheShape cache;
    std::vector<Chunk> chunks;
    int window;
    double cap;
    bool sinks, causal;
};

template <int kKey, int kValue, bool kE4m3>
void launch_prefill(const char* name, void (*kernel)(PrefillArgs), size_t items, const PrefillArgs& args) {
    using P = Prefill<kKey, kValue, kE4m3>;
    harness::launch(name, kernel, dim3(static_cast<unsigned>(items)), P::kThreads, P::kSharedBytes, args);
}

void dispatch(const Case& c, size_t items, const PrefillArgs& args) {
#define DIM(dim) KEY(dim, dim, dim)
#define KEY(key, value, name)                                                                                   \
    case key:                                                                                                   \
        if (c.cache.codes) {                                                                                    \
            return launch_prefill<key, value, true>("e4m3 " #name, attention_prefill_e4m3_##name, items, args); \
        }                                                                                                       \
        return launch_prefill<key, value, false>("bf16 " #name, attention_prefill_bf16_##name, items, args);
    switch (c.cache.head_dim) {
        DIM(64) DIM(96) DIM(128) DIM(256) DIM(512) KEY(576, 512, 576_512) KEY(640, 512, 640_512)
    }
#undef KEY
#undef DIM
    abort();
}

void run(const Case& c) {
    Random random(c.q_heads * 1000 + c.cache.head_dim + c.chunks[0].context);
    std::vector<int> contexts;
    std::vector<RowInfo> rows;
    std::vector<PrefillItem> items;
    uint32_t tokens = 0;
    const int group = c.q_heads / c.cache.kv_heads, dim = c.cache.head_dim;
    for (const Chunk& chunk : c.chunks) {
        const uint32_t row = static_cast<uint32_t>(rows.size());
        rows.push_back({row, tokens, static_cast<uint32_t>(chunk.tokens), static_cast<uint32_t>(chunk.context)});
        contexts.push_back(chunk.context);
        tokens += chunk.tokens;
        for (int h = 0; h < c.cache.kv_heads; h++) {
            for (int f = 0; f < chunk.tokens * group; f += kQueries) {
                items.push_back({row, static_cast<uint32_t>(h), static_cast<uint32_t>(f)});
            }
        }
    }
    std::reverse(items.begin(), items.end());
    PagedCache cache(c.cache, contexts, random);
    cache.fill(random, 2.0f);
    const int stride = c.q_heads * dim + 8, value_dim = cache.value_dim();
    const auto q = random_bf16(random, static_cast<size_t>(tokens) * stride, 1.5f);
    std::vector<float> sinks(c.q_heads);
    for (float& s : sinks) {
        s = random.normal() * 4;
    }
    DeviceCache device(cache);
    Buffer<bf16> d_q(q), d_out(static_cast<size_t>(tokens) * c.q_heads * value_dim);
    Buffer<float> d_sinks(sinks);
    Buffer<RowInfo> d_rows(rows);
    Buffer<PrefillItem> d_items(items);
    PrefillArgs args{};
    args.q = d_q.get();
    args.out = d_out.get();
    args.sinks = c.sinks ? d_sinks.get() : nullptr;
    args.rows = d_rows.get();
    args.items = d_items.get();
    args.kv = device.layer;
    args.scale = 1.0f / sqrtf(static_cast<float>(dim));
    args.cap = static_cast<float>(c.cap);
    args.window = static_cast<uint32_t>(c.window);
    args.q_stride = stride;
    args.q_heads = c.q_heads;
    args.values_are_keys = c.cache.values_are_keys;
    args.causal = c.causal;
    dispatch(c, items.size(), args);

    std::vector<double> want(static_cast<size_t>(tokens) * c.q_heads * value_dim);
    const AttentionRule rule{args.scale, c.cap, c.window, c.causal, c.sinks ? &sinks : nullptr};
    for (size_t r = 0; r < rows.size(); r++) {
        for (uint32_t i = 0; i < rows[r].tokens; i++) {
            const size_t token = rows[r].first + i;
            const int position = contexts[r] - static_cast<int>(rows[r].tokens) + static_cast<int>(i);
            for (int h = 0; h < c.q_heads; h++) {
                std::vector<double> query(dim);
                for (int d = 0; d < dim; d++) {
                    query[d] = value(q[token * stride + h * dim + d]);
                }
                const auto out = reference::attend(cache, r, h, h / group, position, query, rule);
                std::copy(out.begin(), out.end(), want.begin() + (token * c.q_heads + h) * value_dim);
            }
        }
    }
    expect_close("heads " + std::to_string(c.q_heads) + " dim " + std::to_string(dim) + " codes " +
                     std::to_string(c.cache.codes) + " window " + std::to_string(c.window),
                 d_out.download(), want);
}

// Sequences that lie whole in rows [q | k | v].
void run_beside(int q_heads, int kv_heads, const std::vector<int>& lengths, int window, bool causal) {
    constexpr int kDim = 64;
    Random random(q_heads * 10 + lengths[0]);
    const int group = q_heads / kv_heads, stride = (q_heads + 2 * kv_heads) * kDim + 8;
    std::vector<RowInfo> rows;
    std::vector<PrefillItem> items;
    uint32_t tokens = 0;
    for (int length : lengths) {
        const uint32_t row = static_cast<uint32_t>(rows.size()), n = static_cast<uint32_t>(length);
        rows.push_back({0, tokens, n, n});
        tokens += n;
        for (int h = 0; h < kv_heads; h++) {
            for (int f = 0; f < length * group; f += kQueries) {
                items.push_back({row, static_cast<uint32_t>(h), static_cast<uint32_t>(f)});
            }
        }
    }
    const auto x = random_bf16(random, static_cast<size_t>(tokens) * stride, 1.5f);
    Buffer<bf16> d_x(x), d_out(static_cast<size_t>(tokens) * q_heads * kDim);
    Buffer<RowInfo> d_rows(rows);
    Buffer<PrefillItem> d_items(items);
    PrefillArgs args{};
    args.q = d_x.get();
    args.out = d_out.get();
    args.rows = d_rows.get();
    args.items = d_items.get();
    args.kv.kv_heads = static_cast<uint32_t>(kv_heads);
    args.scale = 0.125f;
    args.window = static_cast<uint32_t>(window);
    args.q_stride = stride;
    args.q_heads = q_heads;
    args.causal = causal;
    args.beside = 1;
    launch_prefill<kDim, kDim, false>("beside", attention_prefill_bf16_64, items.size(), args);
    std::vector<double> want;
    for (const RowInfo& row : rows) {
        const auto at = [&](uint32_t i, int column) { return value(x[(row.first + i) * stride + column]); };
        for (uint32_t i = 0; i < row.tokens; i++) {
            for (int h = 0; h < q_heads; h++) {
                std::vector<double> out(kDim, 0.0);
                double sum = 0;
                const uint32_t from = window && i + 1 > args.window ? i + 1 - args.window : 0;
                for (uint32_t k = from; k < (causal ? i + 1 : row.tokens); k++) {
                    double score = 0;
                    for (int d = 0; d < kDim; d++) {
                        score += at(i, h * kDim + d) * at(k, (q_heads + h / group) * kDim + d);
                    }
                    const double w = exp(score * args.scale);
                    sum += w;
                    for (int d = 0; d < kDim; d++) {
                        out[d] += w * at(k, (q_heads + kv_heads + h / group) * kDim + d);
                    }
                }
                for (double v : out) {
                    want.push_back(v / sum);
                }
            }
        }
    }
    expect_close("beside, heads " + std::to_string(q_heads) + " window " + std::to_string(window), d_out.download(),
                 want);
}

}  // namespace

int main() {
    //   q heads, {kv heads, dim, codes, scales, values = keys}, {context, tokens}, window, cap, sinks, causal
    run({4, {2, 64, false, false}, {{1, 1}, {37, 37}, {130, 5}}, 0, 0.0, false, true});
    run({2, {1, 64, true, true}, {{70, 40}}, 20, 0.0, true, true});
    run({1, {1, 512, false, false, true}, {{19, 18}}, 0, 0.0, false, true});
    run({2, {1, 640, false, false, true, 512}, {{20, 3}}, 0, 0.0, true, true});
    run_beside(2, 1, {5, 20}, 0, false);
    if (small()) {
        return report();
    }
    run({3, {1, 576, false, false, true, 512}, {{70, 30}, {5, 5}}, 0, 0.0, false, true});
    run({4, {2, 640, true, true, true, 512}, {{35, 35}}, 10, 0.0, true, true});
    run({1, {1, 576, true, false, true, 512}, {{18, 17}}, 0, 9.0, false, true});
    run_beside(6, 2, {70, 1, 33}, 12, false);
    run_beside(2, 2, {66}, 0, true);
    run({8, {1, 128, false, false}, {{65, 65}, {16, 16}, {20, 0}, {200, 3}}, 0, 20.0, true, true});
    run({3, {3, 96, false, false}, {{129, 100}}, 33, 0.0, false, true});
    run({16, {1, 64, false, false}, {{90, 9}, {15, 15}}, 0, 0.0, true, true});
    run({5, {1, 128, true, true}, {{140, 30}, {64, 64}}, 64, 0.0, false, true});
    run({2, {2, 256, false, false}, {{100, 70}}, 0, 50.0, false, true});
    run({2, {1, 256, true, false}, {{33, 33}}, 8, 0.0, false, true});
    run({2, {1, 512, true, true}, {{50, 34}}, 0, 0.0, true, true});
    run({2, {1, 96, true, true, true}, {{66, 66}}, 0, 0.0, false, true});
    run({4, {4, 64, false, false}, {{67, 67}, {1, 1}, {128, 128}}, 0, 0.0, false, false});
    return report();
}
