// Embeddings, gathers, additions, gates, pages; and that kernels queued one after another read what the one before
// wrote.
#include "../harness/harness.h"
#include "blocks.cu"
#include "elementwise.cu"
#include "embed.cu"
#include "glu.cu"

#include "../harness/reference.h"
#include "../harness/rows.h"

using namespace harness;

namespace {

constexpr bf16 kNan{0x7fff}, kZero{0};

void run_embed(int rows, int width, int vocab, int table_stride) {
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
    const int stride = row_stride(width);
    Buffer<bf16> d_table(spread_rows(table, width, table_stride, kNan)), d_out(static_cast<size_t>(rows) * stride);
    Buffer<uint32_t> d_ids(ids), d_last(last);
    const EmbedArgs args{d_table.get(), d_ids.get(), d_last.get(), d_out.get(), static_cast<uint32_t>(vocab),
                         table_stride,  width,       2.5f};
    LAUNCH(embed_bf16, dim3(rows), 64, 0, args);
    const auto out = d_out.download();
    const auto live = gather_rows("embed", out, width, stride);
    std::vector<bf16> known;
    std::vector<double> want;
    for (int r = 0; r < rows; r++) {
        const uint32_t id = ids[r] & kFromSlot ? last[ids[r] & 3] : ids[r];
        for (int i = 0; i < width; i++) {
            const bf16 x = live[static_cast<size_t>(r) * width + i];
            if (id >= static_cast<uint32_t>(vocab)) {
                expect("unknown token gives NaN", isnan(value(x)));
                continue;
            }
            known.push_back(x);
            want.push_back(2.5 * value(table[static_cast<size_t>(id) * width + i]));
        }
    }
    expect_close("embed", known, want, 4e-3);

    std::vector<uint32_t> outputs{static_cast<uint32_t>(rows - 1), 0};
    Buffer<uint32_t> d_outputs(outputs);
    Buffer<bf16> d_gathered(2 * static_cast<size_t>(stride));
    LAUNCH(gather_rows_bf16, dim3(2), 32, 0, d_out.get(), d_outputs.get(), d_gathered.get(), stride);
    const auto gathered = d_gathered.download();
    for (int i = 0; i < stride; i++) {
        expect("gather", gathered[i].bits == out[static_cast<size_t>(rows - 1) * stride + i].bits &&
                             gathered[stride + i].bits == out[i].bits);
    }
}

void run_positions(int rows, int width, int table_rows, uint32_t offset) {
    Random random(rows + width * 3);
    const int stride = row_stride(width), table_stride = stride + 8;
    const auto table = random_bf16(random, static_cast<size_t>(table_rows) * width);
    const auto x = random_bf16(random, static_cast<size_t>(rows) * width);
    std::vector<uint32_t> positions(rows);
    for (int r = 0; r < rows; r++) {
        positions[r] = static_cast<uint32_t>(random.below(table_rows - static_cast<int>(offset)));
    }
    positions.back() = static_cast<uint32_t>(table_rows) - offset;  // the first that the table has not
    Buffer<bf16> d_table(spread_rows(table, width, table_stride, kNan)), d_x(spread_rows(x, width, stride, kZero));
    Buffer<uint32_t> d_positions(positions);
    const PositionsArgs args{d_table.get(), d_positions.get(), d_x.get(), static_cast<uint32_t>(table_rows),
                             offset,        table_stride,      width};
    LAUNCH(add_positions_bf16, dim3(rows), 32, 0, args);
    auto got = gather_rows("positions", d_x.download(), width, stride);
    for (int i = 0; i < width; i++) {
        expect("unknown position gives NaN", isnan(value(got.back())));
        got.pop_back();
    }
    std::vector<double> want(got.size());
    for (size_t i = 0; i < want.size(); i++) {
        want[i] = value(x[i]) + value(table[(positions[i / width] + offset) * width + i % width]);
    }
    expect_close("positions", got, want, 4e-3);
}

void run_add(int rows, int width) {
    Random random(rows * 3 + width);
    const size_t n = static_cast<size_t>(rows) * width;
    const auto x = random_bf16(random, n), y = random_bf16(random, n), bias = random_bf16(random, width);
    Buffer<bf16> d_x(x), d_y(y), d_bias(bias);
    // Three kernels in a row: each must see the one before.
    LAUNCH(add_bias_bf16, dim3(rows), 64, 0, d_x.get(), d_bias.get(), width);
    LAUNCH(add_bf16, dim3(rows), 32, 0, d_x.get(), d_y.get(), width, 0.5f);
    LAUNCH(scale_bf16, dim3(rows), 96, 0, d_x.get(), width, 3.0f);
    std::vector<double> want(n);
    for (size_t i = 0; i < n; i++) {
        want[i] = 3 * value(round_bf16(value(round_bf16(value(x[i]) + value(bias[i % width]))) + 0.5 * value(y[i])));
    }
    expect_close("add", d_x.download(), want, 4e-3);
}

void run_gate(int rows, int width, int at, bool one) {
    Random random(rows + width + at);
    const int stride = row_stride(width), gates_width = at + (one ? 1 : width), gates_stride = gates_width + 3;
    const auto x = random_bf16(random, static_cast<size_t>(rows) * width);
    const auto gates = random_bf16(random, static_cast<size_t>(rows) * gates_width, 3.0f);
    Buffer<bf16> d_x(spread_rows(x, width, stride, kZero)),
        d_gates(spread_rows(gates, gates_width, gates_stride, kNan));
    const GateArgs args{d_gates.get(), d_x.get(), gates_stride, at, width, one};
    LAUNCH(gate_bf16, dim3(rows), 64, 0, args);
    std::vector<double> want(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        const size_t gate = i / width * gates_width + at + (one ? 0 : i % width);
        want[i] = value(x[i]) / (1 + exp(-value(gates[gate])));
    }
    expect_close("gate", gather_rows("gate", d_x.download(), width, stride), want);
}

void run_glu(int rows, int width, Gate kind, int group) {
    Random random(rows + width + static_cast<int>(kind));
    const auto x = random_bf16(random, static_cast<size_t>(rows) * 2 * width, kind == Gate::ClampedSwish ? 6.0f : 3.0f);
    const GateSpec gate{kind, 7.0f, 1.702f};
    const size_t n = static_cast<size_t>(rows) * width;
    const int stride = row_stride(width);
    Buffer<bf16> d_x(spread_rows(x, 2 * width, row_stride(2 * width), kNan)), d_out(static_cast<size_t>(rows) * stride);
    std::vector<double> want(n);
    for (size_t i = 0; i < n; i++) {
        const size_t at = i / width * 2 * width + i % width;
        want[i] = reference::activate(value(x[at]), value(x[at + width]), gate);
    }
    const std::string name = "glu " + std::to_string(static_cast<int>(kind)) + " width " + std::to_string(width);
    if (group == 0) {
        LAUNCH(glu_bf16, dim3(rows), 128, 0, d_x.get(), d_out.get(), width, gate);
        return expect_close(name, gather_rows(name, d_out.download(), width, stride), want);
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

double curve_of(double x, const ActivateArgs& a) {
    switch (a.kind) {
        case Curve::Silu:
            return reference::activate(x, 1, GateSpec{Gate::Silu, 0, 0});
        case Curve::GeluTanh:
            return reference::activate(x, 1, GateSpec{Gate::GeluTanh, 0, 0});
        case Curve::Gelu:
            return reference::activate(x, 1, GateSpec{Gate::Gelu, 0, 0});
        case Curve::Tanh:
            return tanh(x);
        case Curve::Xielu:
            return x > 0 ? static_cast<double>(a.alpha_p) * x * x + static_cast<double>(a.beta) * x
                         : (expm1(std::min<double>(x, a.eps)) - x) * a.alpha_n + static_cast<double>(a.beta) * x;
    }
    return NAN;
}

void run_activate(int rows, int width, Curve kind) {
    Random random(rows + width + static_cast<int>(kind));
    const int stride = row_stride(width);
    auto x = random_bf16(random, static_cast<size_t>(rows) * width, 3.0f);
    x[0] = kZero;
    Buffer<bf16> d_x(spread_rows(x, width, stride, kNan)), d_out(static_cast<size_t>(rows) * stride);
    ActivateArgs args{d_x.get(), d_out.get(), width, kind, 0.8f, 1.3f, 0.5f, -1e-1f};
    std::vector<double> want(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        want[i] = curve_of(value(x[i]), args);
    }
    const std::string name = "curve " + std::to_string(static_cast<int>(kind)) + " width " + std::to_string(width);
    LAUNCH(activate_bf16, dim3(rows), 32, 0, args);
    expect_close(name, gather_rows(name, d_out.download(), width, stride), want);
    args.out = d_x.get();
    LAUNCH(activate_bf16, dim3(rows), 32, 0, args);
    expect_close(name + " in place", gather_rows(name, d_x.download(), width, stride), want);
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
    run_embed(5, 72, 11, 72);
    run_embed(1, 2880, 7, 2880);
    run_embed(4, 28, 9, 48);
    run_embed(3, 3, 5, 8);
    run_positions(4, 28, 20, 2);
    run_positions(2, 64, 7, 0);
    run_gate(3, 20, 5, false);
    run_gate(2, 64, 0, false);
    run_gate(4, 12, 7, true);
    run_add(3, 72);
    run_add(2, 1000);
    for (Gate kind : {Gate::Silu, Gate::GeluTanh, Gate::Gelu, Gate::ClampedSwish}) {
        run_glu(2, 72, kind, 0);
        run_glu(3, 1448, kind, 0);
        run_glu(3, 13, kind, 0);
        run_glu(2, 100, kind, 0);
    }
    for (Curve kind : {Curve::Silu, Curve::GeluTanh, Curve::Gelu, Curve::Tanh, Curve::Xielu}) {
        run_activate(2, 264, kind);
        run_activate(3, 21, kind);
    }
    run_glu(2, 640, Gate::Silu, 128);
    run_glu(2, 328, Gate::GeluTanh, 328);
    run_glu(1, 192, Gate::Silu, 64);
    run_pages(16, 1);
    run_pages(2048 + 16, 2);
    return report();
}
