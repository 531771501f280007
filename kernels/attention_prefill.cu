// Attention of rows with many query tokens each, over paged keys and values, their own included.
//
//   out[token][h] = softmax(cap(scale q_h K^T), sink_h) V
//   keys of a token at position p: [max(0, p + 1 - window), p + 1), or all of the sequence where not causal
//   with `beside` keys and values are not in pages but behind the queries, in rows `[q | k | v]` of the step, which
//   then has each sequence whole (bf16 only)
//
// Tensors and options are those of `attention_decode.cu`. A row's tokens are the last ones of its context, so a prompt
// may come in chunks. Rows of one step may differ in everything.
//
// Work list: block b takes item b: 64 queries of one row and kv head. Queries are (token, head of the group) pairs in
// token order, so that heads of a group share the keys they read. The host puts long items first.
//
// Algorithm: online softmax (FlashAttention 2): four warps of 16 queries each; keys and values in tiles through a ring
// of two cp.async stages; tiles that no query of the block sees are not read. Beyond 256 elements two warps share 16
// queries: both form the scores, each half of the output.
//
// Work: 4 * q_heads * head_dim * sum over tokens of the keys it sees, on the tensor cores; that over their rate is the
// floor. Bytes are far below it: each tile of keys is read once for 64 / group tokens.

#include "tile.cuh"

constexpr int kQueries = 64;

struct PrefillItem {
    uint32_t row;
    uint32_t kv_head;
    uint32_t first;  // query: token of the row * group + head of the group
};

struct PrefillArgs {
    const bf16* q;
    bf16* out;
    const float* sinks;  // [q_heads]; null: none
    const RowInfo* rows;
    const PrefillItem* items;
    KvLayer kv;
    float scale;
    float cap;        // 0: none
    uint32_t window;  // 0: none
    int q_stride;
    int q_heads;
    int values_are_keys;
    int causal;
    int beside;
};

// kKey, kValue: elements of a stored key and of a value. Where they differ, the value is the start of the key.
template <int kKey, int kValue, bool kE4m3>
struct Prefill {
    static constexpr bool kInKey = kKey != kValue;
    static constexpr int kParts = kInKey ? 1 : 2;      // of a stage: keys, values
    static constexpr int kSplit = kKey > 256 ? 2 : 1;  // warps that share 16 queries
    static constexpr int kThreads = 4 * kSplit * 32;
    static constexpr int kOwn = kValue / kSplit;
    static constexpr int kKeys = kKey <= 128 ? 64 : kKey <= 256 ? 32 : 16;
    static constexpr int kStride = kKey * 2 + 16;
    static constexpr int kTile = kKeys * kStride;
    static constexpr int kRawRow = kKey * (kE4m3 ? 1 : 2);
    static constexpr int kRawStride = kE4m3 ? kKey : kStride;
    static constexpr int kRawTile = kKeys * kRawStride;
    static constexpr bool kHoldQueries = kKey <= 128;  // their fragments stay in registers
    static constexpr int kSharedBytes = kQueries * kStride + 2 * kParts * kRawTile + (kE4m3 ? kParts * kTile : 0);

    struct State {
        float out[kOwn / 8][4];
        float peak[2], sum[2];
        int from[2], to[2];  // keys that rows g and g + 8 see
        uint32_t q[kHoldQueries ? kKey / 16 : 1][4];
    };

    PORT_FN static int group_warp() { return static_cast<int>(threadIdx.x >> 5) / kSplit; }
    PORT_FN static bool in_key(const PrefillArgs& a) { return kInKey || a.values_are_keys; }
    PORT_FN static int member() { return static_cast<int>(threadIdx.x >> 5) % kSplit; }

    // Asks for the keys and values [first, first + kKeys). Those outside [from, to) are not read and become zero:
    // their pages may be gone, and what lies behind the last token may be NaN.
    PORT_FN static void fetch_tile(const PrefillArgs& a, const RowInfo& row, uint32_t head, int first, int from, int to,
                                   unsigned char* stage) {
        const uint32_t* table = a.kv.tables + static_cast<size_t>(row.slot) * a.kv.table_len;
        constexpr int kPieces = kRawRow / 16;
        for (int part = 0; part < (in_key(a) ? 1 : 2); part++) {
            for (int i = static_cast<int>(threadIdx.x); i < kKeys * kPieces; i += kThreads) {
                const int key = first + i / kPieces, piece = i % kPieces * 16;
                const bool seen = key >= from && key < to;
                const unsigned char* at;
                if (!kE4m3 && !kInKey && a.beside) {
                    const size_t token = row.first + static_cast<size_t>(seen ? key : 0);
                    at = reinterpret_cast<const unsigned char*>(a.q + token * a.q_stride +
                                                                (a.q_heads + part * a.kv.kv_heads + head) * kKey);
                } else {
                    const uint32_t page = seen ? table[key / kPageTokens] : 0;
                    at = page_rows(a.kv, page, part, head, kRawRow) + key % kPageTokens * kRawRow;
                }
                copy_async(stage + part * kRawTile + i / kPieces * kRawStride + piece, at + piece, seen ? 16u : 0u);
            }
        }
    }

    PORT_FN static void widen_tile(const unsigned char* raw, unsigned char* wide) {
        constexpr int kPieces = kKey / 16;
        for (int i = static_cast<int>(threadIdx.x); i < kKeys * kPieces; i += kThreads) {
            const uint4 codes = load16(raw + i * 16);
            const uint2 x = widen_e4m3x4(codes.x), y = widen_e4m3x4(codes.y);
            const uint2 z = widen_e4m3x4(codes.z), w = widen_e4m3x4(codes.w);
            unsigned char* to = wide + i / kPieces * kStride + i % kPieces * 32;
            store16(to, uint4{x.x, x.y, y.x, y.y});
            store16(to + 16, uint4{z.x, z.y, w.x, w.y});
        }
    }

    PORT_FN static void load_queries(const unsigned char* q, int d, uint32_t (&a)[4]) {
        const int l = static_cast<int>(lane_id());
        load_matrix_x4(a, q + (group_warp() * 16 + l % 16) * kStride + (d + l / 16 * 8) * 2);
    }

    PORT_FN static void score(const State& state, const unsigned char* q, const unsigned char* keys,
                              float (&s)[kKeys / 8][4]) {
        const int l = static_cast<int>(lane_id());
#pragma unroll
        for (int d = 0; d < kKey; d += 16) {
            uint32_t a[4];
            if constexpr (kHoldQueries) {
                for (int i = 0; i < 4; i++) {
                    a[i] = state.q[d / 16][i];
                }
            } else {
                load_queries(q, d, a);
            }
#pragma unroll
            for (int n = 0; n < kKeys; n += 16) {
                uint32_t b[4];
                load_matrix_x4(b, keys + (n + l % 8 + l / 16 * 8) * kStride + (d + l / 8 % 2 * 8) * 2);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_bf16(s[n / 8], a, b0);
                mma_bf16(s[n / 8 + 1], a, b1);
            }
        }
    }

    // Masks the scores and turns them into weights under the new maximum; returns by how much old sums shrink.
    PORT_FN static void weigh(const PrefillArgs& a, State& state, float scale, int first, float (&s)[kKeys / 8][4],
                              float (&shrink)[2]) {
        const int t = static_cast<int>(lane_id() & 3);
        float peak[2] = {state.peak[0], state.peak[1]};
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = first + n * 8 + 2 * t + i % 2, r = i / 2;
                float x = s[n][i] * scale;
                if (a.cap > 0.0f) {
                    x = a.cap * fast_tanh(x / a.cap);
                }
                s[n][i] = key >= state.from[r] && key < state.to[r] ? x * kLog2E : -kInfinity;
                peak[r] = fmaxf(peak[r], s[n][i]);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(peak[r], shuffle_xor(peak[r], 1));
            peak[r] = fmaxf(peak[r], shuffle_xor(peak[r], 2));
            // No key so far: any finite number will do, all weights are zero.
            const float base = peak[r] == -kInfinity ? 0.0f : peak[r];
            shrink[r] = fast_exp2(state.peak[r] - base);
            state.sum[r] *= shrink[r];
            state.peak[r] = peak[r];
#pragma unroll
            for (int n = 0; n < kKeys / 8; n++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    s[n][r * 2 + c] = fast_exp2(s[n][r * 2 + c] - base);
                    state.sum[r] += s[n][r * 2 + c];
                }
            }
        }
    }

    PORT_FN static void absorb(const PrefillArgs& a, State& state, const unsigned char* q, const unsigned char* keys,
                               const unsigned char* values, float scale, int first) {
        const int l = static_cast<int>(lane_id());
        float s[kKeys / 8][4] = {}, shrink[2];
        score(state, q, keys, s);
        weigh(a, state, scale, first, s, shrink);
#pragma unroll
        for (int n = 0; n < kOwn / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[n][i] *= shrink[i / 2];
            }
        }
#pragma unroll
        for (int k = 0; k < kKeys; k += 16) {
            const uint32_t w[4] = {pack_bf16(s[k / 8][0], s[k / 8][1]), pack_bf16(s[k / 8][2], s[k / 8][3]),
                                   pack_bf16(s[k / 8 + 1][0], s[k / 8 + 1][1]),
                                   pack_bf16(s[k / 8 + 1][2], s[k / 8 + 1][3])};
#pragma unroll
            for (int d = 0; d < kOwn; d += 16) {
                uint32_t b[4];
                load_matrix_x4_transposed(b, values + (k + l % 16) * kStride + (member() * kOwn + d + l / 16 * 8) * 2);
                const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
                mma_bf16(state.out[d / 8], w, b0);
                mma_bf16(state.out[d / 8 + 1], w, b1);
            }
        }
    }

    PORT_FN static void write_out(const PrefillArgs& a, State& state, const RowInfo& row, const PrefillItem& item,
                                  int group, int queries) {
        const int l = static_cast<int>(lane_id()), g = l >> 2, t = l & 3;
        float value_scale = 1.0f;
        if (kE4m3 && a.kv.scales) {
            value_scale = a.kv.scales[in_key(a) ? item.kv_head : a.kv.kv_heads + item.kv_head];
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = state.sum[r];
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            const int query = static_cast<int>(item.first) + group_warp() * 16 + g + r * 8;
            if (query >= queries) {
                continue;
            }
            const int head = static_cast<int>(item.kv_head) * group + query % group;
            if (a.sinks) {
                sum += fast_exp2(a.sinks[head] * kLog2E - (state.peak[r] == -kInfinity ? 0.0f : state.peak[r]));
            }
            const float factor = sum > 0.0f ? value_scale / sum : 0.0f;
            const size_t token = row.first + static_cast<uint32_t>(query / group);
            bf16* to = a.out + (token * a.q_heads + head) * kValue + member() * kOwn;
#pragma unroll
            for (int n = 0; n < kOwn / 8; n++) {
                *reinterpret_cast<uint32_t*>(to + n * 8 + 2 * t) =
                    pack_bf16(state.out[n][r * 2] * factor, state.out[n][r * 2 + 1] * factor);
            }
        }
    }

    PORT_FN static void run(const PrefillArgs& a) {
        PORT_DYNAMIC_SHARED(shared);
        let_dependents_start();
        dependency_wait();
        const PrefillItem item = a.items[blockIdx.x];
        const RowInfo row = a.rows[item.row];
        const int group = a.q_heads / static_cast<int>(a.kv.kv_heads);
        const int queries = static_cast<int>(row.tokens) * group, first = static_cast<int>(item.first);
        const int context = static_cast<int>(row.context), start = context - static_cast<int>(row.tokens);
        const int window = static_cast<int>(a.window);

        unsigned char* q = shared;
        unsigned char* ring = shared + kQueries * kStride;
        unsigned char* wide = ring + 2 * kParts * kRawTile;
        for (int i = static_cast<int>(threadIdx.x); i < kQueries * (kKey / 8); i += kThreads) {
            const int query = first + i / (kKey / 8), d = i % (kKey / 8) * 8;
            uint4 v{0, 0, 0, 0};
            if (query < queries) {
                const size_t token = row.first + static_cast<uint32_t>(query / group);
                v = load16(a.q + token * a.q_stride + (item.kv_head * group + query % group) * kKey + d);
            }
            store16(q + i / (kKey / 8) * kStride + d * 2, v);
        }

        // Keys that any query of the block sees.
        const int last_position = start + (smaller(first + kQueries, queries) - 1) / group;
        const int first_position = start + first / group;
        const int to = a.causal ? last_position + 1 : context;
        const int from = window && first_position + 1 > window ? first_position + 1 - window : 0;
        const int first_tile = from / kKeys, end_tile = ceil_div(to, kKeys);
        fetch_tile(a, row, item.kv_head, first_tile * kKeys, from, to, ring);
        copy_commit();
        block_sync();  // queries are in shared memory

        State state;
#pragma unroll
        for (int n = 0; n < kOwn / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[n][i] = 0.0f;
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            state.peak[r] = -kInfinity;
            state.sum[r] = 0.0f;
            const int query = first + group_warp() * 16 + static_cast<int>(lane_id() >> 2) + r * 8;
            const int position = start + query / group;
            state.from[r] = window && position + 1 > window ? position + 1 - window : 0;
            state.to[r] = query >= queries ? 0 : a.causal ? position + 1 : context;
        }
        if constexpr (kHoldQueries) {
#pragma unroll
            for (int d = 0; d < kKey; d += 16) {
                load_queries(q, d, state.q[d / 16]);
            }
        }
        const float scale = a.scale * (kE4m3 && a.kv.scales ? a.kv.scales[item.kv_head] : 1.0f);

        for (int tile = first_tile; tile < end_tile; tile++) {
            unsigned char* stage = ring + (tile - first_tile) % 2 * kParts * kRawTile;
            copy_wait<0>();
            block_sync();  // this tile is here, and the one before is done with
            if (tile + 1 < end_tile) {
                fetch_tile(a, row, item.kv_head, (tile + 1) * kKeys, from, to,
                           ring + (tile + 1 - first_tile) % 2 * kParts * kRawTile);
            }
            copy_commit();
            const unsigned char* keys = stage;
            const unsigned char* values = in_key(a) ? stage : stage + kRawTile;
            if constexpr (kE4m3) {
                widen_tile(keys, wide);
                if (!in_key(a)) {
                    widen_tile(values, wide + kTile);
                }
                block_sync();
                keys = wide;
                values = in_key(a) ? wide : wide + kTile;
            }
            absorb(a, state, q, keys, values, scale, tile * kKeys);
        }
        write_out(a, state, row, item, group, queries);
    }
};

// Dynamic shared memory: Prefill<...>::kSharedBytes.
#define PREFILL(name, key, value, e4m3)                                                                        \
    extern "C" __global__ void __launch_bounds__(Prefill<key, value, e4m3>::kThreads) name(PrefillArgs args) { \
        Prefill<key, value, e4m3>::run(args);                                                                  \
    }

PREFILL(attention_prefill_bf16_64, 64, 64, false)
PREFILL(attention_prefill_bf16_96, 96, 96, false)
PREFILL(attention_prefill_bf16_128, 128, 128, false)
PREFILL(attention_prefill_bf16_256, 256, 256, false)
PREFILL(attention_prefill_bf16_512, 512, 512, false)
PREFILL(attention_prefill_bf16_576_512, 576, 512, false)
PREFILL(attention_prefill_bf16_640_512, 640, 512, false)
PREFILL(attention_prefill_e4m3_64, 64, 64, true)
PREFILL(attention_prefill_e4m3_96, 96, 96, true)
PREFILL(attention_prefill_e4m3_128, 128, 128, true)
PREFILL(attention_prefill_e4m3_256, 256, 256, true)
PREFILL(attention_prefill_e4m3_512, 512, 512, true)
PREFILL(attention_prefill_e4m3_576_512, 576, 512, true)
PREFILL(attention_prefill_e4m3_640_512, 640, 512, true)
