// Mixture of experts: which experts a token goes to, the order in which experts read their tokens, and the sum at the
// end.
//
//   moe_route:    for each token the top_k experts and their weights; then all (token, slot) pairs sorted by expert
//   moe_combine:  out[token] = sum over slots of weight * y[place of the pair], in the order of slots
//
// Routing: score = softmax over all experts, or sigmoid, of logits [tokens, experts] (single precision, rows `stride`
// apart). Chosen by score + correction (if given), highest first, the lower expert among equals; with groups only among
// the experts of the `groups_kept` groups whose two highest add up to most (DeepSeek-V3). Weight = score (without
// correction), divided by the chosen ones' sum if `normalize`, times expert_scale[expert] if given, times `scale`.
// `shared` further experts (experts, experts + 1, ..., with weight 1) follow for every token. A row of logits with NaN
// routes somewhere, with NaN as weights, so that only its own token is spoilt.
//
// The last block to arrive sorts: pair = token * slots + slot, slots = top_k + shared.
//   chosen [pairs]: expert; weights [pairs]; places [pairs]: place of a pair; pairs [places]: pair of a place
//   offsets [experts + shared + 1]: first place of each expert
//   active [1 + experts + shared]: number of experts with tokens, and which
//   tiles [1 + 2 (pairs / 64 + experts + shared)]: number of tiles of up to 64 places of one expert, then (expert,
//   skip)
//
// Limits: experts + shared <= 512, groups <= 32. Grid of moe_route: ceil(tokens / 16), 512 threads: a warp a token.
// `counter` is zero before and after. Everything is in a fixed order: the same input gives the same bytes.
// Bytes: 4 tokens experts, and 16 a pair; latency at decode. The sort reads the pairs 512 / experts times in parallel.

#include "tile.cuh"

constexpr int kRouteWarps = 16;
constexpr int kRouteThreads = kRouteWarps * 32;
constexpr int kMaxExperts = 512;
constexpr int kTileRows = 64;

struct RouteArgs {
    const float* logits;
    const float* correction;    // [experts]; null: none
    const float* expert_scale;  // [experts]; null: none
    uint32_t* chosen;
    float* weights;
    uint32_t* places;
    uint32_t* pairs;
    uint32_t* offsets;
    uint32_t* active;
    uint32_t* tiles;
    unsigned* counter;
    int tokens;
    int experts;
    int stride;  // singles from a row of logits to the next
    int shared;
    int top_k;
    int groups;  // 0 or 1: no groups
    int groups_kept;
    int sigmoid;
    int normalize;
    float scale;
};

PORT_FN uint64_t warp_largest(uint64_t key) {
#pragma unroll
    for (unsigned d = 16; d > 0; d >>= 1) {
        key = larger(key, static_cast<uint64_t>(shuffle_xor(static_cast<unsigned long long>(key), d)));
    }
    return key;
}

// Bit mask of the groups that may be chosen from.
PORT_FN uint32_t allowed_groups(const RouteArgs& a, const float* scores) {
    if (a.groups < 2) {
        return ~0u;
    }
    const int group = static_cast<int>(lane_id()), size = a.experts / a.groups;
    uint64_t key = 0;
    if (group < a.groups) {
        float first = -kInfinity, second = -kInfinity;
        for (int e = group * size; e < (group + 1) * size; e++) {
            const float s = scores[e] + (a.correction ? a.correction[e] : 0.0f);
            if (s > first) {
                second = first;
                first = s;
            } else if (s > second) {
                second = s;
            }
        }
        key = choice_key(size > 1 ? first + second : first, group);
    }
    uint32_t allowed = 0;
    for (int i = 0; i < a.groups_kept; i++) {
        const uint64_t best = warp_largest(key);
        allowed |= 1u << choice_index(best);
        if (key == best) {
            key = 0;
        }
    }
    return allowed;
}

PORT_FN void route_token(const RouteArgs& a, int token, float* scores) {
    const int l = static_cast<int>(lane_id()), slots = a.top_k + a.shared;
    const float* logits = a.logits + static_cast<size_t>(token) * a.stride;
    float peak = -kInfinity;
    for (int e = l; e < a.experts; e += 32) {
        peak = fmaxf(peak, logits[e]);
    }
    peak = warp_max(peak);
    float sum = 0.0f;
    for (int e = l; e < a.experts; e += 32) {
        const float s = a.sigmoid ? 1.0f / (1.0f + expf(-logits[e])) : expf(logits[e] - peak);
        scores[e] = s;
        sum += s;
    }
    const float inverse = a.sigmoid ? 1.0f : 1.0f / warp_sum(sum);
    for (int e = l; e < a.experts; e += 32) {
        scores[e] *= inverse;
    }
    warp_sync();

    const uint32_t allowed = allowed_groups(a, scores);
    const int group_size = a.groups > 1 ? a.experts / a.groups : a.experts;
    uint32_t taken = 0;  // bit i: expert l + 32 i
    float total = 0.0f;
    for (int slot = 0; slot < a.top_k; slot++) {
        uint64_t key = 0;
        for (int i = 0; l + 32 * i < a.experts; i++) {
            const int e = l + 32 * i;
            if ((taken >> i & 1) || !(allowed >> (e / group_size) & 1)) {
                continue;
            }
            key = larger(key, choice_key(scores[e] + (a.correction ? a.correction[e] : 0.0f), e));
        }
        const int best = choice_index(warp_largest(key));
        if (best % 32 == l) {
            taken |= 1u << (best / 32);
        }
        total += scores[best];
        if (l == 0) {
            a.chosen[token * slots + slot] = static_cast<uint32_t>(best);
        }
    }
    // Each lane finishes the slots it will write; the list is short.
    const float factor = a.scale * (a.normalize ? 1.0f / total : 1.0f);
    warp_sync();
    for (int slot = l; slot < slots; slot += 32) {
        const int pair = token * slots + slot;
        if (slot >= a.top_k) {
            a.chosen[pair] = static_cast<uint32_t>(a.experts + slot - a.top_k);
            a.weights[pair] = 1.0f;
            continue;
        }
        const uint32_t e = a.chosen[pair];
        a.weights[pair] = scores[e] * factor * (a.expert_scale ? a.expert_scale[e] : 1.0f);
    }
}

// Exclusive sums of one value a thread over the block, in the order of threads.
PORT_FN uint32_t block_exclusive_sum(uint32_t value, uint32_t* scratch) {
    const unsigned l = lane_id(), warp = threadIdx.x >> 5;
    uint32_t sum = value;
#pragma unroll
    for (unsigned d = 1; d < 32; d <<= 1) {
        const uint32_t below = shuffle_up(sum, d);
        if (l >= d) {
            sum += below;
        }
    }
    block_sync();
    if (l == 31) {
        scratch[warp] = sum;
    }
    block_sync();
    uint32_t before = 0;
    for (unsigned w = 0; w < warp; w++) {
        before += scratch[w];
    }
    return before + sum - value;
}

// Counting sort of the pairs by expert. Thread s * experts + e counts, then places, expert e in segment s.
PORT_FN void sort_pairs(const RouteArgs& a, uint32_t* scratch, uint32_t* first_places) {
    const int experts = a.experts + a.shared, count = a.tokens * (a.top_k + a.shared);
    const int segments = kRouteThreads / experts, thread = static_cast<int>(threadIdx.x);
    const int e = thread % experts, segment = thread / experts, length = ceil_div(count, segments);
    const int begin = smaller(segment * length, count),
              end = segment < segments ? smaller(begin + length, count) : begin;
    uint32_t mine = 0;
    for (int p = begin; p < end; p++) {
        mine += a.chosen[p] == static_cast<uint32_t>(e);
    }
    // In the order of experts, then of segments.
    const int rank = segment < segments ? e * segments + segment : thread;
    first_places[rank] = mine;
    block_sync();
    const uint32_t counted = first_places[thread];
    const uint32_t before = block_exclusive_sum(counted, scratch);
    block_sync();
    first_places[thread] = before;
    block_sync();
    uint32_t place = first_places[rank];
    for (int p = begin; p < end; p++) {
        if (a.chosen[p] != static_cast<uint32_t>(e)) {
            continue;
        }
        a.pairs[place] = static_cast<uint32_t>(p);
        a.places[p] = place++;
    }
    // One thread an expert for the lists.
    const bool leads = thread < experts;
    const uint32_t first = leads ? first_places[thread * segments] : 0;
    const uint32_t next = !leads                 ? 0
                          : thread + 1 < experts ? first_places[(thread + 1) * segments]
                                                 : static_cast<uint32_t>(count);
    const uint32_t size = next - first, tile_count = (size + kTileRows - 1) / kTileRows;
    if (leads) {
        a.offsets[thread] = first;
    }
    if (thread == experts - 1) {
        a.offsets[experts] = static_cast<uint32_t>(count);
    }
    const uint32_t active_before = block_exclusive_sum(size > 0, scratch);
    if (size > 0) {
        a.active[1 + active_before] = static_cast<uint32_t>(thread);
    }
    if (thread == kRouteThreads - 1) {
        a.active[0] = active_before + (size > 0);
    }
    const uint32_t tiles_before = block_exclusive_sum(tile_count, scratch);
    for (uint32_t t = 0; t < tile_count; t++) {
        a.tiles[1 + 2 * (tiles_before + t)] = static_cast<uint32_t>(thread);
        a.tiles[2 + 2 * (tiles_before + t)] = t * kTileRows;
    }
    if (thread == kRouteThreads - 1) {
        a.tiles[0] = tiles_before + tile_count;
    }
}

extern "C" __global__ void __launch_bounds__(kRouteThreads) moe_route(RouteArgs a) {
    PORT_SHARED(float, scores, kRouteWarps* kMaxExperts);
    PORT_SHARED(uint32_t, scratch, kRouteWarps);
    PORT_SHARED(uint32_t, first_places, kRouteThreads);
    PORT_SHARED(unsigned, last, 1);
    let_dependents_start();
    dependency_wait();
    const int warp = static_cast<int>(threadIdx.x >> 5), token = static_cast<int>(blockIdx.x) * kRouteWarps + warp;
    if (token < a.tokens) {
        route_token(a, token, scores + warp * kMaxExperts);
    }
    block_sync();
    if (threadIdx.x == 0) {
        *last = count_arrival(a.counter) + 1 == gridDim.x;
    }
    block_sync();
    if (!*last) {
        return;
    }
    sort_pairs(a, scratch, first_places);
    if (threadIdx.x == 0) {
        *a.counter = 0;
    }
}

// Grid: tokens. width a multiple of 8.
extern "C" __global__ void __launch_bounds__(256)
    moe_combine_bf16(const bf16* y, const float* weights, const uint32_t* places, bf16* out, int slots, int width) {
    let_dependents_start();
    dependency_wait();
    const size_t token = blockIdx.x;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        Eight sum{};
        for (int s = 0; s < slots; s++) {
            const size_t pair = token * slots + s;
            const float w = weights[pair];
            const Eight v = widen8(load16(y + static_cast<size_t>(places[pair]) * width + i));
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sum.x[j] += w * v.x[j];
            }
        }
        store16(out + token * width + i, narrow8(sum));
    }
}
