// A matmul for each head, of any sizes and places: `matmul_skinny` and `matmul_grouped` take heads too, and are fast,
// where everything is a multiple of 8.
//
//   y[r][y_first + h y_head + o] = sum over i of x[r][x_first + h x_head + i] * w[h][o][i]
//
// x [rows, x_stride], y [rows, y_stride], w [heads][out rows, in_stride] bf16, weights of a head weight_stride elements
// apart. Other elements of y stay, but for those from `width` to y_stride, which become zero.
//
// Grid: (ceil(out / 32), heads, ceil(rows / 8)), 256 threads: eight rows of x as singles in shared memory, a warp makes
// four outputs, its lanes side by side over `in`. Limit: in up to 1,024. Sums in single precision.
// Bytes: 2 heads out in, for each eight rows (from L2 after the first).

#include "tile.cuh"

constexpr int kRows = 8;
constexpr int kOutputs = 32;  // of a block
constexpr int kMaxIn = 1024;

struct HeadLinearArgs {
    const bf16* weight;
    const bf16* x;
    bf16* y;
    unsigned long long weight_stride;  // elements from a head to the next
    int in_stride;                     // elements from a row of a weight to the next
    int rows;
    int in;
    int out;
    int width;  // of rows of y
    int x_stride;
    int x_first;
    int x_head;
    int y_stride;
    int y_first;
    int y_head;
};

extern "C" __global__ void __launch_bounds__(256) head_linear_bf16(HeadLinearArgs a) {
    PORT_SHARED(float, x, kRows* kMaxIn);
    let_dependents_start();
    dependency_wait();
    const int head = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.z) * kRows;
    const int rows = smaller(kRows, a.rows - first), t = static_cast<int>(threadIdx.x);
    const int lane = static_cast<int>(lane_id()), warp = t / 32;
    for (int i = t; i < kRows * a.in; i += static_cast<int>(blockDim.x)) {
        const int row = i / a.in, k = i % a.in;
        const size_t at = static_cast<size_t>(first + row) * a.x_stride + a.x_first + head * a.x_head + k;
        x[row * kMaxIn + k] = row < rows ? to_float(a.x[at]) : 0.0f;
    }
    block_sync();
    for (int o = static_cast<int>(blockIdx.x) * kOutputs + warp;
         o < smaller(a.out, (static_cast<int>(blockIdx.x) + 1) * kOutputs); o += static_cast<int>(blockDim.x) / 32) {
        const bf16* w = a.weight + head * a.weight_stride + static_cast<size_t>(o) * a.in_stride;
        float sums[kRows] = {};
        for (int k = lane; k < a.in; k += 32) {
            const float weight = to_float(w[k]);
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                sums[r] += weight * x[r * kMaxIn + k];
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const float sum = warp_sum(sums[r]);
            if (lane == 0 && r < rows) {
                a.y[static_cast<size_t>(first + r) * a.y_stride + a.y_first + head * a.y_head + o] = to_bf16(sum);
            }
        }
    }
    if (blockIdx.x == 0 && head == 0) {
        const int tail = a.y_stride - a.width;
        for (int i = t; i < rows * tail; i += static_cast<int>(blockDim.x)) {
            a.y[static_cast<size_t>(first + i / tail) * a.y_stride + a.width + i % tail] = to_bf16(0.0f);
        }
    }
}
