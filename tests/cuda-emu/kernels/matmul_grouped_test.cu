// The matmul of many rows: dense, and experts by their list of tiles.
#include "../harness/harness.h"
#include "matmul_grouped.cu"

#include "../harness/reference.h"

using namespace harness;

namespace {

struct Case {
    int rows, out, in;
    bool codes, gated, bias, single;
    int experts;  // 0: dense
    int top_k;
    bool gather;
    float cap;
};

void run(const Case& c) {
    Random random(c.rows + c.out * 3 + c.in);
    const int weights = std::max(c.experts, 1), width = c.gated ? c.out / 2 : c.out;
    const size_t each = static_cast<size_t>(c.out) * c.in;
    const int scale_columns = (c.in + 127) / 128, scales_each = (c.out + 63) / 64 * scale_columns;
    std::vector<double> w(each * weights);
    std::vector<bf16> halves(c.codes ? 0 : w.size());
    std::vector<e4m3> codes(c.codes ? w.size() : 0);
    std::vector<float> scales(c.codes ? scales_each * weights : 0);
    for (float& s : scales) {
        s = static_cast<float>(0.001 + 0.01 * random.unit());
    }
    for (size_t i = 0; i < w.size(); i++) {
        if (c.codes) {
            do {
                codes[i] = e4m3{static_cast<uint8_t>(random.next())};
            } while ((codes[i].bits & 0x7f) == 0x7f);
            const size_t row = i % each / c.in, k = i % c.in;
            w[i] = value(codes[i]) * scales[i / each * scales_each + row / 64 * scale_columns + k / 128];
        } else {
            halves[i] = round_bf16(random.normal() * 0.1f);
            w[i] = value(halves[i]);
        }
    }
    // Experts: the first takes most pairs, the second none.
    const int pairs = c.experts ? c.rows * c.top_k : c.rows;
    std::vector<uint32_t> offsets{0}, order, tiles{0};
    std::vector<int> expert_of;
    for (int e = 0; e < c.experts; e++) {
        for (int p = 0; p < pairs; p++) {
            const int chosen = p % 5 < 3 ? 0 : 2 + p % std::max(1, c.experts - 2);
            if (chosen == e) {
                order.push_back(static_cast<uint32_t>(p)), expert_of.push_back(e);
            }
        }
        const uint32_t size = static_cast<uint32_t>(order.size()) - offsets.back();
        for (uint32_t skip = 0; skip < size; skip += 64) {
            tiles.push_back(e), tiles.push_back(skip), tiles[0]++;
        }
        offsets.push_back(static_cast<uint32_t>(order.size()));
    }
    const int x_rows = c.experts && !c.gather ? pairs : c.rows;
    const auto x = random_bf16(random, static_cast<size_t>(x_rows) * c.in),
               bias = random_bf16(random, static_cast<size_t>(c.out) * weights);
    const size_t outputs = static_cast<size_t>(pairs) * width;
    Buffer<bf16> d_x(x), d_bias(bias), d_halves(halves), d_out(c.single ? 0 : outputs);
    Buffer<e4m3> d_codes(codes);
    Buffer<float> d_scales(scales), d_single(c.single ? outputs : 0);
    Buffer<uint32_t> d_offsets(offsets), d_order(order), d_tiles(tiles),
        d_active(std::vector<uint32_t>(1 + c.experts, 0));
    MatmulArgs args{};
    args.weight =
        c.codes ? reinterpret_cast<unsigned char*>(d_codes.get()) : reinterpret_cast<unsigned char*>(d_halves.get());
    args.scales = d_scales.get();
    args.x = d_x.get();
    args.bias = c.bias ? d_bias.get() : nullptr;
    args.y = c.single ? static_cast<void*>(d_single.get()) : d_out.get();
    args.experts = c.experts ? d_active.get() : nullptr;
    args.offsets = d_offsets.get();
    args.pairs = d_order.get();
    args.weight_stride = each * (c.codes ? 1 : 2);
    args.scale_stride = static_cast<uint32_t>(scales_each);
    args.rows = c.rows;
    args.in = c.in;
    args.out = c.out;
    args.x_stride = c.in;
    args.y_stride = width;
    args.bias_stride = static_cast<uint32_t>(c.out);
    args.scale_rows = 64;
    args.scale_blocks = 1;
    args.top_k = c.top_k;
    args.gather = c.gather;
    args.single_out = c.single;
    args.gated = c.gated;
    args.scale = 1.0f;
    args.cap = c.cap;
    args.gate = GateSpec{Gate::GeluTanh, 0, 0};
    // One row of blocks more than there are tiles: they end.
    const dim3 grid(static_cast<unsigned>(c.gated ? (width + 63) / 64 : (c.out + 127) / 128),
                    c.experts ? tiles[0] + 1 : static_cast<unsigned>((c.rows + 63) / 64));
    const uint32_t* list = c.experts ? d_tiles.get() : nullptr;
    if (c.codes) {
        LAUNCH(matmul_grouped_e4m3, grid, 256, Grouped<true>::kSharedBytes, args, list);
    } else {
        LAUNCH(matmul_grouped_bf16, grid, 256, Grouped<false>::kSharedBytes, args, list);
    }
    std::vector<double> want;
    for (int place = 0; place < pairs; place++) {
        const int e = c.experts ? expert_of[place] : 0;
        const size_t row = c.experts && c.gather ? order[place] / c.top_k : place;
        std::vector<double> y(c.out);
        for (int o = 0; o < c.out; o++) {
            double sum = c.bias ? value(bias[e * c.out + o]) : 0;
            for (int k = 0; k < c.in; k++) {
                sum += value(x[row * c.in + k]) * w[e * each + static_cast<size_t>(o) * c.in + k];
            }
            y[o] = c.cap > 0 ? c.cap * tanh(sum / c.cap) : sum;
        }
        for (int o = 0; o < width; o++) {
            want.push_back(c.gated ? reference::activate(y[o], y[width + o], args.gate) : y[o]);
        }
    }
    const std::string name = "grouped rows " + std::to_string(c.rows) + " experts " + std::to_string(c.experts) +
                             " codes " + std::to_string(c.codes);
    if (c.single) {
        expect_close(name, d_single.download(), want, 1e-4);
    } else {
        expect_close(name, d_out.download(), want);
    }
}

// A weight for each head, x less padded than the weight, biases for the first outputs alone.
void run_heads(bool codes, int rows, int heads, int out, int in) {
    Random random(rows + heads * 3 + out + in);
    const int columns = codes ? (in + 15) / 16 * 16 : in, y_head = out + 6;
    const size_t each = static_cast<size_t>(out) * columns;
    const int x_stride = heads == 1 ? in : heads * (in + 8), y_stride = heads * y_head, biases = out - 5;
    std::vector<bf16> halves(codes ? 0 : each * heads, bf16{0});
    std::vector<e4m3> eights(codes ? each * heads : 0, e4m3{0});
    for (size_t i = 0; i < each * heads; i++) {
        if (static_cast<int>(i % columns) >= in) {
            continue;
        }
        if (codes) {
            eights[i] = e4m3{static_cast<uint8_t>(random.next() % 0x60)};
        } else {
            halves[i] = round_bf16(random.normal() * 0.1);
        }
    }
    const std::vector<float> scales(heads * out, 0.01f);
    const auto x = random_bf16(random, static_cast<size_t>(rows) * x_stride), bias = random_bf16(random, biases);
    Buffer<bf16> d_x(x), d_halves(halves), d_y(static_cast<size_t>(rows) * y_stride), d_bias(bias);
    Buffer<e4m3> d_eights(eights);
    Buffer<float> d_scales(scales);
    MatmulArgs args{};
    args.weight =
        codes ? reinterpret_cast<unsigned char*>(d_eights.get()) : reinterpret_cast<unsigned char*>(d_halves.get());
    args.scales = codes ? d_scales.get() : nullptr;
    args.x = d_x.get();
    args.y = d_y.get();
    args.bias = heads == 1 ? d_bias.get() : nullptr;
    args.bias_stride = static_cast<uint32_t>(biases);
    args.weight_stride = each * (codes ? 1 : 2);
    args.scale_stride = static_cast<uint32_t>(out);
    args.x_stride = x_stride;
    args.y_stride = y_stride;
    args.x_head = in + 8;
    args.y_head = y_head;
    args.rows = rows;
    args.in = columns;
    args.out = out;
    args.scale_rows = 1;
    args.scale = 1.0f;
    const dim3 grid(static_cast<unsigned>((out + 127) / 128), static_cast<unsigned>((rows + 63) / 64),
                    static_cast<unsigned>(heads));
    const uint32_t* none = nullptr;
    if (codes) {
        LAUNCH(matmul_grouped_e4m3, grid, 256, Grouped<true>::kSharedBytes, args, none);
    } else {
        LAUNCH(matmul_grouped_bf16, grid, 256, Grouped<false>::kSharedBytes, args, none);
    }
    const auto y = d_y.download();
    std::vector<bf16> got;
    std::vector<double> want;
    bool beside = true;
    for (size_t i = 0; i < y.size(); i++) {
        const int row = static_cast<int>(i / y_stride), head = static_cast<int>(i % y_stride) / y_head;
        const int o = static_cast<int>(i % y_stride) % y_head;
        if (o >= out) {
            beside = beside && y[i].bits == 0xffff;
            continue;
        }
        double sum = heads == 1 && o < biases ? value(bias[o]) : 0;
        for (int k = 0; k < in; k++) {
            const size_t at = each * head + static_cast<size_t>(o) * columns + k;
            sum += value(x[static_cast<size_t>(row) * x_stride + head * (in + 8) + k]) *
                   (codes ? value(eights[at]) * static_cast<double>(0.01f) : value(halves[at]));
        }
        got.push_back(y[i]);
        want.push_back(sum);
    }
    const std::string name = "grouped heads " + std::to_string(heads) + " codes " + std::to_string(codes);
    expect_close(name, got, want);
    expect(name + ", beside the heads", beside);
}

}  // namespace

int main() {
    //   rows out in codes gated bias single experts top_k gather cap
    run({70, 136, 72, false, false, true, false, 0, 1, false, 0.0f});
    run({9, 144, 80, true, true, true, false, 3, 2, true, 0.0f});
    run_heads(false, 5, 3, 40, 24);
    run_heads(true, 3, 1, 24, 40);
    if (small()) {
        return report();
    }
    run({64, 128, 64, false, false, false, true, 0, 1, false, 5.0f});
    run({130, 200, 336, true, false, false, false, 0, 1, false, 0.0f});
    run({100, 272, 200, false, true, true, false, 4, 2, true, 0.0f});
    run({60, 136, 144, true, false, false, false, 5, 3, false, 0.0f});
    run({1, 130, 2880, false, false, false, false, 0, 1, false, 0.0f});
    run_heads(false, 70, 2, 136, 128);
    run_heads(true, 66, 2, 130, 32);
    return report();
}
