// Embeddings, gathers, additions, gates, pages; and that kernels queued one after another read what the one before
// wrote.
#include "../harness/harness.h"
#include "blocks.cu"
#include "elementwise.cu"
#include "embed.cu"
#include "glu.cu"

#include "../harness/reference.h"

using namespace harness;

namespace {

void run_embed(int rows, int width, int vocab) {
    Random random(rows + width);
    const auto table = random_bf16(random, static_cast<size_t>(vocab) * width);
    const std::vector<uint32_t> last{3, 0xffffffffu, static_cast<uint32_t>(vocab - 1)};
    std::vector<uint32_t> ids(rows);
    for (int r = 0; r < rows; r++) {
        ids[r] = static_cast<uint32_t>(random.below(vocab));
    }
    ids[0] = kFromSlot | 2;
    if (rows > 2) {
        ids[1] = static_cast<uint32_t>(vocab), ids[2] = kFromSlot | 1;  // no such token
    }
    Buffer<bf16> d_table(table), d_out(static_cast<size_t>(rows) * width);
    Buffer<uint32_t> d_ids(ids), d_last(last);
    LAUNCH(embed_bf16, dim3(rows), 64, 0, d_table.get(), d_ids.get(), d_last.get(), d_out.get(),
           static_cast<uint32_t>(vocab), width, 2.5f);
    const auto out = d_out.download();
    std::vector<bf16> known;
    std::vector<double> want;
    for (int r = 0; r < rows; r++) {
        const uint32_t id = ids[r] & kFromSlot ? last[ids[r] & 3] : ids[r];
        for (int i = 0; i < width; i++) {
            const bf16 x = out[static_cast<size_t>(r) * width + i];
            if (id >= static_cast<uint32_t>(vocab)) {
                expect("unknown token gives NaN", isnan(value(x)) && x.bits == 0x7fff);
                continue;
            }
            known.push_back(x);
            want.push_back(2.5 * value(table[static_cast<size_t>(id) * width + i]));
        }
    }
    expect_close("embed", known, want, 4e-3);

    std::vector<uint32_t> outputs{static_cast<uint32_t>(rows - 1), 0};
    Buffer<uint32_t> d_outputs(outputs);
    Buffer<bf16> d_gathered(2 * static_cast<size_t>(width));
    LAUNCH(gather_rows_bf16, dim3(2), 32, 0, d_out.get(), d_outputs.get(), d_gathered.get(), width);
    const auto gathered = d_gathered.download();
    for (int i = 0; i < width; i++) {
        expect("gather", gathered[i].bits == out[static_cast<size_t>(rows - 1) * width + i].bits &&
                             gathered[width + i].bits == out[i].bits);
    }
}

void run_add(int rows, int width) {
    Random random(rows * 3 + width);
    const size_t n = static_cast<size_t>(rows) * width;
    const auto x = random_bf16(random, n), y = random_bf16(random, n), bias = random_bf16(random, width);
    Buffer<bf16> d_x(x), d_y(y), d_bias(bias);
    // Three kernels in a row: each must see the one before.
    LAUNCH(add_bias_bf16, dim3(rows), 64, 0, d_x.get(), d_bias.get(), width);
    LAUNCH(add_bf16, dim3(rows), 32, 0, d_x.get(), d_y.get(), width);
    LAUNCH(add_bf16, dim3(rows), 96, 0, d_x.get(), d_x.get(), width);
    std::vector<double> want(n);
    for (size_t i = 0; i < n; i++) {
        want[i] = 2 * value(round_bf16(value(round_bf16(value(x[i]) + value(bias[i % width]))) + value(y[i])));
    }
    expect_close("add", d_x.download(), want, 1e-3);
}

void run_glu(int rows, int width, Gate kind, int group) {
    Random random(rows + width + static_cast<int>(kind));
    const auto x = random_bf16(random, static_cast<size_t>(rows) * 2 * width, kind == Gate::ClampedSwish ? 6.0f : 3.0f);
    const GateSpec gate{kind, 7.0f, 1.702f};
    const size_t n = static_cast<size_t>(rows) * width;
    Buffer<bf16> d_x(x), d_out(n);
    std::vector<double> want(n);
    for (size_t i = 0; i < n; i++) {
        const size_t at = i / width * 2 * width + i % width;
        want[i] = reference::activate(value(x[at]), value(x[at + width]), gate);
    }
    const std::string name = "glu " + std::to_string(static_cast<int>(kind)) + " width " + std::to_string(width);
    if (group == 0) {
        LAUNCH(glu_bf16, dim3(rows), 128, 0, d_x.get(), d_out.get(), width, gate);
        return expect_close(name, d_out.download(), want);
    }
    Buffer<e4m3> d_codes(n);
    Buffer<float> d_scales(n / group);
    LAUNCH(glu_e4m3, dim3(rows), 64, width * 4u, d_x.get(), d_codes.get(), d_scales.get(), width, group, gate);
    const auto codes = d_codes.download();
    const auto scales = d_scales.download();
    std::vector<double> got(n);
    for (size_t i = 0; i < n; i++) {
        got[i] = value(codes[i]) * scales[i / group];
    }
    expect_close(name + " codes", got, want, 0.07);
    for (size_t g = 0; g < scales.size(); g++) {
        double peak = 0;
        for (int i = 0; i < group; i++) {
            peak = std::max(peak, fabs(want[g * group + i]));
        }
        expect(name + " scale", fabs(scales[g] * 448 - peak) <= 1e-2 * peak);
    }
}

void run_pages(unsigned long long bytes, unsigned parts) {
    Random random(bytes);
    std::vector<unsigned char> pool(6 * bytes);
    for (unsigned char& b : pool) {
        b = static_cast<unsigned char>(random.next());
    }
    Buffer<unsigned char> d_pool(pool);
    const std::vector<uint32_t> from{5, 0}, to{1, 3}, clear{5, 2};
    Buffer<uint32_t> d_from(from), d_to(to), d_clear(clear);
    LAUNCH(copy_pages, dim3(2, parts), 64, 0, d_pool.get(), d_from.get(), d_to.get(), bytes);
    LAUNCH(zero_pages, dim3(2, parts), 64, 0, d_pool.get(), d_clear.get(), bytes);
    for (int i = 0; i < 2; i++) {
        std::copy(pool.begin() + from[i] * bytes, pool.begin() + (from[i] + 1) * bytes, pool.begin() + to[i] * bytes);
    }
    for (uint32_t page : clear) {
        std::fill(pool.begin() + page * bytes, pool.begin() + (page + 1) * bytes, 0);
    }
    expect_equal("pages of " + std::to_string(bytes), d_pool.download(), pool);
}

}  // namespace

int main() {
    run_embed(5, 72, 11);
    run_embed(1, 2880, 7);
    run_add(3, 72);
    run_add(2, 1000);
    for (Gate kind : {Gate::Silu, Gate::GeluTanh, Gate::Gelu, Gate::ClampedSwish}) {
        run_glu(2, 72, kind, 0);
        run_glu(3, 1448, kind, 0);
    }
    run_glu(2, 640, Gate::Silu, 128);
    run_glu(2, 328, Gate::GeluTanh, 328);
    run_glu(1, 192, Gate::Silu, 64);
    run_pages(16, 1);
    run_pages(2048 + 16, 2);
    return report();
}
