// Handles and descriptions of the emulated cublasLt. See lt.h.
#include <string.h>

#include "lt.h"

using namespace lt;
using Description = cublasLtDescription;

struct cublasLtContext {};

namespace {

constexpr size_t kVersion = 130001;

// Every attribute has a size of its own, and the library refuses any other.
size_t size_of(Description::Kind kind, int attribute) {
    static const std::map<int, size_t> matmul = {
        {CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, 4},    {CUBLASLT_MATMUL_DESC_SCALE_TYPE, 4},
        {CUBLASLT_MATMUL_DESC_POINTER_MODE, 4},    {CUBLASLT_MATMUL_DESC_TRANSA, 4},
        {CUBLASLT_MATMUL_DESC_TRANSB, 4},          {CUBLASLT_MATMUL_DESC_TRANSC, 4},
        {CUBLASLT_MATMUL_DESC_FILL_MODE, 4},       {CUBLASLT_MATMUL_DESC_EPILOGUE, 4},
        {CUBLASLT_MATMUL_DESC_BIAS_POINTER, 8},    {CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, 4},
        {CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, 8}, {CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, 8},
        {CUBLASLT_MATMUL_DESC_C_SCALE_POINTER, 8}, {CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, 8},
        {CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, 8},  {CUBLASLT_MATMUL_DESC_FAST_ACCUM, 1},
        {CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, 4},  {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, 4},
        {CUBLASLT_MATMUL_DESC_B_SCALE_MODE, 4},
    };
    static const std::map<int, size_t> layout = {
        {CUBLASLT_MATRIX_LAYOUT_TYPE, 4},         {CUBLASLT_MATRIX_LAYOUT_ORDER, 4},
        {CUBLASLT_MATRIX_LAYOUT_ROWS, 8},         {CUBLASLT_MATRIX_LAYOUT_COLS, 8},
        {CUBLASLT_MATRIX_LAYOUT_LD, 8},           {CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 4},
        {CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, 8}, {CUBLASLT_MATRIX_LAYOUT_PLANE_OFFSET, 8},
    };
    static const std::map<int, size_t> preference = {
        {CUBLASLT_MATMUL_PREF_SEARCH_MODE, 4},           {CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, 8},
        {CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, 4}, {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 4}, {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 4},
        {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 4}, {CUBLASLT_MATMUL_PREF_MAX_WAVES_COUNT, 4},
        {CUBLASLT_MATMUL_PREF_IMPL_MASK, 8},
    };
    const auto& sizes = kind == Description::Kind::Matmul   ? matmul
                        : kind == Description::Kind::Layout ? layout
                                                            : preference;
    const auto found = sizes.find(attribute);
    return found == sizes.end() ? 0 : found->second;
}

cublasStatus_t set(Description* description, Description::Kind kind, int attribute, const void* value, size_t bytes) {
    if (!description || description->kind != kind || !value || !bytes || size_of(kind, attribute) != bytes) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const char* from = static_cast<const char*>(value);
    description->values[attribute].assign(from, from + bytes);
    return CUBLAS_STATUS_SUCCESS;
}

// Without a place for the value it only says how large that is.
cublasStatus_t get(Description* description, Description::Kind kind, int attribute, void* value, size_t bytes,
                   size_t* written) {
    if (!description || description->kind != kind) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    const size_t size = size_of(kind, attribute);
    if (!size || (bytes && (!value || bytes != size)) || (!bytes && !written)) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    if (written) {
        *written = size;
    }
    if (bytes) {
        memset(value, 0, size);
        const auto found = description->values.find(attribute);
        if (found != description->values.end()) {
            memcpy(value, found->second.data(), size);
        }
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t destroy(Description* description, Description::Kind kind) {
    if (!description || description->kind != kind) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    delete description;
    return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
    if (!handle) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    CUcontext context = nullptr;
    if (cuCtxGetCurrent(&context) != CUDA_SUCCESS || !context) {
        return CUBLAS_STATUS_NOT_INITIALIZED;
    }
    *handle = new cublasLtContext;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}

size_t cublasLtGetVersion() { return kVersion; }
size_t cublasLtGetCudartVersion() { return 13000; }

const char* cublasLtGetStatusName(cublasStatus_t status) {
    switch (status) {
        case CUBLAS_STATUS_SUCCESS:
            return "CUBLAS_STATUS_SUCCESS";
        case CUBLAS_STATUS_NOT_INITIALIZED:
            return "CUBLAS_STATUS_NOT_INITIALIZED";
        case CUBLAS_STATUS_ALLOC_FAILED:
            return "CUBLAS_STATUS_ALLOC_FAILED";
        case CUBLAS_STATUS_INVALID_VALUE:
            return "CUBLAS_STATUS_INVALID_VALUE";
        case CUBLAS_STATUS_ARCH_MISMATCH:
            return "CUBLAS_STATUS_ARCH_MISMATCH";
        case CUBLAS_STATUS_EXECUTION_FAILED:
            return "CUBLAS_STATUS_EXECUTION_FAILED";
        case CUBLAS_STATUS_INTERNAL_ERROR:
            return "CUBLAS_STATUS_INTERNAL_ERROR";
        case CUBLAS_STATUS_NOT_SUPPORTED:
            return "CUBLAS_STATUS_NOT_SUPPORTED";
    }
    return "CUBLAS_STATUS_UNKNOWN";
}

const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, int compute_type, int scale_type) {
    if (!made) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    auto* description = new Description{Description::Kind::Matmul, {}};
    set_value(*description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, compute_type);
    set_value(*description, CUBLASLT_MATMUL_DESC_SCALE_TYPE, scale_type);
    set_value(*description, CUBLASLT_MATMUL_DESC_EPILOGUE, int{CUBLASLT_EPILOGUE_DEFAULT});
    set_value(*description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, -1);  // as D's, or as the table of types says
    *made = description;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
    return destroy(description, Description::Kind::Matmul);
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description, int attribute, const void* value,
                                              size_t bytes) {
    return set(description, Description::Kind::Matmul, attribute, value, bytes);
}
cublasStatus_t cublasLtMatmulDescGetAttribute(cublasLtMatmulDesc_t description, int attribute, void* value,
                                              size_t bytes, size_t* written) {
    return get(description, Description::Kind::Matmul, attribute, value, bytes, written);
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, int type, uint64_t rows, uint64_t cols,
                                          int64_t ld) {
    if (!made) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    auto* layout = new Description{Description::Kind::Layout, {}};
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_TYPE, type);
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_ROWS, rows);
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_COLS, cols);
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_LD, ld);
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_ORDER, int{CUBLASLT_ORDER_COL});
    set_value(*layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, 1);
    *made = layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
    return destroy(layout, Description::Kind::Layout);
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, int attribute, const void* value,
                                                size_t bytes) {
    return set(layout, Description::Kind::Layout, attribute, value, bytes);
}
cublasStatus_t cublasLtMatrixLayoutGetAttribute(cublasLtMatrixLayout_t layout, int attribute, void* value,
                                                size_t bytes, size_t* written) {
    return get(layout, Description::Kind::Layout, attribute, value, bytes, written);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
    if (!made) {
        return CUBLAS_STATUS_INVALID_VALUE;
    }
    auto* preference = new Description{Description::Kind::Preference, {}};
    set_value(*preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{0});
    set_value(*preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32_t{7});
    for (int operand = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES;
         operand <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES; operand++) {
        set_value(*preference, operand, uint32_t{256});
    }
    *made = preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
    return destroy(preference, Description::Kind::Preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference, int attribute,
                                                    const void* value, size_t bytes) {
    return set(preference, Description::Kind::Preference, attribute, value, bytes);
}
cublasStatus_t cublasLtMatmulPreferenceGetAttribute(cublasLtMatmulPreference_t preference, int attribute, void* value,
                                                    size_t bytes, size_t* written) {
    return get(preference, Description::Kind::Preference, attribute, value, bytes, written);
}
}
