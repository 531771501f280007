// Which problems there are algorithms for, and which. See lt.h.
#include <algorithm>

#include "lt.h"

namespace lt {

namespace {

constexpr uint64_t kMagic = 0x746c6d61726d6e65;
constexpr uint32_t kAlignment = 16;  // that every algorithm here asks of its operands

size_t element_bytes(int type) { return type == CUDA_R_32F ? 4 : type == CUDA_R_16BF ? 2 : 1; }

bool read_matrix(const cublasLtDescription* layout, Matrix& matrix) {
    if (!layout || layout->kind != cublasLtDescription::Kind::Layout) {
        return false;
    }
    matrix.type = value_of<int>(*layout, CUBLASLT_MATRIX_LAYOUT_TYPE);
    matrix.rows = value_of<uint64_t>(*layout, CUBLASLT_MATRIX_LAYOUT_ROWS);
    matrix.cols = value_of<uint64_t>(*layout, CUBLASLT_MATRIX_LAYOUT_COLS);
    matrix.ld = value_of<int64_t>(*layout, CUBLASLT_MATRIX_LAYOUT_LD);
    return matrix.rows && matrix.cols && matrix.ld >= static_cast<int64_t>(matrix.rows);
}

bool is_plain(const cublasLtDescription& layout) {
    return value_of<int>(layout, CUBLASLT_MATRIX_LAYOUT_ORDER) == CUBLASLT_ORDER_COL &&
           value_of<int>(layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT) == 1;
}

// The rows of the documentation's tables of types that are emulated. A bias of products into single precision is
// single too where the operands are bf16, and bf16 where they are e4m3.
bool types_exist(const Problem& p, int bias_type) {
    const bool single = p.d.type == CUDA_R_32F;
    if (p.a.type != p.b.type || p.c.type != p.d.type || (!single && p.d.type != CUDA_R_16BF)) {
        return false;
    }
    if (p.a.type != CUDA_R_16BF && p.a.type != CUDA_R_8F_E4M3) {
        return false;
    }
    const int wanted = single && p.a.type == CUDA_R_16BF ? CUDA_R_32F : CUDA_R_16BF;
    return !p.bias || bias_type == -1 || bias_type == wanted;
}

// e4m3 on Hopper: A transposed, B plain, rows of whole 16 bytes; scales of the tensor or of each row and column.
bool scales_exist(const Problem& p) {
    const bool e4m3 = p.a.type == CUDA_R_8F_E4M3;
    if (!e4m3) {
        return !p.a_scale_mode && !p.b_scale_mode;
    }
    const auto known = [](int mode) {
        return mode == CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F || mode == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    };
    const auto whole = [](const Matrix& m) {
        return m.ld * static_cast<int64_t>(element_bytes(m.type)) % kAlignment == 0;
    };
    return p.a_transposed && !p.b_transposed && known(p.a_scale_mode) && p.a_scale_mode == p.b_scale_mode &&
           whole(p.a) && whole(p.b) && whole(p.c) && whole(p.d);
}

bool enough_alignment(const cublasLtDescription& preference) {
    for (int operand = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
         operand <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES; operand++) {
        if (value_of<uint32_t>(preference, operand) < kAlignment) {
            return false;
        }
    }
    return true;
}

cublasLtMatmulHeuristicResult_t result_of(size_t number, const Problem& problem) {
    cublasLtMatmulHeuristicResult_t result{};
    result.algo.data[0] = kMagic;
    result.algo.data[1] = number;
    result.workspaceSize = workspace_of(kAlgorithms[number], problem);
    result.wavesCount = static_cast<float>((problem.m + 127) / 128 * ((problem.n + 127) / 128)) / 132.0f;
    return result;
}

}  // namespace

cublasStatus_t read_problem(cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, Problem& p) {
    if (!description || description->kind != cublasLtDescription::Kind::Matmul || !read_matrix(a, p.a) ||
        !read_matrix(b, p.b) || !read_matrix(c, p.c) || !read_matrix(d, p.d)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const auto flag = [&](int attribute) { return value_of<int>(*description, attribute); };
    p.a_transposed = flag(CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T;
    p.b_transposed = flag(CUBLASLT_MATMUL_DESC_TRANSB) == CUBLAS_OP_T;
    p.m = p.a_transposed ? p.a.cols : p.a.rows;
    p.k = p.a_transposed ? p.a.rows : p.a.cols;
    p.n = p.b_transposed ? p.b.rows : p.b.cols;
    if ((p.b_transposed ? p.b.cols : p.b.rows) != p.k || p.d.rows != p.m || p.d.cols != p.n || p.c.rows != p.m ||
        p.c.cols != p.n) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const int epilogue = flag(CUBLASLT_MATMUL_DESC_EPILOGUE);
    p.bias = epilogue == CUBLASLT_EPILOGUE_BIAS;
    p.bias_data = value_of<const void*>(*description, CUBLASLT_MATMUL_DESC_BIAS_POINTER);
    p.a_scale_mode = flag(CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
    p.b_scale_mode = flag(CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
    p.a_scale = value_of<const float*>(*description, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER);
    p.b_scale = value_of<const float*>(*description, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER);
    const bool known = flag(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE) == CUBLAS_COMPUTE_32F &&
                       flag(CUBLASLT_MATMUL_DESC_SCALE_TYPE) == CUDA_R_32F &&
                       flag(CUBLASLT_MATMUL_DESC_POINTER_MODE) == CUBLASLT_POINTER_MODE_HOST &&
                       !flag(CUBLASLT_MATMUL_DESC_TRANSC) && (p.bias || epilogue == CUBLASLT_EPILOGUE_DEFAULT) &&
                       is_plain(*a) && is_plain(*b) && is_plain(*c) && is_plain(*d);
    if (!known || !types_exist(p, flag(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE)) || !scales_exist(p)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    return CUBLAS_STATUS_SUCCESS;
}

size_t number_of(const cublasLtMatmulAlgo_t& algorithm) {
    return algorithm.data[0] == kMagic && algorithm.data[1] < kAlgorithmCount ? algorithm.data[1] : kAlgorithmCount;
}

size_t workspace_of(const Algorithm& algorithm, const Problem& problem) {
    return algorithm.splits > 1 ? algorithm.splits * problem.m * problem.n * sizeof(float) : 0;
}

}  // namespace lt

using namespace lt;

extern "C" {

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results, int* found) {
    if (!handle || !results || !found || wanted < 1 || !preference ||
        preference->kind != cublasLtDescription::Kind::Preference) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    *found = 0;
    Problem problem;
    if (const cublasStatus_t status = read_problem(description, a, b, c, d, problem); status != CUBLAS_STATUS_SUCCESS) {
        return status;
    }
    if (!enough_alignment(*preference)) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    const auto room = value_of<uint64_t>(*preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
    const auto reductions = value_of<uint32_t>(*preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK);
    for (size_t i = 0; i < kAlgorithmCount && *found < wanted; i++) {
        const bool splits = kAlgorithms[i].splits > 1;
        if (workspace_of(kAlgorithms[i], problem) > room ||
            (splits && (!(reductions & CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) || kAlgorithms[i].splits > problem.k))) {
            continue;
        }
        results[(*found)++] = result_of(i, problem);
    }
    return *found ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                       cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
    Problem problem;
    if (!handle || !algorithm || !result) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (const cublasStatus_t status = read_problem(description, a, b, c, d, problem); status != CUBLAS_STATUS_SUCCESS) {
        return status;
    }
    const size_t number = number_of(*algorithm);
    if (number == kAlgorithmCount || kAlgorithms[number].splits > problem.k) {
        return CUBLAS_STATUS_NOT_SUPPORTED;
    }
    *result = result_of(number, problem);
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algorithm, int attribute, void* value,
                                                    size_t bytes, size_t* written) {
    const size_t number = algorithm ? number_of(*algorithm) : kAlgorithmCount;
    if (number == kAlgorithmCount || !value || bytes != 4) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const Algorithm& a = kAlgorithms[number];
    const std::map<int, uint64_t> numbers = {
        {CUBLASLT_ALGO_CONFIG_ID, number},
        {CUBLASLT_ALGO_CONFIG_TILE_ID, a.lanes},
        {CUBLASLT_ALGO_CONFIG_SPLITK_NUM, a.splits},
        {CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, a.splits > 1 ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : 0},
        {CUBLASLT_ALGO_CONFIG_STAGES_ID, 1},
    };
    const auto found = numbers.find(attribute);
    if (found == numbers.end()) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    *static_cast<uint32_t*>(value) = static_cast<uint32_t>(found->second);
    if (written) {
        *written = 4;
    }
    return CUBLAS_STATUS_SUCCESS;
}
}
