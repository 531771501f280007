// The nonlinearity of a feed-forward layer where the matmul before has not applied it.
//
//   glu_*:          out[r][i] = activate(gate[r][i], up[r][i])      rows of x are [gate | up]
//   activate_bf16:  out[r][i] = curve(x[r][i])                      out may be x
//
// Shapes: x [rows, 2 width] (`activate_bf16`: [rows, width]), out [rows, width] bf16. Rows are padded(2 width) and
// padded(width) apart; width is any number, and where it is no multiple of 8 the ups begin in the middle of 16 bytes
// and are read one by one. What lies behind a row of out is written as zero. Activations: see `tile.cuh`, `Gate`, and
// `Curve`. The e4m3 form writes codes and a scale for each `group` elements (64, 128 or 256, or any number for the
// whole row, which is then held in shared memory: `width` singles of dynamic shared memory). Its width is a multiple of
// 8. One block a row. Bytes: 4 rows width read, 2 (1) written; the floor is 6 rows width over the bandwidth.

#include "tile.cuh"

PORT_FN Eight gated8(const bf16* row, int i, int width, const GateSpec& gate) {
    const Eight g = widen8(load16(row + i)), u = widen8(load16(row + width + i));
    Eight out;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        out.x[j] = activate(g.x[j], u.x[j], gate);
    }
    return out;
}

extern "C" __global__ void __launch_bounds__(256) glu_bf16(const bf16* x, bf16* out, int width, GateSpec gate) {
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    x += row * padded(2 * width);
    out += row * padded(width);
    if (width % 8 == 0) {
        for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
            store16(out + i, narrow8(gated8(x, i, width, gate)));
        }
        return;
    }
    for (int i = static_cast<int>(threadIdx.x); i < padded(width); i += static_cast<int>(blockDim.x)) {
        out[i] = to_bf16(i < width ? activate(to_float(x[i]), to_float(x[width + i]), gate) : 0.0f);
    }
}

// Numbers as in `Gate` where they mean the same.
enum class Curve : int { Silu = 0, GeluTanh = 1, Gelu = 3, Tanh = 4, Xielu = 5 };

struct ActivateArgs {
    const bf16* x;
    bf16* out;
    int width;
    Curve kind;
    // Xielu: x > 0: alpha_p x^2 + beta x, else (expm1(min(x, eps)) - x) alpha_n + beta x.
    float alpha_p;
    float alpha_n;
    float beta;
    float eps;
};

PORT_FN float curve(float x, const ActivateArgs& a) {
    switch (a.kind) {
        case Curve::Silu:
            return activate(x, 1.0f, GateSpec{Gate::Silu, 0.0f, 0.0f});
        case Curve::GeluTanh:
            return activate(x, 1.0f, GateSpec{Gate::GeluTanh, 0.0f, 0.0f});
        case Curve::Gelu:
            return activate(x, 1.0f, GateSpec{Gate::Gelu, 0.0f, 0.0f});
        case Curve::Tanh:
            return fast_tanh(x);
        case Curve::Xielu:
            return x > 0.0f ? a.alpha_p * x * x + a.beta * x : (expm1f(smaller(x, a.eps)) - x) * a.alpha_n + a.beta * x;
    }
    return 0.0f;
}

extern "C" __global__ void __launch_bounds__(256) activate_bf16(ActivateArgs a) {
    let_dependents_start();
    dependency_wait();
    const size_t at = static_cast<size_t>(blockIdx.x) * padded(a.width);
    for (int i = static_cast<int>(threadIdx.x) * 8; i < a.width; i += static_cast<int>(blockDim.x) * 8) {
        Eight v = widen8(load16(a.x + at + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v.x[j] = curve(v.x[j], a);
        }
        clear_from(v, a.width - i);
        store16(a.out + at + i, narrow8(v));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    glu_e4m3(const bf16* x, e4m3* out, float* out_scales, int width, int group, GateSpec gate) {
    PORT_SHARED(float, scratch, 32);
    PORT_DYNAMIC_SHARED(shared);
    float* held = reinterpret_cast<float*>(shared);
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    const int t = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x) * 8;
    float peak = 0.0f;
    for (int i = t * 8; i < width; i += step) {
        const Eight v = gated8(x + row * 2 * width, i, width, gate);
        peak = fmaxf(peak, largest_magnitude(v));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            held[i + j] = v.x[j];
        }
    }
    const bool whole_row = group == width;
    if (whole_row) {
        peak = block_max(peak, scratch);
    }
    // All lanes take part in the shuffles of the last, partial round.
    for (int start = 0; start < width; start += step) {
        const int i = start + t * 8;
        Eight v{};
        if (i < width) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                v.x[j] = held[i + j];
            }
        }
        const float mine = whole_row ? peak : group_max(largest_magnitude(v), group);
        if (i >= width) {
            continue;
        }
        const float scale = mine > 0.0f ? mine / kE4m3Max : 1.0f;
        *reinterpret_cast<uint2*>(out + row * width + i) = quantize8(v, 1.0f / scale);
        if (i % group == 0) {
            out_scales[row * (width / group) + i / group] = scale;
        }
    }
}
