// Attention for every shape that has no tensor-core kernel: any size of keys and values up to 1,024, decode and prefill
// alike.
//
//   out[token][h] = softmax(cap(scale q_h K^T), sink_h) V
//   keys of a token at position p: [max(0, p + 1 - window), p + 1) out of the pages of its slot, or with `whole` all of
//   its row of the step from max(0, p + 1 - window) on, which lie beside the queries in rows `[q | k | v]`
//
// q [tokens, q_stride] bf16: its first q_heads * key_dim columns are the queries; out [tokens, out_stride], of which
// q_heads * value_dim are written, and what lies behind them as zero. Query heads of a kv head are consecutive. With
// `value_in_key` the first value_dim elements of a stored key are its value. A sink is one more score without a value.
//
// Grid: (tokens, q_heads), 256 threads. Keys in turns of 64: each warp scores eight of them, its lanes side by side
// over the elements; then every thread adds up its elements of the output. All in single precision, online softmax.
// Work: 2 * keys * (key_dim + value_dim) a block; each head reads its keys by itself, out of L2 mostly.

#include "heads.cuh"

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kTurn = 64;
constexpr int kMaxHead = 1024;
constexpr int kOwn = kMaxHead / kThreads;

struct AttentionAnyArgs {
    const bf16* q;
    bf16* out;
    const float* sinks;          // [q_heads]; null: none
    const uint32_t* positions;   // [tokens]
    const uint32_t* token_rows;  // [tokens]
    const RowInfo* rows;
    KvLayer kv;  // not used with `whole`
    float scale;
    float cap;        // 0: none
    uint32_t window;  // 0: none
    int q_stride;
    int out_stride;
    int q_heads;
    int kv_heads;
    int key_dim;
    int value_dim;
    int value_in_key;
    int whole;
};

// The keys and values that one query head sees.
struct Seen {
    RowInfo row;
    uint32_t head;
    int from, to;
};

template <bool kE4m3>
PORT_FN float element(const unsigned char* at, int i) {
    return kE4m3 ? to_float(e4m3{at[i]}) : to_float(reinterpret_cast<const bf16*>(at)[i]);
}

// Where the key (part 0) or the value (1) at a position lies.
template <bool kE4m3>
PORT_FN const unsigned char* stored(const AttentionAnyArgs& a, const Seen& seen, int part, int position) {
    if (a.whole) {
        const int columns = (a.q_heads + (part ? a.kv_heads : 0)) * a.key_dim;
        const size_t row = static_cast<size_t>(seen.row.first) + static_cast<size_t>(position);
        const bf16* at = a.q + row * a.q_stride + columns + seen.head * (part ? a.value_dim : a.key_dim);
        return reinterpret_cast<const unsigned char*>(at);
    }
    constexpr uint32_t kElement = kE4m3 ? 1 : 2;
    const uint32_t at = static_cast<uint32_t>(position), page = page_of(a.kv, seen.row.slot, at);
    return token_in_page(a.kv, page, a.value_in_key ? 0 : part, seen.head, at, a.key_dim * kElement,
                         a.value_dim * kElement);
}

// Scores of up to 64 keys, times log2(e); those behind the last are -infinity.
template <bool kE4m3>
PORT_FN void score_turn(const AttentionAnyArgs& a, const Seen& seen, const float* q, int first, float scale,
                        float* scores) {
    const int warp = static_cast<int>(threadIdx.x >> 5), lane = static_cast<int>(lane_id());
    for (int i = warp; i < kTurn; i += kWarps) {
        float score = -kInfinity;
        if (first + i < seen.to) {
            const unsigned char* key = stored<kE4m3>(a, seen, 0, first + i);
            float sum = 0.0f;
            for (int d = lane; d < a.key_dim; d += 32) {
                sum += q[d] * element<kE4m3>(key, d);
            }
            score = warp_sum(sum) * scale;
            if (a.cap > 0.0f) {
                score = a.cap * fast_tanh(score / a.cap);
            }
            score *= kLog2E;
        }
        if (lane == 0) {
            scores[i] = score;
        }
    }
}

template <bool kE4m3>
PORT_FN void attend(const AttentionAnyArgs& a) {
    PORT_SHARED(float, q, kMaxHead);
    PORT_SHARED(float, scores, kTurn);
    let_dependents_start();
    dependency_wait();
    const uint32_t token = blockIdx.x, head = blockIdx.y;
    const int t = static_cast<int>(threadIdx.x), position = static_cast<int>(a.positions[token]);
    Seen seen;
    seen.row = a.rows[a.token_rows[token]];
    seen.head = head / static_cast<uint32_t>(a.q_heads / a.kv_heads);
    seen.to = a.whole ? static_cast<int>(seen.row.tokens) : position + 1;
    seen.from = a.window && position + 1 > static_cast<int>(a.window) ? position + 1 - static_cast<int>(a.window) : 0;
    for (int d = t; d < a.key_dim; d += kThreads) {
        q[d] = to_float(a.q[static_cast<size_t>(token) * a.q_stride + head * a.key_dim + d]);
    }
    block_sync();

    const float scale = a.scale * (kE4m3 ? cache_scale(a.kv, 0, seen.head) : 1.0f);
    float out[kOwn] = {}, peak = -kInfinity, sum = 0.0f;
    for (int first = seen.from; first < seen.to; first += kTurn) {
        score_turn<kE4m3>(a, seen, q, first, scale, scores);
        block_sync();
        const float before = peak, low = scores[lane_id()], high = scores[lane_id() + 32];
        peak = fmaxf(peak, warp_max(fmaxf(low, high)));
        const float shrink = fast_exp2(before - peak);
        sum = sum * shrink + warp_sum(fast_exp2(low - peak) + fast_exp2(high - peak));
        const int count = smaller(kTurn, seen.to - first);
#pragma unroll
        for (int i = 0; i < kOwn; i++) {
            out[i] *= shrink;
        }
        for (int k = 0; k < count; k++) {
            const unsigned char* value = stored<kE4m3>(a, seen, 1, first + k);
            const float weight = fast_exp2(scores[k] - peak);
#pragma unroll
            for (int i = 0; i < kOwn; i++) {
                if (i * kThreads < a.value_dim) {
                    out[i] += weight * element<kE4m3>(value, smaller(t + i * kThreads, a.value_dim - 1));
                }
            }
        }
        block_sync();  // scores are done with
    }

    if (a.sinks) {
        sum += fast_exp2(a.sinks[head] * kLog2E - (peak == -kInfinity ? 0.0f : peak));
    }
    const float value_scale = kE4m3 ? cache_scale(a.kv, a.value_in_key ? 0 : 1, seen.head) : 1.0f;
    const float factor = sum > 0.0f ? value_scale / sum : 0.0f;
    bf16* row = a.out + static_cast<size_t>(token) * a.out_stride;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        if (t + i * kThreads < a.value_dim) {
            row[head * a.value_dim + t + i * kThreads] = to_bf16(out[i] * factor);
        }
    }
    if (head == 0) {
        for (int i = a.q_heads * a.value_dim + t; i < a.out_stride; i += kThreads) {
            row[i] = to_bf16(0.0f);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads) attention_any_bf16(AttentionAnyArgs args) {
    attend<false>(args);
}
extern "C" __global__ void __launch_bounds__(kThreads) attention_any_e4m3(AttentionAnyArgs args) { attend<true>(args); }
