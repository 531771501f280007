// What the sampling kernels share: a row's parameters, results, and the exponential.
//
// Semantics and order of steps are those of the CPU sampler (crates/cpu/src/sampling), to the token. logits [rows,
// stride] single precision, stride >= vocab; raw [raw rows, vocab]: copies of rows that need their logits both edited
// and not. counts [rows of counts, vocab]: bit 31: in the prompt; below: occurrences in the output. masks [mask rows,
// ceil(vocab / 32)]: bit set: allowed. edits: at most one a token; bias -infinity forbids it.
// A row with a logit that is not finite gets fault 1, one with nothing allowed fault 2; other rows do not notice.
#pragma once

#include "tile.cuh"

constexpr int kChunkIds = 4096;
constexpr uint32_t kInPrompt = 0x80000000u;

enum SampleFlags : uint32_t {
    kGreedy = 1,  // temperature below 1e-5, or top_k of 1
    kScore = 2,   // no draw: log-probability of the given token
    kWantLogprobs = 4,
};

struct SampleRow {
    float inverse_temperature;
    float top_p;     // 1: all
    float min_p;     // 0: none
    uint32_t top_k;  // 0: all
    uint32_t seed_low, seed_high, choice, position;
    uint32_t flags;
    uint32_t token;  // of a score
    uint32_t top;    // most likely tokens wanted, at most 1024
    uint32_t slot;   // that gets the token; ~0: none
    float repetition, frequency, presence;
    int32_t counts_row;  // -1: none
    int32_t mask_row;    // -1: none
    int32_t raw_row;     // -1: none
    uint32_t edits_first, edits_count;
};

struct Edit {
    uint32_t token;
    float bias;
};

struct ChunkSums {
    double raw_sum;  // of e^(raw - raw_peak)
    float raw_peak;
    uint32_t fault;
    uint64_t best;  // key of the largest edited logit
};

struct SampleResult {
    uint32_t token;
    uint32_t fault;
    float logprob;
    uint32_t rank;
};

struct TopToken {
    uint32_t token;
    float logprob;
};

struct SampleArgs {
    float* logits;
    float* raw;
    const SampleRow* rows;
    const Edit* edits;
    const uint32_t* masks;
    uint32_t* counts;
    ChunkSums* chunks;      // [rows, chunks]
    SampleResult* results;  // [rows]
    TopToken* tops;         // [rows, max_top]
    uint32_t* last_drawn;   // [slots]
    uint32_t vocab;
    uint32_t stride;
    uint32_t max_top;
    float scale;
    float cap;  // 0: none
};

// e^x for x <= 0, 0 below -87: the CPU sampler's polynomial, operation for operation.
PORT_FN float weight_exp(float x) {
    constexpr float kRounder = 12582912.0f;
    const float clamped = x > -87.0f ? x : -87.0f;
    const float n = add_rn(add_rn(mul_rn(clamped, 1.44269504f), kRounder), -kRounder);
    float r = add_rn(clamped, -mul_rn(n, 0.6933594f));
    r = add_rn(r, mul_rn(n, 2.1219444e-4f));
    float p = 1.0f / 720.0f;
    const float coefficients[6] = {1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f, 1.0f, 1.0f};
#pragma unroll
    for (int i = 0; i < 6; i++) {
        p = add_rn(mul_rn(p, r), coefficients[i]);
    }
    const float power = float_of(static_cast<uint32_t>(static_cast<int>(n) + 127) << 23);
    return x > -87.0f ? mul_rn(p, power) : 0.0f;
}

PORT_FN uint64_t block_largest(uint64_t key, unsigned long long* scratch) {
    unsigned long long best = key;
#pragma unroll
    for (unsigned d = 16; d > 0; d >>= 1) {
        best = larger(best, shuffle_xor(best, d));
    }
    block_sync();
    if (lane_id() == 0) {
        scratch[threadIdx.x >> 5] = best;
    }
    block_sync();
    best = 0;
    for (unsigned w = 0; w < blockDim.x >> 5; w++) {
        best = larger(best, scratch[w]);
    }
    return best;
}

PORT_FN double block_total(double value, double* scratch) {
    value = warp_sum(value);
    block_sync();
    if (lane_id() == 0) {
        scratch[threadIdx.x >> 5] = value;
    }
    block_sync();
    double total = 0;
    for (unsigned w = 0; w < blockDim.x >> 5; w++) {
        total += scratch[w];
    }
    return total;
}
