// Between the projection and attention: norm of each query and key head, rotary embedding, append to the KV cache.
//
// Input rows qkv [tokens, (q_heads + 2 kv_heads) head_dim] bf16, `[q | k | v]`; q is written back in place, k and v go
// to the pages of the token's sequence. Per head of q and k: x / rms(x) * (w + offset) if a norm is given, then the
// first `rotary` elements are rotated as two halves: (a, b) -> (a cos - b sin, b cos + a sin), with the tables' entry
// at the token's position. v is normed without a weight if `norm_values`. With `k_is_v` rows are `[q | k]` and values
// are the keys as projected, before norm and rotation (normed without a weight if asked).
// With `no_values` nothing is stored as values: attention reads the keys for both.
//
// Shapes: q_norm, k_norm [head_dim] bf16; cos, sin [positions, rotary / 2] single precision; token_rows [tokens]: the
// token's entry in `rows`. head_dim a multiple of 16 up to 512, rotary a multiple of 2 up to head_dim.
// Keys and values are rounded to bf16 once, or divided by their head's scale and rounded to e4m3.
//
// Grid: (tokens, ceil(heads / 4)), 128 threads: one warp a head, so nothing crosses warps. A lane holds elements
// 2 lane, 2 lane + 1 of every 64, and of the other half where it rotates, by a shared row of its own warp.
// Bytes: 4 tokens width, plus the tables' 4 tokens rotary: at decode it is launch and latency.

#include "tile.cuh"

constexpr int kWarps = 4;
constexpr int kMaxHead = 512;

struct RopeArgs {
    bf16* qkv;
    const bf16* q_norm;  // null: no norm
    const bf16* k_norm;
    const float* cos;  // null: no rotation
    const float* sin;
    const uint32_t* positions;   // [tokens]
    const uint32_t* token_rows;  // [tokens]
    const RowInfo* rows;
    KvLayer kv;
    float norm_offset;
    float eps;
    int q_heads;
    int head_dim;
    int rotary;
    int norm_values;
    int k_is_v;
    int no_values;
};

enum class Role { Query, Key, Value };

// Norms the warp's head in `head` (single precision, shared memory of the warp).
PORT_FN void norm_head(float* head, const bf16* weight, float offset, float eps, int dim) {
    float squares = 0.0f;
    for (int i = static_cast<int>(lane_id()); i < dim; i += 32) {
        squares += head[i] * head[i];
    }
    const float inverse = fast_rsqrt(warp_sum(squares) / dim + eps);
    for (int i = static_cast<int>(lane_id()); i < dim; i += 32) {
        head[i] = head[i] * inverse * (weight ? to_float(weight[i]) + offset : 1.0f);
    }
    warp_sync();
}

PORT_FN void rotate_head(float* head, const float* cos, const float* sin, int rotary) {
    const int half = rotary / 2;
    for (int i = static_cast<int>(lane_id()); i < half; i += 32) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cos[i] - b * sin[i];
        head[i + half] = b * cos[i] + a * sin[i];
    }
    warp_sync();
}

// Writes the warp's head to token `position` of its sequence.
template <bool kE4m3>
PORT_FN void append_head(const float* head, const RopeArgs& a, const RowInfo& row, uint32_t position, int part,
                         uint32_t kv_head) {
    const uint32_t page = a.kv.tables[static_cast<size_t>(row.slot) * a.kv.table_len + position / kPageTokens];
    const uint32_t row_bytes = static_cast<uint32_t>(a.head_dim) * (kE4m3 ? 1 : 2);
    unsigned char* to = page_rows(a.kv, page, part, kv_head, row_bytes) + position % kPageTokens * row_bytes;
    float inverse = 1.0f;
    if (kE4m3 && a.kv.scales) {
        inverse = 1.0f / a.kv.scales[part * a.kv.kv_heads + kv_head];
    }
    for (int i = static_cast<int>(lane_id()) * 2; i < a.head_dim; i += 64) {
        if (kE4m3) {
            const uint16_t pair =
                static_cast<uint16_t>(to_e4m3(head[i] * inverse).bits | to_e4m3(head[i + 1] * inverse).bits << 8);
            *reinterpret_cast<uint16_t*>(to + i) = pair;
        } else {
            *reinterpret_cast<uint32_t*>(to + i * 2) = pack_bf16(head[i], head[i + 1]);
        }
    }
}

template <bool kE4m3>
PORT_FN void rope_append(const RopeArgs& a) {
    PORT_SHARED(float, heads, kWarps* kMaxHead);
    let_dependents_start();
    dependency_wait();
    const uint32_t token = blockIdx.x;
    const int kv_heads = static_cast<int>(a.kv.kv_heads), warp = static_cast<int>(threadIdx.x >> 5);
    const int index = static_cast<int>(blockIdx.y) * kWarps + warp;
    const int stored = a.q_heads + kv_heads * (a.k_is_v ? 1 : 2);
    const int all = a.q_heads + kv_heads * (a.no_values ? 1 : 2);
    if (index >= all) {
        return;
    }
    const Role role = index < a.q_heads ? Role::Query : index < a.q_heads + kv_heads ? Role::Key : Role::Value;
    // Where values are the projected keys, they are read from the keys' columns, which nobody writes.
    const int column = role == Role::Value && a.k_is_v ? index - kv_heads : index;
    bf16* from = a.qkv + (static_cast<size_t>(token) * stored + column) * a.head_dim;
    const RowInfo row = a.rows[a.token_rows[token]];
    const uint32_t position = a.positions[token];

    float* head = heads + warp * kMaxHead;
    for (int i = static_cast<int>(lane_id()) * 2; i < a.head_dim; i += 64) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(from + i);
        head[i] = low_bf16(pair);
        head[i + 1] = high_bf16(pair);
    }
    warp_sync();
    if (role == Role::Value) {
        if (a.norm_values) {
            norm_head(head, nullptr, 0.0f, a.eps, a.head_dim);
        }
        append_head<kE4m3>(head, a, row, position, 1, static_cast<uint32_t>(index - a.q_heads - kv_heads));
        return;
    }
    const bf16* weight = role == Role::Query ? a.q_norm : a.k_norm;
    if (weight) {
        norm_head(head, weight, a.norm_offset, a.eps, a.head_dim);
    }
    if (a.cos) {
        const size_t at = static_cast<size_t>(position) * (a.rotary / 2);
        rotate_head(head, a.cos + at, a.sin + at, a.rotary);
    }
    if (role == Role::Key) {
        append_head<kE4m3>(head, a, row, position, 0, static_cast<uint32_t>(index - a.q_heads));
        return;
    }
    for (int i = static_cast<int>(lane_id()) * 2; i < a.head_dim; i += 64) {
        *reinterpret_cast<uint32_t*>(from + i) = pack_bf16(head[i], head[i + 1]);
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) rope_append_bf16(RopeArgs args) { rope_append<false>(args); }
extern "C" __global__ void __launch_bounds__(kWarps * 32) rope_append_e4m3(RopeArgs args) { rope_append<true>(args); }
