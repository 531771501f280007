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
constexpr unsigned kMaxWarps = kMaxThreads / 32;
constexpr unsigned kNamedBarriers = 16;
constexpr unsigned kMaxCopies = 512;        // in flight, of one thread
constexpr size_t kMaxShared = 227 * 1024;   // of a block, sm_90
constexpr size_t kArenaBytes = 512 * 1024;  // of a team, under ThreadSanitizer
constexpr unsigned kMaxVariables = 32;      // in shared memory, of a block
constexpr size_t kPendingGrids = 2;         // queued behind the one that runs, unless lazy
constexpr unsigned kEarlyBlocks = 2;        // of a grid, that start before their dependencies have ended
constexpr unsigned kSpinRounds = 20000;     // without any progress, before it is a deadlock

enum class Wait { None, Barrier, Named, Warp, Dependency, Spin, Done };

struct Copy {
    void* to;
    const void* from;
    unsigned bytes, capacity, group;
};

struct Block;

// What a thread's switches touch is kept small and together: a block's threads take turns thousands of times.
struct Thread {
    Fiber fiber;
    Block* block = nullptr;
    unsigned number = 0;  // in its block
    Index3 index;
    Wait wait = Wait::None;
    const char* file = nullptr;  // of the barrier it waits at
    int line = 0;
    unsigned barrier = 0, barrier_threads = 0;
    bool saw_dependency = false;
    unsigned barrier_turn = 0, warp_turn = 0;
    unsigned copy_count = 0, group = 0;
    std::unique_ptr<Copy[]> copies;  // kMaxCopies, from the first one on
};

// Lanes are bits. Every lane of a block is in one of the first five, or runs, or waits at a barrier.
struct Warp {
    unsigned lanes, runnable, spinning, dependent, meeting, done;
    unsigned masks[32];  // of the lanes in `meeting`
    WarpOp ops[32];
    Slot in[32], out[32];
};

struct SharedVariable {
    const void* key;
    void* memory;
};

struct NamedBarrier {
    unsigned waiting, wanted;
    unsigned lanes[kMaxWarps];
};

struct Grid;
struct Team;

struct Block {
    Grid* grid;
    Team* team;
    Index3 index;
    unsigned threads, warp_count, done, at_barrier;
    const Thread* first_at_barrier;
    unsigned ready_warps;  // bits: those with a runnable lane
    unsigned budget;       // turns until other blocks have theirs
    NamedBarrier named[kNamedBarriers];
    // No container that grows: threads would allocate, and the sanitizers see that.
    SharedVariable variables[kMaxVariables];
    unsigned variable_count;
    void* dynamic;
    size_t shared_bytes, arena_used;
    Warp warps[kMaxWarps];
};

// Threads and a block that blocks take turns to use. Under ThreadSanitizer two blocks in a row use different teams, and
// so are not ordered with each other.
struct Team {
    Block block;
    std::vector<Thread> threads;
    char* arena = nullptr;
    // Two keys in turn: who leaves a barrier late must not see what others released at the next.
    char barrier_keys[2] = {}, ended_key = 0, named_keys[kNamedBarriers] = {}, warp_keys[kMaxWarps][2] = {};
    bool taken = false;
};

struct Grid {
    Launch launch;
    std::function<void()> body;
    bool dependency_met = false;
    size_t blocks = 0, admitted = 0;
    std::vector<Block*> running;
    char started_key = 0, ended_key = 0;
};

struct Machine {
    Fiber host;
    Thread* current = nullptr;
    std::deque<std::unique_ptr<Grid>> pending;
    std::vector<std::unique_ptr<Team>> teams;
    size_t next_team = 0;
    Order order = Order::Forward;
    bool lazy = false;
    uint64_t random = 0;
    bool configured = false;
};

extern Machine machine;

// ---- blocks.cpp ----

// Takes over the calling thread; at the first use reads the environment.
void start_machine();
uint32_t next_random();
// Lets other threads run until `wait` is over.
void pause(Wait wait);
// Makes lanes of a warp runnable.
void wake(Block& block, unsigned warp, unsigned lanes);
void* allocate_shared(Block& block, size_t bytes);
// Starts the grid's next block.
void admit_block(Grid& grid);
void retire_block(Block& block);
// Lets a block run until no thread of it can, or until it is another block's turn. True if anything moved.
bool run_turn(Block& block);
// Fails if a barrier waits for threads that have ended; lets it go if all are there, and says so.
bool finish_barrier(Block& block);

}  // namespace emu
