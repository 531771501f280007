// Means of sequences, and rows for the host.
#include "../harness/harness.h"
#include "pool.cu"

#include "../harness/rows.h"

using namespace harness;

namespace {

void run_mean(int width, const std::vector<int>& tokens, const std::vector<int>& outputs) {
    Random random(width + tokens[0]);
    const int stride = row_stride(width);
    std::vector<RowInfo> rows;
    uint32_t count = 0;
    for (int n : tokens) {
        rows.push_back({0, count, static_cast<uint32_t>(n), static_cast<uint32_t>(n)});
        count += static_cast<uint32_t>(n);
    }
    std::vector<uint32_t> output_rows;
    for (int o : outputs) {
        output_rows.push_back(static_cast<uint32_t>(o));
    }
    const auto x = random_bf16(random, static_cast<size_t>(count) * width);
    Buffer<bf16> d_x(spread_rows(x, width, stride, bf16{0x7fff})), d_out(outputs.size() * stride);
    Buffer<RowInfo> d_rows(rows);
    Buffer<uint32_t> d_outputs(output_rows);
    const MeanArgs args{d_x.get(), d_out.get(), d_rows.get(), d_outputs.get(), width};
    LAUNCH(mean_outputs_bf16, dim3(static_cast<unsigned>(outputs.size()), static_cast<unsigned>((stride + 255) / 256)),
           256, 0, args);
    std::vector<double> want;
    for (int o : outputs) {
        for (int i = 0; i < width; i++) {
            double sum = 0;
            for (uint32_t k = 0; o >= 0 && k < rows[o].tokens; k++) {
                sum += value(x[(rows[o].first + k) * width + i]) / rows[o].tokens;
            }
            want.push_back(sum);
        }
    }
    const std::string name = "mean width " + std::to_string(width);
    expect_close(name, gather_rows(name, d_out.download(), width, stride), want);
}

void run_emit(int width, const std::vector<std::pair<int, uint16_t>>& broken) {
    Random random(width);
    const int stride = row_stride(width), rows = static_cast<int>(broken.size());
    auto x = random_bf16(random, static_cast<size_t>(rows) * width);
    std::vector<uint32_t> want_finite;
    for (int r = 0; r < rows; r++) {
        if (broken[r].first >= 0) {
            x[r * width + broken[r].first] = bf16{broken[r].second};
        }
        want_finite.push_back(broken[r].first < 0);
    }
    Buffer<bf16> d_x(spread_rows(x, width, stride, bf16{0x7fff}));
    Buffer<float> d_out(x.size());
    Buffer<uint32_t> d_finite(rows);
    const EmitArgs args{d_x.get(), d_out.get(), d_finite.get(), width};
    LAUNCH(emit_rows, dim3(static_cast<unsigned>(rows)), 64, 0, args);
    const auto out = d_out.download();
    bool same = true;
    for (size_t i = 0; i < x.size(); i++) {
        uint32_t bits;
        memcpy(&bits, &out[i], 4);
        same = same && bits == uint32_t{x[i].bits} << 16;
    }
    expect("emit width " + std::to_string(width), same);
    expect_equal("finite", d_finite.download(), want_finite);
}

}  // namespace

int main() {
    run_mean(28, {3, 1, 5}, {2, 0, -1, 1});
    run_mean(300, {40}, {0});
    run_emit(28, {{-1, 0}, {27, 0x7f80}, {0, 0xff80}, {5, 0x7fc0}, {-1, 0}});
    run_emit(1000, {{999, 0x7fc1}, {-1, 0}, {3, 0x7f80}});
    run_emit(1, {{-1, 0}});
    return report();
}
