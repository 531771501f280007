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

void start_machine() {
    adopt_running_stack(machine.host);
    if (machine.configured) {
        return;
    }
    machine.configured = true;
    const char* order = getenv("EMU_ORDER");
    const char* seed = getenv("EMU_SEED");
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

void run_thread(Thread& thread) {
    machine.current = &thread;
    thread_index = thread.index;
    block_index = thread.block->index;
    block_extent = thread.block->grid->launch.block;
    grid_extent = thread.block->grid->launch.grid;
    switch_fiber(machine.host, thread.fiber, false);
    machine.current = nullptr;
}

}  // namespace

// Gives the processor back to the scheduler until `wait` is over.
void pause(Wait wait) {
    Thread& self = *machine.current;
    self.wait = wait;
    switch_fiber(self.fiber, machine.host, false);
}

namespace {

void thread_main() {
    Thread& self = *machine.current;
    entered(self.fiber);
    acquire(&self.block->team->ended_key);
    acquire(&self.block->grid->started_key);
    self.block->grid->body();
    if (self.copy_count) {
        fail("thread ends with %u asynchronous copies it never waited for", self.copy_count);
    }
    if (!self.saw_dependency) {
        fail("thread ends without having waited for the grid before");
    }
    release(&self.block->team->ended_key);
    release(&self.block->grid->ended_key);
    self.wait = Wait::Done;
    switch_fiber(self.fiber, machine.host, true);
    abort();
}

// ---- shared memory ----

// Not memset: ThreadSanitizer would take it for a write of the program under test.
void poison(void* memory, size_t bytes) {
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
    while (team->threads.size() < threads) {
        team->threads.push_back(std::make_unique<Thread>());
    }
    return *team;
}

}  // namespace

void admit_block(Grid& grid) {
    const Launch& l = grid.launch;
    const size_t turn = grid.admitted++;
    const size_t at = machine.order == Order::Reverse ? grid.blocks - 1 - turn : turn;
    auto block = std::make_unique<Block>();
    block->grid = &grid;
    block->index.x = static_cast<unsigned>(at % l.grid.x);
    block->index.y = static_cast<unsigned>(at / l.grid.x % l.grid.y);
    block->index.z = static_cast<unsigned>(at / l.grid.x / l.grid.y);
    block->threads = l.block.x * l.block.y * l.block.z;
    block->team = &take_team(block->threads);
    block->warps.resize((block->threads + 31) / 32);
    block_index = block->index;
    if (l.shared_bytes) {
        block->dynamic = allocate_shared(*block, l.shared_bytes);
    }
    for (unsigned i = 0; i < block->threads; i++) {
        Thread& thread = *block->team->threads[i];
        thread.block = block.get();
        thread.number = i;
        thread.index.x = i % l.block.x;
        thread.index.y = i / l.block.x % l.block.y;
        thread.index.z = i / l.block.x / l.block.y;
        thread.wait = Wait::None;
        thread.saw_dependency = false;
        thread.copy_count = thread.group = 0;
        prepare(thread.fiber, thread_main);
    }
    grid.running.push_back(std::move(block));
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

namespace {

[[noreturn]] void fail_at(const Thread& thread, const char* what) {
    thread_index = thread.index;
    block_index = thread.block->index;
    fail("%s", what);
}

// Lets a block's barrier go once every thread stands at it.
bool release_barrier(Block& block) {
    const Thread* first = nullptr;
    unsigned waiting = 0, done = 0;
    for (unsigned i = 0; i < block.threads; i++) {
        const Thread& t = *block.team->threads[i];
        done += t.wait == Wait::Done;
        if (t.wait != Wait::Barrier) {
            continue;
        }
        waiting++;
        if (!first) {
            first = &t;
        }
        if (t.line != first->line || strcmp(t.file, first->file)) {
            thread_index = t.index;
            fail("threads of one block wait at different barriers: %s:%d and %s:%d", first->file, first->line, t.file,
                 t.line);
        }
    }
    if (!waiting || waiting + done != block.threads) {
        return false;
    }
    if (done) {
        thread_index = first->index;
        fail("barrier at %s:%d while %u threads of the block have ended", first->file, first->line, done);
    }
    for (unsigned i = 0; i < block.threads; i++) {
        block.team->threads[i]->wait = Wait::None;
    }
    return true;
}

bool release_named(Block& block) {
    bool any = false;
    for (unsigned id = 1; id < 16; id++) {
        unsigned waiting = 0, wanted = 0;
        for (unsigned i = 0; i < block.threads; i++) {
            const Thread& t = *block.team->threads[i];
            if (t.wait != Wait::Named || t.barrier != id) {
                continue;
            }
            if (wanted && wanted != t.barrier_threads) {
                fail_at(t, "threads expect different numbers at one barrier");
            }
            wanted = t.barrier_threads;
            waiting++;
        }
        if (!waiting || waiting < wanted) {
            continue;
        }
        if (waiting > wanted) {
            fail("%u threads at barrier %u, which is for %u", waiting, id, wanted);
        }
        for (unsigned i = 0; i < block.threads; i++) {
            Thread& t = *block.team->threads[i];
            if (t.wait == Wait::Named && t.barrier == id) {
                t.wait = Wait::None;
            }
        }
        any = true;
    }
    return any;
}

}  // namespace

bool run_turn(Block& block) {
    std::vector<unsigned>& order = machine.thread_order;
    order.resize(block.threads);
    for (unsigned i = 0; i < block.threads; i++) {
        order[i] = machine.order == Order::Reverse ? block.threads - 1 - i : i;
    }
    if (machine.order == Order::Random) {
        for (unsigned i = block.threads - 1; i > 0; i--) {
            std::swap(order[i], order[next_random() % (i + 1)]);
        }
    }
    bool moved = false;
    for (unsigned i : order) {
        Thread& thread = *block.team->threads[i];
        if (thread.wait == Wait::None) {
            moved = true;
            run_thread(thread);
        } else if (thread.wait == Wait::Spin) {
            run_thread(thread);
            moved |= thread.wait != Wait::Spin;
        }
    }
    moved |= release_barrier(block);
    moved |= release_named(block);
    block.done = 0;
    for (unsigned i = 0; i < block.threads; i++) {
        block.done += block.team->threads[i]->wait == Wait::Done;
    }
    return moved;
}

}  // namespace emu
