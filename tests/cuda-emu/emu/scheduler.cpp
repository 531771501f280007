// What running threads call: meeting points, shared memory, asynchronous copies, failure. See scheduler.h. Compiled
// without sanitizers; what they must see is in copy.cpp and in headers.
#include <algorithm>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

#include "machine.h"

namespace emu {

Index3 thread_index, block_index;
Extent3 block_extent, grid_extent;

namespace {

void complete_warp(Warp& warp, Block& block, unsigned warp_number, unsigned mask, Combine combine) {
    if (combine) {
        combine(warp.in, warp.out, mask);
    }
    for (unsigned l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) {
            continue;
        }
        Thread& t = *block.team->threads[warp_number * 32 + l];
        if (&t != machine.current) {
            t.wait = Wait::None;
        }
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
    self.file = file;
    self.line = line;
    release(&team.barrier_key);
    pause(Wait::Barrier);
    acquire(&team.barrier_key);
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
    Thread& self = *machine.current;
    Block& block = *self.block;
    const unsigned warp_number = self.number >> 5, me = self.number & 31;
    const unsigned first = warp_number * 32, lanes = std::min(32u, block.threads - first);
    mask &= lanes == 32 ? ~0u : (1u << lanes) - 1;
    if (!(mask >> me & 1)) {
        fail("warp operation %d: lane %u is not in its mask %08x", static_cast<int>(op), me, mask);
    }
    Warp& warp = block.warps[warp_number];
    warp.in[me] = mine;
    self.op = op;
    self.mask = mask;
    if (orders_memory) {
        release(&block.team->warp_keys[warp_number]);
    }
    bool all_here = true;
    for (unsigned l = 0; l < lanes; l++) {
        if (l == me || !(mask >> l & 1)) {
            continue;
        }
        const Thread& other = *block.team->threads[first + l];
        if (other.wait == Wait::Done) {
            fail("warp operation %d: lane %u of mask %08x has ended", static_cast<int>(op), l, mask);
        }
        if (other.wait != Wait::Warp || other.mask != mask) {
            all_here = false;
        } else if (other.op != op) {
            fail("lanes %u and %u wait in different warp operations, %d and %d", me, l, static_cast<int>(op),
                 static_cast<int>(other.op));
        }
    }
    if (all_here) {
        complete_warp(warp, block, warp_number, mask, combine);
    } else {
        pause(Wait::Warp);
    }
    if (orders_memory) {
        acquire(&block.team->warp_keys[warp_number]);
    }
    return warp.out[me];
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
    std::copy(self.copies + landed, self.copies + self.copy_count, self.copies);
    self.copy_count -= landed;
}

}  // namespace emu
