// The gated delta net (arXiv 2412.06464): convolution, recurrence and gated norm, token by token.
//
//   mixed = silu(conv(x[q | k | v]))                                causal, `taps` taps, per channel
//   q = q / |q| / sqrt(k_dim), k = k / |k|                          |x| = sqrt(sum of squares + 1e-6)
//   decay = exp(-exp(a_log) softplus(a + dt_bias)), strength = sigmoid(b)
//   S = decay S + k (strength (v - k (decay S)))^T,  o = q S        S [k_dim][v_dim] of each value head
//   out = o / rms(o) * (w + offset) * silu(z)
//
// x [tokens, stride] bf16, `[q | k | v | z | b | a]`: k_heads * k_dim twice, v_heads * v_dim twice, v_heads twice. out
// [tokens, out_stride] bf16, v_heads * v_dim and zero behind it. States of a layer, single precision: at states + slot
// * slot_stride: [taps - 1][channels] of the convolution, oldest first, channels = 2 k_heads k_dim + v_heads v_dim;
// then [v_heads][k_dim][v_dim]. Value head h reads key head h / (v_heads / k_heads). A row of no tokens does nothing.
//
// Two kernels, the second after the first: `delta_rule_bf16` reads the convolution's state and moves the recurrent one
// on; `delta_conv_state` then moves the convolution's on, which several heads have read.
//
//   delta_rule_bf16:   grid (v_heads, rows), threads: the larger of 4 v_dim and 2 k_dim + v_dim, rounded up to whole
//                      warps. Four threads share a column of the state and hold it in registers over all tokens of the
//                      row; each channel of the convolution is one thread's, with its history in registers.
//   delta_conv_state:  grid (ceil(channels / 256), rows), 256 threads.
//
// Limits: k_dim and v_dim up to 128, taps 1 to 8.
// Bytes: 8 rows state and 2 tokens (in + out width); latency of a token (about 4 k_dim instructions and four
// barriers) where a row is long: a chunked form would be faster there.

#include "heads.cuh"

constexpr int kParts = 4;  // threads that share a column of the state
constexpr int kMaxKeys = 128;
constexpr int kMaxValues = 128;
constexpr int kMaxTaps = 8;
constexpr int kMaxThreads = 512;
constexpr float kLengthEps = 1e-6f;

struct DeltaArgs {
    const bf16* x;
    bf16* out;
    const RowInfo* rows;
    float* states;                   // of the layer, in slot 0
    const float* conv;               // [channels][taps], oldest first
    const float* a_log;              // [v_heads]
    const float* dt_bias;            // [v_heads]
    HeadNorm norm;                   // of each output head: None or Rms
    unsigned long long slot_stride;  // singles from a slot to the next
    int stride;
    int out_stride;
    int k_heads;
    int v_heads;
    int k_dim;
    int v_dim;
    int taps;
};

PORT_FN int channels_of(const DeltaArgs& a) { return 2 * a.k_heads * a.k_dim + a.v_heads * a.v_dim; }

PORT_FN float sigmoid(float x) { return fast_divide(1.0f, 1.0f + fast_exp(-x)); }

// What a thread keeps of its channel: the last taps - 1 inputs, oldest first, and the weights, at the upper ends of the
// arrays.
struct Channel {
    float history[kMaxTaps - 1];
    float weight[kMaxTaps];

    PORT_FN void open(const DeltaArgs& a, const float* state, int channel) {
#pragma unroll
        for (int i = 0; i < kMaxTaps; i++) {
            const int tap = i - (kMaxTaps - a.taps);
            weight[i] = tap >= 0 ? a.conv[static_cast<size_t>(channel) * a.taps + tap] : 0.0f;
            if (i < kMaxTaps - 1) {
                history[i] = tap >= 0 ? state[static_cast<size_t>(tap) * channels_of(a) + channel] : 0.0f;
            }
        }
    }

    PORT_FN float step(float x) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxTaps - 1; i++) {
            sum += history[i] * weight[i];
            history[i] = i + 1 < kMaxTaps - 1 ? history[i + 1] : x;
        }
        sum += x * weight[kMaxTaps - 1];
        return sum * sigmoid(sum);
    }
};

// The channel of `[q | k | v]` that is element `i` of the head's own `[q | k | v]`.
PORT_FN int channel_of(const DeltaArgs& a, int head, int i) {
    const int k_head = head / (a.v_heads / a.k_heads), keys = a.k_heads * a.k_dim;
    if (i < a.k_dim) {
        return k_head * a.k_dim + i;
    }
    if (i < 2 * a.k_dim) {
        return keys + k_head * a.k_dim + i - a.k_dim;
    }
    return 2 * keys + head * a.v_dim + i - 2 * a.k_dim;
}

// 1 / length of a vector in shared memory; every warp forms it for itself, in the same order.
PORT_FN float inverse_length(const float* x, int dim) {
    float squares = 0.0f;
    for (int i = static_cast<int>(lane_id()); i < dim; i += 32) {
        squares += x[i] * x[i];
    }
    return fast_rsqrt(warp_sum(squares) + kLengthEps);
}

// Sum over the four threads of a column.
PORT_FN float column_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}

struct Rates {
    float decay, strength;
};

PORT_FN Rates rates_of(const DeltaArgs& a, const bf16* row, int head) {
    const bf16* b = row + channels_of(a) + a.v_heads * a.v_dim;
    const float rate = to_float(b[a.v_heads + head]) + a.dt_bias[head];
    const float softplus = fmaxf(rate, 0.0f) + log1pf(expf(-fabsf(rate)));
    return Rates{expf(-expf(a.a_log[head]) * softplus), sigmoid(to_float(b[head]))};
}

// Norm of the head's output, its gate, and out with it. One thread of each column has its value.
PORT_FN void write_output(const DeltaArgs& a, const bf16* row, bf16* out, int head, int column, float o, bool mine,
                          float* scratch) {
    float inverse = 1.0f;
    if (a.norm.kind != NormKind::None) {
        inverse = fast_rsqrt(block_sum(mine ? o * o : 0.0f, scratch) / a.v_dim + a.norm.eps);
    }
    if (mine) {
        const float z = to_float(row[channels_of(a) + head * a.v_dim + column]);
        const float y = normed(o, column, a.norm, Moments{0.0f, inverse});
        out[head * a.v_dim + column] = to_bf16(y * z * sigmoid(z));
    }
    if (head == 0) {
        for (int i = a.v_heads * a.v_dim + static_cast<int>(threadIdx.x); i < a.out_stride;
             i += static_cast<int>(blockDim.x)) {
            out[i] = to_bf16(0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1) delta_rule_bf16(DeltaArgs a) {
    PORT_SHARED(float, mixed, 2 * kMaxKeys + kMaxValues);
    PORT_SHARED(float, scratch, 32);
    let_dependents_start();
    dependency_wait();
    const int head = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x);
    const int column = t / kParts, part = t % kParts;
    const bool live = column < a.v_dim;
    const RowInfo row = a.rows[blockIdx.y];
    if (row.tokens == 0) {
        return;
    }
    float* slot = a.states + row.slot * a.slot_stride;
    float* state = slot + static_cast<size_t>(a.taps - 1) * channels_of(a) +
                   static_cast<size_t>(head) * a.k_dim * a.v_dim + column;

    // Keys part, part + 4, ... of the column.
    float s[kMaxKeys / kParts];
#pragma unroll
    for (int i = 0; i < kMaxKeys / kParts; i++) {
        const int key = part + i * kParts;
        s[i] = live && key < a.k_dim ? state[static_cast<size_t>(key) * a.v_dim] : 0.0f;
    }
    const bool convolves = t < 2 * a.k_dim + a.v_dim;
    const int channel = convolves ? channel_of(a, head, t) : 0;
    // Queries and keys have zeros behind them, so that every thread has as many.
    const int place = t < a.k_dim ? t : t < 2 * a.k_dim ? kMaxKeys + t - a.k_dim : 2 * (kMaxKeys - a.k_dim) + t;
    for (int i = t; i < 2 * kMaxKeys; i += static_cast<int>(blockDim.x)) {
        mixed[i] = 0.0f;
    }
    Channel own{};
    if (convolves) {
        own.open(a, slot, channel);
    }
    const float root = fast_rsqrt(static_cast<float>(a.k_dim));
    for (uint32_t k = 0; k < row.tokens; k++) {
        const size_t token = static_cast<size_t>(row.first) + k;
        const bf16* x = a.x + token * a.stride;
        block_sync();  // the token before is done with
        if (convolves) {
            mixed[place] = own.step(to_float(x[channel]));
        }
        const Rates rates = rates_of(a, x, head);
        block_sync();
        const float* q = mixed;
        const float* key = mixed + kMaxKeys;
        const float q_factor = inverse_length(q, a.k_dim) * root, k_factor = inverse_length(key, a.k_dim);
        float read = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxKeys / kParts; i++) {
            s[i] *= rates.decay;
            read += s[i] * key[part + i * kParts];
        }
        const float value = live ? mixed[2 * kMaxKeys + column] : 0.0f;
        const float change = rates.strength * (value - column_sum(read) * k_factor) * k_factor;
        float o = 0.0f;
#pragma unroll
        for (int i = 0; i < kMaxKeys / kParts; i++) {
            s[i] += key[part + i * kParts] * change;
            o += s[i] * q[part + i * kParts];
        }
        o = column_sum(o) * q_factor;
        write_output(a, x, a.out + token * a.out_stride, head, column, o, live && part == 0, scratch);
    }
    // Through a shuffle, so that the compiler does not keep the addresses from above all the way.
    const int v_dim = shuffle(a.v_dim, 0);
#pragma unroll
    for (int i = 0; i < kMaxKeys / kParts; i++) {
        const int key = part + i * kParts;
        if (live && key < a.k_dim) {
            state[static_cast<size_t>(key) * v_dim] = s[i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) delta_conv_state(DeltaArgs a) {
    let_dependents_start();
    dependency_wait();
    const int channel = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), channels = channels_of(a);
    if (channel >= channels) {
        return;
    }
    const RowInfo row = a.rows[blockIdx.y];
    float* state = a.states + row.slot * a.slot_stride + channel;
    // Ascending: what is read was not written yet.
    for (int tap = 0; tap < a.taps - 1; tap++) {
        const int token = static_cast<int>(row.tokens) - (a.taps - 1) + tap;
        const size_t at = static_cast<size_t>(row.first) + static_cast<size_t>(larger(token, 0));
        state[static_cast<size_t>(tap) * channels] =
            token >= 0 ? to_float(a.x[at * a.stride + channel])
                       : state[static_cast<size_t>(tap + static_cast<int>(row.tokens)) * channels];
    }
}
