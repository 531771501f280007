// The matmul of few rows: weights in bf16 and e4m3, split-K, epilogues, experts.
#include "../harness/harness.h"
#include "matmul_skinny.cu"

#include "../harness/reference.h"
#include "../harness/rows.h"

using namespace harness;

namespace {

using Kernel = void (*)(MatmulArgs);

template <bool kE4m3, int kM, int kN>
constexpr size_t shared_bytes() {
    using S = Skinny<kE4m3, kM, kN>;
    return std::max<size_t>(S::kStages * (S::kWeightStage + S::kXStage), kN * 8 * kResultStride * 4);
}

struct Variant {
    Kernel kernel;
    const char* name;
    unsigned threads;
    size_t shared;
};

Variant pick(bool codes, int rows) {
#define VARIANT(name, codes, m, n) \
    Variant { name, #name, Skinny<codes, m, n>::kThreads, shared_bytes<codes, m, n>() }
    if (codes) {
        if (rows <= 8) {
            return VARIANT(matmul_skinny_e4m3_8, true, 1, 1);
        }
        if (rows <= 16) {
            return VARIANT(matmul_skinny_e4m3_16, true, 1, 2);
        }
        if (rows <= 32) {
            return VARIANT(matmul_skinny_e4m3_32, true, 1, 4);
        }
        return VARIANT(matmul_skinny_e4m3_64, true, 2, 8);
    }
    if (rows <= 8) {
        return VARIANT(matmul_skinny_bf16_8, false, 1, 1);
    }
    if (rows <= 16) {
        return VARIANT(matmul_skinny_bf16_16, false, 1, 2);
    }
    if (rows <= 32) {
        return VARIANT(matmul_skinny_bf16_32, false, 1, 4);
    }
    return VARIANT(matmul_skinny_bf16_64, false, 2, 8);
#undef VARIANT
}

void run_variant(const Variant& v, dim3 grid, const MatmulArgs& args) {
    harness::launch(v.name, v.kernel, grid, v.threads, v.shared, args);
}

struct Case {
    int rows, out, in, splits;
    bool codes, gated;
    int scale_rows;  // of e4m3
    bool scale_blocks, bias, single;
    float scale, cap;
};

// Weights as numbers, as bytes, and their scales.
struct Weights {
    std::vector<double> values;
    std::vector<bf16> halves;
    std::vector<e4m3> codes;
    std::vector<float> scales;
};

Weights random_weights(Random& random, int out, int in, bool codes, int scale_rows, bool scale_blocks) {
    Weights w;
    const size_t n = static_cast<size_t>(out) * in;
    w.values.resize(n);
    const int columns = scale_blocks ? (in + 127) / 128 : 1;
    if (codes) {
        w.scales.resize(static_cast<size_t>((out + scale_rows - 1) / scale_rows) * columns);
        for (float& s : w.scales) {
            s = static_cast<float>(0.001 + 0.01 * random.unit());
        }
        w.codes.resize(n);
    } else {
        w.halves = random_bf16(random, n, 0.1f);
    }
    for (size_t i = 0; i < n; i++) {
        if (!codes) {
            w.values[i] = value(w.halves[i]);
            continue;
        }
        do {
            w.codes[i] = e4m3{static_cast<uint8_t>(random.next())};
        } while ((w.codes[i].bits & 0x7f) == 0x7f);
        const size_t row = i / in / scale_rows, column = scale_blocks ? i % in / 128 : 0;
        w.values[i] = value(w.codes[i]) * w.scales[row * columns + column];
    }
    return w;
}

GateSpec gate_spec(bool gated) { return GateSpec{gated ? Gate::ClampedSwish : Gate::Silu, 7.0f, 1.702f}; }

// One row of the result, in double precision.
std::vector<double> expected_row(const Case& c, const double* x, const Weights& w, const std::vector<bf16>& bias) {
    std::vector<double> y(c.out);
    for (int o = 0; o < c.out; o++) {
        double sum = c.bias ? value(bias[o]) : 0;
        for (int k = 0; k < c.in; k++) {
            sum += x[k] * w.values[static_cast<size_t>(o) * c.in + k];
        }
        if (!c.gated) {
            sum *= c.scale;
        }
        if (c.cap > 0) {
            sum = c.cap * tanh(sum / c.cap);
        }
        y[o] = sum;
    }
    if (!c.gated) {
        return y;
    }
    std::vector<double> gated(c.out / 2);
    for (int i = 0; i < c.out / 2; i++) {
        gated[i] = reference::activate(y[i], y[c.out / 2 + i], gate_spec(true));
    }
    return gated;
}

void run(const Case& c) {
    Random random(c.rows * 7919 + c.out * 31 + c.in + c.splits);
    const auto x = random_bf16(random, static_cast<size_t>(c.rows) * c.in);
    const Weights w = random_weights(random, c.out, c.in, c.codes, c.scale_rows, c.scale_blocks);
    const auto bias = random_bf16(random, c.out);
    const int width = c.gated ? c.out / 2 : c.out;
    const int tiles = c.gated ? (width + 63) / 64 : (c.out + 127) / 128;
    Buffer<bf16> d_x(x), d_bias(bias), d_halves(w.halves), d_out(c.single ? 0 : c.rows * width);
    Buffer<e4m3> d_codes(w.codes);
    Buffer<float> d_scales(w.scales), d_single(c.single ? c.rows * width : 0);
    Buffer<float> d_partial(c.splits > 1 ? static_cast<size_t>(tiles) * c.splits * c.rows * 128 : 0);
    Buffer<unsigned> d_counters(std::vector<unsigned>(tiles, 0));
    MatmulArgs args{};
    args.weight =
        c.codes ? reinterpret_cast<unsigned char*>(d_codes.get()) : reinterpret_cast<unsigned char*>(d_halves.get());
    args.scales = d_scales.get();
    args.x = d_x.get();
    args.bias = c.bias ? d_bias.get() : nullptr;
    args.y = c.single ? static_cast<void*>(d_single.get()) : d_out.get();
    args.partial = d_partial.get();
    args.counters = d_counters.get();
    args.rows = c.rows;
    args.in = c.in;
    args.out = c.out;
    args.x_stride = c.in;
    args.y_stride = width;
    args.bias_stride = static_cast<uint32_t>(c.out);
    args.scale_rows = c.scale_rows;
    args.scale_blocks = c.scale_blocks;
    args.single_out = c.single;
    args.gated = c.gated;
    args.scale = c.scale;
    args.cap = c.cap;
    args.gate = gate_spec(c.gated);
    const Variant v = pick(c.codes, c.rows);
    run_variant(v, dim3(tiles, c.splits), args);
    run_variant(v, dim3(tiles, c.splits), args);  // counters are as they were: it may run again

    std::vector<double> want, xs(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        xs[i] = value(x[i]);
    }
    for (int r = 0; r < c.rows; r++) {
        const auto row = expected_row(c, &xs[static_cast<size_t>(r) * c.in], w, bias);
        want.insert(want.end(), row.begin(), row.end());
    }
    const std::string name = std::string(v.name) + " rows " + std::to_string(c.rows) + " out " + std::to_string(c.out) +
                             " in " + std::to_string(c.in) + " splits " + std::to_string(c.splits);
    if (c.single) {
        expect_close(name, d_single.download(), want, 1e-4);
    } else {
        expect_close(name, d_out.download(), want);
    }
    expect_equal(name + " counters", d_counters.download(), std::vector<unsigned>(tiles, 0));
}

// A layer of experts: gate and up with gathered rows, then down with rows in place.
void run_experts(bool codes, int tokens, int experts, int top_k, int in, int width) {
    Random random(tokens * 17 + experts);
    std::vector<uint32_t> counts(experts, 0), choice(tokens * top_k);
    for (int t = 0; t < tokens; t++) {
        for (int s = 0; s < top_k; s++) {
            // Expert 1 is never chosen, and no token chooses one twice.
            uint32_t e = static_cast<uint32_t>((t * 3 + s * 2) % experts);
            while (e == 1 || std::count(&choice[t * top_k], &choice[t * top_k] + s, e)) {
                e = (e + 1) % experts;
            }
            choice[t * top_k + s] = e;
            counts[e]++;
        }
    }
    std::vector<uint32_t> offsets(experts + 1, 0), active{0}, pairs;
    for (int e = 0; e < experts; e++) {
        offsets[e + 1] = offsets[e] + counts[e];
        if (counts[e]) {
            active.push_back(e), active[0]++;
        }
        for (uint32_t p = 0; p < choice.size(); p++) {
            if (choice[p] == static_cast<uint32_t>(e)) {
                pairs.push_back(p);
            }
        }
    }
    active.resize(1 + experts, 0xffffffffu);
    const auto x = random_bf16(random, static_cast<size_t>(tokens) * in);
    Case c{tokens, 2 * width, in, 1, codes, true, 128, true, true, false, 1.0f, 0.0f};
    std::vector<Weights> each;
    Weights all;
    std::vector<bf16> bias;
    for (int e = 0; e < experts; e++) {
        each.push_back(random_weights(random, c.out, in, codes, 128, true));
        const Weights& w = each.back();
        all.halves.insert(all.halves.end(), w.halves.begin(), w.halves.end());
        all.codes.insert(all.codes.end(), w.codes.begin(), w.codes.end());
        all.scales.insert(all.scales.end(), w.scales.begin(), w.scales.end());
        const auto b = random_bf16(random, c.out);
        bias.insert(bias.end(), b.begin(), b.end());
    }
    Buffer<bf16> d_x(x), d_bias(bias), d_halves(all.halves), d_out(pairs.size() * width);
    Buffer<e4m3> d_codes(all.codes);
    Buffer<float> d_scales(all.scales);
    Buffer<uint32_t> d_active(active), d_offsets(offsets), d_pairs(pairs);
    MatmulArgs args{};
    args.weight =
        codes ? reinterpret_cast<unsigned char*>(d_codes.get()) : reinterpret_cast<unsigned char*>(d_halves.get());
    args.scales = d_scales.get();
    args.x = d_x.get();
    args.bias = d_bias.get();
    args.y = d_out.get();
    args.experts = d_active.get();
    args.offsets = d_offsets.get();
    args.pairs = d_pairs.get();
    args.weight_stride = static_cast<unsigned long long>(c.out) * in * (codes ? 1 : 2);
    args.scale_stride = static_cast<uint32_t>(all.scales.size() / experts);
    args.rows = tokens;
    args.in = in;
    args.out = c.out;
    args.x_stride = in;
    args.y_stride = width;
    args.bias_stride = static_cast<uint32_t>(c.out);
    args.scale_rows = 128;
    args.scale_blocks = 1;
    args.top_k = top_k;
    args.gather = 1;
    args.gated = 1;
    args.scale = 1.0f;
    args.gate = gate_spec(true);
    const Variant v = pick(codes, tokens);
    run_variant(v, dim3((width + 63) / 64, 1, experts), args);
    std::vector<double> want;
    for (size_t place = 0; place < pairs.size(); place++) {
        const uint32_t e = choice[pairs[place]], token = pairs[place] / top_k;
        std::vector<double> row(in);
        for (int k = 0; k < in; k++) {
            row[k] = value(x[token * in + k]);
        }
        const auto y = expected_row(c, row.data(), each[e],
                                    std::vector<bf16>(bias.begin() + e * c.out, bias.begin() + (e + 1) * c.out));
        want.insert(want.end(), y.begin(), y.end());
    }
    expect_close(std::string(v.name) + " experts", d_out.download(), want);

    // Rows in place, from what the first kernel wrote.
    const auto hidden = d_out.download();
    const Weights down = random_weights(random, experts * 136, width, codes, 1, false);
    Buffer<bf16> d_down(down.halves), d_y(pairs.size() * 136);
    Buffer<e4m3> d_down_codes(down.codes);
    Buffer<float> d_down_scales(down.scales);
    args.weight =
        codes ? reinterpret_cast<unsigned char*>(d_down_codes.get()) : reinterpret_cast<unsigned char*>(d_down.get());
    args.scales = d_down_scales.get();
    args.x = d_out.get();
    args.bias = nullptr;
    args.y = d_y.get();
    args.weight_stride = static_cast<unsigned long long>(136) * width * (codes ? 1 : 2);
    args.scale_stride = 136;
    args.in = width;
    args.out = 136;
    args.x_stride = width;
    args.y_stride = 136;
    args.scale_rows = 1;
    args.scale_blocks = 0;
    args.gather = 0;
    args.gated = 0;
    run_variant(v, dim3(2, 1, experts), args);
    want.clear();
    for (size_t place = 0; place < pairs.size(); place++) {
        const uint32_t e = choice[pairs[place]];
        for (int o = 0; o < 136; o++) {
            double sum = 0;
            for (int k = 0; k < width; k++) {
                sum += value(hidden[place * width + k]) * down.values[(static_cast<size_t>(e) * 136 + o) * width + k];
            }
            want.push_back(sum);
        }
    }
    expect_close(std::string(v.name) + " experts, down", d_y.download(), want);
}

// Widths that are no multiple of 8: the weight is padded with zeros, x less so, rows of y are wide, and biases are only
// those that there are, expert behind expert.
void run_padded(bool codes, int rows, int experts, int out, int in) {
    Random random(rows * 5 + out + in + experts);
    const int columns = codes ? (in + 15) / 16 * 16 : row_stride(in), outputs = row_stride(out), y_stride = outputs + 8;
    const int x_stride = row_stride(in), weights = std::max(experts, 1);
    const Weights w = random_weights(random, weights * out, in, codes, 1, false);
    std::vector<unsigned char> bytes(static_cast<size_t>(weights) * outputs * columns * (codes ? 1 : 2), 0);
    std::vector<float> scales(static_cast<size_t>(weights) * outputs, 1.0f);
    for (int e = 0; e < weights; e++) {
        for (int o = 0; o < out; o++) {
            for (int k = 0; k < in; k++) {
                const size_t from = (static_cast<size_t>(e) * out + o) * in + k;
                const size_t to = (static_cast<size_t>(e) * outputs + o) * columns + k;
                if (codes) {
                    bytes[to] = w.codes[from].bits;
                } else {
                    memcpy(&bytes[2 * to], &w.halves[from], 2);
                }
            }
            scales[static_cast<size_t>(e) * outputs + o] = codes ? w.scales[static_cast<size_t>(e) * out + o] : 1.0f;
        }
    }
    const auto x = random_bf16(random, static_cast<size_t>(rows) * in);
    const auto bias = random_bf16(random, static_cast<size_t>(weights) * out);
    // All rows go to the last expert.
    std::vector<uint32_t> offsets(weights + 1, 0), active{1, static_cast<uint32_t>(weights - 1)}, pairs(rows);
    offsets[weights] = static_cast<uint32_t>(rows);
    for (int r = 0; r < rows; r++) {
        pairs[r] = static_cast<uint32_t>(rows - 1 - r);
    }
    Buffer<unsigned char> d_weight(bytes);
    Buffer<float> d_scales(scales);
    Buffer<bf16> d_x(spread_rows(x, in, x_stride, bf16{0})), d_bias(bias), d_y(static_cast<size_t>(rows) * y_stride);
    Buffer<uint32_t> d_offsets(offsets), d_active(active), d_pairs(pairs);
    MatmulArgs args{};
    args.weight = d_weight.get();
    args.scales = d_scales.get();
    args.x = d_x.get();
    args.bias = d_bias.get();
    args.y = d_y.get();
    args.experts = experts ? d_active.get() : nullptr;
    args.offsets = d_offsets.get();
    args.pairs = d_pairs.get();
    args.weight_stride = static_cast<unsigned long long>(outputs) * columns * (codes ? 1 : 2);
    args.scale_stride = static_cast<uint32_t>(outputs);
    args.bias_stride = static_cast<uint32_t>(out);
    args.x_stride = x_stride;
    args.y_stride = y_stride;
    args.rows = rows;
    args.in = columns;
    args.out = outputs;
    args.scale_rows = 1;
    args.top_k = 1;
    args.gather = 1;
    args.scale = 1.0f;
    const Variant v = pick(codes, rows);
    run_variant(v, dim3((outputs + 127) / 128, 1, 1), args);
    std::vector<double> want;
    for (int r = 0; r < rows; r++) {
        const int row = experts ? rows - 1 - r : r;
        for (int o = 0; o < out; o++) {
            double sum = value(bias[static_cast<size_t>(weights - 1) * out + o]);
            for (int k = 0; k < in; k++) {
                sum += value(x[static_cast<size_t>(row) * in + k]) *
                       w.values[(static_cast<size_t>(weights - 1) * out + o) * in + k];
            }
            want.push_back(sum);
        }
    }
    const std::string name = std::string(v.name) + " padded out " + std::to_string(out) + " in " + std::to_string(in);
    std::vector<bf16> written;
    const auto y = d_y.download();
    for (size_t i = 0; i < y.size(); i++) {
        if (static_cast<int>(i % y_stride) < outputs) {
            written.push_back(y[i]);
        } else {
            expect(name + ", beside rows", y[i].bits == 0xffff);
        }
    }
    expect_close(name, gather_rows(name, written, out, outputs), want);
}

// A weight for each head, on columns of x and y at places of their own.
void run_heads(bool codes, int rows, int heads, int out, int in, int splits) {
    Random random(rows + heads * 3 + out + in);
    const int x_head = in + 16, y_head = out + 8, x_stride = heads * x_head, y_stride = heads * y_head;
    const Weights w = random_weights(random, heads * out, in, codes, 1, false);
    const auto x = random_bf16(random, static_cast<size_t>(rows) * x_stride);
    const int tiles = (out + 127) / 128;
    Buffer<bf16> d_x(x), d_halves(w.halves), d_y(static_cast<size_t>(rows) * y_stride);
    Buffer<e4m3> d_codes(w.codes);
    Buffer<float> d_scales(w.scales), d_partial(static_cast<size_t>(tiles) * heads * splits * rows * 128);
    Buffer<unsigned> d_counters(std::vector<unsigned>(tiles * heads, 0));
    MatmulArgs args{};
    args.weight =
        codes ? reinterpret_cast<unsigned char*>(d_codes.get()) : reinterpret_cast<unsigned char*>(d_halves.get());
    args.scales = codes ? d_scales.get() : nullptr;
    args.x = d_x.get() + 8;
    args.y = d_y.get() + 4;
    args.partial = d_partial.get();
    args.counters = d_counters.get();
    args.weight_stride = static_cast<unsigned long long>(out) * in * (codes ? 1 : 2);
    args.scale_stride = static_cast<uint32_t>(out);
    args.x_stride = x_stride;
    args.y_stride = y_stride;
    args.x_head = x_head;
    args.y_head = y_head;
    args.rows = rows;
    args.in = in;
    args.out = out;
    args.scale_rows = 1;
    args.scale = 1.0f;
    const Variant v = pick(codes, rows);
    run_variant(v, dim3(tiles, splits, heads), args);
    const auto y = d_y.download();
    std::vector<bf16> got;
    std::vector<double> want;
    bool beside = true;
    for (size_t i = 0; i < y.size(); i++) {
        const int row = static_cast<int>(i / y_stride), column = static_cast<int>(i % y_stride) - 4;
        const int head = column < 0 ? 0 : column / y_head, o = column - head * y_head;
        if (o < 0 || o >= out) {
            beside = beside && y[i].bits == 0xffff;
            continue;
        }
        double sum = 0;
        for (int k = 0; k < in; k++) {
            sum += value(x[static_cast<size_t>(row) * x_stride + 8 + head * x_head + k]) *
                   w.values[(static_cast<size_t>(head) * out + o) * in + k];
        }
        got.push_back(y[i]);
        want.push_back(sum);
    }
    const std::string name = std::string(v.name) + " heads " + std::to_string(heads) + " out " + std::to_string(out);
    expect_close(name, got, want);
    expect(name + ", beside the heads", beside);
}

}  // namespace

int main() {
    //       rows out  in  splits codes gated scale_rows blocks bias single scale cap
    run({1, 128, 64, 1, false, false, 1, false, false, false, 1.0f, 0.0f});
    run({3, 200, 328, 2, false, false, 1, false, true, false, 1.0f, 0.0f});
    run({8, 136, 1000, 3, false, false, 1, false, false, true, 0.5f, 30.0f});
    run({5, 136, 336, 1, true, false, 128, true, true, false, 1.0f, 0.0f});
    run({2, 264, 592, 2, true, true, 128, true, true, false, 1.0f, 0.0f});
    run({7, 140, 200, 1, false, true, 1, false, false, false, 1.0f, 0.0f});
    run_experts(false, 5, 6, 2, 72, 72);
    run_padded(false, 3, 0, 13, 28);
    run_padded(true, 2, 0, 20, 23);
    run_padded(false, 4, 3, 28, 12);
    run_heads(false, 3, 2, 40, 24, 1);
    if (small()) {
        return report();
    }
    run({13, 256, 640, 2, false, false, 1, false, true, false, 1.0f, 0.0f});
    run({32, 130, 2880, 4, false, false, 1, false, false, false, 1.0f, 0.0f});
    run({64, 256, 584, 3, false, true, 1, false, true, false, 1.0f, 0.0f});
    run({33, 128, 136, 1, false, false, 1, false, false, true, 1.0f, 0.0f});
    run({16, 128, 640, 2, true, false, 1, false, false, false, 1.0f, 0.0f});
    run({27, 384, 400, 1, true, false, 384, false, false, false, 1.0f, 0.0f});
    run({64, 256, 912, 2, true, false, 128, true, false, true, 1.0f, 0.0f});
    run_experts(true, 9, 5, 3, 144, 80);
    run_padded(true, 9, 4, 131, 104);
    run_padded(false, 17, 2, 3, 7);
    run_heads(true, 12, 3, 136, 160, 1);
    run_heads(false, 40, 2, 128, 200, 2);
    run_experts(false, 40, 4, 2, 136, 64);
    return report();
}
