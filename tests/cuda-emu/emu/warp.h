// What CUDA C++ gives a kernel, for the host: keywords, indices, warp operations, matrix instructions.
//
// Owns the meaning of each instruction as the PTX ISA describes it; the scheduler owns when it happens. Included by
// `kernels/port.cuh` and by nothing else.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "scheduler.h"

// Left visible where only the names of kernels are asked for; see driver/table.py.
#ifdef EMU_LISTING
#define __global__ EMU_KERNEL
#define __launch_bounds__(...) EMU_BOUNDS(__VA_ARGS__)
#else
#define __global__
#define __launch_bounds__(...)
#endif
#define __device__
#define __host__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
// A raw shared variable would be one for all blocks: kernels use PORT_SHARED.
#define __shared__ use_PORT_SHARED_instead

#define threadIdx (emu::thread_index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_extent)
#define gridDim (emu::grid_extent)
using dim3 = emu::Extent3;

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };

namespace emu {

// Always inlined: warp.cpp must not get a copy that a sanitizer watches.
template <class T>
__attribute__((always_inline)) inline Slot to_slot(T value) {
    static_assert(sizeof(T) <= sizeof(Slot));
    Slot slot{};
    memcpy(&slot, &value, sizeof(T));
    return slot;
}

template <class T>
__attribute__((always_inline)) inline T from_slot(const Slot& slot) {
    T value;
    memcpy(&value, &slot, sizeof(T));
    return value;
}

// In warp.cpp.
void combine_mma_bf16(const Slot in[32], Slot out[32], unsigned mask);
// Lane l gets the rows of which it holds a part: row l / 4 of each of four 8x8 matrices.
void combine_rows(const Slot in[32], Slot out[32], unsigned mask);
// Transposed: element (2t, g) and (2t + 1, g) instead of (g, 2t) and (g, 2t + 1), so all eight rows are touched.
void combine_all_rows(const Slot in[32], Slot out[32], unsigned mask);
void combine_next_rows(const Slot in[32], Slot out[32], unsigned mask);

template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
    static_assert(sizeof(T) <= 8);
    uint64_t word = 0;
    memcpy(&word, &value, sizeof(T));
    word = warp_shuffle(mask, word, from & 31);
    memcpy(&value, &word, sizeof(T));
    return value;
}

// Fragments of mma.m16n8k16, PTX ISA "Matrix Fragments for mma.m16n8k16 with floating point type". With g = lane / 4
// and t = lane % 4: a0 (g, 2t), a1 (g + 8, 2t), a2 (g, 2t + 8), a3 (g + 8, 2t + 8); b0 (2t, g), b1 (2t + 8, g); each
// register holds this element and the next in k. c0, c1 (g, 2t), (g, 2t + 1); c2, c3 eight rows below.
struct MmaOperands {
    uint32_t a[4], b[2];
};

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const auto pair = [](uint32_t low, uint32_t high) { return low | uint64_t{high} << 32; };
    const Slot result =
        warp_meet(WarpOp::Mma, ~0u, pair(a[0], a[1]), pair(a[2], a[3]), pair(b[0], b[1]), combine_mma_bf16);
    float product[4];
    memcpy(product, &result, sizeof product);
    for (int i = 0; i < 4; i++) {
        c[i] += product[i];
    }
}

struct RowPointers {
    const char* row[4];
};

inline const char* aligned_row(const char* row) {
    if (reinterpret_cast<uintptr_t>(row) & 15) {
        fail("ldmatrix: a row's address is no multiple of 16");
    }
    return row;
}

inline void load_matrix_x4(uint32_t (&r)[4], const void* row) {
    const Slot mine = to_slot(static_cast<const char*>(row));
    const auto rows = from_slot<RowPointers>(warp_meet(WarpOp::LoadMatrix, ~0u, mine, combine_rows, false));
    for (int m = 0; m < 4; m++) {
        memcpy(&r[m], aligned_row(rows.row[m]) + (lane() & 3) * 4, 4);
    }
}

inline void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
    const Slot mine = to_slot(static_cast<const char*>(row));
    const auto even = from_slot<RowPointers>(warp_meet(WarpOp::LoadMatrix, ~0u, mine, combine_all_rows, false));
    const auto odd = from_slot<RowPointers>(warp_meet(WarpOp::LoadMatrix, ~0u, mine, combine_next_rows, false));
    const unsigned column = lane() / 4 * 2;
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        memcpy(&pair[0], aligned_row(even.row[m]) + column, 2);
        memcpy(&pair[1], aligned_row(odd.row[m]) + column, 2);
        memcpy(&r[m], pair, 4);
    }
}

}  // namespace emu
