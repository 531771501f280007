// Matmul of 1 to 64 rows, which reads every weight once and is as fast as memory gives them.
//
//   y = epilogue(x w^T + bias)      x [rows, in] bf16, w [out, in] bf16 or e4m3, y [rows, out] bf16 or single
//   epilogue: y * scale, then cap * tanh(y / cap) if cap > 0; or, gated, w is [gate | up] and y = gate(g, u), [rows,
//   out / 2]
//
// in is a multiple of 8 (bf16) or 16 (e4m3), out of 2 (16 where gated); weights and x start on 16 bytes. Rows of x and
// y are x_stride (a multiple of 8) and y_stride (even) apart; columns of x from x_stride on are taken as zero, since
// e4m3 weights are padded to 16 and rows of x only to 8. Outputs from bias_stride on have no bias. e4m3: scales
// [ceil(out / scale_rows), ceil(in / 128)] if `scale_blocks`, else [ceil(out / scale_rows), 1]; value = code * scale.
//
// Experts: with `experts` set, grid z is an index into the list of experts that have rows (see `moe_route.cu`), each
// with its own weight at w + expert * weight_stride, bias and scales likewise. Rows are those of the expert: input row
// is the pair's token (`gather`) or the pair's place; output rows lie at the pair's place. No padding to wide tiles: an
// expert with one row costs its weights.
//
// Heads: without `experts`, grid z is a head with its own weight (weight_stride, scale_stride) and its own columns of x
// and y: x + head * x_head (a multiple of 8), y + head * y_head (even); no bias then.
//
// Algorithm: weights are the wide side of the tensor-core tile: m16n8k16 with 16 outputs by 8 rows. A block has 128
// outputs and, with split-K, a range of `in`. Every thread copies to shared memory exactly the 16-byte pieces of
// weights that it will multiply itself, through a ring of kStages stages, so that no barrier stands between memory and
// the tensor core; it may take any 16 neighbours of k, as long as x is read in the same order. The rows of x of a stage
// are shared by the block, hence one barrier a stage of 64 k. Weights are asked for before the dependency wait. With
// split-K every block writes its sums, and the last to arrive adds them in the order of splits: the same bits whoever
// is last. `counters` [tiles * experts] is zero before and after; `partial` has tiles * splits * experts * rows * 128
// singles (heads as experts). Grid: (ceil(outputs / 128), splits, 1, active experts or heads), where outputs is `out`.
//
// Bytes: out * in * (2 or 1) + rows * in * 2 * tiles, the second from L2. Floor: out * in * (2 or 1) / bandwidth.

#include "matmul.cuh"

template <bool kE4m3, int kMTiles, int kNTiles>
struct Skinny {
    static constexpr int kWarps = 8 / kMTiles;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kStages = kE4m3 ? 6 : 4;
    static constexpr int kPieces = kMTiles * (kE4m3 ? 2 : 4);  // 16 bytes each, of a thread and stage
    static constexpr int kWeightStage = kPieces * kThreads * 16;
    static constexpr int kXStage = kNTiles * 8 * kChunk * 2;
    static constexpr int kElement = kE4m3 ? 1 : 2;

    PORT_FN static void fetch_weights(const MatmulArgs& a, const MatmulTask& task, int chunk, unsigned char* ring) {
        const int warp = static_cast<int>(threadIdx.x >> 5), g = static_cast<int>(lane_id() >> 2);
        const int t = static_cast<int>(lane_id() & 3);
        constexpr int kHalves = kE4m3 ? 1 : 2;
        int piece = 0;
#pragma unroll
        for (int m = 0; m < kMTiles; m++) {
#pragma unroll
            for (int h = 0; h < kHalves; h++) {
#pragma unroll
                for (int low = 0; low < 2; low++, piece++) {
                    const int row = weight_row(a, (warp * kMTiles + m) * 16 + low * 8 + g);
                    const int k = chunk * kChunk + (kE4m3 ? 16 * t : 32 * h + 8 * t);
                    // `in` is a multiple of 16 bytes: a piece is there as a whole or not at all.
                    const bool inside = row >= 0 && k < a.in;
                    const size_t at = inside ? (static_cast<size_t>(row) * a.in + k) * kElement : 0;
                    copy_async(ring + (piece * kThreads + static_cast<int>(threadIdx.x)) * 16, task.weight + at,
                               inside ? 16u : 0u);
                }
            }
        }
    }

    // Chunk of 16 bytes within a row of x, moved so that a quarter warp never meets in a bank.
    PORT_FN static int swizzled(int row, int chunk) { return chunk ^ (kE4m3 ? row & 1 : (row & 1) << 2); }

    PORT_FN static void fetch_x(const MatmulArgs& a, const MatmulTask& task, int chunk, unsigned char* stage) {
        const int rows = (task.rows + 7) / 8 * 8;
        for (int i = static_cast<int>(threadIdx.x); i < rows * 8; i += kThreads) {
            const int row = i / 8, c = i % 8, k = chunk * kChunk + c * 8;
            const bool inside = row < task.rows && k < columns_of_x(a);
            const size_t source = inside ? source_row(a, task, row) : 0;
            copy_async(stage + (row * 8 + swizzled(row, c)) * 16, task.x + source * a.x_stride + (inside ? k : 0),
                       inside ? 16u : 0u);
        }
    }

    PORT_FN static void multiply(const unsigned char* ring, const unsigned char* x, int rows,
                                 float (&sums)[kMTiles][kNTiles][4]) {
        const int g = static_cast<int>(lane_id() >> 2), t = static_cast<int>(lane_id() & 3);
        const int tid = static_cast<int>(threadIdx.x);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            // Fragments of 32 k: two steps of 16, elements in the order in which the thread holds them.
            uint32_t a[kMTiles][2][4];
#pragma unroll
            for (int m = 0; m < kMTiles; m++) {
                const int piece = kE4m3 ? m * 2 : m * 4 + h * 2;
                const uint4 top = load16(ring + (piece * kThreads + tid) * 16);
                const uint4 low = load16(ring + ((piece + 1) * kThreads + tid) * 16);
                if constexpr (kE4m3) {
                    const uint2 top0 = widen_e4m3x4(h ? top.z : top.x), top1 = widen_e4m3x4(h ? top.w : top.y);
                    const uint2 low0 = widen_e4m3x4(h ? low.z : low.x), low1 = widen_e4m3x4(h ? low.w : low.y);
                    const uint32_t steps[2][4] = {{top0.x, low0.x, top0.y, low0.y}, {top1.x, low1.x, top1.y, low1.y}};
                    for (int i = 0; i < 4; i++) {
                        a[m][0][i] = steps[0][i], a[m][1][i] = steps[1][i];
                    }
                } else {
                    const uint32_t steps[2][4] = {{top.x, low.x, top.y, low.y}, {top.z, low.z, top.w, low.w}};
                    for (int i = 0; i < 4; i++) {
                        a[m][0][i] = steps[0][i], a[m][1][i] = steps[1][i];
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < kNTiles; n++) {
                if (n * 8 >= rows) {
                    break;
                }
                const int row = n * 8 + g, chunk = kE4m3 ? 2 * t + h : 4 * h + t;
                const uint4 v = load16(x + (row * 8 + swizzled(row, chunk)) * 16);
                const uint32_t b0[2] = {v.x, v.y}, b1[2] = {v.z, v.w};
#pragma unroll
                for (int m = 0; m < kMTiles; m++) {
                    mma_bf16(sums[m][n], a[m][0], b0);
                    mma_bf16(sums[m][n], a[m][1], b1);
                }
            }
        }
    }

    // Adds the sums of one block of 128 k, times their scale, to the totals.
    PORT_FN static void apply_scales(const MatmulArgs& a, const MatmulTask& task, int chunk,
                                     float (&sums)[kMTiles][kNTiles][4], float (&totals)[kMTiles][kNTiles][4]) {
        const int warp = static_cast<int>(threadIdx.x >> 5), g = static_cast<int>(lane_id() >> 2);
#pragma unroll
        for (int m = 0; m < kMTiles; m++) {
            float scale[2];
#pragma unroll
            for (int low = 0; low < 2; low++) {
                const int row = weight_row(a, (warp * kMTiles + m) * 16 + low * 8 + g);
                scale[low] = weight_scale(a, task, row, chunk * kChunk);
            }
#pragma unroll
            for (int n = 0; n < kNTiles; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    totals[m][n][i] += sums[m][n][i] * scale[i / 2];
                    sums[m][n][i] = 0.0f;
                }
            }
        }
    }

    // Adds up the splits in their order. True for the block that arrived last and holds the whole sum in `results`.
    PORT_FN static bool merge_splits(const MatmulArgs& a, const MatmulTask& task, float* results, unsigned* last) {
        const size_t tile = blockIdx.x + static_cast<size_t>(gridDim.x) * blockIdx.z;
        const size_t size = static_cast<size_t>(a.rows) * kTile;
        float* mine = a.partial + (tile * gridDim.y + blockIdx.y) * size;
        for (int i = static_cast<int>(threadIdx.x); i < task.rows * kTile; i += kThreads) {
            mine[i] = results[i / kTile * kResultStride + i % kTile];
        }
        block_sync();
        if (threadIdx.x == 0) {
            *last = count_arrival(a.counters + tile) + 1 == gridDim.y;
        }
        block_sync();
        if (!*last) {
            return false;
        }
        for (int i = static_cast<int>(threadIdx.x); i < task.rows * kTile; i += kThreads) {
            float sum = 0.0f;
            for (unsigned s = 0; s < gridDim.y; s++) {
                sum += a.partial[(tile * gridDim.y + s) * size + i];
            }
            results[i / kTile * kResultStride + i % kTile] = sum;
        }
        if (threadIdx.x == 0) {
            a.counters[tile] = 0;
        }
        block_sync();
        return true;
    }

    PORT_FN static void run(const MatmulArgs& a) {
        PORT_DYNAMIC_SHARED(shared);
        PORT_SHARED(unsigned, last, 1);
        // Two chunks are the least part: a scale's block.
        const int blocks = ceil_div(ceil_div(a.in, kChunk), 2), splits = static_cast<int>(gridDim.y);
        const int split = static_cast<int>(blockIdx.y);
        const int chunk_first = split * blocks / splits * 2;
        const int chunk_end = smaller((split + 1) * blocks / splits * 2, ceil_div(a.in, kChunk));
        MatmulTask task = a.experts ? dense_task(a, 0, a.rows) : head_task(a, blockIdx.z, 0, a.rows);
        unsigned char* x_ring = shared + kStages * kWeightStage;

        if (!a.experts) {
            for (int s = 0; s < kStages - 1; s++) {
                if (chunk_first + s < chunk_end) {
                    fetch_weights(a, task, chunk_first + s, shared + s * kWeightStage);
                }
            }
        }
        let_dependents_start();
        dependency_wait();
        if (a.experts) {
            if (blockIdx.z >= a.experts[0]) {
                return;
            }
            const uint32_t expert = a.experts[1 + blockIdx.z];
            task =
                expert_task(a, expert, a.offsets[expert], static_cast<int>(a.offsets[expert + 1] - a.offsets[expert]));
        }
        for (int s = 0; s < kStages - 1; s++) {
            const int chunk = chunk_first + s;
            if (chunk < chunk_end) {
                if (a.experts) {
                    fetch_weights(a, task, chunk, shared + s * kWeightStage);
                }
                fetch_x(a, task, chunk, x_ring + s * kXStage);
            }
            copy_commit();
        }

        float sums[kMTiles][kNTiles][4] = {}, totals[kMTiles][kNTiles][4] = {};
        for (int chunk = chunk_first, stage = 0; chunk < chunk_end; chunk++, stage = (stage + 1) % kStages) {
            copy_wait<kStages - 2>();
            block_sync();  // all threads' copies of this stage are here, and the stage before is free
            const int next = chunk + kStages - 1, free_stage = (stage + kStages - 1) % kStages;
            if (next < chunk_end) {
                fetch_weights(a, task, next, shared + free_stage * kWeightStage);
                fetch_x(a, task, next, x_ring + free_stage * kXStage);
            }
            copy_commit();
            multiply(shared + stage * kWeightStage, x_ring + stage * kXStage, task.rows, sums);
            if (kE4m3 && (chunk % 2 == 1 || chunk + 1 == chunk_end)) {
                apply_scales(a, task, chunk, sums, totals);
            }
        }
        copy_wait<0>();
        block_sync();  // the ring becomes the results

        float* results = reinterpret_cast<float*>(shared);
        const int warp = static_cast<int>(threadIdx.x >> 5), g = static_cast<int>(lane_id() >> 2);
        const int t = static_cast<int>(lane_id() & 3);
#pragma unroll
        for (int m = 0; m < kMTiles; m++) {
#pragma unroll
            for (int n = 0; n < kNTiles; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = n * 8 + 2 * t + i % 2, r = (warp * kMTiles + m) * 16 + i / 2 * 8 + g;
                    results[row * kResultStride + r] = kE4m3 ? totals[m][n][i] : sums[m][n][i];
                }
            }
        }
        block_sync();
        if (splits > 1 && !merge_splits(a, task, results, last)) {
            return;
        }
        finish_results(a, task, results);
    }
};

// Dynamic shared memory: kStages * (kWeightStage + kXStage), at least the results' rows * 132 * 4.
#define SKINNY(name, e4m3, m_tiles, n_tiles)                                                                          \
    extern "C" __global__ void __launch_bounds__(Skinny<e4m3, m_tiles, n_tiles>::kThreads, 1) name(MatmulArgs args) { \
        Skinny<e4m3, m_tiles, n_tiles>::run(args);                                                                    \
    }

// Named by weight and most rows. Beyond 32 rows a warp has twice the outputs, to read x half as often.
SKINNY(matmul_skinny_bf16_8, false, 1, 1)
SKINNY(matmul_skinny_bf16_16, false, 1, 2)
SKINNY(matmul_skinny_bf16_32, false, 1, 4)
SKINNY(matmul_skinny_bf16_64, false, 2, 8)
SKINNY(matmul_skinny_e4m3_8, true, 1, 1)
SKINNY(matmul_skinny_e4m3_16, true, 1, 2)
SKINNY(matmul_skinny_e4m3_32, true, 1, 4)
SKINNY(matmul_skinny_e4m3_64, true, 2, 8)
