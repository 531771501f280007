// Append where keys and values are one projection: what is stored, and queries that fit it.
#include "../harness/harness.h"
#include "append_shared.cu"

#include "../harness/heads.h"
#include "../harness/paged.h"

using namespace harness;

namespace {

struct Case {
    int q_heads, kv_heads, dim;
    bool codes;
    std::vector<int> contexts, tokens;
    RotationShape rotation;
    NormShape q_norm, k_norm, v_norm;
};

void run(const Case& c) {
    Random random(c.q_heads * 100 + c.dim + c.rotation.rotary);
    const int key_dim = c.dim + c.rotation.rotary, width = (c.q_heads + c.kv_heads) * c.dim, stride = width + 2;
    const int out_width = c.q_heads * key_dim, out_stride = (out_width + 7) / 8 * 8;
    PagedCache cache({c.kv_heads, key_dim, c.codes, c.codes, true, c.dim}, c.contexts, random);
    const StepRows step(c.contexts, c.tokens);
    const auto qk = random_bf16(random, static_cast<size_t>(step.count()) * stride, 2.0f);
    const TestNorm q_norm(c.q_norm, c.dim, random), k_norm(c.k_norm, c.dim, random), v_norm(c.v_norm, c.dim, random);
    const TestRotation rotation(c.rotation, 300);
    DeviceCache device(cache);
    const DeviceRows rows(step);
    Buffer<bf16> d_qk(qk), d_out(static_cast<size_t>(step.count()) * out_stride);
    const AppendSharedArgs args{
        d_qk.get(),      d_out.get(),   rows.positions.get(), rows.token_rows.get(), rows.rows.get(), device.layer,
        rotation.args(), q_norm.args(), k_norm.args(),        v_norm.args(),         stride,          out_stride,
        c.q_heads,       c.dim};
    const dim3 grid(static_cast<unsigned>(step.count()),
                    static_cast<unsigned>((c.q_heads + c.kv_heads + kWarps - 1) / kWarps));
    if (c.codes) {
        LAUNCH(append_shared_e4m3, grid, kWarps * 32, 0, args);
    } else {
        LAUNCH(append_shared_bf16, grid, kWarps * 32, 0, args);
    }

    const std::vector<unsigned char> before = cache.bytes(), after = device.bytes.download();
    const auto out = d_out.download();
    const std::vector<int> rotated = rotation.rotated();
    std::vector<bf16> got_q;
    std::vector<double> want_q, got_cache, want_cache;
    bool zero = true;
    PagedCache touched = cache;
    for (int t = 0; t < step.count(); t++) {
        const int position = static_cast<int>(step.positions[t]);
        const size_t row = step.token_rows[t];
        for (int h = 0; h < c.q_heads + c.kv_heads; h++) {
            std::vector<double> x(c.dim);
            for (int d = 0; d < c.dim; d++) {
                x[d] = value(qk[static_cast<size_t>(t) * stride + h * c.dim + d]);
            }
            std::vector<double> turned = h < c.q_heads ? q_norm.apply(x) : k_norm.apply(x);
            rotation.rotate(turned.data(), position);
            std::vector<double> want = h < c.q_heads ? turned : v_norm.apply(x);
            for (int d = 0; h < c.q_heads && d < c.dim; d++) {
                const bool turns = std::count(rotated.begin(), rotated.end(), d);
                want[d] *= turns ? 0 : k_norm.weight(d);
            }
            for (int d : rotated) {
                want.push_back(turned[d]);
            }
            for (int d = 0; d < key_dim; d++) {
                if (h < c.q_heads) {
                    got_q.push_back(out[static_cast<size_t>(t) * out_stride + h * key_dim + d]);
                    want_q.push_back(want[d] * rotation.scale(position));
                } else {
                    want_cache.push_back(want[d]);
                    got_cache.push_back(cache.get(after, row, 0, h - c.q_heads, position, d));
                    touched.set(row, 0, h - c.q_heads, position, d, 0);
                }
            }
        }
        for (int i = out_width; i < out_stride; i++) {
            zero = zero && out[static_cast<size_t>(t) * out_stride + i].bits == 0;
        }
    }
    const std::string name = "shared dim " + std::to_string(c.dim) + " rotary " + std::to_string(c.rotation.rotary) +
                             " codes " + std::to_string(c.codes);
    expect_close(name + " q", got_q, want_q);
    expect(name + ", zero behind rows", zero);
    expect_close(name + " cache", got_cache, want_cache, c.codes ? 0.07 : 1e-2);
    expect(name + " strays", touched.strays(before, after) == 0);
}

}  // namespace

int main() {
    using P = Pairing;
    const NormShape none{}, rms{NormKind::Rms}, bare{NormKind::Rms, false};
    run({4, 2, 24, false, {1, 20}, {1, 3}, {8, P::Apart, 12}, rms, rms, bare});
    run({3, 1, 7, true, {18}, {2}, {4, P::Adjacent, 0, true}, rms, rms, bare});
    run({2, 1, 16, false, {40}, {2}, {16}, bare, bare, bare});
    run({1, 1, 40, false, {9}, {2}, {8, P::Apart, 20}, none, none, none});
    if (small()) {
        return report();
    }
    run({8, 1, 512, false, {33, 200}, {1, 1}, {128, P::Apart, 256}, rms, rms, bare});
    run({5, 1, 512, true, {17}, {17}, {64, P::Halves, 0, true}, rms, rms, bare});
    run({1, 3, 1000, false, {16}, {1}, {24}, rms, rms, bare});
    return report();
}
