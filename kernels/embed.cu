// Rows out of a table: token embeddings, and the rows of a step whose logits are wanted.
//
//   embed_bf16:   out[t] = table[id(t)] * scale       id(t) = ids[t], or last_drawn[ids[t] & 0x7fffffff] where bit 31
//   is set gather_rows:  out[o] = x[outputs[o]]
//
// Shapes: table [vocab, width], x [tokens, width], out [rows, width] bf16; width a multiple of 8. ids, outputs [rows];
// last_drawn [slots]: the token that a slot drew in the step before, which the host has not seen yet. An id beyond the
// vocabulary gives a row of NaN, so that only the sequence it belongs to fails. One block a row.
//
// Bytes: 4 rows width: latency at decode, bandwidth at prefill.

#include "tile.cuh"

constexpr uint32_t kFromSlot = 0x80000000u;
constexpr uint32_t kNanPair = 0x7fff7fffu;

extern "C" __global__ void __launch_bounds__(256)
    embed_bf16(const bf16* table, const uint32_t* ids, const uint32_t* last_drawn, bf16* out, uint32_t vocab, int width,
               float scale) {
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    uint32_t id = ids[row];
    if (id & kFromSlot) {
        id = last_drawn[id & ~kFromSlot];
    }
    const bool known = id < vocab;
    const bf16* from = table + static_cast<size_t>(known ? id : 0) * width;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        Eight v = widen8(load16(from + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v.x[j] *= scale;
        }
        const uint4 nan = {kNanPair, kNanPair, kNanPair, kNanPair};
        store16(out + row * width + i, known ? narrow8(v) : nan);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    gather_rows_bf16(const bf16* x, const uint32_t* outputs, bf16* out, int width) {
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    const bf16* from = x + static_cast<size_t>(outputs[row]) * width;
    for (int i = static_cast<int>(threadIdx.x) * 8; i < width; i += static_cast<int>(blockDim.x) * 8) {
        store16(out + row * width + i, load16(from + i));
    }
}
