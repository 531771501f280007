// Residual add and norm in one pass over the residual stream.
//
//   h = residual + x_scale * (post_weight ? rms_norm(x, post_weight) : x)        if x is given, else residual
//   residual = h                                                                 rounded to bf16, if x is given
//   out = norm(h, weight)      h / rms(h) * (w + offset), or with `bias`: (h - mean) / deviation * w + bias
//
// Shapes: residual, x, out [rows, width] bf16, contiguous; weight, post_weight, bias [width] bf16. width is a multiple
// of 8, at most 8 * 512 * kMaxVectors. One block a row: `blockDim.x` threads, whole warps, at least
// width / 8 / kMaxVectors. h is normed as rounded to bf16, so that `residual` and `out` agree.
//
// The e4m3 form writes codes and one scale for each `group` elements (a multiple of 8 that divides the width and is a
// power of two times 8 up to 256, or the width itself): value = code * scale.
//
// Algorithm: 16-byte loads, h kept in registers between the sum of squares and the output; sums in a fixed order.
// Bytes: 2 rows width (residual) + 2 (x) + 2 (residual written) + 2 or 1 (out): 8 rows width over the bandwidth is the
// floor. At few rows it is launch and latency: the weights are read before the dependency wait.

#include "tile.cuh"

constexpr int kMaxVectors = 4;

struct NormArgs {
    bf16* residual;
    const bf16* x;
    const bf16* post_weight;
    const bf16* weight;
    const bf16* bias;
    float x_scale;
    float offset;
    float post_offset;
    float eps;
    int width;
    int group;
};

PORT_FN float square_sum(const Eight& v) {
    float s = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        s += v.x[i] * v.x[i];
    }
    return s;
}

template <bool kQuantize>
PORT_FN void norm_row(const NormArgs& a, void* out, float* out_scales) {
    PORT_SHARED(float, scratch, 32);
    const int vectors = a.width / 8, row = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x);
    const int step = static_cast<int>(blockDim.x);
    uint4 weight[kMaxVectors];
#pragma unroll
    for (int i = 0; i < kMaxVectors; i++) {
        if (t + i * step < vectors) {
            weight[i] = load16(a.weight + (t + i * step) * 8);
        }
    }
    let_dependents_start();
    dependency_wait();

    bf16* residual = a.residual + static_cast<size_t>(row) * a.width;
    Eight h[kMaxVectors];
    if (a.x) {
        const bf16* x = a.x + static_cast<size_t>(row) * a.width;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxVectors; i++) {
            h[i] = Eight{};
            if (t + i * step < vectors) {
                h[i] = widen8(load16(x + (t + i * step) * 8));
            }
            squares += square_sum(h[i]);
        }
        float scale = a.x_scale;
        if (a.post_weight) {
            scale *= fast_rsqrt(block_sum(squares, scratch) / a.width + a.eps);
        }
#pragma unroll
        for (int i = 0; i < kMaxVectors; i++) {
            const int v = t + i * step;
            if (v >= vectors) {
                continue;
            }
            const Eight old = widen8(load16(residual + v * 8));
            Eight factor;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                factor.x[j] = 1.0f;
            }
            if (a.post_weight) {
                factor = widen8(load16(a.post_weight + v * 8));
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float f = a.post_weight ? factor.x[j] + a.post_offset : 1.0f;
                h[i].x[j] = old.x[j] + h[i].x[j] * scale * f;
            }
            const uint4 rounded = narrow8(h[i]);
            store16(residual + v * 8, rounded);
            h[i] = widen8(rounded);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kMaxVectors; i++) {
            h[i] = Eight{};
            if (t + i * step < vectors) {
                h[i] = widen8(load16(residual + (t + i * step) * 8));
            }
        }
    }

    float mean = 0.0f;
    if (a.bias) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxVectors; i++) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sum += h[i].x[j];
            }
        }
        mean = block_sum(sum, scratch) / a.width;
    }
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxVectors; i++) {
        if (t + i * step >= vectors) {
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            h[i].x[j] -= mean;
        }
        squares += square_sum(h[i]);
    }
    const float inverse = fast_rsqrt(block_sum(squares, scratch) / a.width + a.eps);

    float row_max = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxVectors; i++) {
        const int v = t + i * step;
        if (v >= vectors) {
            continue;
        }
        const Eight w = widen8(weight[i]);
        Eight b = Eight{};
        if (a.bias) {
            b = widen8(load16(a.bias + v * 8));
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            h[i].x[j] = h[i].x[j] * inverse * (w.x[j] + a.offset) + b.x[j];
        }
        row_max = fmaxf(row_max, largest_magnitude(h[i]));
        if (!kQuantize) {
            store16(static_cast<bf16*>(out) + static_cast<size_t>(row) * a.width + v * 8, narrow8(h[i]));
        }
    }
    if (!kQuantize) {
        return;
    }

    const bool whole_row = a.group == a.width;
    if (whole_row) {
        row_max = block_max(row_max, scratch);
    }
#pragma unroll
    for (int i = 0; i < kMaxVectors; i++) {
        const int v = t + i * step;
        const float mine = whole_row ? row_max : group_max(largest_magnitude(h[i]), a.group);
        if (v >= vectors) {
            continue;
        }
        const float scale = mine > 0.0f ? mine / kE4m3Max : 1.0f;
        *reinterpret_cast<uint2*>(static_cast<e4m3*>(out) + static_cast<size_t>(row) * a.width + v * 8) =
            quantize8(h[i], 1.0f / scale);
        if (v * 8 % a.group == 0) {
            out_scales[static_cast<size_t>(row) * (a.width / a.group) + v * 8 / a.group] = scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(512) add_norm_bf16(NormArgs args, bf16* out) {
    norm_row<false>(args, out, nullptr);
}

extern "C" __global__ void __launch_bounds__(512) add_norm_e4m3(NormArgs args, e4m3* out, float* out_scales) {
    norm_row<true>(args, out, out_scales);
}
