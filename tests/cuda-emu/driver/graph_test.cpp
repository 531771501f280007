// Capture and graphs: what may be captured, what ends a capture, what a launch does again.
// RUN: MIRAI_EMU_ORDER=forward
// RUN: MIRAI_EMU_ORDER=random:3
// RUN: MIRAI_EMU_LAZY=1
#include "test.h"

namespace {

CUgraphExec instantiate(CUgraph graph) {
    CUgraphExec executable = nullptr;
    MUST(cuGraphInstantiateWithFlags(&executable, graph, 0));
    return executable;
}

// x += y twice, in a graph that is launched three times.
void test_replay(CUmodule module) {
    Adder adder(module);
    Stream stream;
    DeviceRow x(300, 0.0f), y(300, 1.0f);
    CUgraph graph = nullptr;
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    MUST(cuStreamIsCapturing(stream.get(), &status));
    EXPECT(status == CU_STREAM_CAPTURE_STATUS_NONE);
    MUST(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    EXPECT_CODE(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), CUDA_ERROR_ILLEGAL_STATE);
    MUST(cuStreamIsCapturing(stream.get(), &status));
    EXPECT(status == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    adder.add(x, y, stream.get());
    adder.add(x, y, stream.get());
    MUST(cuMemcpyDtoDAsync_v2(y.get() + 4, y.get(), 4, stream.get()));
    MUST(cuStreamEndCapture(stream.get(), &graph));
    EXPECT(x.all(0.0f));
    size_t nodes = 0;
    MUST(cuGraphGetNodes(graph, nullptr, &nodes));
    EXPECT(nodes == 3);
    CUgraphExec executable = instantiate(graph);
    MUST(cuGraphDestroy(graph));
    EXPECT_CODE(cuGraphDestroy(graph), CUDA_ERROR_INVALID_VALUE);
    MUST(cuGraphUpload(executable, stream.get()));
    count("kernels", true);
    for (int i = 0; i < 3; i++) {
        MUST(cuGraphLaunch(executable, stream.get()));
    }
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(x.all(6.0f));
    EXPECT(count("graph_launches") == 3 && count("kernels") == 6 && count("kernels_by_name.self_test_add") == 6);
    EXPECT(count("device_copies") == 3);
    MUST(cuGraphExecDestroy(executable));
    EXPECT_CODE(cuGraphLaunch(executable, stream.get()), CUDA_ERROR_INVALID_VALUE);
}

// A pinned buffer that a graph reads is read at each launch.
void test_upload_in_a_graph() {
    Stream stream;
    DeviceRow row(4, 0.0f);
    float* pinned = nullptr;
    MUST(cuMemHostAlloc(reinterpret_cast<void**>(&pinned), 16, 0));
    CUgraph graph = nullptr;
    MUST(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_RELAXED));
    MUST(cuMemcpyHtoDAsync_v2(row.get(), pinned, 16, stream.get()));
    MUST(cuStreamEndCapture(stream.get(), &graph));
    CUgraphExec executable = instantiate(graph);
    for (float value : {3.0f, 4.0f}) {
        std::fill_n(pinned, 4, value);
        MUST(cuGraphLaunch(executable, stream.get()));
        MUST(cuStreamSynchronize(stream.get()));
        EXPECT(row.all(value));
    }
    MUST(cuGraphExecDestroy(executable));
    MUST(cuGraphDestroy(graph));
    MUST(cuMemFreeHost(pinned));
}

// Each call that a capture does not allow fails, and the capture with it.
void test_refusals() {
    Stream stream, other;
    DeviceRow row(4, 0.0f);
    float pageable[4] = {};
    CUevent event = nullptr;
    MUST(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
    MUST(cuEventRecord(event, other.get()));
    CUdeviceptr memory = 0;
    const std::pair<const char*, CUresult (*)(CUstream, DeviceRow&, float*, CUevent, CUdeviceptr*)> calls[] = {
        {"synchronize", [](CUstream s, auto&, float*, CUevent, auto*) { return cuStreamSynchronize(s); }},
        {"query", [](CUstream s, auto&, float*, CUevent, auto*) { return cuStreamQuery(s); }},
        {"context", [](CUstream, auto&, float*, CUevent, auto*) { return cuCtxSynchronize(); }},
        {"event", [](CUstream, auto&, float*, CUevent e, auto*) { return cuEventSynchronize(e); }},
        {"allocate", [](CUstream, auto&, float*, CUevent, auto* m) { return cuMemAlloc_v2(m, 4); }},
        {"copy", [](CUstream, auto& r, float* h, CUevent, auto*) { return cuMemcpyHtoD_v2(r.get(), h, 16); }},
        {"pageable", [](CUstream s, auto& r, float* h, CUevent,
                        auto*) { return cuMemcpyHtoDAsync_v2(r.get(), h, 16, s); }},
        {"destroy", [](CUstream s, auto&, float*, CUevent, auto*) { return cuStreamDestroy_v2(s); }},
    };
    for (const auto& [name, call] : calls) {
        CUgraph graph = nullptr;
        MUST(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_GLOBAL));
        const CUresult code = call(stream.get(), row, pageable, event, &memory);
        expect(code == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, name, __LINE__, name_of(code));
        CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
        MUST(cuStreamIsCapturing(stream.get(), &status));
        EXPECT(status == CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        EXPECT_CODE(cuMemsetD8Async(row.get(), 0, 4, stream.get()), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        EXPECT_CODE(cuStreamEndCapture(stream.get(), &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        EXPECT(!graph);
    }
    CUgraph graph = nullptr;
    EXPECT_CODE(cuStreamEndCapture(stream.get(), &graph), CUDA_ERROR_ILLEGAL_STATE);
    EXPECT_CODE(cuStreamBeginCapture_v2(nullptr, CU_STREAM_CAPTURE_MODE_GLOBAL),
                CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    MUST(cuEventDestroy_v2(event));
}

// A capture that is not global leaves other threads alone, and only its own thread ends it.
void test_modes() {
    Stream stream;
    CUcontext context = nullptr;
    CUgraph graph = nullptr;
    MUST(cuCtxGetCurrent(&context));
    MUST(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    std::thread([&] {
        MUST(cuCtxSetCurrent(context));
        CUdeviceptr memory = 0;
        MUST(cuMemAlloc_v2(&memory, 4));
        MUST(cuMemFree_v2(memory));
        CUgraph none = nullptr;
        EXPECT_CODE(cuStreamEndCapture(stream.get(), &none), CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }).join();
    MUST(cuStreamEndCapture(stream.get(), &graph));
    MUST(cuGraphDestroy(graph));
    MUST(cuStreamBeginCapture_v2(stream.get(), CU_STREAM_CAPTURE_MODE_GLOBAL));
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    MUST(cuThreadExchangeStreamCaptureMode(&mode));
    CUdeviceptr memory = 0;
    MUST(cuMemAlloc_v2(&memory, 4));
    MUST(cuMemFree_v2(memory));
    MUST(cuThreadExchangeStreamCaptureMode(&mode));
    MUST(cuStreamEndCapture(stream.get(), &graph));
    MUST(cuGraphDestroy(graph));
}

// A second stream takes part through an event, and must be waited for before the end.
void test_forks(CUmodule module) {
    Adder adder(module);
    Stream one, two;
    DeviceRow x(8, 0.0f), y(8, 1.0f);
    CUevent fork = nullptr, join = nullptr;
    MUST(cuEventCreate(&fork, CU_EVENT_DISABLE_TIMING));
    MUST(cuEventCreate(&join, CU_EVENT_DISABLE_TIMING));
    for (bool joined : {false, true}) {
        CUgraph graph = nullptr;
        MUST(cuStreamBeginCapture_v2(one.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
        MUST(cuEventRecord(fork, one.get()));
        EXPECT_CODE(cuEventQuery(fork), CUDA_ERROR_CAPTURED_EVENT);
        MUST(cuStreamWaitEvent(two.get(), fork, 0));
        EXPECT_CODE(cuStreamEndCapture(two.get(), &graph), CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
        adder.add(x, y, two.get());
        MUST(cuEventRecord(join, two.get()));
        if (joined) {
            MUST(cuStreamWaitEvent(one.get(), join, 0));
        }
        EXPECT_CODE(cuStreamEndCapture(one.get(), &graph),
                    joined ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
        if (joined) {
            CUgraphExec executable = instantiate(graph);
            MUST(cuGraphLaunch(executable, one.get()));
            MUST(cuStreamSynchronize(one.get()));
            EXPECT(x.all(1.0f));
            MUST(cuGraphExecDestroy(executable));
            MUST(cuGraphDestroy(graph));
        }
    }
    MUST(cuEventDestroy_v2(fork));
    MUST(cuEventDestroy_v2(join));
}

void test_default_stream(CUmodule module) {
    Adder adder(module);
    Stream blocking(CU_STREAM_DEFAULT);
    DeviceRow x(8, 0.0f);
    CUgraph graph = nullptr;
    MUST(cuStreamBeginCapture_v2(blocking.get(), CU_STREAM_CAPTURE_MODE_RELAXED));
    EXPECT_CODE(adder.try_add(x, x, nullptr), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    EXPECT_CODE(cuStreamEndCapture(blocking.get(), &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

}  // namespace

int main() {
    MUST(cuInit(0));
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUmodule module = nullptr;
    MUST(cuModuleLoadData(&module, kImage));
    test_replay(module);
    test_upload_in_a_graph();
    test_refusals();
    test_modes();
    test_forks(module);
    test_default_stream(module);
    CUdeviceptr late = 0;
    MUST(cuMemAlloc_v2(&late, 4));
    EXPECT(count("allocations_after_graphs") > 0);
    MUST(cuMemFree_v2(late));
    return report();
}
