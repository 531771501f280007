// The mathematics of the kernels in double precision, plain and slow.
//
// Owns no rounding: what a kernel rounds between steps its test rounds itself.
#pragma once
#include "harness.h"

namespace reference {

inline std::vector<double> rms_norm(const std::vector<double>& x, const std::vector<bf16>& weight, double offset,
                                    double eps) {
    double squares = 0;
    for (double v : x) squares += v * v;
    const double inverse = 1 / sqrt(squares / static_cast<double>(x.size()) + eps);
    std::vector<double> out(x.size());
    for (size_t i = 0; i < x.size(); i++) out[i] = x[i] * inverse * (harness::value(weight[i]) + offset);
    return out;
}

}  // namespace reference
