// Stream capture and graphs. See device.h.
#include <algorithm>

#include "device.h"

using namespace driver;

namespace driver {

namespace {
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
}

CUresult refuse_in_capture() {
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) {
        return CUDA_SUCCESS;
    }
    bool refused = false;
    for (const auto& capture : device().captures) {
        const bool here = capture->thread == std::this_thread::get_id();
        const bool forbids = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL
                                 ? here || thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL
                                 : capture->mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && here;
        capture->invalid |= forbids;
        refused |= forbids;
    }
    return refused ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS;
}

CUresult refuse_if_capturing(CUstream stream) {
    if (!stream->capture) {
        return refuse_in_capture();
    }
    stream->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

}  // namespace driver

namespace {

void forget(Device& d, const std::shared_ptr<Capture>& capture) {
    capture->origin->capture = nullptr;
    for (const auto& [stream, fork] : capture->forks) {
        stream->capture = nullptr;
    }
    d.captures.erase(std::find(d.captures.begin(), d.captures.end(), capture));
}

CUresult end_capture(Device& d, CUstream stream, CUgraph* graph) {
    const std::shared_ptr<Capture> capture = stream->capture;
    if (!capture) {
        return CUDA_ERROR_ILLEGAL_STATE;
    }
    if (capture->origin != stream) {
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    }
    if (capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED && capture->thread != std::this_thread::get_id()) {
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    }
    forget(d, capture);
    *graph = nullptr;
    if (capture->invalid) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    for (const auto& [other, fork] : capture->forks) {
        if (fork.joined < fork.done) {
            return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
        }
    }
    *graph = new CUgraph_st;
    *(*graph)->body = std::move(capture->body);
    d.graphs.insert(*graph);
    return CUDA_SUCCESS;
}

// All of a graph waits for what is before it in the stream, and what comes after waits for all of it.
CUresult launch(Device& d, CUstream stream, const GraphBody& body) {
    d.graphs_launched = true;
    CUresult result = submit(stream, {}, "graph_launches");
    for (size_t i = 0; i < body.nodes.size() && result == CUDA_SUCCESS; i++) {
        result = submit(stream, *body.nodes[i], "");
    }
    if (result == CUDA_SUCCESS) {
        result = submit(stream, {}, "");
    }
    for (const auto& [what, n] : body.counts) {
        for (unsigned long i = 0; i < n; i++) {
            count_work(what);
        }
    }
    return result;
}

}  // namespace

extern "C" {

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (stream->is_default) {
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        if (stream->capture) {
            return CUDA_ERROR_ILLEGAL_STATE;
        }
        auto capture = std::make_shared<Capture>();
        capture->origin = stream;
        capture->mode = mode;
        capture->thread = std::this_thread::get_id();
        stream->capture = capture;
        d.captures.push_back(std::move(capture));
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        CUstream stream = resolve(handle);
        if (!stream || !graph) {
            return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
        }
        return end_capture(d, stream, graph);
    });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        *status = !stream->capture           ? CU_STREAM_CAPTURE_STATUS_NONE
                  : stream->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                             : CU_STREAM_CAPTURE_STATUS_ACTIVE;
        return CUDA_SUCCESS;
    });
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    if (!mode || *mode > CU_STREAM_CAPTURE_MODE_RELAXED) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    std::swap(*mode, driver::thread_mode);
    return CUDA_SUCCESS;
}

CUresult cuGraphCreate(CUgraph* graph, unsigned flags) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!graph || flags) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *graph = new CUgraph_st;
        d.graphs.insert(*graph);
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphDestroy(CUgraph graph) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.graphs.erase(graph)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        delete graph;
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphGetNodes(CUgraph graph, CUgraphNode* nodes, size_t* count) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.graphs.count(graph) || !count) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        const auto& all = graph->body->nodes;
        for (size_t i = 0; nodes && i < std::min(*count, all.size()); i++) {
            nodes[i] = reinterpret_cast<CUgraphNode>(const_cast<Work*>(all[i].get()));
        }
        *count = all.size();
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!executable || !d.graphs.count(graph)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *executable = new CUgraphExec_st{graph->body};
        d.executables.insert(*executable);
        d.counts.add("graphs_instantiated");
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphUpload(CUgraphExec executable, CUstream handle) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        return resolve(handle) && d.executables.count(executable) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
    });
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream handle) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        CUstream stream = resolve(handle);
        if (!stream || !d.executables.count(executable)) {
            return stream ? CUDA_ERROR_INVALID_VALUE : CUDA_ERROR_INVALID_HANDLE;
        }
        if (stream->capture) {
            return refuse_if_capturing(stream);  // a child graph: not emulated
        }
        return launch(d, stream, *executable->body);
    });
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!d.executables.erase(executable)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        delete executable;
        return CUDA_SUCCESS;
    });
}
}
