// Streams and events. See device.h.
#include "device.h"

using namespace driver;

namespace {

// Priorities of an H200 go from 0, the least, to -5.
int clamp_priority(int priority) { return priority > 0 ? 0 : priority < -5 ? -5 : priority; }

CUresult record(Device& d, CUevent event, CUstream handle) {
    CUstream stream = resolve(handle);
    if (!stream || !d.events.count(event)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->capture) {
        if (stream->capture->invalid) {
            return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        }
        event->captured = true;
        event->capture = stream->capture;
        event->captured_stream = stream;
        const auto fork = stream->capture->forks.find(stream);
        event->captured_done = fork == stream->capture->forks.end() ? 0 : fork->second.done;
        return CUDA_SUCCESS;
    }
    event->captured = false;
    event->polls = 0;
    event->mark = std::make_shared<Mark>(Mark{stream});
    Work work;
    work.reaches = event->mark;
    return submit(stream, std::move(work), "event_records");
}

// A stream that waits for an event of a capture takes part in it; the origin that waits takes its fork back in.
CUresult wait_in_capture(CUstream stream, CUevent event) {
    const std::shared_ptr<Capture> capture = event->capture.lock();
    if (!capture) {
        return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    }
    if (stream->capture && stream->capture != capture) {
        capture->invalid = stream->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (!stream->capture) {
        stream->capture = capture;
        capture->forks[stream] = {};
    } else if (const auto fork = capture->forks.find(event->captured_stream); fork != capture->forks.end()) {
        fork->second.joined = std::max(fork->second.joined, event->captured_done);
    }
    return CUDA_SUCCESS;
}

CUresult query(bool done, int& polls) { return done || ++polls > kPolls ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY; }

CUresult elapsed(Device& d, float* milliseconds, CUevent start, CUevent end) {
    if (!d.events.count(start) || !d.events.count(end)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if ((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING || !start->mark || !end->mark) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!start->mark->reached || !end->mark->reached) {
        return CUDA_ERROR_NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(end->mark->when - start->mark->when).count();
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuStreamCreate(CUstream* stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

CUresult cuStreamCreateWithPriority(CUstream* stream, unsigned flags, int priority) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!stream || flags & ~CU_STREAM_NON_BLOCKING) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *stream = new CUstream_st;
        (*stream)->flags = flags;
        (*stream)->priority = clamp_priority(priority);
        d.streams.insert(*stream);
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.streams.count(stream)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (stream->capture) {
            return refuse_if_capturing(stream);
        }
        drain(stream);
        d.streams.erase(stream);
        delete stream;
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamSynchronize(CUstream handle) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (const CUresult refused = refuse_if_capturing(stream); refused != CUDA_SUCCESS) {
            return refused;
        }
        d.counts.add("synchronizations");
        drain(stream);
        emu::synchronize();
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamQuery(CUstream handle) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (const CUresult refused = refuse_if_capturing(stream); refused != CUDA_SUCCESS) {
            return refused;
        }
        const CUresult result = query(idle(stream), stream->polls);
        if (result == CUDA_SUCCESS) {
            drain(stream);
            emu::synchronize();
        }
        return result;
    });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        CUstream stream = resolve(handle);
        if (!stream || !d.events.count(event)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (event->captured) {
            return wait_in_capture(stream, event);
        }
        if (stream->capture && event->mark) {
            stream->capture->invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
        if (!event->mark || event->mark->reached) {
            return CUDA_SUCCESS;
        }
        Work work;
        work.awaits = event->mark;
        return submit(stream, std::move(work), "event_waits");
    });
}

CUresult cuStreamGetPriority(CUstream handle, int* priority) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        *priority = stream->priority;
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamGetFlags(CUstream handle, unsigned* flags) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        *flags = stream->flags;
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext* context) {
    return enter(__func__, Needs::Context, [&](Device&) {
        if (!resolve(handle)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        *context = current_context;
        return CUDA_SUCCESS;
    });
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void* user) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream || !function) {
            return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
        }
        Work work;
        work.action = [=] { function(user); };
        return submit(stream, std::move(work), "host_functions");
    });
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!event || flags & ~7u) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *event = new CUevent_st;
        (*event)->flags = flags;
        d.events.insert(*event);
        return CUDA_SUCCESS;
    });
}

CUresult cuEventDestroy_v2(CUevent event) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.events.erase(event)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        delete event;
        return CUDA_SUCCESS;
    });
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device& d) { return record(d, event, stream); });
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream stream, unsigned flags) {
    return enter(__func__, Needs::Context,
                 [&](Device& d) { return flags ? CUDA_ERROR_NOT_SUPPORTED : record(d, event, stream); });
}

CUresult cuEventQuery(CUevent event) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.events.count(event)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (event->captured) {
            return CUDA_ERROR_CAPTURED_EVENT;
        }
        if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
            return refused;
        }
        const CUresult result = query(!event->mark || event->mark->reached, event->polls);
        if (result == CUDA_SUCCESS && event->mark) {
            reach(event->mark);
        }
        return result;
    });
}

CUresult cuEventSynchronize(CUevent event) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.events.count(event)) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (event->captured) {
            return CUDA_ERROR_CAPTURED_EVENT;
        }
        if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
            return refused;
        }
        d.counts.add("synchronizations");
        if (event->mark) {
            reach(event->mark);
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuEventElapsedTime_v2(float* milliseconds, CUevent start, CUevent end) {
    return enter(__func__, Needs::Context, [&](Device& d) { return elapsed(d, milliseconds, start, end); });
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent start, CUevent end) {
    return enter(__func__, Needs::Context, [&](Device& d) { return elapsed(d, milliseconds, start, end); });
}
}
