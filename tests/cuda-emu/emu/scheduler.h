// Runs grids of CUDA threads on the host: one fiber a thread.
//
// Owns the order in which threads, blocks and dependent grids run, and the checks of how they meet: barriers, warp
// operations, asynchronous copies, the wait for the grid before. It knows no instruction; `warp.h` gives those their
// meaning. Faults end the process with exit code 70 and a line that names block, thread and cause.
//
// Environment: EMU_ORDER = fwd | rev | rand, order of threads and blocks; EMU_SEED, a number, for rand; EMU_LAZY = 1,
// grids wait for the host's `synchronize`.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>

namespace emu {

struct Index3 {
    unsigned x = 0, y = 0, z = 0;
};
struct Extent3 {
    unsigned x, y, z;
    constexpr Extent3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs now; what kernels see as threadIdx, blockIdx, blockDim, gridDim.
extern Index3 thread_index, block_index;
extern Extent3 block_extent, grid_extent;

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// ---- launching, called by the host, from one thread at a time ----

// Of threads and of blocks. In random order blocks run three at a time.
enum class Order { Forward, Reverse, Random };
// Instead of what the environment says.
void set_order(Order order, uint64_t seed);
// Queued grids end only when the host waits for them; otherwise two at most stay behind the one that runs.
void set_lazy(bool lazy);

struct Launch {
    Extent3 grid, block;
    size_t shared_bytes = 0;  // dynamic shared memory
    // Programmatic dependent launch: what stands before the kernel's dependency wait runs ahead of earlier grids.
    bool early = true;
    const char* name = "kernel";
};

// Queues a grid on the one stream. It may run at once, later, or when `synchronize` is called.
void launch(const Launch& launch, std::function<void()> body);
// Runs everything queued to its end.
void synchronize();

// ---- meeting points, called by kernels ----

void block_barrier(const char* file, int line);
// Meets `threads` threads of the block at barrier `id`.
void named_barrier(unsigned id, unsigned threads);
// Waits until the grids before have ended. Every thread of every kernel must call it.
void dependency_wait();
// Lets other threads and blocks run; for loops that wait for another block.
void spin_pause();
unsigned lane();

// What one lane brings to a warp operation, and what it takes away.
struct Slot {
    uint64_t words[4];
};
enum class WarpOp { Shuffle, Sync, Mma, LoadMatrix };
// Turns the slots of the lanes in `mask` into results.
using Combine = void (*)(const Slot in[32], Slot out[32], unsigned mask);
// Waits until all lanes of `mask` are here with the same operation. `orders_memory`: it is also a fence among them.
Slot warp_meet(WarpOp op, unsigned mask, const Slot& mine, Combine combine, bool orders_memory);
// As above, with what the lane brings in registers: a slot on its stack would be read before its writes have settled.
Slot warp_meet(WarpOp op, unsigned mask, uint64_t first, uint64_t second, uint64_t third, Combine combine);
// Gives and takes 8 bytes, in registers: the most frequent meeting. A lane outside the mask is undefined in CUDA and
// gives NaN here.
uint64_t warp_shuffle(unsigned mask, uint64_t mine, unsigned from);

// ---- memory ----

// Shared memory of the running block: NaN until written, exact in size, one variable for each key.
void* shared_variable(const void* key, size_t bytes);
void* shared_dynamic();

// Copies that land only when their thread waits for them. `bytes` may be below `capacity`: the rest becomes zero.
void async_copy(void* to, const void* from, unsigned bytes, unsigned capacity);
void async_commit();
// Lands all but the newest `keep` groups.
void async_wait(unsigned keep);
// The copy itself, compiled with the sanitizers.
void instrumented_copy(void* to, const void* from, unsigned bytes, unsigned capacity);

}  // namespace emu
