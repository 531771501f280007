// Attention of rows with one query token each, over paged keys and values: causal, window, sinks, soft-cap, grouped
// heads.
//
//   out[token][h] = softmax(cap(scale q_h K^T) , sink_h) V      over keys [max(0, context - window), context)
//
// q: rows of `q_stride` elements whose first q_heads * key_dim columns are the queries. out [tokens, q_heads *
// value_dim]. All bf16; cache bf16 or e4m3 with a scale for each head. Query heads of a kv head are consecutive. A sink
// is one more score of a head without a value. V may be the keys themselves
// (`values_are_keys`), or the first 512 elements of keys of 576 (latent attention) or 640 (one projection for both,
// with 128 elements rotated).
//
// Work list (host code writes it into the step's upload): block b does items [starts[b], starts[b + 1]); an item is a
// run of cache blocks of one row and one tile of up to 16 query heads of a kv head. A row too long for one block of
// threads is several items, which may be anywhere; each leaves (max, sum, unnormalised output) in `partial`, and the
// last of its group to finish merges them in their order: the same bits whoever is last. So the grid is fixed, and one
// long row spreads over all multiprocessors. `counters` [groups] is zero before and after.
//
// Algorithm: queries of a group are the 16 rows of m16n8k16. Every warp takes whole pages of 16 keys in turn, through a
// ring of its own of cp.async stages, with an online softmax of its own; so only warps meet, at the end, in shared
// memory. Beyond 256 elements two warps share a page: both form the scores, each half of the output. e4m3 pages are
// widened to bf16 by the warp that loaded them; scales of keys fold into the scores, those of values into the output.
//
// Bytes: every key and value once: sum of context * 2 * kv_heads * head_dim * (2 or 1); floor: that over the bandwidth.

#include "tile.cuh"

constexpr int kHeadTile = 16;

struct DecodeItem {
    uint32_t row;          // of `rows`
    uint32_t head_tile;    // kv head * tiles of a group + tile
    uint32_t first, end;   // pages, counted from the start of the sequence; first < end
    int32_t partial;       // place of its part; negative: it is the whole row
    uint32_t group;        // counter
    uint32_t group_first;  // place of the group's first part; parts are consecutive, in order of pages
    uint32_t group_parts;
};

struct DecodeArgs {
    const bf16* q;
    bf16* out;
    const float* sinks;  // [q_heads]; null: none
    const RowInfo* rows;
    const uint32_t* starts;  // [grid + 1]
    const DecodeItem* items;
    float* partial;  // [parts][16][value_dim + 2]
    unsigned* counters;
    KvLayer kv;
    float scale;
    float cap;        // 0: none
    uint32_t window;  // 0: none
    int q_stride;
    int q_heads;
    int values_are_keys;
};

// kKey, kValue: elements of a stored key and of a value. Where they differ, the value is the start of the key.
template <int kKey, int kValue, bool kE4m3>
struct Decode {
    static constexpr bool kInKey = kKey != kValue;
    static constexpr int kTeam = kKey > 256 ? 2 : 1;  // warps that share a page
    static constexpr int kTeams = kKey > 256 ? 2 : 4;
    static constexpr int kThreads = kTeam * kTeams * 32;
    static constexpr int kStages = kKey >= 128 ? 2 : 3;
    static constexpr int kParts = kInKey ? 1 : 2;  // of a stage: keys, values
    static constexpr int kOwn = kValue / kTeam;    // elements of the output that a warp forms
    static constexpr int kStride = kKey * 2 + 16;  // bytes of a row in shared memory; the pad spreads the banks
    static constexpr int kTile = kPageTokens * kStride;
    static constexpr int kRawRow = kKey * (kE4m3 ? 1 : 2);
    static constexpr int kRawStride = kE4m3 ? kKey : kStride;
    static constexpr int kRawTile = kPageTokens * kRawStride;
    // Of a team: ring of raw keys and values, and for e4m3 one page of each as bf16.
    static constexpr int kTeamBytes = kStages * kParts * kRawTile + (kE4m3 ? kParts * kTile : 0);
    static constexpr int kMergeRow = kValue + 2;  // output, maximum, sum
    static constexpr int kMergeBytes = kTeams * kHeadTile * kMergeRow * 4;
    static constexpr int kSharedBytes = kTile + (kTeams * kTeamBytes > kMergeBytes ? kTeams * kTeamBytes : kMergeBytes);

    struct State {
        float out[kOwn / 8][4];
        float peak[2], sum[2];  // of rows g and g + 8
    };

    PORT_FN static int team() { return static_cast<int>(threadIdx.x >> 5) / kTeam; }
    PORT_FN static int member() { return static_cast<int>(threadIdx.x >> 5) % kTeam; }

    PORT_FN static bool in_key(const DecodeArgs& a) { return kInKey || a.values_are_keys; }

    PORT_FN static void team_sync() {
        if constexpr (kTeam == 1) {
            warp_sync();
        } else {
            named_sync(1 + static_cast<unsigned>(team()), kTeam * 32);
        }
    }

    // Asks for one page of one head. Rows that hold no token of the sequence become zero: what lies there may be NaN,
    // and a weight of zero times NaN is NaN.
    PORT_FN static void fetch_page(const DecodeArgs& a, const uint32_t* table, uint32_t page, uint32_t head,
                                   int context, unsigned char* stage) {
        const int thread = static_cast<int>(threadIdx.x) % (kTeam * 32);
        constexpr int kPieces = kRawRow / 16;
        const uint32_t at = table[page];
        const int live = context - static_cast<int>(page) * kPageTokens;
        for (int part = 0; part < (in_key(a) ? 1 : 2); part++) {
            const unsigned char* from = page_rows(a.kv, at, part, head, kRawRow);
            for (int i = thread; i < kPageTokens * kPieces; i += kTeam * 32) {
                copy_async(stage + part * kRawTile + i / kPieces * kRawStride + i % kPieces * 16, from + i * 16,
                           i / kPieces < live ? 16u : 0u);
            }
        }
    }

    PORT_FN static void widen_page(const unsigned char* raw, unsigned char* wide) {
        const int thread = static_cast<int>(threadIdx.x) % (kTeam * 32);
        constexpr int kPieces = kKey / 16;
        for (int i = thread; i < kPageTokens * kPieces; i += kTeam * 32) {
            const uint4 codes = load16(raw + i * 16);
            const uint2 x = widen_e4m3x4(codes.x), y = widen_e4m3x4(codes.y);
            const uint2 z = widen_e4m3x4(codes.z), w = widen_e4m3x4(codes.w);
            unsigned char* to = wide + i / kPieces * kStride + i % kPieces * 32;
            store16(to, uint4{x.x, x.y, y.x, y.y});
            store16(to + 16, uint4{z.x, z.y, w.x, w.y});
        }
    }

    // Scores of 16 queries with 16 keys: two tiles of 8 keys.
    PORT_FN static void score(const unsigned char* q, const unsigned char* keys, float (&s)[2][4]) {
        const int l = static_cast<int>(lane_id());
#pragma unroll
        for (int d = 0; d < kKey; d += 16) {
            uint32_t a[4], b[4];
            load_matrix_x4(a, q + l % 16 * kStride + (d + l / 16 * 8) * 2);
            // Matrices: keys 0 to 7 of k 0 and k 8, then keys 8 to 15.
            load_matrix_x4(b, keys + (l % 8 + l / 16 * 8) * kStride + (d + l / 8 % 2 * 8) * 2);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
            mma_bf16(s[0], a, b0);
            mma_bf16(s[1], a, b1);
        }
    }

    // One page into the running softmax. `from`, `to`: positions that are seen.
    PORT_FN static void absorb(const DecodeArgs& a, State& state, const unsigned char* q, const unsigned char* keys,
                               const unsigned char* values, float scale, int first_key, int from, int to) {
        const int l = static_cast<int>(lane_id()), t = l & 3;
        float s[2][4] = {};
        score(q, keys, s);
        float peak[2] = {state.peak[0], state.peak[1]};
#pragma unroll
        for (int n = 0; n < 2; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = first_key + n * 8 + 2 * t + i % 2;
                float x = s[n][i] * scale;
                if (a.cap > 0.0f) {
                    x = a.cap * fast_tanh(x / a.cap);
                }
                s[n][i] = key >= from && key < to ? x * kLog2E : -kInfinity;
                peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
            }
        }
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            peak[r] = fmaxf(peak[r], shuffle_xor(peak[r], 1));
            peak[r] = fmaxf(peak[r], shuffle_xor(peak[r], 2));
            // No key so far: any finite number will do, all weights are zero.
            const float base = peak[r] == -kInfinity ? 0.0f : peak[r];
            shrink[r] = fast_exp2(state.peak[r] - base);
            state.sum[r] *= shrink[r];
#pragma unroll
            for (int n = 0; n < 2; n++) {
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    s[n][r * 2 + c] = fast_exp2(s[n][r * 2 + c] - base);
                    state.sum[r] += s[n][r * 2 + c];
                }
            }
            state.peak[r] = peak[r];
        }
        // The scores' accumulators are the weights' fragment as they stand.
        const uint32_t w[4] = {pack_bf16(s[0][0], s[0][1]), pack_bf16(s[0][2], s[0][3]), pack_bf16(s[1][0], s[1][1]),
                               pack_bf16(s[1][2], s[1][3])};
#pragma unroll
        for (int d = 0; d < kOwn; d += 16) {
            uint32_t b[4];
            // Matrices: keys 0 to 7 and 8 to 15 of elements d, then of d + 8; transposed, k runs over keys.
            load_matrix_x4_transposed(b, values + l % 16 * kStride + (member() * kOwn + d + l / 16 * 8) * 2);
            const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                float(&o)[4] = state.out[d / 8 + n];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    o[i] *= shrink[i / 2];
                }
                mma_bf16(o, w, n ? b1 : b0);
            }
        }
    }

    // All pages of an item that fall to this team.
    PORT_FN static void walk(const DecodeArgs& a, const DecodeItem& item, const RowInfo& row, uint32_t head,
                             const unsigned char* q, unsigned char* memory, State& state) {
        const uint32_t* table = a.kv.tables + static_cast<size_t>(row.slot) * a.kv.table_len;
        const int from = a.window && row.context > a.window ? static_cast<int>(row.context - a.window) : 0;
        const int to = static_cast<int>(row.context);
        const float key_scale = kE4m3 && a.kv.scales ? a.kv.scales[head] : 1.0f;
        unsigned char* wide = memory + kStages * kParts * kRawTile;
        const uint32_t first = item.first + static_cast<uint32_t>(team());
        for (int s = 0; s < kStages - 1; s++) {
            const uint32_t page = first + static_cast<uint32_t>(s * kTeams);
            if (page < item.end) {
                fetch_page(a, table, page, head, to, memory + s * kParts * kRawTile);
            }
            copy_commit();
        }
        int stage = 0;
        for (uint32_t page = first; page < item.end; page += kTeams, stage = (stage + 1) % kStages) {
            copy_wait<kStages - 2>();
            team_sync();  // this page is here, and the one before is done with
            const uint32_t next = page + (kStages - 1) * kTeams;
            if (next < item.end) {
                fetch_page(a, table, next, head, to, memory + (stage + kStages - 1) % kStages * kParts * kRawTile);
            }
            copy_commit();
            unsigned char* keys = memory + stage * kParts * kRawTile;
            unsigned char* values = in_key(a) ? keys : keys + kRawTile;
            if constexpr (kE4m3) {
                widen_page(keys, wide);
                if (!in_key(a)) {
                    widen_page(values, wide + kTile);
                }
                team_sync();
                keys = wide;
                values = in_key(a) ? wide : wide + kTile;
            }
            const int first_key = static_cast<int>(page) * kPageTokens;
            absorb(a, state, q, keys, values, a.scale * key_scale, first_key, from, to);
        }
        copy_wait<0>();
    }

    // Leaves each team's state in shared memory: rows of output, then maximum and sum.
    PORT_FN static void leave(State& state, float* merge) {
        const int l = static_cast<int>(lane_id()), g = l >> 2, t = l & 3;
        float* mine = merge + team() * kHeadTile * kMergeRow;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            state.sum[r] += shuffle_xor(state.sum[r], 1);
            state.sum[r] += shuffle_xor(state.sum[r], 2);
            float* row = mine + (g + r * 8) * kMergeRow;
#pragma unroll
            for (int n = 0; n < kOwn / 8; n++) {
                row[member() * kOwn + n * 8 + 2 * t] = state.out[n][r * 2];
                row[member() * kOwn + n * 8 + 2 * t + 1] = state.out[n][r * 2 + 1];
            }
            if (t == 0 && member() == 0) {
                row[kValue] = state.peak[r];
                row[kValue + 1] = state.sum[r];
            }
        }
    }

    // Adds up `parts` states that lie `stride` apart, element d of head row h; sum and maximum go where asked.
    PORT_FN static float merged(const float* parts, int count, size_t stride, int h, int d, float* peak, float* sum) {
        float top = -kInfinity;
        for (int p = 0; p < count; p++) {
            top = fmaxf(top, parts[p * stride + h * kMergeRow + kValue]);
        }
        const float base = top == -kInfinity ? 0.0f : top;
        float value = 0.0f, total = 0.0f;
        for (int p = 0; p < count; p++) {
            const float* row = parts + p * stride + h * kMergeRow;
            const float w = fast_exp2(row[kValue] - base);
            value += w * row[d];
            total += w * row[kValue + 1];
        }
        *peak = top;
        *sum = total;
        return value;
    }

    PORT_FN static void write_out(const DecodeArgs& a, const RowInfo& row, uint32_t kv_head, int first_head, int heads,
                                  const float* parts, int count, size_t stride) {
        float value_scale = 1.0f;
        if (kE4m3 && a.kv.scales) {
            value_scale = a.kv.scales[in_key(a) ? kv_head : a.kv.kv_heads + kv_head];
        }
        for (int i = static_cast<int>(threadIdx.x); i < heads * kValue / 2; i += kThreads) {
            const int h = i / (kValue / 2), d = i % (kValue / 2) * 2;
            float peak, sum, v[2];
            v[0] = merged(parts, count, stride, h, d, &peak, &sum);
            v[1] = merged(parts, count, stride, h, d + 1, &peak, &sum);
            if (a.sinks) {
                sum += fast_exp2(a.sinks[first_head + h] * kLog2E - (peak == -kInfinity ? 0.0f : peak));
            }
            const float factor = sum > 0.0f ? value_scale / sum : 0.0f;
            const size_t at = (static_cast<size_t>(row.first) * a.q_heads + first_head + h) * kValue + d;
            *reinterpret_cast<uint32_t*>(a.out + at) = pack_bf16(v[0] * factor, v[1] * factor);
        }
    }

    PORT_FN static void run_item(const DecodeArgs& a, const DecodeItem& item, unsigned char* shared, unsigned* last) {
        const RowInfo row = a.rows[item.row];
        const int group = a.q_heads / static_cast<int>(a.kv.kv_heads), tiles = ceil_div(group, kHeadTile);
        const uint32_t kv_head = item.head_tile / static_cast<uint32_t>(tiles);
        const int tile = static_cast<int>(item.head_tile) % tiles;
        const int first_head = static_cast<int>(kv_head) * group + tile * kHeadTile;
        const int heads = smaller(kHeadTile, group - tile * kHeadTile);

        unsigned char* q = shared;
        unsigned char* rest = shared + kTile;
        const bf16* from = a.q + static_cast<size_t>(row.first) * a.q_stride + static_cast<size_t>(first_head) * kKey;
        for (int i = static_cast<int>(threadIdx.x); i < kHeadTile * (kKey / 8); i += kThreads) {
            const int h = i / (kKey / 8), d = i % (kKey / 8) * 8;
            store16(q + h * kStride + d * 2, h < heads ? load16(from + h * kKey + d) : uint4{0, 0, 0, 0});
        }
        // The item before is done with the rest: all threads have read it when they come here.
        block_sync();

        State state;
#pragma unroll
        for (int n = 0; n < kOwn / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                state.out[n][i] = 0.0f;
            }
        }
        state.peak[0] = state.peak[1] = -kInfinity;
        state.sum[0] = state.sum[1] = 0.0f;
        walk(a, item, row, kv_head, q, rest + team() * kTeamBytes, state);
        block_sync();  // rings become the place where teams meet
        float* merge = reinterpret_cast<float*>(rest);
        leave(state, merge);
        block_sync();

        constexpr size_t kPart = kHeadTile * kMergeRow;
        if (item.partial < 0) {
            write_out(a, row, kv_head, first_head, heads, merge, kTeams, kPart);
        } else {
            float* mine = a.partial + static_cast<size_t>(item.partial) * kPart;
            for (int i = static_cast<int>(threadIdx.x); i < heads * kValue; i += kThreads) {
                const int h = i / kValue, d = i % kValue;
                float peak, sum;
                mine[h * kMergeRow + d] = merged(merge, kTeams, kPart, h, d, &peak, &sum);
                if (d == 0) {
                    mine[h * kMergeRow + kValue] = peak;
                    mine[h * kMergeRow + kValue + 1] = sum;
                }
            }
            block_sync();
            if (threadIdx.x == 0) {
                *last = count_arrival(a.counters + item.group) + 1 == item.group_parts;
            }
            block_sync();
            if (*last) {
                const float* parts = a.partial + static_cast<size_t>(item.group_first) * kPart;
                write_out(a, row, kv_head, first_head, heads, parts, static_cast<int>(item.group_parts), kPart);
                if (threadIdx.x == 0) {
                    a.counters[item.group] = 0;
                }
            }
        }
    }

    PORT_FN static void run(const DecodeArgs& a) {
        PORT_DYNAMIC_SHARED(shared);
        PORT_SHARED(unsigned, last, 1);
        let_dependents_start();
        dependency_wait();
        const uint32_t end = a.starts[blockIdx.x + 1];
        for (uint32_t i = a.starts[blockIdx.x]; i < end; i++) {
            run_item(a, a.items[i], shared, last);
        }
    }
};

// Dynamic shared memory: Decode<...>::kSharedBytes.
#define DECODE(name, key, value, e4m3)                                                                       \
    extern "C" __global__ void __launch_bounds__(Decode<key, value, e4m3>::kThreads) name(DecodeArgs args) { \
        Decode<key, value, e4m3>::run(args);                                                                 \
    }

DECODE(attention_decode_bf16_64, 64, 64, false)
DECODE(attention_decode_bf16_96, 96, 96, false)
DECODE(attention_decode_bf16_128, 128, 128, false)
DECODE(attention_decode_bf16_256, 256, 256, false)
DECODE(attention_decode_bf16_512, 512, 512, false)
DECODE(attention_decode_bf16_576_512, 576, 512, false)
DECODE(attention_decode_bf16_640_512, 640, 512, false)
DECODE(attention_decode_e4m3_64, 64, 64, true)
DECODE(attention_decode_e4m3_96, 96, 96, true)
DECODE(attention_decode_e4m3_128, 128, 128, true)
DECODE(attention_decode_e4m3_256, 256, 256, true)
DECODE(attention_decode_e4m3_512, 512, 512, true)
DECODE(attention_decode_e4m3_576_512, 576, 512, true)
DECODE(attention_decode_e4m3_640_512, 640, 512, true)
