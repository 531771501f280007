// Contract of each wrapper of port.cuh: the same kernels and the same expected numbers on the emulation and on a GPU.
//
// Expected values are worked out here by the plainest means, from the PTX ISA's wording, not by the emulation's code.
#include "../harness/harness.h"

using namespace harness;

// ---- numbers ----

extern "C" __global__ void contract_numbers(const float* x, int n, bf16* halves, uint32_t* pairs, e4m3* codes,
                                            float* back) {
    dependency_wait();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        halves[i] = to_bf16(x[i]);
        pairs[i] = pack_bf16(x[i], -x[i]);
        codes[i] = to_e4m3(x[i]);
        back[i] = to_float(to_bf16(x[i]));
    }
}

extern "C" __global__ void contract_widen(const uint32_t* codes, int n, uint2* wide, float* singles) {
    dependency_wait();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        wide[i] = widen_e4m3x4(codes[i]);
        for (int b = 0; b < 4; b++) {
            singles[4 * i + b] = to_float(e4m3{static_cast<uint8_t>(codes[i] >> (8 * b))});
        }
    }
}

extern "C" __global__ void contract_math(const float* x, const float* y, int n, float* out) {
    dependency_wait();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        out[i] = add_rn(mul_rn(x[i], y[i]), -x[i]);
        out[n + i] = fast_exp2(x[i]);
        out[2 * n + i] = fast_exp(x[i]);
        out[3 * n + i] = fast_rsqrt(fabsf(x[i]) + 0.01f);
        out[4 * n + i] = fast_divide(x[i], fabsf(y[i]) + 0.01f);
        out[5 * n + i] = fast_tanh(x[i]);
        out[6 * n + i] = is_finite(x[i]) ? 1.0f : 0.0f;
    }
}

static void test_numbers() {
    // Every kind of rounding case: halves between neighbours, subnormals of e4m3, its limit, zeros, infinities.
    std::vector<float> x{0.0f,          -0.0f,     1.0f,          448.0f,      449.0f,       464.0f,        480.0f,
                         1e30f,         -1e30f,    INFINITY,      -INFINITY,   0.001953125f, 0.0009765625f, 0.00097656f,
                         0.0029296875f, 0.015625f, 0.0146484375f, 1.00390625f, 1.01171875f,  3.3895e38f};
    Random random(1);
    for (int i = 0; i < 2000; i++) {
        x.push_back(random.normal() * powf(2.0f, static_cast<float>(random.below(24) - 12)));
    }
    for (int code = 0; code < 0x7e; code++) {
        const double a = value(e4m3{static_cast<uint8_t>(code)}), b = value(e4m3{static_cast<uint8_t>(code + 1)});
        for (double m : {a, (a + b) / 2, (a + b) / 2 * (1 + 1e-6), (a + b) / 2 * (1 - 1e-6)}) {
            x.push_back(static_cast<float>(m)), x.push_back(static_cast<float>(-m));
        }
    }
    const int n = static_cast<int>(x.size());
    Buffer<float> d_x(x), d_back(n);
    Buffer<bf16> d_halves(n);
    Buffer<uint32_t> d_pairs(n);
    Buffer<e4m3> d_codes(n);
    LAUNCH(contract_numbers, dim3(1), 128, 0, d_x.get(), n, d_halves.get(), d_pairs.get(), d_codes.get(), d_back.get());
    const auto halves = d_halves.download();
    const auto pairs = d_pairs.download();
    const auto codes = d_codes.download();
    const auto back = d_back.download();
    for (int i = 0; i < n; i++) {
        const bf16 want = round_bf16(x[i]);
        if (halves[i].bits != want.bits) {
            mismatch("to_bf16 of " + std::to_string(x[i]), i, halves[i].bits, want.bits);
        }
        expect("pack_bf16", pairs[i] == (want.bits | static_cast<uint32_t>(round_bf16(-x[i]).bits) << 16));
        expect("to_float", value(halves[i]) == back[i]);
        const e4m3 code = isinf(x[i]) ? round_e4m3(x[i] > 0 ? 448 : -448) : round_e4m3(x[i]);
        if (codes[i].bits != code.bits) {
            mismatch("to_e4m3 of " + std::to_string(x[i]), i, codes[i].bits, code.bits);
        }
    }
    Buffer<float> d_nan(std::vector<float>{NAN});
    LAUNCH(contract_numbers, dim3(1), 32, 0, d_nan.get(), 1, d_halves.get(), d_pairs.get(), d_codes.get(),
           d_back.get());
    expect("NaN stays NaN in bf16", isnan(value(d_halves.download()[0])));
    expect("NaN is 0x7f in e4m3", (d_codes.download()[0].bits & 0x7f) == 0x7f);

    std::vector<uint32_t> words;
    for (uint32_t c = 0; c < 256; c++) {
        words.push_back(c | (255 - c) << 8 | (c ^ 0x55) << 16 | ((c * 7) & 255) << 24);
    }
    Buffer<uint32_t> d_words(words);
    Buffer<uint2> d_wide(256);
    Buffer<float> d_singles(1024);
    LAUNCH(contract_widen, dim3(1), 64, 0, d_words.get(), 256, d_wide.get(), d_singles.get());
    const auto wide = d_wide.download();
    const auto singles = d_singles.download();
    for (int i = 0; i < 256; i++) {
        const uint32_t halves4[4] = {wide[i].x & 0xffff, wide[i].x >> 16, wide[i].y & 0xffff, wide[i].y >> 16};
        for (int b = 0; b < 4; b++) {
            const e4m3 code{static_cast<uint8_t>(words[i] >> (8 * b))};
            const bool nan = (code.bits & 0x7f) == 0x7f;
            const double want = nan ? (code.bits & 0x80 ? -480 : 480) : value(code);
            expect("widen_e4m3x4", value(bf16{static_cast<uint16_t>(halves4[b])}) == want);
            expect("to_float of e4m3", singles[4 * i + b] == want);
        }
    }
}

static void test_math() {
    Random random(2);
    std::vector<float> x, y;
    for (int i = 0; i < 500; i++) {
        x.push_back(random.normal() * 5), y.push_back(random.normal());
    }
    x[0] = -INFINITY, x[1] = 0, x[2] = -100, x[3] = 80;
    const int n = 500;
    Buffer<float> d_x(x), d_y(y), d_out(7 * n);
    LAUNCH(contract_math, dim3(1), 64, 0, d_x.get(), d_y.get(), n, d_out.get());
    const auto out = d_out.download();
    const auto near = [](double got, double want, double tolerance) {
        return fabs(got - want) <= tolerance * fabs(want) + 1e-37;
    };
    for (int i = 1; i < n; i++) {
        const float product = static_cast<float>(static_cast<double>(x[i]) * y[i]);
        expect("mul_rn, add_rn: two roundings", out[i] == static_cast<float>(static_cast<double>(product) - x[i]));
        expect("fast_exp2", near(out[n + i], exp2(static_cast<double>(x[i])), 1e-6));
        expect("fast_exp", near(out[2 * n + i], exp(static_cast<double>(x[i])), 1e-5));
        expect("fast_rsqrt", near(out[3 * n + i], 1 / sqrt(fabs(static_cast<double>(x[i])) + 0.01f), 1e-6));
        expect("fast_divide", near(out[4 * n + i], x[i] / (fabs(static_cast<double>(y[i])) + 0.01f), 1e-6));
        expect("fast_tanh", fabs(out[5 * n + i] - tanh(static_cast<double>(x[i]))) < 1e-6);
        expect("is_finite", out[6 * n + i] == 1);
    }
    expect("exp2 of -infinity", out[n] == 0);
    expect("exp of -infinity", out[2 * n] == 0);
    expect("-infinity is not finite", out[6 * n] == 0);
}

// ---- warps, blocks ----

extern "C" __global__ void contract_warps(uint32_t* out) {
    dependency_wait();
    const uint32_t t = threadIdx.x, l = lane_id();
    out[t] = shuffle(t * 3, 5);
    out[64 + t] = shuffle_xor(t, 9);
    out[128 + t] = shuffle_up(t, 4);
    out[192 + t] = static_cast<uint32_t>(shuffle_xor(uint64_t{t} << 40, 16) >> 40);
    PORT_SHARED(uint32_t, box, 64);
    box[t] = t + 1;
    warp_sync();
    out[256 + t] = box[t ^ 31];
    block_sync();
    box[63 - t] = t;
    named_sync(3, 64);
    out[320 + t] = box[t];
    out[384 + t] = l;
}

static void test_warps() {
    Buffer<uint32_t> d_out(448);
    LAUNCH(contract_warps, dim3(1), 64, 0, d_out.get());
    std::vector<uint32_t> want(448);
    for (uint32_t t = 0; t < 64; t++) {
        const uint32_t l = t % 32;
        want[t] = (t / 32 * 32 + 5) * 3;
        want[64 + t] = t ^ 9;
        want[128 + t] = l < 4 ? t : t - 4;
        want[192 + t] = t ^ 16;
        want[256 + t] = (t ^ 31) + 1;
        want[320 + t] = 63 - t;
        want[384 + t] = l;
    }
    expect_equal("warps", d_out.download(), want);
}

// ---- memory ----

extern "C" __global__ void contract_copies(const unsigned char* in, uint32_t* out) {
    PORT_DYNAMIC_SHARED(shared);
    dependency_wait();
    const int t = static_cast<int>(threadIdx.x);
    uint32_t* words = reinterpret_cast<uint32_t*>(shared);
    for (int i = 0; i < 3; i++) {
        copy_async(shared + (i * 32 + t) * 16, in + (i * 32 + t) * 16, static_cast<unsigned>(i == 2 ? t % 17 : 16));
        copy_commit();
    }
    copy_wait<1>();  // two of the three groups
    for (int i = 0; i < 8; i++) {
        out[t * 8 + i] = words[(i / 4 * 32 + t) * 4 + i % 4];
    }
    copy_wait<0>();
    block_sync();
    const int other = 31 - t;
    for (int i = 0; i < 4; i++) {
        out[256 + t * 4 + i] = words[(64 + other) * 4 + i];
    }
    store16(out + 384 + t * 4, load_stream(in + t * 16));
}

extern "C" __global__ void contract_atomics(uint32_t* words, unsigned long long* sum) {
    dependency_wait();
    atomic_add(&words[0], threadIdx.x);
    atomic_or(&words[1], 1u << (threadIdx.x % 32));
    atomic_add(sum, (1ull << 40) + threadIdx.x);
    PORT_SHARED(uint32_t, counter, 1);
    if (threadIdx.x == 0) {
        *counter = 0;
    }
    block_sync();
    words[16 + blockIdx.x * 64 + count_in_block(counter)] = 1;
    block_sync();
    // What every block wrote is seen by the last to arrive.
    PORT_SHARED(unsigned, last, 1);
    if (threadIdx.x == 0) {
        *last = count_arrival(&words[2]) + 1 == gridDim.x;
    }
    block_sync();
    if (!*last) {
        return;
    }
    for (unsigned b = 0; b < gridDim.x; b++) {
        atomic_add(&words[3], words[16 + b * 64 + threadIdx.x]);
    }
}

static void test_memory() {
    Random random(3);
    std::vector<unsigned char> in(96 * 16);
    for (unsigned char& b : in) {
        b = static_cast<unsigned char>(random.next());
    }
    Buffer<unsigned char> d_in(in);
    Buffer<uint32_t> d_out(512);
    LAUNCH(contract_copies, dim3(1), 32, 96 * 16, d_in.get(), d_out.get());
    std::vector<uint32_t> want(512);
    const auto word = [&](int piece, int i, int bytes) {
        uint32_t w = 0;
        for (int b = 0; b < 4; b++) {
            w |= i * 4 + b < bytes ? uint32_t{in[piece * 16 + i * 4 + b]} << (8 * b) : 0;
        }
        return w;
    };
    for (int t = 0; t < 32; t++) {
        for (int i = 0; i < 8; i++) {
            want[t * 8 + i] = word(i / 4 * 32 + t, i % 4, 16);
        }
        for (int i = 0; i < 4; i++) {
            want[256 + t * 4 + i] = word(64 + 31 - t, i, (31 - t) % 17);
        }
        for (int i = 0; i < 4; i++) {
            want[384 + t * 4 + i] = word(t, i, 16);
        }
    }
    expect_equal("copies", d_out.download(), want);

    constexpr unsigned kBlocks = 5;
    Buffer<uint32_t> d_words(std::vector<uint32_t>(16 + kBlocks * 64, 0));
    Buffer<unsigned long long> d_sum(std::vector<unsigned long long>(1, 0));
    LAUNCH(contract_atomics, dim3(kBlocks), 64, 0, d_words.get(), d_sum.get());
    const auto words = d_words.download();
    expect("atomic_add", words[0] == kBlocks * 63 * 32);
    expect("atomic_or", words[1] == ~0u);
    expect("count_arrival", words[2] == kBlocks);
    expect("writes before an arrival are seen", words[3] == kBlocks * 64);
    expect("atomic_add of 64 bits", d_sum.download()[0] == kBlocks * (64 * (1ull << 40) + 63 * 32));
}

// ---- matrices ----

extern "C" __global__ void contract_matrices(const bf16* a, const bf16* b, float* out, uint32_t* loaded) {
    PORT_SHARED(bf16, tile, 32 * 8 * 2);
    dependency_wait();
    const int l = static_cast<int>(lane_id()), g = l / 4, t = l % 4;
    // Fragments by the layout of m16n8k16, element by element.
    const auto pair = [](const bf16* p) { return p[0].bits | uint32_t{p[1].bits} << 16; };
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; i++) {
        fa[i] = pair(a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8);
    }
    for (int i = 0; i < 2; i++) {
        fb[i] = pair(b + g * 16 + 2 * t + i * 8);  // b is [8][16], k fastest
    }
    float c[4] = {1, 2, 3, 4};
    mma_bf16(c, fa, fb);
    for (int i = 0; i < 4; i++) {
        out[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
    }
    // Four 8x8 matrices: the four quarters of a, row by row.
    for (int i = 0; i < 8; i++) {
        tile[l * 8 + i] = a[(l % 16) * 16 + l / 16 * 8 + i];
    }
    warp_sync();
    uint32_t r[4];
    load_matrix_x4(r, &tile[l * 8]);
    for (int i = 0; i < 4; i++) {
        loaded[l * 4 + i] = r[i];
    }
    load_matrix_x4_transposed(r, &tile[l * 8]);
    for (int i = 0; i < 4; i++) {
        loaded[128 + l * 4 + i] = r[i];
    }
}

static void test_matrices() {
    Random random(4);
    const auto a = random_bf16(random, 256), b = random_bf16(random, 128);
    Buffer<bf16> d_a(a), d_b(b);
    Buffer<float> d_out(128);
    Buffer<uint32_t> d_loaded(256);
    LAUNCH(contract_matrices, dim3(1), 32, 0, d_a.get(), d_b.get(), d_out.get(), d_loaded.get());
    std::vector<double> want(128);
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 8; j++) {
            double sum = j % 2 + i / 8 * 2 + 1;
            for (int k = 0; k < 16; k++) {
                sum += value(a[i * 16 + k]) * value(b[j * 16 + k]);
            }
            want[i * 8 + j] = sum;
        }
    }
    expect_close("mma_bf16", d_out.download(), want, 1e-5);
    std::vector<uint32_t> loaded(256);
    for (int l = 0; l < 32; l++) {
        for (int m = 0; m < 4; m++) {
            const auto element = [&](int row, int column) {
                return uint32_t{a[(m % 2 * 8 + row) * 16 + m / 2 * 8 + column].bits};
            };
            loaded[l * 4 + m] = element(l / 4, l % 4 * 2) | element(l / 4, l % 4 * 2 + 1) << 16;
            loaded[128 + l * 4 + m] = element(l % 4 * 2, l / 4) | element(l % 4 * 2 + 1, l / 4) << 16;
        }
    }
    expect_equal("load_matrix", d_loaded.download(), loaded);
}

// ---- dependent grids ----

// Reads only constants before its wait; what the grid before wrote, after it.
extern "C" __global__ void contract_dependent(const uint32_t* constants, uint32_t* values) {
    const uint32_t early = constants[threadIdx.x];
    let_dependents_start();
    dependency_wait();
    values[blockIdx.x * 32 + threadIdx.x] = values[blockIdx.x * 32 + threadIdx.x] * 3 + early;
}

static void test_dependents() {
    std::vector<uint32_t> constants(32), values(96, 1);
    for (uint32_t i = 0; i < 32; i++) {
        constants[i] = i + 1;
    }
    Buffer<uint32_t> d_constants(constants), d_values(values);
    for (int i = 0; i < 7; i++) {
        LAUNCH(contract_dependent, dim3(3), 32, 0, d_constants.get(), d_values.get());
    }
    for (int i = 0; i < 7; i++) {
        for (uint32_t k = 0; k < 96; k++) {
            values[k] = values[k] * 3 + constants[k % 32];
        }
    }
    expect_equal("seven grids in a row", d_values.download(), values);
}

int main() {
    test_numbers();
    test_math();
    test_warps();
    test_memory();
    test_matrices();
    test_dependents();
    return report();
}
