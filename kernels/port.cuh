// Instructions: the one place where a kernel meets the machine.
//
// Owns a wrapper for each instruction or intrinsic that kernels use. Under nvcc it is PTX; elsewhere it is the same
// meaning on the host (`tests/cuda-emu/emu/warp.h`), so that every kernel also runs without a GPU. Each wrapper has a
// contract test in `tests/cuda-emu/contract`, which runs in both places. Kernels include `tile.cuh`, which includes
// this; nothing else reaches into the toolkit. No wrapper knows what a kernel is for.
#pragma once

#ifdef __CUDACC__

#include <stdint.h>

#define PORT_SHARED(T, name, n) __shared__ __align__(16) T name[n]
#define PORT_DYNAMIC_SHARED(name)                                   \
    extern __shared__ __align__(128) unsigned char port_dynamic_[]; \
    unsigned char* name = port_dynamic_
#define block_sync() __syncthreads()
#define PORT_FN __device__ __forceinline__

#else

#include "warp.h"

#define PORT_SHARED(T, name, n)            \
    static const char port_key_##name = 0; \
    T* name = static_cast<T*>(emu::shared_variable(&port_key_##name, sizeof(T) * (n)))
#define PORT_DYNAMIC_SHARED(name) unsigned char* name = static_cast<unsigned char*>(emu::shared_dynamic())
#define block_sync() emu::block_barrier(__FILE__, __LINE__)
#define PORT_FN inline

#endif

constexpr unsigned kFullWarp = 0xffffffffu;

// ---- numbers ----

// bfloat16: the upper half of an IEEE single.
struct bf16 {
    uint16_t bits;
};
// 8-bit float, 4 exponent bits with bias 7, 3 mantissa bits, no infinity; largest 448; 0x7f is NaN.
struct e4m3 {
    uint8_t bits;
};

PORT_FN uint32_t bits_of(float x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
#endif
}

PORT_FN float float_of(uint32_t bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    float x;
    memcpy(&x, &bits, 4);
    return x;
#endif
}

PORT_FN bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

PORT_FN float to_float(bf16 x) { return float_of(uint32_t{x.bits} << 16); }
PORT_FN float low_bf16(uint32_t pair) { return float_of(pair << 16); }
PORT_FN float high_bf16(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// Rounds to nearest, ties to even; NaN stays NaN.
PORT_FN bf16 to_bf16(float x) {
#ifdef __CUDACC__
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#else
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return bf16{0x7fff};
    }
    return bf16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
#endif
}

// Two neighbours in one register, `low` at the lower address.
PORT_FN uint32_t pack_bf16(float low, float high) {
#ifdef __CUDACC__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return to_bf16(low).bits | uint32_t{to_bf16(high).bits} << 16;
#endif
}

// The two NaN codes read as +-480: a value that is not finite must be caught before it is stored in eight bits.
PORT_FN float to_float(e4m3 x) {
    constexpr uint32_t kTwoTo120 = (127u + 120u) << 23;
    const uint32_t bits = uint32_t{x.bits} << 24;
    return float_of((bits & 0x80000000u) | (bits & 0x7f000000u) >> 4) * float_of(kTwoTo120);
}

// Rounds to nearest, ties to even; beyond 448 gives 448; NaN gives 0x7f.
PORT_FN e4m3 to_e4m3(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
    return e4m3{static_cast<uint8_t>(pair)};
#else
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
    if (magnitude > 0x7f800000u) {
        return e4m3{0x7f};
    }
    uint32_t code;
    if (magnitude < (127u - 6u) << 23) {
        // Below 2^-6 the step is 2^-9; adding 2^14 leaves exactly that step, rounded to even.
        code = bits_of(float_of(magnitude) + 16384.0f) - bits_of(16384.0f);
    } else {
        code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
        code = code > 0x7eu ? 0x7eu : code;
    }
    return e4m3{static_cast<uint8_t>(code | sign)};
#endif
}

// Four e4m3 in a register, lowest first, as two pairs of bf16: exact, but for the NaN codes (see `to_float`).
PORT_FN uint2 widen_e4m3x4(uint32_t codes) {
    // Exponent and mantissa moved to where bf16 has them are the value times 2^-120.
#ifdef __CUDACC__
    uint2 out;
    const uint32_t even = __byte_perm(codes, 0, 0x1404), odd = __byte_perm(codes, 0, 0x3424);
    const uint32_t low = (even & 0x80008000u) | ((even & 0x7f007f00u) >> 4);
    const uint32_t high = (odd & 0x80008000u) | ((odd & 0x7f007f00u) >> 4);
    // 2^120 in both halves; fma with -0, since a product alone needs sm_90.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out.x) : "r"(low), "r"(0x7b807b80u), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out.y) : "r"(high), "r"(0x7b807b80u), "r"(0x80008000u));
    return out;
#else
    float x[4];
    for (int i = 0; i < 4; i++) {
        x[i] = to_float(e4m3{static_cast<uint8_t>(codes >> (8 * i))});
    }
    return uint2{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
#endif
}

// ---- arithmetic ----

// Never fused with a neighbour: the same bits everywhere.
PORT_FN float mul_rn(float a, float b) {
#ifdef __CUDACC__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
PORT_FN float add_rn(float a, float b) {
#ifdef __CUDACC__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

// 2^x, relative error below 2^-21; exp2 of -infinity is 0.
PORT_FN float fast_exp2(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}
PORT_FN float fast_exp(float x) { return fast_exp2(x * 1.44269504f); }

// 1 / sqrt(x), relative error below 2^-22.
PORT_FN float fast_rsqrt(float x) {
#ifdef __CUDACC__
    return rsqrtf(x);
#else
    return 1.0f / sqrtf(x);
#endif
}

PORT_FN float fast_divide(float a, float b) {
#ifdef __CUDACC__
    return __fdividef(a, b);
#else
    return a / b;
#endif
}

PORT_FN float fast_tanh(float x) {
    // exp never overflows to NaN this way round.
    const float e = fast_exp(-2.0f * fabsf(x));
    return copysignf(fast_divide(1.0f - e, 1.0f + e), x);
}

PORT_FN uint64_t wide_mul(uint32_t a, uint32_t b) { return uint64_t{a} * b; }

// ---- warps and blocks ----

PORT_FN unsigned lane_id() { return threadIdx.x & 31; }

template <class T>
PORT_FN T shuffle(T value, unsigned from) {
#ifdef __CUDACC__
    return __shfl_sync(kFullWarp, value, from);
#else
    return emu::shuffle(kFullWarp, value, from);
#endif
}

template <class T>
PORT_FN T shuffle_xor(T value, unsigned distance) {
#ifdef __CUDACC__
    return __shfl_xor_sync(kFullWarp, value, distance);
#else
    return emu::shuffle(kFullWarp, value, emu::lane() ^ distance);
#endif
}

// Value of the lane `distance` below; a lane's own where there is none.
template <class T>
PORT_FN T shuffle_up(T value, unsigned distance) {
#ifdef __CUDACC__
    return __shfl_up_sync(kFullWarp, value, distance);
#else
    return emu::shuffle(kFullWarp, value, emu::lane() < distance ? emu::lane() : emu::lane() - distance);
#endif
}

// Also orders the lanes' memory accesses.
PORT_FN void warp_sync() {
#ifdef __CUDACC__
    __syncwarp();
#else
    emu::warp_meet(emu::WarpOp::Sync, kFullWarp, emu::Slot{}, nullptr, true);
#endif
}

// Meets `threads` threads of the block, whole warps; id 1 to 15.
PORT_FN void named_sync(unsigned id, unsigned threads) {
#ifdef __CUDACC__
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
    emu::named_barrier(id, threads);
#endif
}

// ---- dependent grids ----

// Waits until the grids before this one have ended and their writes are visible. Every thread calls it before its
// first write to global memory and before it reads anything that a kernel computed, also when it has nothing to do.
PORT_FN void dependency_wait() {
#ifdef __CUDACC__
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#else
    emu::dependency_wait();
#endif
}

// The next grid may begin to start.
PORT_FN void let_dependents_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- memory ----

// 16 bytes that this step reads once: they need not stay in the first-level cache.
PORT_FN uint4 load_stream(const void* from) {
#ifdef __CUDACC__
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
#else
    return *static_cast<const uint4*>(from);
#endif
}
PORT_FN uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }
PORT_FN void store16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// Copies 16 bytes from global to shared memory in the background; of them the first `bytes` (0 to 16) are read, the
// rest become zero. Both addresses are multiples of 16.
PORT_FN void copy_async(void* shared, const void* global, unsigned bytes) {
#ifdef __CUDACC__
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
        "l"(global), "r"(bytes)
        : "memory");
#else
    emu::async_copy(shared, global, bytes, 16);
#endif
}

// Closes this thread's group of copies.
PORT_FN void copy_commit() {
#ifdef __CUDACC__
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    emu::async_commit();
#endif
}

// Waits for all of this thread's groups but the newest `Keep`. Other threads see them after a barrier.
template <int Keep>
PORT_FN void copy_wait() {
#ifdef __CUDACC__
    asm volatile("cp.async.wait_group %0;" ::"n"(Keep) : "memory");
#else
    emu::async_wait(Keep);
#endif
}

// Adds to a counter in global memory and returns what was there. What this thread wrote or saw before it, other
// threads' writes that a barrier ordered included, is seen by whoever counts later, and by those it meets at a barrier
// then.
PORT_FN unsigned count_arrival(unsigned* counter) {
#ifdef __CUDACC__
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
#else
    return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL);
#endif
}

// Unordered sums in shared or global memory.
PORT_FN void atomic_add(unsigned* to, unsigned value) {
#ifdef __CUDACC__
    atomicAdd(to, value);
#else
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
#endif
}
PORT_FN void atomic_add(unsigned long long* to, unsigned long long value) {
#ifdef __CUDACC__
    atomicAdd(to, value);
#else
    __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
#endif
}
PORT_FN void atomic_or(unsigned* to, unsigned bits) {
#ifdef __CUDACC__
    atomicOr(to, bits);
#else
    __atomic_fetch_or(to, bits, __ATOMIC_RELAXED);
#endif
}
// Adds 1 and returns what was there; orders nothing.
PORT_FN unsigned count_in_block(unsigned* counter) {
#ifdef __CUDACC__
    return atomicAdd(counter, 1u);
#else
    return __atomic_fetch_add(counter, 1u, __ATOMIC_RELAXED);
#endif
}

// ---- matrices ----

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l / 8 and
// gets elements (l / 4, 2 (l % 4)) and the next of each.
PORT_FN void load_matrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#else
    emu::load_matrix_x4(r, row);
#endif
}

// As `load_matrix_x4`, each matrix transposed.
PORT_FN void load_matrix_x4_transposed(uint32_t (&r)[4], const void* row) {
#ifdef __CUDACC__
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
#else
    emu::load_matrix_x4_transposed(r, row);
#endif
}

// c[16][8] += a[16][16] b[16][8], bf16 in, single precision out; fragments as in the PTX ISA, m16n8k16.
PORT_FN void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef __CUDACC__
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emu::mma_bf16(c, a, b);
#endif
}
