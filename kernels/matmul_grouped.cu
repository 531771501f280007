// Matmul of many rows on the tensor cores: experts in prefill, and dense weights where there is no cublasLt.
//
//   y = epilogue(x w^T + bias)      as in `matmul_skinny.cu`: same arguments, storages and epilogues
//
// Experts: `tiles` lists (expert, first row within the expert) of every 64 rows that an expert has (`moe_route.cu`
// writes it); grid y is an index into it, for the most tiles that can be, ceil(pairs / 64) + experts, and blocks beyond
// the list end. Dense: grid y is the tile of 64 rows itself, and `tiles` is null.
// Grid: (ceil(outputs / 128), row tiles, 1 or heads), 256 threads. No split-K: there are rows enough.
//
// Algorithm: 64 rows by 128 outputs a block, eight warps of 32 by 32, k in stages of 64 through a ring of three
// cp.async stages; m16n8k16 on fragments from ldmatrix. e4m3 weights are widened in shared memory, and their scales are
// applied to the sums of each 128 k. Dense weights are asked for before the dependency wait.
//
// Work: 2 * rows * in * out over the tensor cores' rate; each weight is read rows / 64 times, from L2 mostly.

#include "matmul.cuh"

template <bool kE4m3>
struct Grouped {
    static constexpr int kRows = 64;
    static constexpr int kThreads = 256;
    static constexpr int kStages = 3;
    static constexpr int kStride = kChunk * 2 + 16;  // bytes of 64 bf16 and a pad against bank conflicts
    static constexpr int kXTile = kRows * kStride;
    static constexpr int kRawRow = kChunk * (kE4m3 ? 1 : 2);
    static constexpr int kRawStride = kE4m3 ? kRawRow : kStride;
    static constexpr int kWeightTile = kTile * kRawStride;
    static constexpr int kStage = kXTile + kWeightTile;
    static constexpr int kRing = kStages * kStage + (kE4m3 ? kTile * kStride : 0);
    static constexpr int kSharedBytes = kRing > kRows* kResultStride * 4 ? kRing : kRows* kResultStride * 4;

    PORT_FN static void fetch_x(const MatmulArgs& a, const MatmulTask& task, int chunk, unsigned char* stage) {
        for (int i = static_cast<int>(threadIdx.x); i < kRows * 8; i += kThreads) {
            const int row = i / 8, k = chunk * kChunk + i % 8 * 8;
            const bool inside = row < task.rows && k < columns_of_x(a);
            const bf16* from = task.x + (inside ? source_row(a, task, row) * a.x_stride + k : 0);
            copy_async(stage + row * kStride + i % 8 * 16, from, inside ? 16u : 0u);
        }
    }

    PORT_FN static void fetch_weights(const MatmulArgs& a, const MatmulTask& task, int chunk, unsigned char* stage) {
        constexpr int kPieces = kRawRow / 16, kElement = kE4m3 ? 1 : 2;
        for (int i = static_cast<int>(threadIdx.x); i < kTile * kPieces; i += kThreads) {
            const int row = weight_row(a, i / kPieces), k = chunk * kChunk + i % kPieces * (16 / kElement);
            const bool inside = row >= 0 && k < a.in;
            const unsigned char* from = task.weight + (inside ? (static_cast<size_t>(row) * a.in + k) * kElement : 0);
            copy_async(stage + kXTile + i / kPieces * kRawStride + i % kPieces * 16, from, inside ? 16u : 0u);
        }
    }

    PORT_FN static void widen(const unsigned char* raw, unsigned char* wide) {
        constexpr int kPieces = kChunk / 16;
        for (int i = static_cast<int>(threadIdx.x); i < kTile * kPieces; i += kThreads) {
            const uint4 codes = load16(raw + i * 16);
            const uint2 x = widen_e4m3x4(codes.x), y = widen_e4m3x4(codes.y);
            const uint2 z = widen_e4m3x4(codes.z), w = widen_e4m3x4(codes.w);
            unsigned char* to = wide + i / kPieces * kStride + i % kPieces * 32;
            store16(to, uint4{x.x, x.y, y.x, y.y});
            store16(to + 16, uint4{z.x, z.y, w.x, w.y});
        }
    }

    PORT_FN static int warp_row() { return static_cast<int>(threadIdx.x >> 5) / 4 * 32; }
    PORT_FN static int warp_out() { return static_cast<int>(threadIdx.x >> 5) % 4 * 32; }

    PORT_FN static void multiply(const unsigned char* x, const unsigned char* w, float (&sums)[2][4][4]) {
        const int l = static_cast<int>(lane_id());
#pragma unroll
        for (int k = 0; k < kChunk; k += 16) {
            uint32_t a[2][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 2; m++) {
                load_matrix_x4(a[m], x + (warp_row() + m * 16 + l % 16) * kStride + (k + l / 16 * 8) * 2);
            }
#pragma unroll
            for (int n = 0; n < 2; n++) {
                load_matrix_x4(b[n],
                               w + (warp_out() + n * 16 + l % 8 + l / 16 * 8) * kStride + (k + l / 8 % 2 * 8) * 2);
            }
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    mma_bf16(sums[m][n], a[m], pair);
                }
            }
        }
    }

    PORT_FN static void apply_scales(const MatmulArgs& a, const MatmulTask& task, int chunk, float (&sums)[2][4][4],
                                     float (&totals)[2][4][4]) {
        const int t = static_cast<int>(lane_id() & 3);
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float scale =
                    weight_scale(a, task, weight_row(a, warp_out() + n * 8 + 2 * t + c), chunk * kChunk);
#pragma unroll
                for (int m = 0; m < 2; m++) {
#pragma unroll
                    for (int low = 0; low < 2; low++) {
                        totals[m][n][low * 2 + c] += sums[m][n][low * 2 + c] * scale;
                        sums[m][n][low * 2 + c] = 0.0f;
                    }
                }
            }
        }
    }

    PORT_FN static void run(const MatmulArgs& a, const uint32_t* tiles) {
        PORT_DYNAMIC_SHARED(shared);
        const int chunks = ceil_div(a.in, kChunk), row_tile = static_cast<int>(blockIdx.y) * kRows;
        MatmulTask task = head_task(a, blockIdx.z, static_cast<uint32_t>(row_tile), smaller(kRows, a.rows - row_tile));
        if (!tiles) {
            for (int s = 0; s < smaller(kStages - 1, chunks); s++) {
                fetch_weights(a, task, s, shared + s * kStage);
            }
        }
        let_dependents_start();
        dependency_wait();
        if (tiles) {
            if (blockIdx.y >= tiles[0]) {
                return;
            }
            const uint32_t expert = tiles[1 + 2 * blockIdx.y], skip = tiles[2 + 2 * blockIdx.y];
            const uint32_t first = a.offsets[expert] + skip;
            task = expert_task(a, expert, first, smaller(kRows, static_cast<int>(a.offsets[expert + 1] - first)));
        }
        for (int s = 0; s < kStages - 1; s++) {
            if (s < chunks) {
                if (tiles) {
                    fetch_weights(a, task, s, shared + s * kStage);
                }
                fetch_x(a, task, s, shared + s * kStage);
            }
            copy_commit();
        }
        float sums[2][4][4] = {}, totals[2][4][4] = {};
        unsigned char* wide = shared + kStages * kStage;
        for (int chunk = 0; chunk < chunks; chunk++) {
            copy_wait<kStages - 2>();
            block_sync();  // this stage is here, and the one before is done with
            const int next = chunk + kStages - 1;
            if (next < chunks) {
                fetch_weights(a, task, next, shared + next % kStages * kStage);
                fetch_x(a, task, next, shared + next % kStages * kStage);
            }
            copy_commit();
            const unsigned char* stage = shared + chunk % kStages * kStage;
            const unsigned char* w = stage + kXTile;
            if constexpr (kE4m3) {
                widen(w, wide);
                block_sync();
                w = wide;
            }
            multiply(stage, w, sums);
            if (kE4m3 && (chunk % 2 == 1 || chunk + 1 == chunks)) {
                apply_scales(a, task, chunk, sums, totals);
            }
        }
        copy_wait<0>();
        block_sync();  // the ring becomes the results
        float* results = reinterpret_cast<float*>(shared);
        const int g = static_cast<int>(lane_id() >> 2), t = static_cast<int>(lane_id() & 3);
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int n = 0; n < 4; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = warp_row() + m * 16 + i / 2 * 8 + g, out = warp_out() + n * 8 + 2 * t + i % 2;
                    results[row * kResultStride + out] = kE4m3 ? totals[m][n][i] : sums[m][n][i];
                }
            }
        }
        block_sync();
        finish_results(a, task, results);
    }
};

// Dynamic shared memory: Grouped<...>::kSharedBytes.
extern "C" __global__ void __launch_bounds__(Grouped<false>::kThreads)
    matmul_grouped_bf16(MatmulArgs args, const uint32_t* tiles) {
    Grouped<false>::run(args, tiles);
}
extern "C" __global__ void __launch_bounds__(Grouped<true>::kThreads)
    matmul_grouped_e4m3(MatmulArgs args, const uint32_t* tiles) {
    Grouped<true>::run(args, tiles);
}
