// Rows out of a table: token embeddings, learned positions, and the rows of a step whose logits are wanted.
//
//   embed_bf16:          out[t] = table[id(t)] * scale
//                        id(t) = ids[t], or last_drawn[ids[t] & 0x7fffffff] where bit 31 is set
//   add_positions_bf16:  x[t] += table[positions[t] + offset]
//   gather_rows_bf16:    out[o] = x[outputs[o]]
//
// Shapes: table [table_rows, width] bf16, its rows `table_stride` apart; x, out [rows, width] bf16, `padded(width)`
// apart, zero between; ids, positions, outputs [rows]; last_drawn [slots]: the token that a slot drew in the step
// before, which the host has not seen yet. A row beyond the table gives a row of NaN, so that only the sequence it
// belongs to fails. One block a row. `gather_rows_bf16` takes the padded width as its width.
//
// Bytes: 4 (6) rows width: latency at decode, bandwidth at prefill.

#include "tile.cuh"

constexpr uint32_t kFromSlot = 0x80000000u;

struct EmbedArgs {
    const bf16* table;
    const uint32_t* ids;
    const uint32_t* last_drawn;
    bf16* out;
    uint32_t table_rows;
    int table_stride;  // a multiple of 8, at least padded(width)
    int width;
    float scale;
};

struct PositionsArgs {
    const bf16* table;
    const uint32_t* positions;
    bf16* x;
    uint32_t table_rows;
    uint32_t offset;
    int table_stride;  // a multiple of 8, at least padded(width)
    int width;
};

PORT_FN Eight not_numbers() {
    Eight v;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        v.x[j] = float_of(0x7fffffffu);
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(256) embed_bf16(EmbedArgs a) {
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    uint32_t id = a.ids[row];
    if (id & kFromSlot) {
        id = a.last_drawn[id & ~kFromSlot];
    }
    const bool known = id < a.table_rows;
    const bf16* from = a.table + static_cast<size_t>(known ? id : 0) * a.table_stride;
    bf16* out = a.out + row * padded(a.width);
    for (int i = static_cast<int>(threadIdx.x) * 8; i < a.width; i += static_cast<int>(blockDim.x) * 8) {
        Eight v = known ? widen8(load16(from + i)) : not_numbers();
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v.x[j] *= a.scale;
        }
        clear_from(v, a.width - i);
        store16(out + i, narrow8(v));
    }
}

extern "C" __global__ void __launch_bounds__(256) add_positions_bf16(PositionsArgs a) {
    let_dependents_start();
    dependency_wait();
    const size_t row = blockIdx.x;
    const uint64_t index = uint64_t{a.positions[row]} + a.offset;
    const bool known = index < a.table_rows;
    const bf16* from = a.table + (known ? index : 0) * a.table_stride;
    bf16* x = a.x + row * padded(a.width);
    for (int i = static_cast<int>(threadIdx.x) * 8; i < a.width; i += static_cast<int>(blockDim.x) * 8) {
        const Eight add = known ? widen8(load16(from + i)) : not_numbers();
        Eight v = widen8(load16(x + i));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v.x[j] += add.x[j];
        }
        clear_from(v, a.width - i);
        store16(x + i, narrow8(v));
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
