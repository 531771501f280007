// The scheduler's own state: threads, teams, blocks, grids. Included by its three sources and by nothing else, since
// all of it must stay out of the sanitizers' sight.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "fiber.h"
#include "scheduler.h"

namespace emu {

constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxCopies = 512;        // in flight, of one thread
constexpr size_t kMaxShared = 227 * 1024;   // of a block, sm_90
constexpr size_t kArenaBytes = 512 * 1024;  // of a team, under ThreadSanitizer
constexpr unsigned kMaxVariables = 32;      // in shared memory, of a block
constexpr size_t kPendingGrids = 2;         // queued behind the one that runs
constexpr unsigned kEarlyBlocks = 2;        // of a grid, that start before their dependencies have ended
constexpr unsigned kSpinRounds = 20000;     // without any progress, before it is a deadlock

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
    bool configured = false;
};

extern Machine machine;

// ---- blocks.cpp ----

// Takes over the calling thread; at the first use reads the environment.
void start_machine();
uint32_t next_random();
// Gives the processor back to the scheduler until `wait` is over.
void pause(Wait wait);
void* allocate_shared(Block& block, size_t bytes);
// Starts the grid's next block.
void admit_block(Grid& grid);
void retire_block(Block& block);
// One turn of every thread of a block that can run. True if anything moved.
bool run_turn(Block& block);

}  // namespace emu
