// What running threads call: meeting points, shared memory, asynchronous copies, failure. See scheduler.h. Compiled
// without sanitizers; what they must see is in copy.cpp and in headers.
#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "machine.h"

namespace emu {

Index3 thread_index, block_index;
Extent3 block_extent, grid_extent;

namespace {

// Whether all lanes of `mask` have come to the operation that lane `me` has come to.
bool all_have_come(const Warp& warp, unsigned mask, unsigned me) {
    if (const unsigned ended = mask & warp.done) {
        fail("warp operation %d: lane %d of mask %08x has ended", static_cast<int>(warp.ops[me]), __builtin_ctz(ended),
             mask);
    }
    if (mask & ~warp.meeting) {
        return false;
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const auto l = static_cast<unsigned>(__builtin_ctz(rest));
        if (warp.masks[l] != mask) {
            return false;
        }
        if (warp.ops[l] != warp.ops[me]) {
            fail("lanes %u and %u wait in different warp operations, %d and %d", me, l,
                 static_cast<int>(warp.ops[me]), static_cast<int>(warp.ops[l]));
        }
    }
    return true;
}

// Waits until all lanes of `mask` are here with what they bring.
void meet(WarpOp op, unsigned mask, Combine combine, bool orders_memory) {
    Thread& self = *machine.current;
    Block& block = *self.block;
    const unsigned warp_number = self.number >> 5, me = self.number & 31, bit = 1u << me;
    Warp& warp = block.warps[warp_number];
    mask &= warp.lanes;
    if (!(mask & bit)) {
        fail("warp operation %d: lane %u is not in its mask %08x", static_cast<int>(op), me, mask);
    }
    warp.ops[me] = op;
    warp.masks[me] = mask;
    warp.meeting |= bit;
    char* const key = &block.team->warp_keys[warp_number][self.warp_turn % 2];
    if (orders_memory) {
        if (mask != warp.lanes) {
            fail("a warp barrier for the lanes of mask %08x: it is for all", mask);
        }
        self.warp_turn++;
        release(key);
    }
    if (all_have_come(warp, mask, me)) {
        if (combine) {
            combine(warp.in, warp.out, mask);
        }
        warp.meeting &= ~mask;
        wake(block, warp_number, mask & ~bit);
    } else {
        pause(Wait::Warp);
    }
    if (orders_memory) {
        acquire(key);
    }
}

void combine_shuffle(const Slot in[32], Slot out[32], unsigned mask) {
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const auto l = static_cast<unsigned>(__builtin_ctz(rest));
        const uint64_t from = in[l].words[1];
        out[l].words[0] = mask >> from & 1 ? in[from].words[0] : ~uint64_t{0};
    }
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    const char* kernel = machine.current ? machine.current->block->grid->launch.name : "kernel";
    fprintf(stderr, "EMU ERROR: %s, block (%u,%u,%u) thread (%u,%u,%u): ", kernel, block_index.x, block_index.y,
            block_index.z, thread_index.x, thread_index.y, thread_index.z);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    fflush(nullptr);
    _exit(70);
}

void block_barrier(const char* file, int line) {
    Thread& self = *machine.current;
    Team& team = *self.block->team;
    Block& block = *self.block;
    self.file = file;
    self.line = line;
    if (!block.at_barrier++) {
        block.first_at_barrier = &self;
    } else if (const Thread& first = *block.first_at_barrier;
               line != first.line || (file != first.file && strcmp(file, first.file))) {
        fail("threads of one block wait at different barriers: %s:%d and %s:%d", first.file, first.line, file, line);
    }
    char* const key = &team.barrier_keys[self.barrier_turn++ % 2];
    release(key);
    // The last goes on at once, but not always first.
    finish_barrier(block);
    pause(Wait::Barrier);
    acquire(key);
}

void named_barrier(unsigned id, unsigned threads) {
    if (id == 0 || id > 15) {
        fail("barrier %u: 1 to 15 may be named", id);
    }
    if (threads == 0 || threads % 32) {
        fail("barrier %u for %u threads, which are no whole warps", id, threads);
    }
    Thread& self = *machine.current;
    Team& team = *self.block->team;
    self.barrier = id;
    self.barrier_threads = threads;
    release(&team.named_keys[id]);
    NamedBarrier& barrier = self.block->named[id];
    if (barrier.waiting && barrier.wanted != threads) {
        fail("threads expect different numbers at barrier %u, %u and %u", id, barrier.wanted, threads);
    }
    barrier.wanted = threads;
    barrier.lanes[self.number / 32] |= 1u << self.number % 32;
    if (++barrier.waiting == threads) {
        for (unsigned w = 0; w < self.block->warp_count; w++) {
            wake(*self.block, w, barrier.lanes[w]);
            barrier.lanes[w] = 0;
        }
        barrier.waiting = 0;
    }
    pause(Wait::Named);
    acquire(&team.named_keys[id]);
}

void dependency_wait() {
    Thread& self = *machine.current;
    self.saw_dependency = true;
    if (!self.block->grid->dependency_met) {
        pause(Wait::Dependency);
    }
    // Everything that ended before this grid is visible; the host's thread has acquired it.
    acquire(&machine);
}

void spin_pause() { pause(Wait::Spin); }

unsigned lane() { return machine.current->number & 31; }

Slot warp_meet(WarpOp op, unsigned mask, const Slot& mine, Combine combine, bool orders_memory) {
    const Thread& self = *machine.current;
    Warp& warp = self.block->warps[self.number >> 5];
    warp.in[self.number & 31] = mine;
    meet(op, mask, combine, orders_memory);
    return warp.out[self.number & 31];
}

Slot warp_meet(WarpOp op, unsigned mask, uint64_t first, uint64_t second, uint64_t third, Combine combine) {
    const Thread& self = *machine.current;
    Warp& warp = self.block->warps[self.number >> 5];
    Slot& slot = warp.in[self.number & 31];
    slot.words[0] = first;
    slot.words[1] = second;
    slot.words[2] = third;
    meet(op, mask, combine, false);
    return warp.out[self.number & 31];
}

uint64_t warp_shuffle(unsigned mask, uint64_t mine, unsigned from) {
    const Thread& self = *machine.current;
    Warp& warp = self.block->warps[self.number >> 5];
    Slot& slot = warp.in[self.number & 31];
    slot.words[0] = mine;
    slot.words[1] = from;
    meet(WarpOp::Shuffle, mask, combine_shuffle, false);
    return warp.out[self.number & 31].words[0];
}

void* shared_variable(const void* key, size_t bytes) {
    Block& block = *machine.current->block;
    for (unsigned i = 0; i < block.variable_count; i++) {
        if (block.variables[i].key == key) {
            return block.variables[i].memory;
        }
    }
    if (block.variable_count == kMaxVariables) {
        fail("more than %u shared variables", kMaxVariables);
    }
    void* memory = allocate_shared(block, bytes);
    block.variables[block.variable_count++] = {key, memory};
    return memory;
}

void* shared_dynamic() {
    Block& block = *machine.current->block;
    if (!block.dynamic) {
        fail("the kernel uses dynamic shared memory, the launch gave none");
    }
    return block.dynamic;
}

void async_copy(void* to, const void* from, unsigned bytes, unsigned capacity) {
    Thread& self = *machine.current;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & (capacity - 1)) {
        fail("asynchronous copy of %u bytes between misaligned addresses", capacity);
    }
    if (bytes > capacity) {
        fail("asynchronous copy of %u bytes into %u", bytes, capacity);
    }
    if (self.copy_count == kMaxCopies) {
        fail("more than %u asynchronous copies in flight", kMaxCopies);
    }
    if (!self.copies) {
        self.copies.reset(new Copy[kMaxCopies]);
    }
    self.copies[self.copy_count++] = {to, from, bytes, capacity, self.group};
}

void async_commit() { machine.current->group++; }

void async_wait(unsigned keep) {
    Thread& self = *machine.current;
    unsigned landed = 0;
    while (landed < self.copy_count && self.copies[landed].group + keep < self.group) {
        const Copy& c = self.copies[landed++];
        instrumented_copy(c.to, c.from, c.bytes, c.capacity);
    }
    std::copy(self.copies.get() + landed, self.copies.get() + self.copy_count, self.copies.get());
    self.copy_count -= landed;
}

}  // namespace emu
