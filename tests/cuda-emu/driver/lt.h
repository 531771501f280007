// The emulated cublasLt's own: descriptions as tables of attributes, a problem read from them, algorithms.
//
// Owns what is a valid problem on an H200 and how an algorithm adds up. Its work goes to the emulated driver's streams.
#pragma once
#include <map>
#include <vector>

#include "lt_api.h"

// Any of the three kinds of description.
struct cublasLtDescription {
    enum class Kind { Matmul, Layout, Preference } kind;
    std::map<int, std::vector<char>> values;
};

namespace lt {

template <class T>
T value_of(const cublasLtDescription& description, int attribute);
template <class T>
void set_value(cublasLtDescription& description, int attribute, T value);

struct Matrix {
    int type;
    uint64_t rows, cols;
    int64_t ld;
};

// D [m, n] = alpha op(A) B + beta C + bias, columns first.
struct Problem {
    Matrix a, b, c, d;
    uint64_t m, n, k;
    bool a_transposed, b_transposed, bias;
    int a_scale_mode, b_scale_mode;
    const float *a_scale, *b_scale;
    const void* bias_data;
};

// In the order in which heuristics give them. They add in different orders, so results differ in their last bits.
struct Algorithm {
    uint64_t lanes;   // partial sums side by side
    uint64_t splits;  // of k, each with sums of its own in the workspace
};
constexpr Algorithm kAlgorithms[] = {{8, 1}, {16, 1}, {8, 2}, {4, 1}, {16, 4}, {8, 8}};
constexpr size_t kAlgorithmCount = sizeof kAlgorithms / sizeof kAlgorithms[0];

// Reads descriptions into a problem, or says why there is none.
cublasStatus_t read_problem(cublasLtMatmulDesc_t description, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, Problem& problem);
// The algorithm's number, or kAlgorithmCount if it is none of these.
size_t number_of(const cublasLtMatmulAlgo_t& algorithm);
size_t workspace_of(const Algorithm& algorithm, const Problem& problem);

template <class T>
T value_of(const cublasLtDescription& description, int attribute) {
    T value{};
    const auto found = description.values.find(attribute);
    if (found != description.values.end() && found->second.size() == sizeof(T)) {
        __builtin_memcpy(&value, found->second.data(), sizeof(T));
    }
    return value;
}

template <class T>
void set_value(cublasLtDescription& description, int attribute, T value) {
    const char* bytes = reinterpret_cast<const char*>(&value);
    description.values[attribute].assign(bytes, bytes + sizeof(T));
}

}  // namespace lt
