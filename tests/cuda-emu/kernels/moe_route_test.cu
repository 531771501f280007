// Routing, the order of pairs, and the weighted sum.
#include "../harness/harness.h"
#include "moe_route.cu"

using namespace harness;

namespace {

struct Case {
    int tokens, experts, shared, top_k, groups, groups_kept;
    bool sigmoid, correction, normalize, expert_scale, ties;
    float scale;
};

struct Routed {
    std::vector<uint32_t> chosen;
    std::vector<double> weights;
};

Routed expected(const Case& c, const std::vector<float>& logits, const std::vector<float>& correction,
                const std::vector<float>& expert_scale) {
    Routed out;
    for (int t = 0; t < c.tokens; t++) {
        std::vector<double> score(c.experts), choose(c.experts);
        double sum = 0;
        for (int e = 0; e < c.experts; e++) {
            const double l = logits[t * c.experts + e];
            score[e] = c.sigmoid ? 1 / (1 + exp(-l)) : exp(l);
            sum += score[e];
        }
        for (int e = 0; e < c.experts; e++) {
            if (!c.sigmoid) {
                score[e] /= sum;
            }
            choose[e] = score[e] + (c.correction ? correction[e] : 0);
        }
        const auto by_value = [](const std::vector<double>& v) {
            std::vector<int> order(v.size());
            for (size_t i = 0; i < v.size(); i++) {
                order[i] = static_cast<int>(i);
            }
            std::stable_sort(order.begin(), order.end(),
                             [&](int a, int b) { return static_cast<float>(v[a]) > static_cast<float>(v[b]); });
            return order;
        };
        if (c.groups > 1) {
            const int size = c.experts / c.groups;
            std::vector<double> best(c.groups);
            for (int g = 0; g < c.groups; g++) {
                std::vector<double> members(choose.begin() + g * size, choose.begin() + (g + 1) * size);
                std::sort(members.rbegin(), members.rend());
                best[g] = members[0] + (size > 1 ? members[1] : 0);
            }
            const auto order = by_value(best);
            for (int k = c.groups_kept; k < c.groups; k++) {
                for (int e = order[k] * size; e < (order[k] + 1) * size; e++) {
                    choose[e] = -INFINITY;
                }
            }
        }
        const auto order = by_value(choose);
        double total = 0;
        for (int k = 0; k < c.top_k; k++) {
            total += score[order[k]];
        }
        for (int k = 0; k < c.top_k; k++) {
            out.chosen.push_back(static_cast<uint32_t>(order[k]));
            out.weights.push_back(score[order[k]] * c.scale / (c.normalize ? total : 1) *
                                  (c.expert_scale ? expert_scale[order[k]] : 1));
        }
        for (int k = 0; k < c.shared; k++) {
            out.chosen.push_back(static_cast<uint32_t>(c.experts + k));
            out.weights.push_back(1);
        }
    }
    return out;
}

void run(const Case& c, int width) {
    Random random(c.tokens * 7 + c.experts);
    const int slots = c.top_k + c.shared, pairs = c.tokens * slots, all = c.experts + c.shared;
    std::vector<float> logits(c.tokens * c.experts), correction(c.experts), expert_scale(c.experts);
    for (float& l : logits) {
        l = c.ties ? static_cast<float>(random.below(3)) : random.normal() * 2;
    }
    for (float& b : correction) {
        b = random.normal() * 0.3f;
    }
    for (float& s : expert_scale) {
        s = static_cast<float>(0.5 + random.unit());
    }
    const int max_tiles = pairs / 64 + all;
    // Rows of logits are padded; what lies between must not count.
    const int stride = (c.experts + 7) / 8 * 8 + 8;
    std::vector<float> spread(c.tokens * stride, 100.0f);
    for (size_t i = 0; i < logits.size(); i++) {
        spread[i / c.experts * stride + i % c.experts] = logits[i];
    }
    Buffer<float> d_logits(spread), d_correction(correction), d_scale(expert_scale), d_weights(pairs);
    Buffer<uint32_t> d_chosen(pairs), d_places(pairs), d_pairs(pairs), d_offsets(all + 1), d_active(1 + all),
        d_tiles(1 + 2 * max_tiles);
    Buffer<unsigned> d_counter(std::vector<unsigned>(1, 0));
    const RouteArgs args{d_logits.get(),
                         c.correction ? d_correction.get() : nullptr,
                         c.expert_scale ? d_scale.get() : nullptr,
                         d_chosen.get(),
                         d_weights.get(),
                         d_places.get(),
                         d_pairs.get(),
                         d_offsets.get(),
                         d_active.get(),
                         d_tiles.get(),
                         d_counter.get(),
                         c.tokens,
                         c.experts,
                         stride,
                         c.shared,
                         c.top_k,
                         c.groups,
                         c.groups_kept,
                         c.sigmoid,
                         c.normalize,
                         c.scale};
    const dim3 grid(static_cast<unsigned>((c.tokens + 15) / 16));
    LAUNCH(moe_route, grid, kRouteThreads, 0, args);
    LAUNCH(moe_route, grid, kRouteThreads, 0, args);
    const std::string name = "tokens " + std::to_string(c.tokens) + " experts " + std::to_string(c.experts);
    const Routed want = expected(c, logits, correction, expert_scale);
    expect_equal(name + " chosen", d_chosen.download(), want.chosen);
    expect_close(name + " weights", d_weights.download(), want.weights, 1e-5);

    std::vector<uint32_t> order, places(pairs), offsets{0}, active{0}, tiles{0};
    for (uint32_t e = 0; e < static_cast<uint32_t>(all); e++) {
        for (int p = 0; p < pairs; p++) {
            if (want.chosen[p] != e) {
                continue;
            }
            places[p] = static_cast<uint32_t>(order.size());
            order.push_back(static_cast<uint32_t>(p));
        }
        const uint32_t size = static_cast<uint32_t>(order.size()) - offsets.back();
        offsets.push_back(static_cast<uint32_t>(order.size()));
        if (size) {
            active.push_back(e), active[0]++;
        }
        for (uint32_t skip = 0; skip < size; skip += 64) {
            tiles.push_back(e), tiles.push_back(skip), tiles[0]++;
        }
    }
    expect_equal(name + " pairs", d_pairs.download(), order);
    expect_equal(name + " places", d_places.download(), places);
    expect_equal(name + " offsets", d_offsets.download(), offsets);
    auto got_active = d_active.download(), got_tiles = d_tiles.download();
    expect(name + " tiles fit", tiles.size() <= got_tiles.size());
    got_active.resize(active.size());
    got_tiles.resize(tiles.size());
    expect_equal(name + " active", got_active, active);
    expect_equal(name + " tiles", got_tiles, tiles);
    expect_equal(name + " counter", d_counter.download(), std::vector<unsigned>(1, 0));

    const auto y = random_bf16(random, static_cast<size_t>(pairs) * width);
    Buffer<bf16> d_y(y), d_out(static_cast<size_t>(c.tokens) * width);
    LAUNCH(moe_combine_bf16, dim3(c.tokens), 64, 0, d_y.get(), d_weights.get(), d_places.get(), d_out.get(), slots,
           width);
    std::vector<double> sum(static_cast<size_t>(c.tokens) * width, 0.0);
    for (int p = 0; p < pairs; p++) {
        for (int i = 0; i < width; i++) {
            sum[static_cast<size_t>(p / slots) * width + i] +=
                want.weights[p] * value(y[static_cast<size_t>(places[p]) * width + i]);
        }
    }
    expect_close(name + " combined", d_out.download(), sum);
}

// A token whose logits are NaN goes somewhere, with NaN, and leaves the others alone.
void run_nan() {
    std::vector<float> logits(3 * 8, 0.5f);
    for (int e = 0; e < 8; e++) {
        logits[8 + e] = NAN;
    }
    Buffer<float> d_logits(logits), d_weights(6);
    Buffer<uint32_t> d_chosen(6), d_places(6), d_pairs(6), d_offsets(9), d_active(9), d_tiles(17);
    Buffer<unsigned> d_counter(std::vector<unsigned>(1, 0));
    const RouteArgs args{d_logits.get(),
                         nullptr,
                         nullptr,
                         d_chosen.get(),
                         d_weights.get(),
                         d_places.get(),
                         d_pairs.get(),
                         d_offsets.get(),
                         d_active.get(),
                         d_tiles.get(),
                         d_counter.get(),
                         3,
                         8,
                         8,
                         0,
                         2,
                         0,
                         0,
                         0,
                         1,
                         1.0f};
    LAUNCH(moe_route, dim3(1), kRouteThreads, 0, args);
    const auto weights = d_weights.download();
    const auto chosen = d_chosen.download();
    expect("NaN stays with its token",
           isnan(weights[2]) && isnan(weights[3]) && chosen[2] < 8 && chosen[3] < 8 && chosen[2] != chosen[3]);
    expect("others are right", weights[0] == 0.5f && weights[5] == 0.5f && chosen[4] == 0 && chosen[5] == 1);
}

}  // namespace

int main() {
    //   tokens experts shared top_k groups kept sigmoid correction normalize expert_scale ties scale
    run({3, 8, 0, 2, 0, 0, false, false, true, false, false, 1.0f}, 72);
    run({17, 60, 1, 4, 0, 0, false, false, false, true, false, 1.5f}, 64);
    run_nan();
    if (small()) {
        return report();
    }
    run({64, 256, 1, 8, 8, 4, true, true, true, false, false, 2.5f}, 264);
    run({40, 128, 0, 8, 0, 0, false, false, true, false, true, 1.0f}, 8);
    run({300, 32, 0, 4, 0, 0, false, true, true, false, false, 1.0f}, 2048);
    run({5, 512, 0, 10, 0, 0, true, false, true, false, false, 1.0f}, 8);
    run({2, 4, 0, 4, 4, 4, true, false, false, false, false, 1.0f}, 8);
    run({1, 16, 2, 1, 4, 1, false, false, true, false, false, 1.0f}, 8);
    return report();
}
