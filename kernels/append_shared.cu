// Append where keys and values are one projection (see `Backend::append_shared`): one vector of a token is stored.
//
// Rows qk [tokens, stride] bf16, `[q | k]` of heads of `dim`. Stored of each key head, [dim + rotary]: v_norm(k), then
// the elements of rope(k_norm(k)) that are rotated, in their order. The other elements of a key are those of the value
// times the weight of k_norm, so queries take that weight: q_out [tokens, out_stride], heads of dim + rotary: with q =
// rope(q_norm(q)) * q_scale, first q times the weight and 0 where an element is rotated, then the rotated ones. Both
// norms of a key divide by the same size, so they have equal kind and eps. What lies behind a row of q_out becomes
// zero.
//
// Limits: dim up to 1,024. kv heads are `kv.kv_heads`. Grid: (tokens, ceil((q_heads + kv heads) / 4)), 128 threads: a
// warp a head. Bytes: 2 tokens (width + out width) + the cache's: latency at decode.

#include "heads.cuh"

constexpr int kWarps = 4;
constexpr int kMaxHead = 1024;

struct AppendSharedArgs {
    const bf16* qk;
    bf16* q_out;
    const uint32_t* positions;   // [tokens]
    const uint32_t* token_rows;  // [tokens]
    const RowInfo* rows;
    KvLayer kv;
    Rotation rotation;
    HeadNorm q_norm;
    HeadNorm k_norm;
    HeadNorm v_norm;
    int stride;
    int out_stride;
    int q_heads;
    int dim;
};

PORT_FN void write_query(const AppendSharedArgs& a, float* head, uint32_t token, int index, uint32_t position) {
    norm_head(head, a.dim, a.q_norm, head_moments(head, a.dim, a.q_norm), 0);
    rotate_head(head, a.rotation, position);
    const float scale = query_scale(a.rotation, position);
    bf16* row = a.q_out + static_cast<size_t>(token) * a.out_stride;
    bf16* out = row + index * (a.dim + a.rotation.rotary);
    for (int i = static_cast<int>(lane_id()); i < a.dim; i += 32) {
        const float weight = a.k_norm.weight ? to_float(a.k_norm.weight[i]) + a.k_norm.offset : 1.0f;
        out[i] = to_bf16(is_rotated(a.rotation, i) ? 0.0f : head[i] * scale * weight);
    }
    for (int j = static_cast<int>(lane_id()); j < a.rotation.rotary; j += 32) {
        out[a.dim + j] = to_bf16(head[rotated_element(a.rotation, j)] * scale);
    }
    if (index == 0) {
        for (int i = a.q_heads * (a.dim + a.rotation.rotary) + static_cast<int>(lane_id()); i < a.out_stride; i += 32) {
            row[i] = to_bf16(0.0f);
        }
    }
}

template <bool kE4m3>
PORT_FN void store_key(const AppendSharedArgs& a, float* head, uint32_t token, uint32_t kv_head, uint32_t position) {
    constexpr uint32_t kElement = kE4m3 ? 1 : 2;
    const uint32_t page = page_of(a.kv, a.rows[a.token_rows[token]].slot, position);
    unsigned char* to = token_in_page(a.kv, page, 0, kv_head, position, (a.dim + a.rotation.rotary) * kElement, 0);
    const float inverse = fast_divide(1.0f, cache_scale(a.kv, 0, kv_head));
    const Moments as_value = head_moments(head, a.dim, a.v_norm), as_key = head_moments(head, a.dim, a.k_norm);
    auto put = [&](int i, float x) {
        if (kE4m3) {
            to[i] = to_e4m3(x * inverse).bits;
        } else {
            *reinterpret_cast<bf16*>(to + i * 2) = to_bf16(x);
        }
    };
    for (int i = static_cast<int>(lane_id()); i < a.dim; i += 32) {
        put(i, normed(head[i], i, a.v_norm, as_value));
    }
    warp_sync();  // the head now becomes the key
    norm_head(head, a.dim, a.k_norm, as_key, 0);
    rotate_head(head, a.rotation, position);
    for (int j = static_cast<int>(lane_id()); j < a.rotation.rotary; j += 32) {
        put(a.dim + j, head[rotated_element(a.rotation, j)]);
    }
}

template <bool kE4m3>
PORT_FN void append_shared(const AppendSharedArgs& a) {
    PORT_SHARED(float, heads, kWarps* kMaxHead);
    let_dependents_start();
    dependency_wait();
    const int warp = static_cast<int>(threadIdx.x >> 5), index = static_cast<int>(blockIdx.y) * kWarps + warp;
    if (index >= a.q_heads + static_cast<int>(a.kv.kv_heads)) {
        return;
    }
    const uint32_t token = blockIdx.x, position = a.positions[token];
    float* head = heads + warp * kMaxHead;
    load_head(head, a.qk + static_cast<size_t>(token) * a.stride + index * a.dim, a.dim);
    if (index < a.q_heads) {
        write_query(a, head, token, index, position);
    } else {
        store_key<kE4m3>(a, head, token, static_cast<uint32_t>(index - a.q_heads), position);
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) append_shared_bf16(AppendSharedArgs args) {
    append_shared<false>(args);
}
extern "C" __global__ void __launch_bounds__(kWarps * 32) append_shared_e4m3(AppendSharedArgs args) {
    append_shared<true>(args);
}
