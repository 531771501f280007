// Norm of heads, rotary embedding and append to the cache: the kernel of even heads and the one of all others.
#include "../harness/harness.h"
#include "rope_append.cu"

#include "../harness/heads.h"
#include "../harness/paged.h"

using namespace harness;

namespace {

// What the layer does; norms in the order of q, k, v.
struct Case {
    int q_heads;
    CacheShape cache;
    std::vector<int> contexts;  // after the step
    std::vector<int> tokens;    // of the step
    RotationShape rotation;
    NormShape q_norm, k_norm, v_norm;
    bool across = false, any = false;
    bool append = true, keep = false;
    bool queries_alone = false;
    int gates = 0;  // columns behind v
};

// Norms the heads of a token, or all of them as one vector.
void norm_heads(std::vector<double>& x, int dim, bool across, const TestNorm& norm) {
    const size_t part = across ? x.size() : dim;
    for (size_t at = 0; at < x.size(); at += part) {
        const auto y = norm.apply({x.begin() + at, x.begin() + at + part});
        std::copy(y.begin(), y.end(), x.begin() + at);
    }
}

void run(const Case& c) {
    Random random(c.q_heads * 100 + c.cache.head_dim + c.rotation.rotary);
    PagedCache cache(c.cache, c.contexts, random);
    const int key_dim = c.cache.head_dim, value_dim = cache.value_dim(), kv = c.queries_alone ? 0 : c.cache.kv_heads;
    const int q_width = c.q_heads * key_dim, k_width = kv * key_dim,
              width = q_width + k_width + kv * value_dim + c.gates;
    const int stride = (width + 7) / 8 * 8;
    const StepRows step(c.contexts, c.tokens);
    const auto qkv = random_bf16(random, static_cast<size_t>(step.count()) * stride, 2.0f);
    const TestNorm q_norm(c.q_norm, c.across ? q_width : key_dim, random);
    const TestNorm k_norm(c.k_norm, c.across ? k_width : key_dim, random), v_norm(c.v_norm, value_dim, random);
    const TestRotation rotation(c.rotation, 300);
    DeviceCache device(cache);
    const DeviceRows rows(step);
    Buffer<bf16> d_qkv(qkv);
    AppendArgs args{};
    args.qkv = d_qkv.get();
    args.positions = rows.positions.get();
    args.token_rows = rows.token_rows.get();
    args.rows = rows.rows.get();
    args.kv = device.layer;
    args.rotation = rotation.args();
    args.q_norm = q_norm.args();
    args.k_norm = k_norm.args();
    args.v_norm = v_norm.args();
    args.stride = stride;
    args.q_heads = c.q_heads;
    args.kv_heads = kv;
    args.key_dim = key_dim;
    args.value_dim = value_dim;
    args.across_heads = c.across;
    args.append = c.append;
    args.keep = c.keep;
    const unsigned tokens = static_cast<unsigned>(step.count());
    const dim3 grid(tokens, static_cast<unsigned>((c.q_heads + 2 * kv + kWarps - 1) / kWarps));
    if (c.any && c.cache.codes) {
        LAUNCH(rope_append_any_e4m3, dim3(tokens), kAnyWarps * 32, 0, args);
    } else if (c.any) {
        LAUNCH(rope_append_any_bf16, dim3(tokens), kAnyWarps * 32, 0, args);
    } else if (c.cache.codes) {
        LAUNCH(rope_append_e4m3, grid, kWarps * 32, 0, args);
    } else {
        LAUNCH(rope_append_bf16, grid, kWarps * 32, 0, args);
    }

    const std::vector<unsigned char> before = cache.bytes(), after = device.bytes.download();
    const auto out = d_qkv.download();
    std::vector<bf16> got_rows;
    std::vector<double> want_rows, got_cache, want_cache;
    bool others_stay = true;
    PagedCache touched = cache;
    for (int t = 0; t < step.count(); t++) {
        const size_t row = step.token_rows[t];
        const int position = static_cast<int>(step.positions[t]);
        const auto part = [&](int from, int length) {
            std::vector<double> x(length);
            for (int i = 0; i < length; i++) {
                x[i] = value(qkv[static_cast<size_t>(t) * stride + from + i]);
            }
            return x;
        };
        std::vector<double> q = part(0, q_width), k = part(q_width, k_width),
                            v = part(q_width + k_width, kv * value_dim);
        norm_heads(q, key_dim, c.across, q_norm);
        if (kv) {
            norm_heads(k, key_dim, c.across, k_norm);
            norm_heads(v, value_dim, false, v_norm);
        }
        for (int h = 0; h < c.q_heads; h++) {
            rotation.rotate(&q[h * key_dim], position);
        }
        for (int h = 0; h < kv; h++) {
            rotation.rotate(&k[h * key_dim], position);
        }
        for (double& x : q) {
            x *= rotation.scale(position);
        }
        std::vector<double> row_after = q;
        row_after.insert(row_after.end(), k.begin(), k.end());
        row_after.insert(row_after.end(), v.begin(), v.end());
        for (int i = 0; i < stride; i++) {
            const size_t at = static_cast<size_t>(t) * stride + i;
            if (i < q_width || (c.keep && i < width - c.gates)) {
                got_rows.push_back(out[at]);
                want_rows.push_back(row_after[i]);
            } else {
                others_stay = others_stay && out[at].bits == qkv[at].bits;
            }
        }
        for (int h = 0; c.append && h < kv; h++) {
            for (int p = 0; p < 2; p++) {
                for (int d = 0; d < (p ? value_dim : key_dim); d++) {
                    want_cache.push_back(p ? v[h * value_dim + d] : k[h * key_dim + d]);
                    got_cache.push_back(cache.get(after, row, p, h, position, d));
                    touched.set(row, p, h, position, d, 0);
                }
            }
        }
    }
    const std::string name = std::string(c.any ? "any" : "rope") + " dims " + std::to_string(key_dim) + " " +
                             std::to_string(value_dim) + " rotary " + std::to_string(c.rotation.rotary) + " codes " +
                             std::to_string(c.cache.codes);
    expect_close(name + " rows", got_rows, want_rows);
    expect(name + " other columns", others_stay);
    expect_close(name + " cache", got_cache, want_cache, c.cache.codes ? 0.07 : 1e-2);
    expect(name + " strays", touched.strays(before, after) == 0);
}

}  // namespace

int main() {
    using P = Pairing;
    const NormShape none{}, rms{NormKind::Rms}, bare{NormKind::Rms, false}, layer{NormKind::Layer, true, true};
    //   q heads, {kv heads, dim, codes, scales, values = keys, value dim}, contexts, tokens, {rotary, pairing,
    //   distance, q scale}, norms of q, k, v; across heads, any; append, keep; queries alone, gates
    run({4, {2, 64, false, false}, {1, 17, 40}, {1, 1, 5}, {64}, rms, rms, none});
    run({3, {1, 96, true, true}, {33}, {20}, {48, P::Adjacent}, none, none, none});
    run({2, {1, 256, false, false}, {18}, {18}, {64, P::Apart, 128}, rms, rms, bare});
    run({3,
         {1, 6, false, false, false, 10},
         {20},
         {4},
         {6, P::Halves, 0, true},
         rms,
         bare,
         none,
         false,
         false,
         true,
         false,
         false,
         24});
    run({3, {2, 7, false, false, false, 5}, {17, 3}, {2, 3}, {4, P::Adjacent, 0, true}, rms, rms, rms, true, true});
    run({2, {1, 28, false, false}, {5}, {5}, {28}, none, none, none, false, true, false, true});
    run({2, {1, 64, false, false}, {9}, {2}, {32}, rms, none, none, false, false, false, false, true, 5});
    run({4, {2, 24, false, false}, {19}, {3}, {8, P::Apart, 12}, layer, layer, layer, true, true});
    run({9, {3, 6, false, false, false, 5}, {18}, {2}, {6}, rms, rms, rms, false, true});
    if (small()) {
        return report();
    }
    run({8, {8, 128, false, false}, {16, 200}, {1, 1}, {128}, none, none, none});
    run({2, {1, 512, false, false}, {40, 2}, {2, 2}, {512}, rms, rms, none});
    run({5, {1, 80, true, false}, {7}, {3}, {0}, rms, rms, none});
    run({2, {2, 512, true, true}, {31}, {2}, {128, P::Halves, 0, true}, layer, rms, bare});
    run({16, {2, 128, false, false}, {33, 6}, {2, 6}, {128}, rms, rms, none, true, true});
    run({3, {1, 1023, false, false, false, 700}, {18}, {3}, {32, P::Adjacent}, rms, rms, rms, false, true});
    run({9, {3, 15, true, true, false, 9}, {35}, {20}, {10, P::Apart, 5, true}, bare, layer, none, false, true});
    run({2, {1, 1024, true, false}, {16}, {1}, {1024}, rms, rms, bare, true, true, true, true});
    run({7, {1, 33, false, false}, {50}, {1}, {16}, rms, none, none, false, true, false, false, true, 8});
    return report();
}
