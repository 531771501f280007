#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#ifndef __x86_64__
#error "fiber.cpp switches stacks for x86-64 only"
#endif

// Absent unless the sanitizer is linked in.
extern "C" {
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void* __tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_switch_to_fiber(void*, unsigned);
__attribute__((weak)) void __tsan_acquire(void*);
__attribute__((weak)) void __tsan_release(void*);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void**, const void*, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void emu_switch_stack(void** save, void* load);
}

// Callee-saved registers go to the old stack and come from the new one. MXCSR and the x87 control word are the same
// on all fibers.
asm(R"(
.text
.globl emu_switch_stack
.type emu_switch_stack,@function
emu_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emu_switch_stack,.-emu_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");

namespace emu {

namespace {
// The stack that the running thread brought along, learnt when it is left.
const void* host_stack;
size_t host_stack_bytes;
constexpr unsigned kNoSync = 1;
constexpr size_t kTopBytes = 64;
// Tops of stacks lie differently within their pages, or all of them would want the same few lines of the cache.
constexpr size_t kColors = 61, kColorBytes = 320;

// Whether the switch that is being made leaves the host's stack.
bool leaves_host;

void learn(const void* bottom, size_t bytes) {
    if (leaves_host) {
        host_stack = bottom;
        host_stack_bytes = bytes;
    }
}
}  // namespace

bool under_tsan() { return __tsan_create_fiber != nullptr; }

void adopt_running_stack(Fiber& fiber) {
    if (under_tsan()) {
        fiber.tsan = __tsan_get_current_fiber();
    }
}

void prepare(Fiber& fiber, void (*entry)()) {
    if (!fiber.stack) {
        void* memory =
            mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            perror("stack of a fiber");
            abort();
        }
        fiber.stack = static_cast<char*>(memory);
        static size_t made;
        fiber.color = made++ % kColors * kColorBytes;
        if (under_tsan()) {
            fiber.tsan = __tsan_create_fiber(0);
        }
    }
    constexpr int kSavedRegisters = 6;
    void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - kTopBytes - fiber.color);
    *--top = nullptr;  // entry's return address, which keeps the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSavedRegisters; i++) {
        *--top = nullptr;
    }
    fiber.stack_pointer = top;
    fiber.asan_frames = nullptr;
}

void switch_fiber(Fiber& from, Fiber& to, bool ends) {
    if (__sanitizer_start_switch_fiber) {
        leaves_host = !from.stack;
        const void* bottom = to.stack ? to.stack : host_stack;
        __sanitizer_start_switch_fiber(ends ? nullptr : &from.asan_frames, bottom,
                                       to.stack ? kStackBytes : host_stack_bytes);
    }
    if (under_tsan()) {
        __tsan_switch_to_fiber(to.tsan, kNoSync);
    }
    emu_switch_stack(&from.stack_pointer, to.stack_pointer);
    if (__sanitizer_finish_switch_fiber) {
        const void* bottom;
        size_t bytes;
        __sanitizer_finish_switch_fiber(from.asan_frames, &bottom, &bytes);
        learn(bottom, bytes);
    }
}

void entered(Fiber& self) {
    if (__sanitizer_finish_switch_fiber) {
        const void* bottom;
        size_t bytes;
        __sanitizer_finish_switch_fiber(self.asan_frames, &bottom, &bytes);
        learn(bottom, bytes);
    }
}

void acquire(void* key) {
    if (__tsan_acquire) {
        __tsan_acquire(key);
    }
}

void release(void* key) {
    if (__tsan_release) {
        __tsan_release(key);
    }
}

}  // namespace emu
