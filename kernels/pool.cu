// Ends of models that do not generate.
//
//   mean_outputs_bf16:  out[o] = mean over the tokens of row output_rows[o] of x; zero where that is ~0
//   emit_rows:          out[o] = x[o] in single precision, finite[o] = 1 if all of it are numbers, else 0
//
// Shapes: x [tokens or outputs, width] bf16, rows padded(width) apart; out of mean_outputs likewise, with zeros behind
// a row; out of emit_rows [outputs, width], with nothing between. Grids: (outputs, ceil(width / 256)) with 256 threads;
// outputs with 256 threads. A row's tokens are added up in their order. Bytes: 2 tokens width; 6 outputs width.

#include "tile.cuh"

constexpr uint32_t kNoRow = 0xffffffffu;

struct MeanArgs {
    const bf16* x;
    bf16* out;
    const RowInfo* rows;
    const uint32_t* output_rows;  // [outputs]: its entry in `rows`, ~0: none
    int width;
};

struct EmitArgs {
    const bf16* x;
    float* out;
    uint32_t* finite;  // [outputs]
    int width;
};

extern "C" __global__ void __launch_bounds__(256) mean_outputs_bf16(MeanArgs a) {
    let_dependents_start();
    dependency_wait();
    const size_t stride = padded(a.width), i = blockIdx.y * static_cast<size_t>(blockDim.x) + threadIdx.x;
    const uint32_t index = a.output_rows[blockIdx.x];
    if (i >= stride) {
        return;
    }
    float sum = 0.0f;
    uint32_t tokens = 1;
    if (index != kNoRow && i < static_cast<size_t>(a.width)) {
        const RowInfo row = a.rows[index];
        tokens = row.tokens;
        for (uint32_t k = 0; k < tokens; k++) {
            sum += to_float(a.x[(static_cast<size_t>(row.first) + k) * stride + i]);
        }
    }
    a.out[blockIdx.x * stride + i] = to_bf16(sum / static_cast<float>(tokens));
}

extern "C" __global__ void __launch_bounds__(256) emit_rows(EmitArgs a) {
    PORT_SHARED(float, scratch, 32);
    let_dependents_start();
    dependency_wait();
    const bf16* x = a.x + blockIdx.x * static_cast<size_t>(padded(a.width));
    float* out = a.out + blockIdx.x * static_cast<size_t>(a.width);
    bool finite = true;
    for (int i = static_cast<int>(threadIdx.x); i < a.width; i += static_cast<int>(blockDim.x)) {
        const float v = to_float(x[i]);
        finite = finite && is_finite(v);
        out[i] = v;
    }
    const bool broken = block_max(finite ? 0.0f : 1.0f, scratch) > 0.0f;
    if (threadIdx.x == 0) {
        a.finite[blockIdx.x] = broken ? 0 : 1;
    }
}
