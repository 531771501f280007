// Decode attention over ragged contexts, whole rows and split ones.
#include "../harness/harness.h"
#include "attention_decode.cu"

#include "../harness/paged.h"

using namespace harness;

namespace {

struct Case {
    int q_heads;
    CacheShape cache;
    std::vector<int> contexts;
    int blocks;  // of threads
    int window;
    double cap;
    bool sinks;
};

struct Plan {
    std::vector<uint32_t> starts{0};
    std::vector<DecodeItem> items;
    int parts = 0, groups = 0;
};

// Deals all pages of all rows and head tiles to `blocks` equal shares, in order: what the host's planner does.
Plan deal(const Case& c) {
    const int group = c.q_heads / c.cache.kv_heads, tiles = c.cache.kv_heads * ((group + 15) / 16);
    Plan plan;
    std::vector<std::pair<uint32_t, uint32_t>> spans;
    long total = 0;
    for (int context : c.contexts) {
        const int first = c.window && context > c.window ? (context - c.window) / 16 : 0;
        spans.push_back({first, (context + 15) / 16});
        total += static_cast<long>(spans.back().second - first) * tiles;
    }
    const long share = std::max(1L, (total + c.blocks - 1) / c.blocks);
    long room = share;
    for (size_t row = 0; row < spans.size(); row++) {
        for (int tile = 0; tile < tiles; tile++) {
            const size_t begin = plan.items.size();
            uint32_t at = spans[row].first;
            while (at < spans[row].second) {
                const uint32_t take = static_cast<uint32_t>(std::min<long>(room, spans[row].second - at));
                plan.items.push_back(
                    {static_cast<uint32_t>(row), static_cast<uint32_t>(tile), at, at + take, -1, 0, 0, 0});
                at += take;
                room -= take;
                if (room == 0) {
                    plan.starts.push_back(static_cast<uint32_t>(plan.items.size()));
                    room = share;
                }
            }
            const size_t parts = plan.items.size() - begin;
            if (parts < 2) {
                continue;
            }
            for (size_t p = begin; p < plan.items.size(); p++) {
                DecodeItem& item = plan.items[p];
                item.partial = static_cast<int32_t>(plan.parts + (p - begin));
                item.group = static_cast<uint32_t>(plan.groups);
                item.group_first = static_cast<uint32_t>(plan.parts);
                item.group_parts = static_cast<uint32_t>(parts);
            }
            plan.parts += static_cast<int>(parts);
            plan.groups++;
        }
    }
    plan.starts.resize(c.blocks + 1, static_cast<uint32_t>(plan.items.size()));
    return plan;
}

template <int kKey, int kValue, bool kE4m3>
void launch_decode(const char* name, void (*kernel)(DecodeArgs), int blocks, const DecodeArgs& args) {
    using D = Decode<kKey, kValue, kE4m3>;
    harness::launch(name, kernel, dim3(blocks), D::kThreads, D::kSharedBytes, args);
}

void dispatch(const Case& c, const DecodeArgs& args) {
#define DIM(dim) KEY(dim, dim, dim)
#define KEY(key, value, name)                                                                                    \
    case key:                                                                                                    \
        if (c.cache.codes) {                                                                                     \
            return launch_decode<key, value, true>("e4m3 " #name, attention_decode_e4m3_##name, c.blocks, args); \
        }                                                                                                        \
        return launch_decode<key, value, false>("bf16 " #name, attention_decode_bf16_##name, c.blocks, args);
    switch (c.cache.head_dim) {
        DIM(64) DIM(96) DIM(128) DIM(256) DIM(512) KEY(576, 512, 576_512) KEY(640, 512, 640_512)
    }
#undef KEY
#undef DIM
    abort();
}

void run(const Case& c) {
    Random random(c.q_heads * 1000 + c.cache.head_dim + c.contexts[0]);
    PagedCache cache(c.cache, c.contexts, random);
    cache.fill(random, 2.0f);
    const int tokens = static_cast<int>(c.contexts.size()), dim = c.cache.head_dim;
    const int value_dim = cache.value_dim();
    const int stride = (c.q_heads + 2 * c.cache.kv_heads) * dim;
    const auto q = random_bf16(random, static_cast<size_t>(tokens) * stride, 1.5f);
    std::vector<float> sinks(c.q_heads);
    for (float& s : sinks) {
        s = random.normal() * 4;
    }
    std::vector<RowInfo> rows;
    for (int t = 0; t < tokens; t++) {
        // Rows lie in the step in another order than their slots.
        rows.push_back(
            {static_cast<uint32_t>(t), static_cast<uint32_t>(tokens - 1 - t), 1, static_cast<uint32_t>(c.contexts[t])});
    }
    const Plan plan = deal(c);
    DeviceCache device(cache);
    Buffer<bf16> d_q(q), d_out(static_cast<size_t>(tokens) * c.q_heads * value_dim);
    Buffer<float> d_sinks(sinks), d_partial(static_cast<size_t>(plan.parts) * 16 * (value_dim + 2));
    Buffer<RowInfo> d_rows(rows);
    Buffer<uint32_t> d_starts(plan.starts);
    Buffer<DecodeItem> d_items(plan.items);
    Buffer<unsigned> d_counters(std::vector<unsigned>(plan.groups, 0));
    DecodeArgs args{};
    args.q = d_q.get();
    args.out = d_out.get();
    args.sinks = c.sinks ? d_sinks.get() : nullptr;
    args.rows = d_rows.get();
    args.starts = d_starts.get();
    args.items = d_items.get();
    args.partial = d_partial.get();
    args.counters = d_counters.get();
    args.kv = device.layer;
    args.scale = 1.0f / sqrtf(static_cast<float>(dim));
    args.cap = static_cast<float>(c.cap);
    args.window = static_cast<uint32_t>(c.window);
    args.q_stride = stride;
    args.q_heads = c.q_heads;
    args.values_are_keys = c.cache.values_are_keys;
    dispatch(c, args);
    dispatch(c, args);

    std::vector<double> want(static_cast<size_t>(tokens) * c.q_heads * value_dim);
    const AttentionRule rule{args.scale, c.cap, c.window, true, c.sinks ? &sinks : nullptr};
    for (int t = 0; t < tokens; t++) {
        const int token = tokens - 1 - t;
        for (int h = 0; h < c.q_heads; h++) {
            std::vector<double> query(dim);
            for (int d = 0; d < dim; d++) {
                query[d] = value(q[static_cast<size_t>(token) * stride + h * dim + d]);
            }
            const auto out =
                reference::attend(cache, t, h, h / (c.q_heads / c.cache.kv_heads), c.contexts[t] - 1, query, rule);
            std::copy(out.begin(), out.end(), want.begin() + (static_cast<size_t>(token) * c.q_heads + h) * value_dim);
        }
    }
    expect_close("heads " + std::to_string(c.q_heads) + " dim " + std::to_string(dim) + " codes " +
                     std::to_string(c.cache.codes) + " parts " + std::to_string(plan.parts),
                 d_out.download(), want);
    expect_equal("counters", d_counters.download(), std::vector<unsigned>(plan.groups, 0));
}

}  // namespace

int main() {
    //   q heads, {kv heads, dim, codes, scales, values = keys}, contexts, blocks, window, cap, sinks
    run({4, {2, 64, false, false}, {1, 37, 130}, 4, 0, 0.0, false});
    run({8, {1, 64, true, true}, {16, 17, 200}, 3, 0, 0.0, true});
    run({4, {1, 512, false, false, true}, {70, 15}, 2, 0, 0.0, false});
    run({3, {1, 640, false, false, true, 512}, {33, 2}, 3, 0, 0.0, true});
    if (small()) {
        return report();
    }
    run({16, {1, 128, false, false}, {300, 15, 16, 33}, 6, 0, 20.0, true});
    run({6, {6, 96, false, false}, {31, 129}, 5, 40, 0.0, false});
    run({24, {1, 64, false, false}, {90}, 3, 0, 0.0, true});
    run({5, {1, 128, true, true}, {260, 1}, 7, 100, 0.0, true});
    run({4, {2, 256, false, false}, {65, 300}, 3, 0, 50.0, false});
    run({2, {1, 256, true, false}, {33, 18}, 2, 17, 0.0, false});
    run({4, {1, 512, true, true}, {150, 16}, 3, 0, 0.0, true});
    run({2, {1, 96, true, true, true}, {100}, 2, 0, 0.0, false});
    run({8, {8, 128, false, false}, {1, 2, 3, 4, 5, 6, 7, 8, 9}, 5, 3, 0.0, true});
    run({2, {1, 64, false, false}, {4000, 1}, 24, 0, 0.0, false});
    run({20, {1, 576, false, false, true, 512}, {150, 16}, 4, 0, 0.0, false});
    run({4, {2, 640, true, true, true, 512}, {65, 40}, 3, 0, 0.0, true});
    run({2, {1, 576, true, false, true, 512}, {47}, 1, 20, 30.0, false});
    return report();
}
