// The emulated device's state: allocations, streams with their queues of work, events, captures, counts.
//
// Owns when work runs: at once, or (lazy) only when something needs its result. The functions of the driver's
// interface, one source a group, are thin above it. Everything here is used under `Device::mutex`.
#pragma once
#include <chrono>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_api.h"
#include "scheduler.h"
#include "table.h"

namespace driver {

// An H200.
constexpr int kMultiprocessors = 132;
constexpr int kMaxThreads = 1024;
constexpr int kSharedDefault = 48 * 1024;
constexpr int kSharedOptIn = 227 * 1024;
constexpr int kL2Bytes = 50 << 20;
constexpr size_t kDefaultMemory = size_t{1} << 30;  // where MIRAI_EMU_MEMORY says nothing
constexpr int kDriverVersion = 13000;
// Asked this often whether it is done, lazy work does get done.
constexpr int kPolls = 3;
// Works a stream holds back before the oldest runs: a real queue is finite too.
constexpr size_t kMaxQueued = 16384;

// A place in a stream's work: what an event becomes when it is recorded.
struct Mark {
    CUstream stream;
    bool reached = false;
    std::chrono::steady_clock::time_point when{};
};

struct KernelCall {
    const Kernel* kernel;
    emu::Launch launch;
    std::vector<char> values;  // of the parameters
};

// One entry of a stream's queue or node of a graph. A kernel, or an action that runs once all before it has ended.
struct Work {
    std::shared_ptr<const KernelCall> kernel;
    std::function<void()> action;
    std::shared_ptr<Mark> reaches, awaits;
};
using WorkPtr = std::shared_ptr<const Work>;

// What a graph holds.
struct GraphBody {
    std::vector<WorkPtr> nodes;
    std::map<std::string, unsigned long> counts;  // of one launch
};

struct Capture {
    CUstream origin;
    CUstreamCaptureMode mode;
    std::thread::id thread;
    bool invalid = false;
    GraphBody body;
    // Streams that joined through an event: how much they did, and how much of it the origin has waited for.
    struct Fork {
        size_t done = 1, joined = 0;
    };
    std::map<CUstream, Fork> forks;
};

struct Counts {
    std::map<std::string, unsigned long> values, kernels;
    void add(const std::string& what, unsigned long n = 1) { values[what] += n; }
};

struct Allocation {
    size_t bytes;
    std::function<void()> release;
};

struct Device {
    std::mutex mutex;
    bool started = false, lazy = false, overlap = false;
    size_t memory_total = kDefaultMemory, memory_used = 0;
    int context_users = 0;
    CUresult broken = CUDA_SUCCESS;  // once an error has left the context unusable
    std::map<uintptr_t, Allocation> device_memory, host_memory;
    std::set<CUstream> streams;
    std::set<CUevent> events;
    std::set<CUgraph> graphs;
    std::set<CUgraphExec> executables;
    std::set<CUmodule> modules;
    std::set<CUfunction> functions;
    std::vector<std::shared_ptr<Capture>> captures;
    bool graphs_launched = false;
    Counts counts;
};

Device& device();

// ---- memory.cpp ----

// The allocation that holds all of [address, address + bytes); the map's end if none does.
std::map<uintptr_t, Allocation>::iterator holder(std::map<uintptr_t, Allocation>& memory, uintptr_t address,
                                                 size_t bytes);
bool on_device(CUdeviceptr address, size_t bytes);
bool is_pinned(const void* address, size_t bytes);

// ---- queue.cpp ----

// The stream of a handle, with the default stream for 0 and CU_STREAM_LEGACY; null if there is none.
CUstream resolve(CUstream handle);
// Appends to a stream's queue, or to the graph that it captures. `what` names it in the counts; empty: not counted.
CUresult submit(CUstream stream, Work work, const std::string& what);
// Runs a stream's work to its end, or up to a mark.
void drain(CUstream stream);
void reach(const std::shared_ptr<Mark>& mark);
void drain_all();
bool idle(CUstream stream);
void queue_marker(CUstream stream, std::shared_ptr<Mark> reaches, std::shared_ptr<Mark> awaits);

// ---- graphs.cpp ----

// For calls that are not allowed while this thread, or with a global capture any thread, captures: ends such a capture
// as invalid and says so.
CUresult refuse_in_capture();
// The error of using a stream that captures in a way that cannot be captured; ends its capture as invalid.
CUresult refuse_if_capturing(CUstream stream);

// ---- counts.cpp ----

void count_work(const std::string& what);
// The n-th call of a function that MIRAI_EMU_FAIL=FUNCTION:N:CODE names fails.
CUresult injected_failure(const char* function);

// ---- entering ----

enum class Needs { Nothing, Start, Context };
extern thread_local CUcontext current_context;

template <class Body>
CUresult enter(const char* function, Needs needs, Body body) {
    Device& d = device();
    std::lock_guard<std::mutex> lock(d.mutex);
    if (needs != Needs::Nothing && !d.started) {
        return CUDA_ERROR_NOT_INITIALIZED;
    }
    if (needs == Needs::Context && !current_context) {
        return CUDA_ERROR_INVALID_CONTEXT;
    }
    if (needs == Needs::Context && d.broken != CUDA_SUCCESS) {
        return d.broken;
    }
    if (const CUresult failure = injected_failure(function); failure != CUDA_SUCCESS) {
        return failure;
    }
    return body(d);
}

}  // namespace driver

struct CUctx_st {
    int device = 0;
};

struct CUstream_st {
    unsigned flags = 0;
    int priority = 0, polls = 0;
    std::deque<driver::WorkPtr> queue;
    std::shared_ptr<driver::Capture> capture;
    bool is_default = false;
};

struct CUevent_st {
    unsigned flags = 0;
    int polls = 0;
    std::shared_ptr<driver::Mark> mark;         // null: never recorded
    std::weak_ptr<driver::Capture> capture;     // recorded into one
    bool captured = false;
    CUstream captured_stream = nullptr;
    size_t captured_done = 0;
};

struct CUfunc_st {
    const driver::Kernel* kernel;
    int dynamic_shared = driver::kSharedDefault;
    int carveout = -1;
};

struct CUmod_st {
    std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

struct CUgraph_st {
    std::shared_ptr<driver::GraphBody> body = std::make_shared<driver::GraphBody>();
};

struct CUgraphExec_st {
    std::shared_ptr<const driver::GraphBody> body;
};
