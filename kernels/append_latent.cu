// Append of latent attention (see `Backend::append_latent`): one vector `[latent | rotated key]` of a token is stored
// for all heads.
//
// Rows kv_rows [tokens, kv_stride] bf16, `[latent | rope | anything]`: the latent is normed, the rest rotated, and both
// are stored as the one key of the layer. q [tokens, q_stride], heads of nope + rope: the rope part of each is rotated
// into q_out [tokens, out_stride], heads of latent + rope, behind the latent part, which a matmul wrote before; where
// there is a q_scale it multiplies all of q_out. What lies behind a row of q_out becomes zero.
//
// Limits: latent + rope up to 1,024. Grid: (tokens, ceil((q_heads + 1) / 4)), 128 threads: a warp a head, the last one
// for what is stored. Bytes: 4 tokens q_heads rope + the cache's: latency at decode.

#include "heads.cuh"

constexpr int kWarps = 4;
constexpr int kMaxHead = 1024;

struct AppendLatentArgs {
    const bf16* q;
    const bf16* kv_rows;
    bf16* q_out;
    const uint32_t* positions;   // [tokens]
    const uint32_t* token_rows;  // [tokens]
    const RowInfo* rows;
    KvLayer kv;
    Rotation rotation;  // of `rope` elements
    HeadNorm norm;      // of the latent
    int q_stride;
    int kv_stride;
    int out_stride;
    int q_heads;
    int latent;
    int rope;
    int nope;
};

PORT_FN void write_query(const AppendLatentArgs& a, float* head, uint32_t token, int index, uint32_t position) {
    load_head(head, a.q + static_cast<size_t>(token) * a.q_stride + index * (a.nope + a.rope) + a.nope, a.rope);
    rotate_head(head, a.rotation, position);
    const float scale = query_scale(a.rotation, position);
    bf16* row = a.q_out + static_cast<size_t>(token) * a.out_stride;
    bf16* out = row + index * (a.latent + a.rope);
    for (int i = static_cast<int>(lane_id()); i < a.rope; i += 32) {
        out[a.latent + i] = to_bf16(head[i] * scale);
    }
    if (a.rotation.q_scale) {
        for (int i = static_cast<int>(lane_id()); i < a.latent; i += 32) {
            out[i] = to_bf16(to_float(out[i]) * scale);
        }
    }
    if (index == 0) {
        for (int i = a.q_heads * (a.latent + a.rope) + static_cast<int>(lane_id()); i < a.out_stride; i += 32) {
            row[i] = to_bf16(0.0f);
        }
    }
}

template <bool kE4m3>
PORT_FN void append_latent(const AppendLatentArgs& a) {
    PORT_SHARED(float, heads, kWarps* kMaxHead);
    let_dependents_start();
    dependency_wait();
    const int warp = static_cast<int>(threadIdx.x >> 5), index = static_cast<int>(blockIdx.y) * kWarps + warp;
    if (index > a.q_heads) {
        return;
    }
    const uint32_t token = blockIdx.x, position = a.positions[token];
    float* head = heads + warp * kMaxHead;
    if (index < a.q_heads) {
        write_query(a, head, token, index, position);
        return;
    }
    load_head(head, a.kv_rows + static_cast<size_t>(token) * a.kv_stride, a.latent + a.rope);
    norm_head(head, a.latent, a.norm, head_moments(head, a.latent, a.norm), 0);
    rotate_head(head + a.latent, a.rotation, position);
    constexpr uint32_t kElement = kE4m3 ? 1 : 2;
    const uint32_t page = page_of(a.kv, a.rows[a.token_rows[token]].slot, position);
    unsigned char* to = token_in_page(a.kv, page, 0, 0, position, (a.latent + a.rope) * kElement, 0);
    store_elements<kE4m3>(to, head, 0, a.latent + a.rope, cache_scale(a.kv, 0, 0));
}

extern "C" __global__ void __launch_bounds__(kWarps * 32) append_latent_bf16(AppendLatentArgs args) {
    append_latent<false>(args);
}
extern "C" __global__ void __launch_bounds__(kWarps * 32) append_latent_e4m3(AppendLatentArgs args) {
    append_latent<true>(args);
}
