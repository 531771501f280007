// Residual add and norm in one pass over the residual stream.
//
//   h = residual + x_scale * (post_weight ? rms_norm(x, post_weight) : x)        if x is given, else residual
//   residual = h                                                                 rounded to bf16, if x is given
//   out = norm(h)         h / rms(h) * (w + offset) + bias
//                         with `layer`: (h - mean) / deviation * (w + offset) + bias
//                         without a weight nothing multiplies, without a bias nothing is added
//
// Shapes: residual, x, out [rows, width] bf16, rows `padded(width)` apart, what lies between read as zero and written
// as zero; weight, post_weight, bias [padded(width)] bf16. width is any number up to 8 * 512 * kMaxVectors. One block a
// row: `blockDim.x` threads, whole warps, at least width / 8 / kMaxVectors. h is normed as rounded to bf16, so that
// `residual` and `out` agree.
//
// The e4m3 form writes codes and one scale for each `group` elements (a multiple of 8 that divides the width and is a
// power of two times 8 up to 256, or the width itself): value = code * scale. Its width is a multiple of 8.
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
    const bf16* weight;  // null: 1, without offset
    const bf16* bias;    // null: none
    float x_scale;
    float offset;
    float post_offset;
    float eps;
    int width;
    int layer;  // subtract the mean
    int group;  // of the e4m3 form
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
    const int stride = padded(a.width), vectors = stride / 8, t = static_cast<int>(threadIdx.x);
    const size_t row = blockIdx.x;
    const int step = static_cast<int>(blockDim.x);
    uint4 weight[kMaxVectors];
#pragma unroll
    for (int i = 0; i < kMaxVectors; i++) {
        if (a.weight && t + i * step < vectors) {
            weight[i] = load16(a.weight + (t + i * step) * 8);
        }
    }
    let_dependents_start();
    dependency_wait();

    bf16* residual = a.residual + row * stride;
    Eight h[kMaxVectors];
    if (a.x) {
        const bf16* x = a.x + row * stride;
        float squares = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxVectors; i++) {
            h[i] = Eight{};
            if (t + i * step < vectors) {
                h[i] = widen8(load16(x + (t + i * step) * 8));
                clear_from(h[i], a.width - (t + i * step) * 8);
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
            clear_from(h[i], a.width - v * 8);
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
                clear_from(h[i], a.width - (t + i * step) * 8);
            }
        }
    }

    float mean = 0.0f;
    if (a.layer) {
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
        clear_from(h[i], a.width - (t + i * step) * 8);
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
        Eight b = Eight{};
        if (a.bias) {
            b = widen8(load16(a.bias + v * 8));
        }
        if (a.weight) {
            const Eight w = widen8(weight[i]);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                h[i].x[j] *= w.x[j] + a.offset;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            h[i].x[j] = h[i].x[j] * inverse + b.x[j];
        }
        clear_from(h[i], a.width - v * 8);
        row_max = fmaxf(row_max, largest_magnitude(h[i]));
        if (!kQuantize) {
            store16(static_cast<bf16*>(out) + row * stride + v * 8, narrow8(h[i]));
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
        *reinterpret_cast<uint2*>(static_cast<e4m3*>(out) + row * stride + v * 8) = quantize8(h[i], 1.0f / scale);
        if (v * 8 % a.group == 0) {
            out_scales[row * (a.width / a.group) + v * 8 / a.group] = scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(512) add_norm_bf16(NormArgs args, bf16* out) {
    norm_row<false>(args, out, nullptr);
}

extern "C" __global__ void __launch_bounds__(512) add_norm_e4m3(NormArgs args, e4m3* out, float* out_scales) {
    norm_row<true>(args, out, out_scales);
}
