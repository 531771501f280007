// add_norm_bf16 and add_norm_e4m3 against double precision.
#include "../harness/harness.h"
#include "norm.cu"

#include "../harness/reference.h"
#include "../harness/rows.h"

using namespace harness;

namespace {

struct Case {
    int rows, width;
    bool x, post, bias, layer, weight;
    int group;  // 0: bf16 out
};

void run(const Case& c) {
    Random random(c.rows * 131 + c.width + c.group);
    const int stride = row_stride(c.width);
    const size_t n = static_cast<size_t>(c.rows) * c.width;
    const float x_scale = 0.5f, offset = c.bias ? 0.0f : 1.0f, post_offset = 0.25f, eps = 1e-5f;
    // Rows as small as epsilon, too.
    const float magnitude = c.width == 264 || c.width == 64 ? 2e-3f : 1.0f;
    const auto residual = random_bf16(random, n, 3 * magnitude), x = random_bf16(random, n, magnitude);
    const auto weight = random_bf16(random, c.width, 0.3f), post = random_bf16(random, c.width, 0.3f);
    const auto bias = random_bf16(random, c.width);
    const auto spread = [&](const std::vector<bf16>& rows) { return spread_rows(rows, c.width, stride, bf16{0x7fff}); };
    Buffer<bf16> d_residual(spread(residual)), d_x(spread(x)), d_weight(spread(weight)), d_post(spread(post)),
        d_bias(spread(bias)), d_out(static_cast<size_t>(c.rows) * stride);
    Buffer<e4m3> d_codes(n);
    Buffer<float> d_scales(c.group ? n / c.group : 0);
    const NormArgs args{d_residual.get(),
                        c.x ? d_x.get() : nullptr,
                        c.post ? d_post.get() : nullptr,
                        c.weight ? d_weight.get() : nullptr,
                        c.bias ? d_bias.get() : nullptr,
                        x_scale,
                        offset,
                        post_offset,
                        eps,
                        c.width,
                        c.layer,
                        c.group};
    const unsigned threads = std::min(512, (stride / 8 + 31) / 32 * 32);
    if (c.group) {
        LAUNCH(add_norm_e4m3, dim3(c.rows), threads, 0, args, d_codes.get(), d_scales.get());
    } else {
        LAUNCH(add_norm_bf16, dim3(c.rows), threads, 0, args, d_out.get());
    }

    std::vector<double> want_residual(n), want(n);
    for (int r = 0; r < c.rows; r++) {
        std::vector<double> h(c.width), branch(c.width);
        for (int i = 0; i < c.width; i++) {
            h[i] = value(residual[r * c.width + i]);
            branch[i] = value(x[r * c.width + i]);
        }
        if (c.post) {
            branch = reference::rms_norm(branch, post, post_offset, eps);
        }
        for (int i = 0; i < c.width; i++) {
            if (c.x) {
                h[i] = value(round_bf16(h[i] + x_scale * branch[i]));
            }
            want_residual[r * c.width + i] = h[i];
        }
        if (c.layer) {
            double mean = 0;
            for (double v : h) {
                mean += v / c.width;
            }
            for (double& v : h) {
                v -= mean;
            }
        }
        h = c.weight ? reference::rms_norm(h, weight, offset, eps)
                     : reference::rms_norm(h, std::vector<bf16>(c.width, bf16{0}), 1, eps);
        for (int i = 0; i < c.width; i++) {
            want[r * c.width + i] = h[i] + (c.bias ? value(bias[i]) : 0);
        }
    }
    const std::string name =
        "rows " + std::to_string(c.rows) + " width " + std::to_string(c.width) + " group " + std::to_string(c.group);
    const auto left = d_residual.download();
    if (c.x) {
        expect_close("residual, " + name, gather_rows("residual, " + name, left, c.width, stride), want_residual);
    } else {
        expect("input as it was, " + name, !memcmp(left.data(), spread(residual).data(), left.size() * sizeof(bf16)));
    }
    if (!c.group) {
        return expect_close("out, " + name, gather_rows("out, " + name, d_out.download(), c.width, stride), want);
    }
    const auto codes = d_codes.download();
    const auto scales = d_scales.download();
    std::vector<double> got(n);
    for (size_t i = 0; i < n; i++) {
        got[i] = value(codes[i]) * scales[i / c.group];
    }
    expect_close("codes, " + name, got, want, 0.07);  // three bits of mantissa
    for (size_t g = 0; g < scales.size(); g++) {
        double peak = 0;
        for (int i = 0; i < c.group; i++) {
            peak = std::max(peak, fabs(want[g * c.group + i]));
        }
        expect("scale, " + name, fabs(scales[g] * 448 - peak) <= 1e-2 * peak);
    }
}

}  // namespace

int main() {
    // rows, width, x, post, bias, layer, weight, group
    for (const Case& c :
         {Case{1, 8, true, false, false, false, true, 0}, Case{3, 2880, true, false, false, false, true, 0},
          Case{2, 64, false, false, false, false, true, 0}, Case{2, 264, true, true, false, false, true, 0},
          Case{2, 1000, true, false, true, true, true, 0}, Case{1, 128, true, false, false, false, true, 128},
          Case{2, 2560, true, false, false, false, true, 128}, Case{2, 2880, true, true, false, false, true, 2880},
          Case{2, 512, false, false, false, false, true, 64}, Case{3, 28, true, true, false, false, true, 0},
          Case{2, 3, true, false, true, true, true, 0}, Case{2, 28, false, false, false, true, false, 0},
          Case{3, 261, false, false, true, false, true, 0}, Case{2, 12, true, false, false, false, false, 0},
          Case{1, 1, true, false, false, false, true, 0}}) {
        run(c);
    }
    if (!small()) {
        run({2, 8192, true, true, false, false, true, 0});
        run({1, 16384, true, false, false, false, true, 256});
        run({1, 16381, true, false, true, true, true, 0});
    }
    return report();
}
