// Element by element: what no other kernel takes along.
//
//   add_bias_bf16:  x[r] += bias                      x [rows, width], bias [width]
//   add_bf16:       x[r] += scale * y[r]              x, y [rows, width]
//   scale_bf16:     x[r] *= factor
//   gate_bf16:      x[r][i] *= sigmoid(gates[r][at + i]), or with `one` sigmoid(gates[r][at]) for all of a row
//
// bf16, in single precision, rounded once. One block a row. Widths are padded ones, multiples of 8, but for
// `gate_bf16`, whose rows are `padded(width)` (x) and `gates_stride` apart; `at` is any column. Bytes: 4 (6, 4, 6) rows
// width over the bandwidth. Decode has no bias of its own: the matmul of few rows adds it.

#include "tile.cuh"

PORT_FN void add_row(bf16* x, const bf16* y, int width, float scale) {
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        Eight a = widen8(load16(x + i));
        const Eight b = widen8(load16(y + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            a.x[j] += scale * b.x[j];
        }
        store16(x + i, narrow8(a));
    }
}

extern "C" __global__ void __launch_bounds__(256) add_bias_bf16(bf16* x, const bf16* bias, int width) {
    let_dependents_start();
    dependency_wait();
    add_row(x + static_cast<size_t>(blockIdx.x) * width, bias, width, 1.0f);
}

extern "C" __global__ void __launch_bounds__(256) add_bf16(bf16* x, const bf16* y, int width, float scale) {
    let_dependents_start();
    dependency_wait();
    const size_t at = static_cast<size_t>(blockIdx.x) * width;
    add_row(x + at, y + at, width, scale);
}

extern "C" __global__ void __launch_bounds__(256) scale_bf16(bf16* x, int width, float factor) {
    let_dependents_start();
    dependency_wait();
    x += static_cast<size_t>(blockIdx.x) * width;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        Eight v = widen8(load16(x + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v.x[j] *= factor;
        }
        store16(x + i, narrow8(v));
    }
}

struct GateArgs {
    const bf16* gates;
    bf16* x;
    int gates_stride;
    int at;
    int width;
    int one;
};

extern "C" __global__ void __launch_bounds__(256) gate_bf16(GateArgs a) {
    let_dependents_start();
    dependency_wait();
    const bf16* gates = a.gates + static_cast<size_t>(blockIdx.x) * a.gates_stride + a.at;
    bf16* x = a.x + static_cast<size_t>(blockIdx.x) * padded(a.width);
    for (int i = static_cast<int>(threadIdx.x); i < a.width; i += static_cast<int>(blockDim.x)) {
        const float gate = to_float(gates[a.one ? 0 : i]);
        x[i] = to_bf16(fast_divide(to_float(x[i]), 1.0f + fast_exp(-gate)));
    }
}
