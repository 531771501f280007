// Heads on their way to attention: norms, rotation, and their places in pages.
//
// Owns the meaning of `HeadNorm` and `Rotation`, which all kernels that append to the cache share. A warp has a head as
// singles in shared memory of its own. Which heads there are is each kernel's own.
#pragma once

#include "tile.cuh"

enum class NormKind : int { None = 0, Rms = 1, Layer = 2 };

// x / size * (weight + offset) + bias; without a weight nothing multiplies.
struct HeadNorm {
    const bf16* weight;  // of the vector that is normed
    const bf16* bias;    // likewise; null: none
    float offset;
    float eps;
    NormKind kind;
};

// Pair i of a head, of rotary / 2: elements (step i, step i + distance). Halves: 1, rotary / 2; adjacent: 2, 1; halves
// of a longer head of which only the first pairs turn: 1, and the half of that head.
struct Rotation {
    const float* cos;      // [positions][rotary / 2]; null: nothing is rotated
    const float* sin;      // [positions][rotary / 2]
    const float* q_scale;  // [positions]: multiplies queries after the rotation; null: nothing does
    int rotary;
    int step;
    int distance;
};

struct Moments {
    float mean, inverse;  // of what is normed: mean (0 for Rms) and 1 / size
};

// Loads a head of bf16. Elements come in pairs where they lie so.
PORT_FN void load_head(float* head, const bf16* from, int dim) {
    const int lane = static_cast<int>(lane_id());
    if ((dim | static_cast<int>(reinterpret_cast<uintptr_t>(from) / 2)) % 2 == 0) {
        for (int i = lane * 2; i < dim; i += 64) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(from + i);
            head[i] = low_bf16(pair);
            head[i + 1] = high_bf16(pair);
        }
    } else {
        for (int i = lane; i < dim; i += 32) {
            head[i] = to_float(from[i]);
        }
    }
    warp_sync();
}

PORT_FN void write_head(bf16* to, const float* head, int dim) {
    const int lane = static_cast<int>(lane_id());
    if ((dim | static_cast<int>(reinterpret_cast<uintptr_t>(to) / 2)) % 2 == 0) {
        for (int i = lane * 2; i < dim; i += 64) {
            *reinterpret_cast<uint32_t*>(to + i) = pack_bf16(head[i], head[i + 1]);
        }
    } else {
        for (int i = lane; i < dim; i += 32) {
            to[i] = to_bf16(head[i]);
        }
    }
}

PORT_FN Moments head_moments(const float* head, int dim, const HeadNorm& norm) {
    Moments m{0.0f, 1.0f};
    if (norm.kind == NormKind::None) {
        return m;
    }
    const int lane = static_cast<int>(lane_id());
    if (norm.kind == NormKind::Layer) {
        float sum = 0.0f;
        for (int i = lane; i < dim; i += 32) {
            sum += head[i];
        }
        m.mean = fast_divide(warp_sum(sum), static_cast<float>(dim));
    }
    float squares = 0.0f;
    for (int i = lane; i < dim; i += 32) {
        squares += (head[i] - m.mean) * (head[i] - m.mean);
    }
    m.inverse = fast_rsqrt(fast_divide(warp_sum(squares), static_cast<float>(dim)) + norm.eps);
    return m;
}

// Element `i` of a normed vector.
PORT_FN float normed(float x, int i, const HeadNorm& norm, const Moments& m) {
    if (norm.kind == NormKind::None) {
        return x;
    }
    x = (x - m.mean) * m.inverse;
    if (norm.weight) {
        x *= to_float(norm.weight[i]) + norm.offset;
    }
    return norm.bias ? x + to_float(norm.bias[i]) : x;
}

// Norms a head, which begins at element `first` of the normed vector.
PORT_FN void norm_head(float* head, int dim, const HeadNorm& norm, const Moments& m, int first) {
    if (norm.kind == NormKind::None) {
        return;
    }
    for (int i = static_cast<int>(lane_id()); i < dim; i += 32) {
        head[i] = normed(head[i], first + i, norm, m);
    }
    warp_sync();
}

PORT_FN void rotate_head(float* head, const Rotation& r, uint32_t position) {
    if (!r.cos) {
        return;
    }
    const size_t at = static_cast<size_t>(position) * (r.rotary / 2);
    for (int i = static_cast<int>(lane_id()); i < r.rotary / 2; i += 32) {
        const float a = head[r.step * i], b = head[r.step * i + r.distance];
        const float cos = r.cos[at + i], sin = r.sin[at + i];
        head[r.step * i] = a * cos - b * sin;
        head[r.step * i + r.distance] = b * cos + a * sin;
    }
    warp_sync();
}

PORT_FN float query_scale(const Rotation& r, uint32_t position) {
    return r.cos && r.q_scale ? r.q_scale[position] : 1.0f;
}

// The `j`th of the elements that are rotated, in ascending order.
PORT_FN int rotated_element(const Rotation& r, int j) {
    const int half = r.rotary / 2;
    return r.step == 2 || j < half ? j : j - half + r.distance;
}

PORT_FN bool is_rotated(const Rotation& r, int i) {
    const int half = r.rotary / 2;
    return r.step == 2 ? i < r.rotary : i < half || (i >= r.distance && i < r.distance + half);
}

// Address of a token's key or value. Pages hold `[K|V][kv_heads][16][...]`, keys and values each with a width of its
// own.
PORT_FN unsigned char* token_in_page(const KvLayer& kv, uint32_t page, int part, uint32_t head, uint32_t position,
                                     uint32_t key_bytes, uint32_t value_bytes) {
    const uint32_t row_bytes = part ? value_bytes : key_bytes;
    const unsigned long long keys = part ? static_cast<unsigned long long>(kv.kv_heads) * kPageTokens * key_bytes : 0;
    return kv.pages + page * kv.page_bytes + keys +
           (static_cast<unsigned long long>(head) * kPageTokens + position % kPageTokens) * row_bytes;
}

// What an element of an e4m3 cache is divided by.
PORT_FN float cache_scale(const KvLayer& kv, int part, uint32_t head) {
    return kv.scales ? kv.scales[part * kv.kv_heads + head] : 1.0f;
}

// Stores elements [first, first + count) of a token's key or value.
template <bool kE4m3>
PORT_FN void store_elements(unsigned char* to, const float* head, int first, int count, float scale) {
    const int lane = static_cast<int>(lane_id());
    const float inverse = kE4m3 ? fast_divide(1.0f, scale) : 1.0f;
    if ((first | count) % 2 == 0 && reinterpret_cast<uintptr_t>(to) % (kE4m3 ? 2 : 4) == 0) {
        for (int i = lane * 2; i < count; i += 64) {
            if (kE4m3) {
                *reinterpret_cast<uint16_t*>(to + first + i) =
                    static_cast<uint16_t>(to_e4m3(head[i] * inverse).bits | to_e4m3(head[i + 1] * inverse).bits << 8);
            } else {
                *reinterpret_cast<uint32_t*>(to + (first + i) * 2) = pack_bf16(head[i], head[i + 1]);
            }
        }
        return;
    }
    for (int i = lane; i < count; i += 32) {
        if (kE4m3) {
            to[first + i] = to_e4m3(head[i] * inverse).bits;
        } else {
            *reinterpret_cast<bf16*>(to + (first + i) * 2) = to_bf16(head[i]);
        }
    }
}
