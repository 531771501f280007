// Building blocks that several kernels share: sums over warps and blocks, rows of bf16, layouts of the KV cache.
//
// Owns no instruction (those are in `port.cuh`) and no kernel.
#pragma once

#include "port.cuh"

constexpr float kLog2E = 1.44269504f;
constexpr float kInfinity = __builtin_huge_valf();
constexpr int kPageTokens = 16;

template <class T>
PORT_FN T smaller(T a, T b) {
    return a < b ? a : b;
}
template <class T>
PORT_FN T larger(T a, T b) {
    return a > b ? a : b;
}
PORT_FN int ceil_div(int a, int b) { return (a + b - 1) / b; }
// Elements from a row to the next: rows start on 16 bytes, and what lies between is zero.
PORT_FN int padded(int width) { return (width + 7) / 8 * 8; }

template <class T>
PORT_FN T warp_sum(T value) {
#pragma unroll
    for (unsigned d = 16; d > 0; d >>= 1) {
        value += shuffle_xor(value, d);
    }
    return value;
}

PORT_FN float warp_max(float value) {
#pragma unroll
    for (unsigned d = 16; d > 0; d >>= 1) {
        value = fmaxf(value, shuffle_xor(value, d));
    }
    return value;
}

// Sum over the block in a fixed order, given to every thread. `scratch` has 32 elements; the block is whole warps.
PORT_FN float block_sum(float value, float* scratch) {
    value = warp_sum(value);
    block_sync();  // scratch may still be read from the call before
    if (lane_id() == 0) {
        scratch[threadIdx.x >> 5] = value;
    }
    block_sync();
    return warp_sum(lane_id() < (blockDim.x >> 5) ? scratch[lane_id()] : 0.0f);
}

PORT_FN float block_max(float value, float* scratch) {
    value = warp_max(value);
    block_sync();
    if (lane_id() == 0) {
        scratch[threadIdx.x >> 5] = value;
    }
    block_sync();
    return warp_max(lane_id() < (blockDim.x >> 5) ? scratch[lane_id()] : -kInfinity);
}

// Orders singles as unsigned numbers: -0 equals 0, NaN comes last.
PORT_FN uint32_t ordered(float x) {
    const uint32_t bits = bits_of(x + 0.0f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return 0;
    }
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Highest first, the lower index among equals; never 0.
PORT_FN uint64_t choice_key(float score, int index) {
    return uint64_t{ordered(score)} << 32 | ~static_cast<uint32_t>(index);
}
PORT_FN int choice_index(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// Eight bf16 as singles.
struct Eight {
    float x[8];
};

PORT_FN Eight widen8(uint4 packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        out.x[2 * i] = low_bf16(words[i]);
        out.x[2 * i + 1] = high_bf16(words[i]);
    }
    return out;
}

PORT_FN uint4 narrow8(const Eight& v) {
    return uint4{pack_bf16(v.x[0], v.x[1]), pack_bf16(v.x[2], v.x[3]), pack_bf16(v.x[4], v.x[5]),
                 pack_bf16(v.x[6], v.x[7])};
}

// Makes elements from the `live`th on zero.
PORT_FN void clear_from(Eight& v, int live) {
#pragma unroll
    for (int j = 0; j < 8; j++) {
        v.x[j] = j < live ? v.x[j] : 0.0f;
    }
}

PORT_FN float largest_magnitude(const Eight& v) {
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        m = fmaxf(m, fabsf(v.x[i]));
    }
    return m;
}

// Largest e4m3.
constexpr float kE4m3Max = 448.0f;

PORT_FN uint2 quantize8(const Eight& v, float inverse_scale) {
    uint32_t words[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        words[i / 4] |= uint32_t{to_e4m3(v.x[i] * inverse_scale).bits} << (i % 4 * 8);
    }
    return uint2{words[0], words[1]};
}

// Largest magnitude of the group of elements that this thread's eight belong to, where groups are 8 to 256 wide.
PORT_FN float group_max(float mine, int group) {
    for (int threads = 1; threads * 8 < group; threads *= 2) {
        mine = fmaxf(mine, shuffle_xor(mine, threads));
    }
    return mine;
}

enum class Gate : int { Silu = 0, GeluTanh = 1, ClampedSwish = 2, Gelu = 3 };

// How a gate and an up projection become one value.
struct GateSpec {
    Gate kind;
    float limit;  // ClampedSwish: gate at most `limit`, up within +-limit
    float alpha;  // ClampedSwish: slope inside the sigmoid
};

// Silu: g sigmoid(g) u. Gelu: g Phi(g) u, by tanh or exact. ClampedSwish (gpt-oss): g sigmoid(alpha g) (u + 1).
PORT_FN float activate(float gate, float up, const GateSpec& spec) {
    switch (spec.kind) {
        case Gate::Silu:
            return fast_divide(gate, 1.0f + fast_exp(-gate)) * up;
        case Gate::GeluTanh: {
            const float inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
            return 0.5f * gate * (1.0f + fast_tanh(inner)) * up;
        }
        case Gate::Gelu:
            return 0.5f * gate * (1.0f + erff(gate * 0.70710678f)) * up;
        case Gate::ClampedSwish: {
            const float g = fminf(gate, spec.limit), u = fmaxf(fminf(up, spec.limit), -spec.limit);
            return fast_divide(g, 1.0f + fast_exp(-spec.alpha * g)) * (u + 1.0f);
        }
    }
    return 0.0f;
}

// One sequence of the step.
struct RowInfo {
    uint32_t slot;     // whose block table applies
    uint32_t first;    // its first token in the step
    uint32_t tokens;   // its tokens in the step
    uint32_t context;  // keys its last token sees, that token included
};

// Where one layer's keys and values lie: pages of `[K|V][kv_heads][16][head_dim]`.
struct KvLayer {
    unsigned char* pages;           // the layer's part of page 0
    const uint32_t* tables;         // [slots][table_len]: page of each 16 tokens of a sequence
    const float* scales;            // [2][kv_heads], keys then values, of an e4m3 cache; null: all 1
    unsigned long long page_bytes;  // from a page to the next
    uint32_t table_len;
    uint32_t kv_heads;
};

// Page of a position of the sequence in a slot.
PORT_FN uint32_t page_of(const KvLayer& kv, uint32_t slot, uint32_t position) {
    return kv.tables[static_cast<size_t>(slot) * kv.table_len + position / kPageTokens];
}

// Address of token 0 of a head in a page. `part`: 0 keys, 1 values.
PORT_FN unsigned char* page_rows(const KvLayer& kv, uint32_t page, int part, uint32_t head, uint32_t row_bytes) {
    return kv.pages + page * kv.page_bytes +
           (static_cast<unsigned long long>(part) * kv.kv_heads + head) * kPageTokens * row_bytes;
}
