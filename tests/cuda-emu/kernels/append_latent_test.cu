// Append of latent attention: the stored vector, and the rotated parts of queries.
#include "../harness/harness.h"
#include "append_latent.cu"

#include "../harness/heads.h"
#include "../harness/paged.h"

using namespace harness;

namespace {

struct Case {
    int q_heads, latent, rope, nope;
    bool codes;
    std::vector<int> contexts, tokens;
    Pairing pairing;
    bool q_scale;
    NormShape norm;
};

void run(const Case& c) {
    Random random(c.q_heads * 100 + c.latent + c.rope);
    const int key_dim = c.latent + c.rope, head = c.nope + c.rope, q_stride = c.q_heads * head + 5,
              kv_stride = key_dim + 3;
    const int out_width = c.q_heads * key_dim, out_stride = (out_width + 7) / 8 * 8;
    PagedCache cache({1, key_dim, c.codes, c.codes, true, c.latent}, c.contexts, random);
    const StepRows step(c.contexts, c.tokens);
    const size_t tokens = static_cast<size_t>(step.count());
    const auto q = random_bf16(random, tokens * q_stride), kv = random_bf16(random, tokens * kv_stride, 2.0f);
    const auto begun = random_bf16(random, tokens * out_stride);  // latent parts of queries are there
    const TestNorm norm(c.norm, c.latent, random);
    const TestRotation rotation({c.rope, c.pairing, 0, c.q_scale}, 300);
    DeviceCache device(cache);
    const DeviceRows rows(step);
    Buffer<bf16> d_q(q), d_kv(kv), d_out(begun);
    const AppendLatentArgs args{d_q.get(),
                                d_kv.get(),
                                d_out.get(),
                                rows.positions.get(),
                                rows.token_rows.get(),
                                rows.rows.get(),
                                device.layer,
                                rotation.args(),
                                norm.args(),
                                q_stride,
                                kv_stride,
                                out_stride,
                                c.q_heads,
                                c.latent,
                                c.rope,
                                c.nope};
    const dim3 grid(static_cast<unsigned>(step.count()), static_cast<unsigned>((c.q_heads + kWarps) / kWarps));
    if (c.codes) {
        LAUNCH(append_latent_e4m3, grid, kWarps * 32, 0, args);
    } else {
        LAUNCH(append_latent_bf16, grid, kWarps * 32, 0, args);
    }

    const std::vector<unsigned char> before = cache.bytes(), after = device.bytes.download();
    const auto out = d_out.download();
    std::vector<bf16> got_q;
    std::vector<double> want_q, got_cache, want_cache;
    bool zero = true;
    PagedCache touched = cache;
    for (size_t t = 0; t < tokens; t++) {
        const int position = static_cast<int>(step.positions[t]);
        std::vector<double> stored(key_dim);
        for (int d = 0; d < key_dim; d++) {
            stored[d] = value(kv[t * kv_stride + d]);
        }
        const auto latent = norm.apply({stored.begin(), stored.begin() + c.latent});
        std::copy(latent.begin(), latent.end(), stored.begin());
        rotation.rotate(&stored[c.latent], position);
        for (int d = 0; d < key_dim; d++) {
            want_cache.push_back(stored[d]);
            got_cache.push_back(cache.get(after, step.token_rows[t], 0, 0, position, d));
            touched.set(step.token_rows[t], 0, 0, position, d, 0);
        }
        for (int h = 0; h < c.q_heads; h++) {
            std::vector<double> turned(c.rope);
            for (int d = 0; d < c.rope; d++) {
                turned[d] = value(q[t * q_stride + h * head + c.nope + d]);
            }
            rotation.rotate(turned.data(), position);
            for (int d = 0; d < key_dim; d++) {
                const size_t at = t * out_stride + h * key_dim + d;
                got_q.push_back(out[at]);
                want_q.push_back((d < c.latent ? value(begun[at]) : turned[d - c.latent]) * rotation.scale(position));
            }
        }
        for (int i = out_width; i < out_stride; i++) {
            zero = zero && out[t * out_stride + i].bits == 0;
        }
    }
    const std::string name =
        "latent " + std::to_string(c.latent) + " rope " + std::to_string(c.rope) + " codes " + std::to_string(c.codes);
    expect_close(name + " q", got_q, want_q);
    expect(name + ", zero behind rows", zero);
    expect_close(name + " cache", got_cache, want_cache, c.codes ? 0.07 : 1e-2);
    expect(name + " strays", touched.strays(before, after) == 0);
}

}  // namespace

int main() {
    const NormShape rms{NormKind::Rms}, layer{NormKind::Layer, true, true};
    run({3, 12, 4, 6, false, {1, 20}, {1, 3}, Pairing::Adjacent, false, rms});
    run({2, 7, 6, 5, true, {18}, {2}, Pairing::Halves, true, rms});
    run({4, 9, 2, 3, false, {33}, {2}, Pairing::Halves, true, layer});
    if (small()) {
        return report();
    }
    run({16, 512, 64, 128, false, {33, 200}, {1, 1}, Pairing::Adjacent, false, rms});
    run({5, 512, 64, 128, true, {17}, {17}, Pairing::Halves, true, rms});
    run({1, 960, 64, 8, false, {16}, {1}, Pairing::Adjacent, true, rms});
    return report();
}
