// Threads and blocks: starting them, giving each its turn, letting barriers go. See scheduler.h. Compiled without
// sanitizers.
#include <algorithm>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "machine.h"

namespace emu {

Machine machine;

uint32_t next_random() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return static_cast<uint32_t>(machine.random >> 16);
}

namespace {
void seed_random(uint64_t seed) { machine.random = seed * 0x9e3779b97f4a7c15ull + 1; }
}  // namespace

void set_order(Order order, uint64_t seed) {
    machine.configured = true;
    machine.order = order;
    seed_random(seed);
}

void set_lazy(bool lazy) { machine.lazy = lazy; }

void start_machine() {
    adopt_running_stack(machine.host);
    if (machine.configured) {
        return;
    }
    machine.configured = true;
    const char* order = getenv("EMU_ORDER");
    const char* seed = getenv("EMU_SEED");
    const char* lazy = getenv("EMU_LAZY");
    machine.lazy = lazy && !strcmp(lazy, "1");
    if (order && !strcmp(order, "rev")) {
        machine.order = Order::Reverse;
    }
    if (order && !strcmp(order, "rand")) {
        machine.order = Order::Random;
    }
    seed_random(seed ? strtoull(seed, nullptr, 10) : 1);
}

namespace {

// ---- threads ----

unsigned lowest(unsigned bits) { return static_cast<unsigned>(__builtin_ctz(bits)); }
unsigned highest(unsigned bits) { return 31 - static_cast<unsigned>(__builtin_clz(bits)); }
// The next set bit from a random place on.
unsigned any(unsigned bits) {
    const unsigned turn = next_random() & 31;
    const unsigned turned = turn ? bits >> turn | bits << (32 - turn) : bits;
    return (lowest(turned) + turn) & 31;
}

unsigned choose(unsigned bits) {
    return machine.order == Order::Forward ? lowest(bits) : machine.order == Order::Reverse ? highest(bits) : any(bits);
}

// A thread of the block that can run; null if there is none or it is another block's turn. In forward and reverse order
// a warp goes on while it can, which runs far ahead of the others.
Thread* next_thread(Block& block, unsigned warp) {
    if (!block.ready_warps || !block.budget) {
        return nullptr;
    }
    if (machine.order == Order::Random) {
        block.budget--;
        warp = any(block.ready_warps);
    } else if (!(block.ready_warps >> warp & 1)) {
        warp = choose(block.ready_warps);
    }
    Warp& w = block.warps[warp];
    const unsigned lane = choose(w.runnable);
    w.runnable &= ~(1u << lane);
    if (!w.runnable) {
        block.ready_warps &= ~(1u << warp);
    }
    return &block.team->threads[warp * 32 + lane];
}

// The indices that kernels see.
void become(Thread& thread) {
    thread.wait = Wait::None;
    machine.current = &thread;
    thread_index = thread.index;
}

void run_thread(Thread& thread) {
    const Block& block = *thread.block;
    block_index = block.index;
    block_extent = block.grid->launch.block;
    grid_extent = block.grid->launch.grid;
    become(thread);
    switch_fiber(machine.host, thread.fiber, false);
    machine.current = nullptr;
}

// From the thread that runs to another of its block, or to the scheduler.
void leave(Thread& self, bool ends) {
    Thread* next = next_thread(*self.block, self.number / 32);
    if (next == &self) {
        become(self);
        return;
    }
    if (next) {
        become(*next);
    }
    switch_fiber(self.fiber, next ? next->fiber : machine.host, ends);
}

}  // namespace

void wake(Block& block, unsigned warp, unsigned lanes) {
    block.warps[warp].runnable |= lanes;
    if (lanes) {
        block.ready_warps |= 1u << warp;
    }
}

void pause(Wait wait) {
    Thread& self = *machine.current;
    self.wait = wait;
    Warp& warp = self.block->warps[self.number / 32];
    const unsigned bit = 1u << self.number % 32;
    warp.spinning |= wait == Wait::Spin ? bit : 0;
    warp.dependent |= wait == Wait::Dependency ? bit : 0;
    leave(self, false);
}

namespace {

void thread_main() {
    Thread& self = *machine.current;
    Block& block = *self.block;
    entered(self.fiber);
    acquire(&block.team->ended_key);
    acquire(&block.grid->started_key);
    block.grid->body();
    if (self.copy_count) {
        fail("thread ends with %u asynchronous copies it never waited for", self.copy_count);
    }
    if (!self.saw_dependency) {
        fail("thread ends without having waited for the grid before");
    }
    release(&block.team->ended_key);
    release(&block.grid->ended_key);
    self.wait = Wait::Done;
    block.warps[self.number / 32].done |= 1u << self.number % 32;
    block.done++;
    finish_barrier(block);
    leave(self, true);
    abort();
}

// ---- shared memory ----

void poison(void* memory, size_t bytes) {
    if (!under_tsan()) {
        memset(memory, 0xff, bytes);
        return;
    }
    // It would take memset for a write of the program under test.
    auto* out = static_cast<volatile uint8_t*>(memory);
    for (size_t i = 0; i < bytes; i++) {
        out[i] = 0xff;
    }
}

}  // namespace

void* allocate_shared(Block& block, size_t bytes) {
    block.shared_bytes += bytes;
    if (block.shared_bytes > kMaxShared) {
        fail("%zu bytes of shared memory, %zu exist", block.shared_bytes, kMaxShared);
    }
    void* memory = nullptr;
    if (under_tsan()) {
        // Never freed: freeing would be an access of the host's thread.
        memory = block.team->arena + block.arena_used;
        block.arena_used += (bytes + 255) / 128 * 128;
        if (block.arena_used > kArenaBytes) {
            fail("out of room for shared memory");
        }
    } else if (posix_memalign(&memory, 128, bytes)) {
        fail("out of memory");
    }
    poison(memory, bytes);
    return memory;
}

namespace {

Team& take_team(unsigned threads) {
    constexpr long kLeastFree = 2;
    while (std::count_if(machine.teams.begin(), machine.teams.end(), [](const auto& t) { return !t->taken; }) <
           kLeastFree) {
        machine.teams.push_back(std::make_unique<Team>());
    }
    Team* team = nullptr;
    for (size_t i = 0; i < machine.teams.size() && !team; i++) {
        Team& candidate = *machine.teams[machine.next_team++ % machine.teams.size()];
        if (!candidate.taken) {
            team = &candidate;
        }
    }
    team->taken = true;
    if (under_tsan() && !team->arena) {
        void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) {
            fail("out of memory");
        }
        team->arena = static_cast<char*>(memory);
    }
    if (team->threads.size() < threads) {
        team->threads.resize(threads);
    }
    return *team;
}

}  // namespace

namespace {

void reset(Block& block, Grid& grid, size_t at) {
    const Launch& l = grid.launch;
    block.grid = &grid;
    block.index.x = static_cast<unsigned>(at % l.grid.x);
    block.index.y = static_cast<unsigned>(at / l.grid.x % l.grid.y);
    block.index.z = static_cast<unsigned>(at / l.grid.x / l.grid.y);
    block.threads = l.block.x * l.block.y * l.block.z;
    block.warp_count = (block.threads + 31) / 32;
    block.done = block.at_barrier = block.variable_count = block.ready_warps = 0;
    block.dynamic = nullptr;
    block.shared_bytes = block.arena_used = 0;
    for (NamedBarrier& barrier : block.named) {
        if (barrier.wanted) {
            barrier = {};
        }
    }
    for (unsigned w = 0; w < block.warp_count; w++) {
        Warp& warp = block.warps[w];
        const unsigned lanes = std::min(32u, block.threads - w * 32);
        warp.lanes = lanes == 32 ? ~0u : (1u << lanes) - 1;
        warp.runnable = warp.spinning = warp.dependent = warp.meeting = warp.done = 0;
        wake(block, w, warp.lanes);
    }
}

}  // namespace

void admit_block(Grid& grid) {
    const Launch& l = grid.launch;
    const size_t turn = grid.admitted++;
    Team& team = take_team(l.block.x * l.block.y * l.block.z);
    Block& block = team.block;
    block.team = &team;
    reset(block, grid, machine.order == Order::Reverse ? grid.blocks - 1 - turn : turn);
    block_index = block.index;
    if (l.shared_bytes) {
        block.dynamic = allocate_shared(block, l.shared_bytes);
    }
    Index3 index;
    for (unsigned i = 0; i < block.threads; i++) {
        Thread& thread = team.threads[i];
        thread.block = &block;
        thread.number = i;
        thread.index = index;
        thread.wait = Wait::None;
        thread.saw_dependency = false;
        thread.barrier_turn = thread.warp_turn = 0;
        thread.copy_count = thread.group = 0;
        prepare(thread.fiber, thread_main);
        if (++index.x == l.block.x) {
            index.x = 0;
            if (++index.y == l.block.y) {
                index.y = 0;
                index.z++;
            }
        }
    }
    grid.running.push_back(&block);
}

void retire_block(Block& block) {
    if (!under_tsan()) {
        for (unsigned i = 0; i < block.variable_count; i++) {
            free(block.variables[i].memory);
        }
        free(block.dynamic);
    }
    block.team->taken = false;
}

// A barrier that all threads but those that have ended stand at lets them go; there must be none that has ended.
bool finish_barrier(Block& block) {
    if (!block.at_barrier || block.at_barrier + block.done != block.threads) {
        return false;
    }
    if (block.done) {
        const Thread& first = *block.first_at_barrier;
        thread_index = first.index;
        fail("barrier at %s:%d while %u threads of the block have ended", first.file, first.line, block.done);
    }
    block.at_barrier = 0;
    for (unsigned w = 0; w < block.warp_count; w++) {
        wake(block, w, block.warps[w].lanes);
    }
    return true;
}

bool run_turn(Block& block) {
    bool moved = false;
    block.budget = machine.order == Order::Random ? block.threads : 1;
    while (Thread* thread = next_thread(block, machine.order == Order::Reverse ? block.warp_count - 1 : 0)) {
        moved = true;
        run_thread(*thread);
    }
    // Those that spin look once more; where nothing has changed they spin on.
    for (unsigned w = 0; w < block.warp_count; w++) {
        unsigned spinning = block.warps[w].spinning;
        while (spinning) {
            const unsigned lane = choose(spinning), bit = 1u << lane;
            spinning &= ~bit;
            block.warps[w].spinning &= ~bit;
            block.budget = 0;
            run_thread(block.team->threads[w * 32 + lane]);
            moved |= !(block.warps[w].spinning & bit);
        }
    }
    return moved || block.ready_warps;
}

}  // namespace emu
