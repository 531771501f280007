// See scheduler.h. Compiled without sanitizers; everything that must be seen by them is in copy.cpp or in headers.
#include "scheduler.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>

#include "fiber.h"

namespace emu {

Index3 thread_index, block_index;
Extent3 block_extent, grid_extent;

namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCopies = 512;             // in flight, of one thread
constexpr size_t kMaxShared = 227 * 1024;        // of a block, sm_90
constexpr size_t kArenaBytes = 512 * 1024;       // of a team, under ThreadSanitizer
constexpr unsigned kMaxVariables = 32;            // in shared memory, of a block
constexpr size_t kPendingGrids = 2;              // queued behind the one that runs
constexpr unsigned kEarlyBlocks = 2;             // of a grid, that start before their dependencies have ended
constexpr unsigned kSpinRounds = 20000;         // without any progress, before it is a deadlock

enum class Order { Forward, Reverse, Random };
enum class Wait { None, Barrier, Named, Warp, Dependency, Spin, Done };

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, capacity, group;
};

struct Block;

struct Thread {
    Fiber fiber;
    Block* block = nullptr;
    unsigned number = 0;  // in its block
    Index3 index;
    Wait wait = Wait::None;
    const char* file = nullptr;  // of the barrier it waits at
    int line = 0;
    unsigned barrier = 0, barrier_threads = 0;
    WarpOp op{};
    unsigned mask = 0;
    bool saw_dependency = false;
    Copy copies[kMaxCopies];
    unsigned copy_count = 0, group = 0;
};

// Threads that blocks take turns to use. Under ThreadSanitizer two blocks in a row use different teams, and so are
// not ordered with each other.
struct Team {
    std::vector<std::unique_ptr<Thread>> threads;
    char* arena = nullptr;
    char barrier_key = 0, ended_key = 0, named_keys[16] = {}, warp_keys[32] = {};
    bool taken = false;
};

struct Warp {
    Slot in[32], out[32];
};

struct SharedVariable {
    const void* key;
    void* memory;
};

struct Grid;

struct Block {
    Grid* grid = nullptr;
    Team* team = nullptr;
    Index3 index;
    unsigned threads = 0, done = 0;
    std::vector<Warp> warps;
    // No container that grows: threads would allocate, and the sanitizers see that.
    SharedVariable variables[kMaxVariables];
    unsigned variable_count = 0;
    void* dynamic = nullptr;
    size_t shared_bytes = 0, arena_used = 0;
};

struct Grid {
    Launch launch;
    std::function<void()> body;
    bool dependency_met = false;
    size_t blocks = 0, admitted = 0;
    std::vector<std::unique_ptr<Block>> running;
    char started_key = 0, ended_key = 0;
};

struct Machine {
    Fiber host;
    Thread* current = nullptr;
    std::deque<std::unique_ptr<Grid>> pending;
    std::vector<std::unique_ptr<Team>> teams;
    size_t next_team = 0;
    std::vector<unsigned> thread_order;
    Order order = Order::Forward;
    uint64_t random = 0;
    bool started = false;
};

Machine machine;

uint32_t next_random() {
    machine.random ^= machine.random << 13;
    machine.random ^= machine.random >> 7;
    machine.random ^= machine.random << 17;
    return static_cast<uint32_t>(machine.random >> 16);
}

void start_machine() {
    if (machine.started) return;
    machine.started = true;
    adopt_running_stack(machine.host);
    const char* order = getenv("EMU_ORDER");
    const char* seed = getenv("EMU_SEED");
    if (order && !strcmp(order, "rev")) machine.order = Order::Reverse;
    if (order && !strcmp(order, "rand")) machine.order = Order::Random;
    machine.random = (seed ? strtoull(seed, nullptr, 10) : 1) * 0x9e3779b97f4a7c15ull + 1;
}

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

// Gives the processor back to the scheduler until `wait` is over.
void pause(Wait wait) {
    Thread& self = *machine.current;
    self.wait = wait;
    switch_fiber(self.fiber, machine.host, false);
}

void thread_main() {
    Thread& self = *machine.current;
    entered(self.fiber);
    acquire(&self.block->team->ended_key);
    acquire(&self.block->grid->started_key);
    self.block->grid->body();
    if (self.copy_count) fail("thread ends with %u asynchronous copies it never waited for", self.copy_count);
    if (!self.saw_dependency) fail("thread ends without having waited for the grid before");
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
    for (size_t i = 0; i < bytes; i++) out[i] = 0xff;
}

void* allocate_shared(Block& block, size_t bytes) {
    block.shared_bytes += bytes;
    if (block.shared_bytes > kMaxShared) fail("%zu bytes of shared memory, %zu exist", block.shared_bytes, kMaxShared);
    void* memory = nullptr;
    if (under_tsan()) {
        // Never freed: freeing would be an access of the host's thread.
        memory = block.team->arena + block.arena_used;
        block.arena_used += (bytes + 255) / 128 * 128;
        if (block.arena_used > kArenaBytes) fail("out of room for shared memory");
    } else if (posix_memalign(&memory, 128, bytes)) {
        fail("out of memory");
    }
    poison(memory, bytes);
    return memory;
}

// ---- blocks ----

Team& take_team(unsigned threads) {
    constexpr long kLeastFree = 2;
    while (std::count_if(machine.teams.begin(), machine.teams.end(), [](const auto& t) { return !t->taken; }) < kLeastFree) {
        machine.teams.push_back(std::make_unique<Team>());
    }
    Team* team = nullptr;
    for (size_t i = 0; i < machine.teams.size() && !team; i++) {
        Team& candidate = *machine.teams[machine.next_team++ % machine.teams.size()];
        if (!candidate.taken) team = &candidate;
    }
    team->taken = true;
    if (under_tsan() && !team->arena) {
        void* memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) fail("out of memory");
        team->arena = static_cast<char*>(memory);
    }
    while (team->threads.size() < threads) team->threads.push_back(std::make_unique<Thread>());
    return *team;
}

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
    if (l.shared_bytes) block->dynamic = allocate_shared(*block, l.shared_bytes);
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
        for (unsigned i = 0; i < block.variable_count; i++) free(block.variables[i].memory);
        free(block.dynamic);
    }
    block.team->taken = false;
}

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
        if (t.wait != Wait::Barrier) continue;
        waiting++;
        if (!first) first = &t;
        if (t.line != first->line || strcmp(t.file, first->file)) {
            thread_index = t.index;
            fail("threads of one block wait at different barriers: %s:%d and %s:%d", first->file, first->line,
                 t.file, t.line);
        }
    }
    if (!waiting || waiting + done != block.threads) return false;
    if (done) {
        thread_index = first->index;
        fail("barrier at %s:%d while %u threads of the block have ended", first->file, first->line, done);
    }
    for (unsigned i = 0; i < block.threads; i++) block.team->threads[i]->wait = Wait::None;
    return true;
}

bool release_named(Block& block) {
    bool any = false;
    for (unsigned id = 1; id < 16; id++) {
        unsigned waiting = 0, wanted = 0;
        for (unsigned i = 0; i < block.threads; i++) {
            const Thread& t = *block.team->threads[i];
            if (t.wait != Wait::Named || t.barrier != id) continue;
            if (wanted && wanted != t.barrier_threads) fail_at(t, "threads expect different numbers at one barrier");
            wanted = t.barrier_threads;
            waiting++;
        }
        if (!waiting || waiting < wanted) continue;
        if (waiting > wanted) fail("%u threads at barrier %u, which is for %u", waiting, id, wanted);
        for (unsigned i = 0; i < block.threads; i++) {
            Thread& t = *block.team->threads[i];
            if (t.wait == Wait::Named && t.barrier == id) t.wait = Wait::None;
        }
        any = true;
    }
    return any;
}

// One turn of every thread that can run. True if anything moved.
bool run_turn(Block& block) {
    std::vector<unsigned>& order = machine.thread_order;
    order.resize(block.threads);
    for (unsigned i = 0; i < block.threads; i++) {
        order[i] = machine.order == Order::Reverse ? block.threads - 1 - i : i;
    }
    if (machine.order == Order::Random) {
        for (unsigned i = block.threads - 1; i > 0; i--) std::swap(order[i], order[next_random() % (i + 1)]);
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
    for (unsigned i = 0; i < block.threads; i++) block.done += block.team->threads[i]->wait == Wait::Done;
    return moved;
}

[[noreturn]] void report_deadlock(const Grid& grid) {
    for (const auto& block : grid.running) {
        for (unsigned i = 0; i < block->threads; i++) {
            const Thread& t = *block->team->threads[i];
            thread_index = t.index;
            block_index = block->index;
            switch (t.wait) {
                case Wait::Warp: fail("deadlock: waits in warp operation %d, mask %08x", static_cast<int>(t.op), t.mask);
                case Wait::Barrier: fail("deadlock: waits at %s:%d", t.file, t.line);
                case Wait::Named: fail("deadlock: waits at barrier %u for %u threads", t.barrier, t.barrier_threads);
                case Wait::Spin: fail("deadlock: waits for another block");
                default: break;
            }
        }
    }
    fail("deadlock");
}

// ---- grids ----

// Starts a few blocks and runs them up to their wait for the grids before.
void run_early(Grid& grid) {
    const size_t count = std::min<size_t>(kEarlyBlocks, grid.blocks);
    for (size_t i = 0; i < count; i++) admit_block(grid);
    bool moved = true;
    while (moved) {
        moved = false;
        for (auto& block : grid.running) moved |= run_turn(*block);
    }
}

void meet_dependency(Grid& grid) {
    grid.dependency_met = true;
    for (auto& block : grid.running) {
        for (unsigned i = 0; i < block->threads; i++) {
            Thread& t = *block->team->threads[i];
            if (t.wait == Wait::Dependency) t.wait = Wait::None;
        }
    }
}

// Blocks that run side by side: one, in random order three; more when the running ones only spin.
size_t window() { return machine.order == Order::Random ? 3 : 1; }

void run_to_end(Grid& grid) {
    meet_dependency(grid);
    size_t room = window();
    unsigned idle = 0;
    while (!grid.running.empty() || grid.admitted < grid.blocks) {
        while (grid.running.size() < room && grid.admitted < grid.blocks) admit_block(grid);
        bool moved = false, skipped = false;
        for (size_t i = 0; i < grid.running.size(); i++) {
            if (machine.order == Order::Random && next_random() % 4 == 0) {
                skipped = true;  // stands still this time, while others go on
                continue;
            }
            Block& block = *grid.running[i];
            moved |= run_turn(block);
            if (block.done == block.threads) {
                retire_block(block);
                grid.running.erase(grid.running.begin() + static_cast<long>(i--));
            }
        }
        if (skipped && !moved) continue;
        idle = moved ? 0 : idle + 1;
        if (idle && grid.admitted < grid.blocks) {
            room++;
        } else if (idle > kSpinRounds) {
            report_deadlock(grid);
        } else if (idle && !std::any_of(grid.running.begin(), grid.running.end(), [](const auto& block) {
                       return std::any_of(block->team->threads.begin(), block->team->threads.begin() + block->threads,
                                          [](const auto& t) { return t->wait == Wait::Spin; });
                   })) {
            report_deadlock(grid);
        }
    }
    acquire(&grid.ended_key);
    release(&machine);
}

void finish_oldest() {
    std::unique_ptr<Grid> grid = std::move(machine.pending.front());
    machine.pending.pop_front();
    run_to_end(*grid);
}

void complete_warp(Warp& warp, Block& block, unsigned warp_number, unsigned mask, Combine combine) {
    if (combine) combine(warp.in, warp.out, mask);
    for (unsigned l = 0; l < 32; l++) {
        if (!(mask >> l & 1)) continue;
        Thread& t = *block.team->threads[warp_number * 32 + l];
        if (&t != machine.current) t.wait = Wait::None;
    }
}

}  // namespace

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "EMU ERROR: block (%u,%u,%u) thread (%u,%u,%u): ", block_index.x, block_index.y, block_index.z,
            thread_index.x, thread_index.y, thread_index.z);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    fflush(nullptr);
    _exit(70);
}

void launch(const Launch& request, std::function<void()> body) {
    start_machine();
    const size_t threads = size_t{request.block.x} * request.block.y * request.block.z;
    if (!threads || threads > kMaxThreads) fail("%s: a block of %zu threads", request.name, threads);
    auto grid = std::make_unique<Grid>();
    grid->launch = request;
    grid->body = std::move(body);
    grid->blocks = size_t{request.grid.x} * request.grid.y * request.grid.z;
    if (!grid->blocks) fail("%s: a grid without blocks", request.name);
    release(&grid->started_key);
    if (request.early) {
        run_early(*grid);
    } else {
        synchronize();
    }
    machine.pending.push_back(std::move(grid));
    while (machine.pending.size() > kPendingGrids) finish_oldest();
}

void synchronize() {
    start_machine();
    while (!machine.pending.empty()) finish_oldest();
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
    if (id == 0 || id > 15) fail("barrier %u: 1 to 15 may be named", id);
    if (threads == 0 || threads % 32) fail("barrier %u for %u threads, which are no whole warps", id, threads);
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
    if (!self.block->grid->dependency_met) pause(Wait::Dependency);
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
    if (!(mask >> me & 1)) fail("warp operation %d: lane %u is not in its mask %08x", static_cast<int>(op), me, mask);
    Warp& warp = block.warps[warp_number];
    warp.in[me] = mine;
    self.op = op;
    self.mask = mask;
    if (orders_memory) release(&block.team->warp_keys[warp_number]);
    bool all_here = true;
    for (unsigned l = 0; l < lanes; l++) {
        if (l == me || !(mask >> l & 1)) continue;
        const Thread& other = *block.team->threads[first + l];
        if (other.wait == Wait::Done) fail("warp operation %d: lane %u of mask %08x has ended", static_cast<int>(op), l, mask);
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
    if (orders_memory) acquire(&block.team->warp_keys[warp_number]);
    return warp.out[me];
}

void* shared_variable(const void* key, size_t bytes) {
    Block& block = *machine.current->block;
    for (unsigned i = 0; i < block.variable_count; i++) {
        if (block.variables[i].key == key) return block.variables[i].memory;
    }
    if (block.variable_count == kMaxVariables) fail("more than %u shared variables", kMaxVariables);
    void* memory = allocate_shared(block, bytes);
    block.variables[block.variable_count++] = {key, memory};
    return memory;
}

void* shared_dynamic() {
    Block& block = *machine.current->block;
    if (!block.dynamic) fail("the kernel uses dynamic shared memory, the launch gave none");
    return block.dynamic;
}

void async_copy(void* to, const void* from, unsigned bytes, unsigned capacity) {
    Thread& self = *machine.current;
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & (capacity - 1)) {
        fail("asynchronous copy of %u bytes between misaligned addresses", capacity);
    }
    if (bytes > capacity) fail("asynchronous copy of %u bytes into %u", bytes, capacity);
    if (self.copy_count == kMaxCopies) fail("more than %u asynchronous copies in flight", kMaxCopies);
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
