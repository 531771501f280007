// Additions that no other kernel takes along.
//
//   add_bias_bf16:  x[r] += bias          x [rows, width], bias [width]
//   add_bf16:       x[r] += y[r]          x, y [rows, width]
//
// bf16, width a multiple of 8, sums in single precision, rounded once. One block a row.
// Bytes: 4 (6) rows width over the bandwidth. Decode has neither: the matmul of few rows adds its bias itself.

#include "tile.cuh"

PORT_FN void add_row(bf16* x, const bf16* y, int width) {
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        Eight a = widen8(load16(x + i));
        const Eight b = widen8(load16(y + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            a.x[j] += b.x[j];
        }
        store16(x + i, narrow8(a));
    }
}

extern "C" __global__ void __launch_bounds__(256) add_bias_bf16(bf16* x, const bf16* bias, int width) {
    let_dependents_start();
    dependency_wait();
    add_row(x + static_cast<size_t>(blockIdx.x) * width, bias, width);
}

extern "C" __global__ void __launch_bounds__(256) add_bf16(bf16* x, const bf16* y, int width) {
    let_dependents_start();
    dependency_wait();
    const size_t at = static_cast<size_t>(blockIdx.x) * width;
    add_row(x + at, y + at, width);
}
