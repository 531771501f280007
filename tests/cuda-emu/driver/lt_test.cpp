// Products of the emulated cublasLt against sums in double precision; which problems it refuses.
// RUN: MIRAI_EMU_ORDER=forward
// RUN: MIRAI_EMU_LAZY=1
#include <math.h>

#include "lt_api.h"
#include "test.h"

#define LT_MUST(call) EXPECT((call) == CUBLAS_STATUS_SUCCESS)

namespace {

struct Case {
    uint64_t rows, outputs, inner;
    int type, out;
    bool bias, outer;
};

uint32_t state = 12345;
uint32_t next() { return state = state * 1664525u + 1013904223u, state >> 8; }

double from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}
double from_e4m3(uint8_t code) {
    const int e = code >> 3 & 15, m = code & 7;
    const double magnitude = e ? ldexp(8 + m, e - 10) : ldexp(m, -9);
    return code & 0x80 ? -magnitude : magnitude;
}

// Numbers in device memory, and their values.
struct Operand {
    Operand(size_t n, int type, CUdeviceptr to) {
        std::vector<uint8_t> raw;
        for (size_t i = 0; i < n; i++) {
            const float x = static_cast<float>(static_cast<int>(next() % 64) - 32) / 16;
            if (type == CUDA_R_8F_E4M3) {
                raw.push_back(static_cast<uint8_t>(next() % 0x60 | (next() & 0x80)));
                values.push_back(from_e4m3(raw.back()));
            } else {
                uint8_t bytes[4];
                memcpy(bytes, &x, 4);
                raw.insert(raw.end(), bytes + (type == CUDA_R_32F ? 0 : 2), bytes + 4);
                values.push_back(x);
            }
        }
        MUST(cuMemcpyHtoD_v2(to, raw.data(), raw.size()));
    }
    std::vector<double> values;
};

class Problem {
  public:
    explicit Problem(const Case& c) : c_(c) {
        LT_MUST(cublasLtCreate(&handle));
        LT_MUST(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(CUBLASLT_MATMUL_DESC_TRANSA, int{CUBLAS_OP_T});
        const auto in = static_cast<int64_t>(c.inner), out = static_cast<int64_t>(c.outputs);
        LT_MUST(cublasLtMatrixLayoutCreate(&a, c.type, c.inner, c.outputs, in));
        LT_MUST(cublasLtMatrixLayoutCreate(&b, c.type, c.inner, c.rows, in));
        LT_MUST(cublasLtMatrixLayoutCreate(&d, c.out, c.outputs, c.rows, out));
        LT_MUST(cublasLtMatmulPreferenceCreate(&preference));
        for (int operand = 5; operand <= 8; operand++) {
            const uint32_t alignment = 16;
            LT_MUST(cublasLtMatmulPreferenceSetAttribute(preference, operand, &alignment, 4));
        }
        room(1 << 20);
        if (c.bias) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE, int{CUBLASLT_EPILOGUE_BIAS});
        }
        if (c.outer) {
            set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, int{CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F});
            set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, int{CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F});
        }
    }
    Problem(const Problem&) = delete;
    Problem& operator=(const Problem&) = delete;
    ~Problem() {
        LT_MUST(cublasLtMatmulPreferenceDestroy(preference));
        for (auto layout : {a, b, d}) {
            LT_MUST(cublasLtMatrixLayoutDestroy(layout));
        }
        LT_MUST(cublasLtMatmulDescDestroy(description));
        LT_MUST(cublasLtDestroy(handle));
    }
    template <class T>
    void set(int attribute, T value) {
        LT_MUST(cublasLtMatmulDescSetAttribute(description, attribute, &value, sizeof value));
    }
    void room(uint64_t bytes) {
        LT_MUST(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, 8));
    }
    cublasStatus_t candidates(std::vector<cublasLtMatmulHeuristicResult_t>& results, int most = 8) {
        results.resize(8);
        int found = 0;
        const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(handle, description, a, b, d, d, preference, most,
                                                                     results.data(), &found);
        results.resize(static_cast<size_t>(found));
        return status;
    }

    cublasLtHandle_t handle = nullptr;
    cublasLtMatmulDesc_t description = nullptr;
    cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
    cublasLtMatmulPreference_t preference = nullptr;

  private:
    Case c_;
};

constexpr size_t kPart = 1 << 20;  // of the device's memory, for each operand

void* at(CUdeviceptr memory, int part) { return reinterpret_cast<void*>(memory + static_cast<size_t>(part) * kPart); }

void test_product(const Case& c, CUdeviceptr memory, CUstream stream) {
    Problem problem(c);
    const auto part = [&](int i) { return memory + static_cast<size_t>(i) * kPart; };
    const int bias_type = c.type == CUDA_R_16BF && c.out == CUDA_R_32F ? CUDA_R_32F : CUDA_R_16BF;
    const Operand w(c.outputs * c.inner, c.type, part(0)), x(c.rows * c.inner, c.type, part(1));
    const Operand bias(c.outputs, bias_type, part(2)), w_scales(c.outputs, CUDA_R_32F, part(3)),
        x_scales(c.rows, CUDA_R_32F, part(4));
    if (c.bias) {
        problem.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, at(memory, 2));
    }
    if (c.type == CUDA_R_8F_E4M3) {
        problem.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, at(memory, 3));
        problem.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, at(memory, 4));
    }
    std::vector<cublasLtMatmulHeuristicResult_t> found;
    LT_MUST(problem.candidates(found));
    EXPECT(found.size() >= 3);
    const size_t bytes = c.out == CUDA_R_32F ? 4 : 2;
    for (const auto& result : found) {
        cublasLtMatmulHeuristicResult_t checked{};
        LT_MUST(cublasLtMatmulAlgoCheck(problem.handle, problem.description, problem.a, problem.b, problem.d,
                                        problem.d, &result.algo, &checked));
        EXPECT(checked.workspaceSize == result.workspaceSize);
        MUST(cuMemsetD8Async(part(5), 0xff, c.rows * c.outputs * bytes, stream));
        float one = 1, zero = 0;
        LT_MUST(cublasLtMatmul(problem.handle, problem.description, &one, at(memory, 0), problem.a, at(memory, 1),
                               problem.b, &zero, at(memory, 5), problem.d, at(memory, 5), problem.d, &result.algo,
                               at(memory, 6), result.workspaceSize, stream));
        one = zero = 100;
        MUST(cuStreamSynchronize(stream));
        std::vector<uint8_t> got(c.rows * c.outputs * bytes);
        MUST(cuMemcpyDtoH_v2(got.data(), part(5), got.size()));
        double worst = 0;
        for (uint64_t r = 0; r < c.rows; r++) {
            for (uint64_t o = 0; o < c.outputs; o++) {
                double sum = 0, size = 0;
                for (uint64_t k = 0; k < c.inner; k++) {
                    sum += w.values[o * c.inner + k] * x.values[r * c.inner + k];
                    size += fabs(w.values[o * c.inner + k] * x.values[r * c.inner + k]);
                }
                const double scale = c.type == CUDA_R_16BF ? 1
                                     : c.outer ? w_scales.values[o] * x_scales.values[r]
                                               : w_scales.values[0] * x_scales.values[0];
                const double want = sum * scale + (c.bias ? bias.values[o] : 0);
                double y;
                if (bytes == 4) {
                    float f;
                    memcpy(&f, &got[(r * c.outputs + o) * 4], 4);
                    y = f;
                } else {
                    uint16_t bits;
                    memcpy(&bits, &got[(r * c.outputs + o) * 2], 2);
                    y = from_bf16(bits);
                }
                const double error = fabs(y - want) / (size * fabs(scale) + fabs(want) + 1e-30);
                worst = error > worst || isnan(error) ? error : worst;
            }
        }
        EXPECT(worst < (bytes == 4 ? 1e-5 : 5e-3));
    }
}

void test_refusals() {
    std::vector<cublasLtMatmulHeuristicResult_t> found;
    {
        Problem p({4, 32, 64, CUDA_R_16BF, CUDA_R_16BF, false, false});
        LT_MUST(p.candidates(found, 1));
        EXPECT(found.size() == 1 && found[0].workspaceSize == 0);
        p.room(0);
        LT_MUST(p.candidates(found));
        EXPECT(std::all_of(found.begin(), found.end(), [](const auto& r) { return r.workspaceSize == 0; }));
        const int64_t narrow = 63;
        LT_MUST(cublasLtMatrixLayoutSetAttribute(p.a, CUBLASLT_MATRIX_LAYOUT_LD, &narrow, 8));
        EXPECT(p.candidates(found) == CUBLAS_STATUS_INVALID_VALUE);
    }
    {
        Problem p({4, 32, 64, CUDA_R_16BF, CUDA_R_16BF, false, false});
        const uint64_t rows = 65;
        LT_MUST(cublasLtMatrixLayoutSetAttribute(p.b, CUBLASLT_MATRIX_LAYOUT_LD, &rows, 8));
        LT_MUST(cublasLtMatrixLayoutSetAttribute(p.b, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, 8));
        EXPECT(p.candidates(found) == CUBLAS_STATUS_INVALID_VALUE);
        EXPECT(cublasLtMatrixLayoutSetAttribute(p.b, CUBLASLT_MATRIX_LAYOUT_ROWS, &rows, 4) ==
               CUBLAS_STATUS_INVALID_VALUE);
        EXPECT(cublasLtMatmulDescSetAttribute(p.b, CUBLASLT_MATMUL_DESC_TRANSA, &rows, 4) ==
               CUBLAS_STATUS_INVALID_VALUE);
        size_t written = 0;
        LT_MUST(
            cublasLtMatmulDescGetAttribute(p.description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, nullptr, 0, &written));
        EXPECT(written == 8);
        int transposed = 0;
        LT_MUST(cublasLtMatmulDescGetAttribute(p.description, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, 4, nullptr));
        EXPECT(transposed == CUBLAS_OP_T);
    }
    {
        // Rows of e4m3 that are no whole 16 bytes.
        Problem p({4, 32, 24, CUDA_R_8F_E4M3, CUDA_R_16BF, false, false});
        EXPECT(p.candidates(found) == CUBLAS_STATUS_NOT_SUPPORTED);
    }
    {
        Problem p({4, 32, 64, CUDA_R_8F_E4M3, CUDA_R_16BF, false, false});
        p.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, 4);
        EXPECT(p.candidates(found) == CUBLAS_STATUS_NOT_SUPPORTED);
    }
    {
        // Single precision out of bf16 takes a bias of single precision.
        Problem p({4, 32, 64, CUDA_R_16BF, CUDA_R_32F, true, false});
        p.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int{CUDA_R_16BF});
        EXPECT(p.candidates(found) == CUBLAS_STATUS_NOT_SUPPORTED);
        p.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int{CUDA_R_32F});
        LT_MUST(p.candidates(found));
    }
    {
        Problem p({4, 32, 64, CUDA_R_16BF, CUDA_R_16BF, false, false});
        const uint32_t two = 2;
        LT_MUST(cublasLtMatmulPreferenceSetAttribute(p.preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &two,
                                                     4));
        EXPECT(p.candidates(found) == CUBLAS_STATUS_NOT_SUPPORTED);
    }
}

void test_pointers(CUdeviceptr memory, CUstream stream) {
    Problem p({4, 32, 64, CUDA_R_16BF, CUDA_R_16BF, false, false});
    std::vector<cublasLtMatmulHeuristicResult_t> found;
    LT_MUST(p.candidates(found));
    const auto run = [&](const void* a, const cublasLtMatmulAlgo_t* algorithm, size_t workspace, CUstream s) {
        const float one = 1, zero = 0;
        return cublasLtMatmul(p.handle, p.description, &one, a, p.a, at(memory, 1), p.b, &zero, at(memory, 5), p.d,
                              at(memory, 5), p.d, algorithm, at(memory, 6), workspace, s);
    };
    LT_MUST(run(at(memory, 0), nullptr, 0, stream));
    EXPECT(run(static_cast<char*>(at(memory, 0)) + 2, nullptr, 0, stream) == CUBLAS_STATUS_INVALID_VALUE);
    cublasLtMatmulAlgo_t unknown{};
    EXPECT(run(at(memory, 0), &unknown, 0, stream) == CUBLAS_STATUS_NOT_SUPPORTED);
    for (const auto& result : found) {
        int splits = 0;
        LT_MUST(cublasLtMatmulAlgoConfigGetAttribute(&result.algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, &splits, 4,
                                                     nullptr));
        if (splits > 1) {
            EXPECT(run(at(memory, 0), &result.algo, result.workspaceSize - 1, stream) == CUBLAS_STATUS_INVALID_VALUE);
        }
    }
    EXPECT(run(at(memory, 0), nullptr, 0, reinterpret_cast<CUstream>(0x99)) == CUBLAS_STATUS_EXECUTION_FAILED);
    MUST(cuStreamSynchronize(stream));
}

}  // namespace

int main() {
    MUST(cuInit(0));
    cublasLtHandle_t early = nullptr;
    EXPECT(cublasLtCreate(&early) == CUBLAS_STATUS_NOT_INITIALIZED);
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUdeviceptr memory = 0;
    MUST(cuMemAlloc_v2(&memory, 7 * kPart));
    {
        Stream stream;
        const Case cases[] = {
            {1, 8, 8, CUDA_R_16BF, CUDA_R_16BF, false, false},     {80, 40, 64, CUDA_R_16BF, CUDA_R_16BF, true, false},
            {17, 33, 129, CUDA_R_16BF, CUDA_R_32F, false, false},  {5, 24, 200, CUDA_R_16BF, CUDA_R_32F, true, false},
            {16, 48, 96, CUDA_R_8F_E4M3, CUDA_R_16BF, true, false}, {16, 48, 96, CUDA_R_8F_E4M3, CUDA_R_32F, false, true},
            {33, 16, 64, CUDA_R_8F_E4M3, CUDA_R_16BF, true, true},
        };
        for (const Case& c : cases) {
            test_product(c, memory, stream.get());
        }
        test_refusals();
        test_pointers(memory, stream.get());
    }
    EXPECT(count("kernels_by_name.cublaslt_matmul") > 0);
    MUST(cuMemFree_v2(memory));
    return report();
}
