// What the matmuls share: arguments, which weights and rows a block has, and what is done with sums.
//
// Owns the meaning of `MatmulArgs`, one for all: a dense weight or a stack of experts, bf16 or e4m3, plain or gated
// output. How products are formed is each kernel's own.
#pragma once

#include "tile.cuh"

constexpr int kTile = 128;                // outputs of a block
constexpr int kChunk = 64;                // k of a stage
constexpr int kResultStride = kTile + 4;  // singles from row to row of results in shared memory

struct MatmulArgs {
    const unsigned char* weight;
    const float* scales;
    const bf16* x;
    const bf16* bias;
    void* y;
    float* partial;
    unsigned* counters;
    const uint32_t* experts;           // null: one weight. Else [1 + n]: how many have rows, then which
    const uint32_t* offsets;           // [experts + 1]: places of each expert's pairs
    const uint32_t* pairs;             // [places]: token * top_k + slot
    unsigned long long weight_stride;  // bytes from expert to expert, or from head to head
    uint32_t scale_stride;             // scales likewise
    uint32_t bias_stride;              // biases likewise; outputs from there on have none
    int x_stride;                      // elements from a row of x to the next; columns from there on count as zero
    int y_stride;
    int x_head;  // elements from a head's columns of x to the next's; heads are grid z where there are no experts
    int y_head;
    int rows;
    int in;
    int out;
    int scale_rows;
    int scale_blocks;
    int top_k;
    int gather;
    int single_out;
    int gated;
    float scale;
    float cap;
    GateSpec gate;
};

// What one block works on.
struct MatmulTask {
    const unsigned char* weight;
    const float* scales;
    const bf16* bias;
    const bf16* x;
    size_t y;        // element of y that is its column 0 of row 0
    uint32_t first;  // place of its first row
    int rows;
};

PORT_FN MatmulTask dense_task(const MatmulArgs& a, uint32_t first, int rows) {
    return MatmulTask{a.weight, a.scales, a.bias, a.x, 0, first, rows};
}

// Each head has a weight of its own, and its columns of x and y.
PORT_FN MatmulTask head_task(const MatmulArgs& a, uint32_t head, uint32_t first, int rows) {
    MatmulTask task = dense_task(a, first, rows);
    task.weight += head * a.weight_stride;
    if (task.scales) {
        task.scales += static_cast<size_t>(head) * a.scale_stride;
    }
    task.x += static_cast<size_t>(head) * a.x_head;
    task.y = static_cast<size_t>(head) * a.y_head;
    return task;
}

PORT_FN MatmulTask expert_task(const MatmulArgs& a, uint32_t expert, uint32_t first, int rows) {
    MatmulTask task = dense_task(a, first, rows);
    task.weight += expert * a.weight_stride;
    if (task.scales) {
        task.scales += static_cast<size_t>(expert) * a.scale_stride;
    }
    if (task.bias) {
        task.bias += static_cast<size_t>(expert) * a.bias_stride;
    }
    return task;
}

// Row of the weight for output `r` of the block's tile; negative if there is none. A gated tile has 64 gates, then the
// 64 ups that belong to them.
PORT_FN int weight_row(const MatmulArgs& a, int r) {
    const int tile = static_cast<int>(blockIdx.x);
    if (!a.gated) {
        const int row = tile * kTile + r;
        return row < a.out ? row : -1;
    }
    const int i = tile * (kTile / 2) + r % (kTile / 2);
    return i < a.out / 2 ? i + (r < kTile / 2 ? 0 : a.out / 2) : -1;
}

// Columns of x that there are; the rest of `in` only pads the weight.
PORT_FN int columns_of_x(const MatmulArgs& a) { return smaller(a.in, a.x_stride); }

// Row of x for a row of the task.
PORT_FN size_t source_row(const MatmulArgs& a, const MatmulTask& task, int row) {
    const uint32_t place = task.first + static_cast<uint32_t>(row);
    return a.experts && a.gather ? a.pairs[place] / static_cast<uint32_t>(a.top_k) : place;
}

// Scale of a weight's row for the 128 k that hold `k`.
PORT_FN float weight_scale(const MatmulArgs& a, const MatmulTask& task, int row, int k) {
    if (row < 0) {
        return 0.0f;
    }
    const int columns = a.scale_blocks ? ceil_div(a.in, 128) : 1, column = a.scale_blocks ? k / 128 : 0;
    return task.scales[static_cast<size_t>(row / a.scale_rows) * columns + column];
}

// Bias of output `w`: rows that only pad the weight have none.
PORT_FN float bias_of(const MatmulArgs& a, const MatmulTask& task, int w) {
    return task.bias && static_cast<uint32_t>(w) < a.bias_stride ? to_float(task.bias[w]) : 0.0f;
}

PORT_FN void finish_pair(const MatmulArgs& a, const MatmulTask& task, int row, int r, float v0, float v1) {
    const int w = weight_row(a, r);
    const size_t at = task.y + (task.first + static_cast<size_t>(row)) * a.y_stride + w;
    v0 = (v0 + bias_of(a, task, w)) * a.scale;
    v1 = (v1 + bias_of(a, task, w + 1)) * a.scale;
    if (a.cap > 0.0f) {
        v0 = a.cap * tanhf(v0 / a.cap);
        v1 = a.cap * tanhf(v1 / a.cap);
    }
    if (a.single_out) {
        *reinterpret_cast<float2*>(static_cast<float*>(a.y) + at) = float2{v0, v1};
    } else {
        *reinterpret_cast<uint32_t*>(static_cast<bf16*>(a.y) + at) = pack_bf16(v0, v1);
    }
}

PORT_FN void finish_gated(const MatmulArgs& a, const MatmulTask& task, const float* results, int row, int r) {
    const int w = weight_row(a, r), width = a.out / 2;
    float y[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* pair = results + row * kResultStride + r + i;
        const float g = pair[0] + bias_of(a, task, w + i), u = pair[kTile / 2] + bias_of(a, task, width + w + i);
        y[i] = activate(g, u, a.gate);
    }
    const size_t at = task.y + (task.first + static_cast<size_t>(row)) * a.y_stride + w;
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(a.y) + at) = pack_bf16(y[0], y[1]);
}

// Bias, gate, scale and cap, and out with it. `results`: [rows][kResultStride] in shared memory, behind a barrier.
PORT_FN void finish_results(const MatmulArgs& a, const MatmulTask& task, const float* results) {
    const int width = a.gated ? kTile / 2 : kTile;
    for (int i = static_cast<int>(threadIdx.x); i < task.rows * width / 2; i += static_cast<int>(blockDim.x)) {
        const int row = i / (width / 2), r = i % (width / 2) * 2;
        if (weight_row(a, r) < 0) {
            continue;
        }
        if (a.gated) {
            finish_gated(a, task, results, row, r);
        } else {
            const float* v = results + row * kResultStride + r;
            finish_pair(a, task, row, r, v[0], v[1]);
        }
    }
}
