// Grids: queueing them, running what stands before their wait ahead of time, running them to their end. See
// scheduler.h. Compiled without sanitizers.
#include <algorithm>

#include "machine.h"

namespace emu {

namespace {

[[noreturn]] void report_deadlock(const Grid& grid) {
    for (const Block* block : grid.running) {
        for (unsigned i = 0; i < block->threads; i++) {
            const Thread& t = block->team->threads[i];
            const Warp& warp = block->warps[i / 32];
            thread_index = t.index;
            block_index = block->index;
            switch (t.wait) {
                case Wait::Warp:
                    fail("deadlock: waits in warp operation %d, mask %08x", static_cast<int>(warp.ops[i % 32]),
                         warp.masks[i % 32]);
                case Wait::Barrier:
                    fail("deadlock: waits at %s:%d", t.file, t.line);
                case Wait::Named:
                    fail("deadlock: waits at barrier %u for %u threads", t.barrier, t.barrier_threads);
                case Wait::Spin:
                    fail("deadlock: waits for another block");
                default:
                    break;
            }
        }
    }
    fail("deadlock");
}

// Starts a few blocks and runs them up to their wait for the grids before.
void run_early(Grid& grid) {
    const size_t count = std::min<size_t>(kEarlyBlocks, grid.blocks);
    for (size_t i = 0; i < count; i++) {
        admit_block(grid);
    }
    bool moved = true;
    while (moved) {
        moved = false;
        for (Block* block : grid.running) {
            moved |= run_turn(*block);
        }
    }
}

void meet_dependency(Grid& grid) {
    grid.dependency_met = true;
    for (Block* block : grid.running) {
        for (unsigned w = 0; w < block->warp_count; w++) {
            wake(*block, w, block->warps[w].dependent);
            block->warps[w].dependent = 0;
        }
    }
}

bool spins(const Block* block) {
    return std::any_of(block->warps, block->warps + block->warp_count, [](const Warp& w) { return w.spinning != 0; });
}

// Blocks that run side by side: one, in random order three; more when the running ones only spin.
size_t window() { return machine.order == Order::Random ? 3 : 1; }

void run_to_end(Grid& grid) {
    meet_dependency(grid);
    size_t room = window();
    unsigned idle = 0;
    while (!grid.running.empty() || grid.admitted < grid.blocks) {
        while (grid.running.size() < room && grid.admitted < grid.blocks) {
            admit_block(grid);
        }
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
        if (skipped && !moved) {
            continue;
        }
        idle = moved ? 0 : idle + 1;
        if (idle && grid.admitted < grid.blocks) {
            room++;
        } else if (idle > kSpinRounds) {
            report_deadlock(grid);
        } else if (idle && !std::any_of(grid.running.begin(), grid.running.end(), spins)) {
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

}  // namespace

void launch(const Launch& request, std::function<void()> body) {
    start_machine();
    const size_t threads = size_t{request.block.x} * request.block.y * request.block.z;
    if (!threads || threads > kMaxThreads) {
        fail("%s: a block of %zu threads", request.name, threads);
    }
    auto grid = std::make_unique<Grid>();
    grid->launch = request;
    grid->body = std::move(body);
    grid->blocks = size_t{request.grid.x} * request.grid.y * request.grid.z;
    if (!grid->blocks) {
        fail("%s: a grid without blocks", request.name);
    }
    release(&grid->started_key);
    if (request.early) {
        run_early(*grid);
    } else {
        synchronize();
    }
    machine.pending.push_back(std::move(grid));
    while (!machine.lazy && machine.pending.size() > kPendingGrids) {
        finish_oldest();
    }
}

void synchronize() {
    start_machine();
    while (!machine.pending.empty()) {
        finish_oldest();
    }
}

}  // namespace emu
