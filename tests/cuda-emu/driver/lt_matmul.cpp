// The product itself: f32 sums in an order that the algorithm fixes. See lt.h.
#include <math.h>
#include <string.h>

#include <algorithm>

#include "lt.h"

using namespace lt;

namespace {

constexpr uint64_t kMostLanes = 16;

struct Call {
    Problem problem;
    Algorithm algorithm;
    float alpha, beta;
    const void *a, *b, *c;
    void *d, *workspace;
};

float from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return 0x7fff;
    }
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_e4m3(uint8_t code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) {
        return NAN;
    }
    const float magnitude = exponent ? ldexpf(static_cast<float>(8 + mantissa), exponent - 10)
                                     : ldexpf(static_cast<float>(mantissa), -9);
    return code & 0x80 ? -magnitude : magnitude;
}

float element(const void* data, int type, uint64_t at) {
    switch (type) {
        case CUDA_R_32F:
            return static_cast<const float*>(data)[at];
        case CUDA_R_16BF:
            return from_bf16(static_cast<const uint16_t*>(data)[at]);
        default:
            return from_e4m3(static_cast<const uint8_t*>(data)[at]);
    }
}

// `count` vectors of k elements each, one behind the other, of op(matrix).
std::vector<float> widen(const void* data, const Matrix& matrix, bool vectors_are_columns, uint64_t count, uint64_t k) {
    std::vector<float> table(matrix.type == CUDA_R_8F_E4M3 ? 256 : 0);
    for (size_t code = 0; code < table.size(); code++) {
        table[code] = from_e4m3(static_cast<uint8_t>(code));
    }
    std::vector<float> wide(count * k);
    const auto ld = static_cast<uint64_t>(matrix.ld);
    for (uint64_t v = 0; v < count; v++) {
        for (uint64_t i = 0; i < k; i++) {
            const uint64_t at = vectors_are_columns ? v * ld + i : i * ld + v;
            wide[v * k + i] = table.empty() ? element(data, matrix.type, at)
                                            : table[static_cast<const uint8_t*>(data)[at]];
        }
    }
    return wide;
}

template <uint64_t kLanes>
float dot(const float* x, const float* y, uint64_t n) {
    float sums[kLanes] = {};
    uint64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (uint64_t l = 0; l < kLanes; l++) {
            sums[l] += x[i + l] * y[i + l];
        }
    }
    for (uint64_t l = 0; i < n; i++, l++) {
        sums[l] += x[i] * y[i];
    }
    float total = 0;
    for (float sum : sums) {
        total += sum;
    }
    return total;
}

float dot(const float* x, const float* y, uint64_t n, uint64_t lanes) {
    return lanes == 4 ? dot<4>(x, y, n) : lanes == 8 ? dot<8>(x, y, n) : dot<kMostLanes>(x, y, n);
}

float scale_of(const Problem& p, uint64_t row, uint64_t column) {
    if (p.a.type != CUDA_R_8F_E4M3) {
        return 1;
    }
    const bool outer = p.a_scale_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    return (p.a_scale ? p.a_scale[outer ? row : 0] : 1) * (p.b_scale ? p.b_scale[outer ? column : 0] : 1);
}

float finish(const Call& call, float sum, uint64_t row, uint64_t column) {
    const Problem& p = call.problem;
    float y = call.alpha * sum * scale_of(p, row, column);
    if (call.beta != 0) {
        y += call.beta * element(call.c, p.c.type, column * static_cast<uint64_t>(p.c.ld) + row);
    }
    if (p.bias) {
        const bool single = p.a.type == CUDA_R_16BF && p.d.type == CUDA_R_32F;
        y += element(p.bias_data, single ? CUDA_R_32F : CUDA_R_16BF, row);
    }
    return y;
}

void run(const void* arguments) {
    Call call;
    memcpy(&call, arguments, sizeof call);
    const Problem& p = call.problem;
    const std::vector<float> a = widen(call.a, p.a, p.a_transposed, p.m, p.k);
    const std::vector<float> b = widen(call.b, p.b, !p.b_transposed, p.n, p.k);
    auto* parts = static_cast<float*>(call.workspace);
    const uint64_t splits = call.algorithm.splits;
    for (uint64_t column = 0; column < p.n; column++) {
        for (uint64_t row = 0; row < p.m; row++) {
            float sum = 0;
            for (uint64_t s = 0; s < splits; s++) {
                const uint64_t first = s * p.k / splits, end = (s + 1) * p.k / splits;
                const float part =
                    dot(&a[row * p.k + first], &b[column * p.k + first], end - first, call.algorithm.lanes);
                if (splits > 1) {
                    parts[(s * p.n + column) * p.m + row] = part;
                }
                sum += part;
            }
            const float y = finish(call, sum, row, column);
            const uint64_t at = column * static_cast<uint64_t>(p.d.ld) + row;
            if (p.d.type == CUDA_R_32F) {
                static_cast<float*>(call.d)[at] = y;
            } else {
                static_cast<uint16_t*>(call.d)[at] = to_bf16(y);
            }
        }
    }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

extern "C" cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void* alpha,
                                         const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                                         cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                                         cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                                         const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                                         size_t workspace_bytes, CUstream stream) {
    Call call{};
    if (!handle || !alpha || !beta || !a || !b || !d) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const cublasStatus_t status = read_problem(description, a_layout, b_layout, c_layout, d_layout, call.problem);
    if (status != CUBLAS_STATUS_SUCCESS) {
        return status;
    }
    const size_t number = algorithm ? number_of(*algorithm) : 0;
    if (number == kAlgorithmCount) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    call.algorithm = kAlgorithms[number];
    memcpy(&call.alpha, alpha, 4);
    memcpy(&call.beta, beta, 4);
    const Problem& p = call.problem;
    const size_t needed = workspace_of(call.algorithm, p);
    const bool outer = p.a_scale_mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    if (needed > workspace_bytes || (needed && (!workspace || !aligned(workspace))) || !aligned(a) || !aligned(b) ||
        !aligned(d) || (call.beta != 0 && (!c || !aligned(c))) || (p.bias && (!p.bias_data || !aligned(p.bias_data))) ||
        (outer && (!p.a_scale || !p.b_scale))) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    call.a = a;
    call.b = b;
    call.c = c;
    call.d = d;
    call.workspace = workspace;
    const CUresult result = mirai_emu_submit(stream, "cublaslt_matmul", run, &call, sizeof call);
    return result == CUDA_SUCCESS ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
