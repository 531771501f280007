// Queues of work: what is appended to a stream, and when it runs. See device.h.
#include "device.h"

namespace driver {

namespace {

constexpr uintptr_t kLegacyHandle = 1, kPerThreadHandle = 2;

CUstream default_stream() {
    static CUstream_st stream;
    stream.is_default = true;
    return &stream;
}

void run_kernel(const std::shared_ptr<const KernelCall>& call) {
    emu::Launch launch = call->launch;
    launch.early = launch.early && device().overlap;
    emu::launch(launch, [call] { call->kernel->run(call->values.data()); });
    if (!device().overlap) {
        emu::synchronize();
    }
}

void run_next(CUstream stream) {
    const WorkPtr work = std::move(stream->queue.front());
    stream->queue.pop_front();
    if (work->awaits) {
        reach(work->awaits);
    }
    if (work->kernel) {
        run_kernel(work->kernel);
        return;
    }
    emu::synchronize();
    if (work->action) {
        work->action();
    }
    if (work->reaches) {
        work->reaches->reached = true;
        work->reaches->when = std::chrono::steady_clock::now();
    }
}

void append(CUstream stream, WorkPtr work) {
    stream->queue.push_back(std::move(work));
    stream->polls = 0;
    if (stream->queue.size() > kMaxQueued) {
        run_next(stream);
    }
}

// The default stream and those that are not made CU_STREAM_NON_BLOCKING wait for each other.
void order_with_default(CUstream stream) {
    const auto wait_for = [&](CUstream other) {
        if (!other->queue.empty()) {
            auto mark = std::make_shared<Mark>(Mark{other});
            queue_marker(other, mark, nullptr);
            queue_marker(stream, nullptr, mark);
        }
    };
    if (!stream->is_default) {
        if (!(stream->flags & CU_STREAM_NON_BLOCKING)) {
            wait_for(default_stream());
        }
        return;
    }
    for (CUstream other : device().streams) {
        if (!(other->flags & CU_STREAM_NON_BLOCKING)) {
            wait_for(other);
        }
    }
}

}  // namespace

CUstream resolve(CUstream handle) {
    const auto number = reinterpret_cast<uintptr_t>(handle);
    if (number == 0 || number == kLegacyHandle || number == kPerThreadHandle) {
        return default_stream();
    }
    return device().streams.count(handle) ? handle : nullptr;
}

void queue_marker(CUstream stream, std::shared_ptr<Mark> reaches, std::shared_ptr<Mark> awaits) {
    Work work;
    work.reaches = std::move(reaches);
    work.awaits = std::move(awaits);
    append(stream, std::make_shared<const Work>(std::move(work)));
}

CUresult submit(CUstream stream, Work work, const std::string& what) {
    if (stream->capture) {
        Capture& capture = *stream->capture;
        if (capture.invalid) {
            return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        }
        if (const auto fork = capture.forks.find(stream); fork != capture.forks.end()) {
            fork->second.done++;
        }
        capture.body.nodes.push_back(std::make_shared<const Work>(std::move(work)));
        capture.body.counts[what]++;
        return CUDA_SUCCESS;
    }
    if (stream->is_default) {
        for (const auto& capture : device().captures) {
            if (!(capture->origin->flags & CU_STREAM_NON_BLOCKING)) {
                capture->invalid = true;
                return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
            }
        }
    }
    if (!what.empty()) {
        count_work(what);
    }
    order_with_default(stream);
    append(stream, std::make_shared<const Work>(std::move(work)));
    if (!device().lazy) {
        drain(stream);
    }
    return CUDA_SUCCESS;
}

// A stream that waits for another is within `run_next`, with that work taken from its queue already.
void drain(CUstream stream) {
    while (!stream->queue.empty()) {
        run_next(stream);
    }
}

void reach(const std::shared_ptr<Mark>& mark) {
    while (!mark->reached && !mark->stream->queue.empty()) {
        run_next(mark->stream);
    }
}

void drain_all() {
    drain(default_stream());
    for (CUstream stream : device().streams) {
        drain(stream);
    }
    emu::synchronize();
}

bool idle(CUstream stream) { return stream->queue.empty(); }

}  // namespace driver
