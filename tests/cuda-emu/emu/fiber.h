// Stackful coroutines for the scheduler: a stack, a stack pointer, and what the sanitizers must be told of them.
//
// Owns switching between stacks (x86-64, System V). Knows nothing of CUDA. Compiled without sanitizers: its own
// bookkeeping must be invisible to them.
#pragma once
#include <stddef.h>

namespace emu {

constexpr size_t kStackBytes = 256 << 10;

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;        // lowest address; null for the stack of a thread of the process
    size_t color = 0;             // bytes left free at the top
    void* tsan = nullptr;         // ThreadSanitizer's handle
    void* asan_frames = nullptr;  // AddressSanitizer's fake stack while switched out
};

// Whether this process runs under ThreadSanitizer.
bool under_tsan();
// Takes over the running stack as a fiber to switch back to.
void adopt_running_stack(Fiber& fiber);
// Makes the next switch to `fiber` call `entry` on an empty stack. `entry` never returns: it switches away for good.
void prepare(Fiber& fiber, void (*entry)());
// Runs `to` until something switches back. `ends`: `from` will be prepared anew before it runs again.
void switch_fiber(Fiber& from, Fiber& to, bool ends);
// First statement of an entry function.
void entered(Fiber& self);

// Happens-before edges for ThreadSanitizer: what was written before `release(key)` is seen after `acquire(key)`.
void acquire(void* key);
void release(void* key);

}  // namespace emu
