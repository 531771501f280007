// Between the projection and attention: norms of heads, rotary embedding, append to the KV cache.
//
// Input rows qkv [tokens, stride] bf16, `[q | k | v | anything]`: q_heads and kv_heads heads of key_dim, kv_heads of
// value_dim; kv_heads 0: queries alone, of a layer that reads another's keys. Queries are normed, rotated, scaled and
// written back in place; keys are normed and rotated, values normed, and both go to the pages of the token's sequence
// (`append`), or back in place (`keep`, where attention reads them beside the queries). Norms are of each head, or with
// `across_heads` those of queries and keys are of all heads as one vector, with weights [heads * key_dim].
// What is behind v stays as it is.
//
// Shapes: norms' weights and biases bf16; see `heads.cuh` for the rotation; token_rows [tokens]: the token's entry in
// `rows`. What is stored is rounded to bf16 once, or divided by its head's scale and rounded to e4m3.
//
//   rope_append_*      key_dim and value_dim even and at most 512, stride even, not across heads. Grid: (tokens,
//                      ceil((q_heads + 2 kv_heads) / 4)), 128 threads: one warp a head, so nothing crosses warps.
//   rope_append_any_*  any key_dim and value_dim up to 1,024. Grid: tokens, 256 threads: one block has all heads of a
//                      token.
//
// Bytes: 4 tokens width, plus the tables' 4 tokens rotary: at decode it is launch and latency.

#include "heads.cuh"

constexpr int kWarps = 4;
constexpr int kMaxHead = 512;
constexpr int kAnyWarps = 8;
constexpr int kMaxAnyHead = 1024;

struct AppendArgs {
    bf16* qkv;
    const uint32_t* positions;   // [tokens]
    const uint32_t* token_rows;  // [tokens]
    const RowInfo* rows;
    KvLayer kv;
    Rotation rotation;
    HeadNorm q_norm;
    HeadNorm k_norm;
    HeadNorm v_norm;
    int stride;  // elements from a row to the next
    int q_heads;
    int kv_heads;  // in the rows; 0: none
    int key_dim;
    int value_dim;
    int across_heads;
    int append;
    int keep;
};

enum class Role { Query, Key, Value };

// Head `index` of a token, in shared memory of the warp. `q_all`, `k_all`: moments of all heads, with `across_heads`.
template <bool kE4m3>
PORT_FN void append_head(const AppendArgs& a, uint32_t token, int index, float* head, Moments q_all, Moments k_all) {
    const Role role = index < a.q_heads ? Role::Query : index < a.q_heads + a.kv_heads ? Role::Key : Role::Value;
    const int first_value = a.q_heads + a.kv_heads;
    const int dim = role == Role::Value ? a.value_dim : a.key_dim;
    const int column =
        role == Role::Value ? first_value * a.key_dim + (index - first_value) * a.value_dim : index * a.key_dim;
    bf16* from = a.qkv + static_cast<size_t>(token) * a.stride + column;
    const uint32_t position = a.positions[token];
    load_head(head, from, dim);
    const bool all = a.across_heads;
    if (role == Role::Query) {
        norm_head(head, dim, a.q_norm, all ? q_all : head_moments(head, dim, a.q_norm), all ? index * dim : 0);
    } else if (role == Role::Key) {
        const int first = (index - a.q_heads) * dim;
        norm_head(head, dim, a.k_norm, all ? k_all : head_moments(head, dim, a.k_norm), all ? first : 0);
    } else {
        norm_head(head, dim, a.v_norm, head_moments(head, dim, a.v_norm), 0);
    }
    if (role != Role::Value) {
        rotate_head(head, a.rotation, position);
    }
    if (role == Role::Query) {
        const float scale = query_scale(a.rotation, position);
        for (int i = static_cast<int>(lane_id()); i < dim; i += 32) {
            head[i] *= scale;
        }
        warp_sync();
    }
    if (role == Role::Query || a.keep) {
        write_head(from, head, dim);
    }
    if (role != Role::Query && a.append) {
        const int part = role == Role::Value;
        const uint32_t kv_head = static_cast<uint32_t>(index - (part ? first_value : a.q_heads));
        constexpr uint32_t kElement = kE4m3 ? 1 : 2;
        const uint32_t page = page_of(a.kv, a.rows[a.token_rows[token]].slot, position);
        unsigned char* to =
            token_in_page(a.kv, page, part, kv_head, position, a.key_dim * kElement, a.value_dim * kElement);
        store_elements<kE4m3>(to, head, 0, dim, cache_scale(a.kv, part, kv_head));
    }
    warp_sync();  // the head's memory may be taken again
}

template <bool kE4m3>
PORT_FN void rope_append(const AppendArgs& a) {
    PORT_SHARED(float, heads, kWarps* kMaxHead);
    let_dependents_start();
    dependency_wait();
    const int warp = static_cast<int>(threadIdx.x >> 5), index = static_cast<int>(blockIdx.y) * kWarps + warp;
    if (index < a.q_heads + 2 * a.kv_heads) {
        append_head<kE4m3>(a, blockIdx.x, index, heads + warp * kMaxHead, Moments{}, Moments{});
    }
}

// Moments of `count` elements in global memory, by the whole block.
PORT_FN Moments block_moments(const bf16* x, int count, const HeadNorm& norm, float* scratch) {
    Moments m{0.0f, 1.0f};
    if (norm.kind == NormKind::None || count == 0) {
        return m;
    }
    const int t = static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
    if (norm.kind == NormKind::Layer) {
        float sum = 0.0f;
        for (int i = t; i < count; i += step) {
            sum += to_float(x[i]);
        }
        m.mean = fast_divide(block_sum(sum, scratch), static_cast<float>(count));
    }
    float squares = 0.0f;
    for (int i = t; i < count; i += step) {
        const float v = to_float(x[i]) - m.mean;
        squares += v * v;
    }
    m.inverse = fast_rsqrt(fast_divide(block_sum(squares, scratch), static_cast<float>(count)) + norm.eps);
    return m;
}

template <bool kE4m3>
PORT_FN void rope_append_any(const AppendArgs& a) {
    PORT_SHARED(float, heads, kAnyWarps* kMaxAnyHead);
    PORT_SHARED(float, scratch, 32);
    let_dependents_start();
    dependency_wait();
    Moments q_all{}, k_all{};
    if (a.across_heads) {
        const bf16* row = a.qkv + static_cast<size_t>(blockIdx.x) * a.stride;
        q_all = block_moments(row, a.q_heads * a.key_dim, a.q_norm, scratch);
        k_all = block_moments(row + a.q_heads * a.key_dim, a.kv_heads * a.key_dim, a.k_norm, scratch);
        block_sync();  // all have read what is now overwritten
    }
    const int warp = static_cast<int>(threadIdx.x >> 5);
    for (int index = warp; index < a.q_heads + 2 * a.kv_heads; index += kAnyWarps) {
        append_head<kE4m3>(a, blockIdx.x, index, heads + warp * kMaxAnyHead, q_all, k_all);
    }
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) rope_append_bf16(AppendArgs args) {
    rope_append<false>(args);
}
extern "C" __global__ void __launch_bounds__(kWarps * 32) rope_append_e4m3(AppendArgs args) { rope_append<true>(args); }
extern "C" __global__ void __launch_bounds__(kAnyWarps * 32) rope_append_any_bf16(AppendArgs args) {
    rope_append_any<false>(args);
}
extern "C" __global__ void __launch_bounds__(kAnyWarps * 32) rope_append_any_e4m3(AppendArgs args) {
    rope_append_any<true>(args);
}
