// The mathematics of the kernels in double precision, plain and slow.
//
// Owns no rounding: what a kernel rounds between steps its test rounds itself.
#pragma once
#include "harness.h"

namespace reference {

inline std::vector<double> rms_norm(const std::vector<double>& x, const std::vector<bf16>& weight, double offset,
                                    double eps) {
    double squares = 0;
    for (double v : x) {
        squares += v * v;
    }
    const double inverse = 1 / sqrt(squares / static_cast<double>(x.size()) + eps);
    std::vector<double> out(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        out[i] = x[i] * inverse * (harness::value(weight[i]) + offset);
    }
    return out;
}

inline double activate(double gate, double up, const GateSpec& spec) {
    switch (spec.kind) {
        case Gate::Silu:
            return gate / (1 + exp(-gate)) * up;
        case Gate::GeluTanh:
            return 0.5 * gate * (1 + tanh(sqrt(2 / M_PI) * (gate + 0.044715 * gate * gate * gate))) * up;
        case Gate::Gelu:
            return 0.5 * gate * (1 + erf(gate / sqrt(2.0))) * up;
        case Gate::ClampedSwish: {
            const double g = std::min<double>(gate, spec.limit), u = std::clamp<double>(up, -spec.limit, spec.limit);
            return g / (1 + exp(-spec.alpha * g)) * (u + 1);
        }
    }
    return NAN;
}

}  // namespace reference
