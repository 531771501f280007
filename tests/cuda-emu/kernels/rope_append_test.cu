// Norm of heads, rotary embedding and append to the cache.
#include "../harness/harness.h"
#include "rope_append.cu"

#include "../harness/paged.h"
#include "../harness/reference.h"

using namespace harness;

namespace {

struct Case {
    int q_heads;
    CacheShape cache;
    std::vector<int> contexts;  // after the step
    std::vector<int> tokens;    // of the step
    int rotary;                 // 0: no rotation
    bool norm, norm_values, k_is_v, no_values;
};

void rotate(std::vector<double>& x, const float* cos, const float* sin, int rotary) {
    for (int i = 0; i < rotary / 2; i++) {
        const double a = x[i], b = x[i + rotary / 2];
        x[i] = a * cos[i] - b * sin[i];
        x[i + rotary / 2] = b * cos[i] + a * sin[i];
    }
}

void run(const Case& c) {
    Random random(c.q_heads * 100 + c.cache.head_dim + c.rotary);
    PagedCache cache(c.cache, c.contexts, random);
    const int dim = c.cache.head_dim, kv = c.cache.kv_heads;
    const int heads = c.q_heads + kv * (c.k_is_v ? 1 : 2), max_context = 300, pairs = std::max(c.rotary / 2, 1);
    std::vector<RowInfo> rows;
    std::vector<uint32_t> positions, token_rows;
    for (size_t r = 0; r < c.tokens.size(); r++) {
        rows.push_back({static_cast<uint32_t>(r), static_cast<uint32_t>(positions.size()),
                        static_cast<uint32_t>(c.tokens[r]), static_cast<uint32_t>(c.contexts[r])});
        for (int i = 0; i < c.tokens[r]; i++) {
            positions.push_back(static_cast<uint32_t>(c.contexts[r] - c.tokens[r] + i));
            token_rows.push_back(static_cast<uint32_t>(r));
        }
    }
    const int tokens = static_cast<int>(positions.size());
    const auto qkv = random_bf16(random, static_cast<size_t>(tokens) * heads * dim, 2.0f);
    const auto q_norm = random_bf16(random, dim, 0.3f), k_norm = random_bf16(random, dim, 0.3f);
    std::vector<float> cos(max_context * pairs), sin(max_context * pairs);
    for (int i = 0; i < max_context * pairs; i++) {
        const double angle = (i / pairs) * pow(100.0, -static_cast<double>(i % pairs) / pairs);
        cos[i] = static_cast<float>(1.2 * ::cos(angle));
        sin[i] = static_cast<float>(1.2 * ::sin(angle));
    }
    DeviceCache device(cache);
    Buffer<bf16> d_qkv(qkv), d_qn(q_norm), d_kn(k_norm);
    Buffer<float> d_cos(cos), d_sin(sin);
    Buffer<uint32_t> d_positions(positions), d_token_rows(token_rows);
    Buffer<RowInfo> d_rows(rows);
    const RopeArgs args{d_qkv.get(),
                        c.norm ? d_qn.get() : nullptr,
                        c.norm ? d_kn.get() : nullptr,
                        c.rotary ? d_cos.get() : nullptr,
                        d_sin.get(),
                        d_positions.get(),
                        d_token_rows.get(),
                        d_rows.get(),
                        device.layer,
                        1.0f,
                        1e-6f,
                        c.q_heads,
                        dim,
                        c.rotary,
                        c.norm_values,
                        c.k_is_v,
                        c.no_values};
    const dim3 grid(tokens, static_cast<unsigned>((c.q_heads + kv * (c.no_values ? 1 : 2) + kWarps - 1) / kWarps));
    if (c.cache.codes) {
        LAUNCH(rope_append_e4m3, grid, kWarps * 32, 0, args);
    } else {
        LAUNCH(rope_append_bf16, grid, kWarps * 32, 0, args);
    }

    const std::vector<unsigned char> before = cache.bytes(), after = device.bytes.download();
    const auto out = d_qkv.download();
    std::vector<bf16> got_q;
    std::vector<double> want_q, got_cache, want_cache;
    PagedCache touched = cache;
    for (int t = 0; t < tokens; t++) {
        const size_t row = token_rows[t];
        for (int h = 0; h < c.q_heads + 2 * kv; h++) {
            const bool is_value = h >= c.q_heads + kv, is_query = h < c.q_heads;
            if (is_value && c.no_values) {
                continue;
            }
            const int column = is_value && c.k_is_v ? h - kv : h;
            std::vector<double> x(dim);
            for (int d = 0; d < dim; d++) {
                x[d] = value(qkv[(static_cast<size_t>(t) * heads + column) * dim + d]);
            }
            if (is_value) {
                if (c.norm_values) {
                    x = reference::rms_norm(x, std::vector<bf16>(dim, bf16{0}), 1.0, 1e-6);
                }
            } else {
                if (c.norm) {
                    x = reference::rms_norm(x, is_query ? q_norm : k_norm, 1.0, 1e-6);
                }
                if (c.rotary) {
                    rotate(x, &cos[positions[t] * pairs], &sin[positions[t] * pairs], c.rotary);
                }
            }
            for (int d = 0; d < dim; d++) {
                if (is_query) {
                    got_q.push_back(out[(static_cast<size_t>(t) * heads + h) * dim + d]);
                    want_q.push_back(x[d]);
                } else {
                    const int part = is_value, head = (h - c.q_heads) % kv;
                    want_cache.push_back(x[d]);
                    got_cache.push_back(cache.get(after, row, part, head, static_cast<int>(positions[t]), d));
                    touched.set(row, part, head, static_cast<int>(positions[t]), d, 0);
                }
            }
        }
    }
    const std::string name = "rope dim " + std::to_string(dim) + " rotary " + std::to_string(c.rotary) + " codes " +
                             std::to_string(c.cache.codes);
    expect_close(name + " q", got_q, want_q);
    expect_close(name + " cache", got_cache, want_cache, c.cache.codes ? 0.07 : 1e-2);
    // Nothing else in the cache was written: other tokens, layers, pages are as before.
    long stray = 0;
    for (size_t i = 0; i < before.size(); i++) {
        stray += touched.bytes()[i] == before[i] && after[i] != before[i];
    }
    expect(name + " strays", stray == 0);
}

}  // namespace

int main() {
    //   q heads, {kv heads, dim, codes, scales}, contexts, tokens, rotary, norm, norm values, k is v, no values
    run({4, {2, 64, false, false}, {1, 17, 40}, {1, 1, 5}, 64, true, false, false, false});
    run({3, {1, 96, true, true}, {33}, {20}, 48, false, false, false, false});
    run({8, {8, 128, false, false}, {16, 200}, {1, 1}, 128, false, false, false, false});
    run({2, {1, 256, false, false}, {18}, {18}, 64, true, true, true, false});
    run({2, {1, 512, false, false}, {40, 2}, {2, 2}, 512, true, false, true, true});
    run({5, {1, 80, true, false}, {7}, {3}, 0, true, false, false, false});
    run({2, {2, 512, true, true}, {31}, {2}, 128, false, true, true, false});
    return report();
}
