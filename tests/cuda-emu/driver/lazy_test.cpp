// Lazy work: what a program forgets to wait for must be seen to be missing.
// RUN: MIRAI_EMU_LAZY=1
#include "test.h"

namespace {

struct Pinned {
    explicit Pinned(size_t n) { MUST(cuMemHostAlloc(reinterpret_cast<void**>(&data), n * sizeof(float), 0)); }
    ~Pinned() { MUST(cuMemFreeHost(data)); }
    float* data = nullptr;
};

// The buffer of an upload is written again too early: the second value arrives.
void test_upload_reads_late() {
    Stream stream;
    DeviceRow row(1, 0.0f);
    Pinned host(1);
    *host.data = 1;
    MUST(cuMemcpyHtoDAsync_v2(row.get(), host.data, 4, stream.get()));
    EXPECT(row.all(0.0f));  // a copy on the default stream does not wait for this one
    *host.data = 2;
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(row.all(2.0f));
    float pageable = 3;
    MUST(cuMemcpyHtoDAsync_v2(row.get(), &pageable, 4, stream.get()));
    pageable = 4;
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(row.all(3.0f));
}

// A read-back is there once its event is, not before.
void test_readback_lands_late() {
    Stream stream;
    DeviceRow row(1, 5.0f);
    Pinned host(1);
    CUevent done = nullptr;
    MUST(cuEventCreate(&done, CU_EVENT_DISABLE_TIMING));
    *host.data = -1;
    MUST(cuMemcpyDtoHAsync_v2(host.data, row.get(), 4, stream.get()));
    MUST(cuEventRecord(done, stream.get()));
    EXPECT(*host.data == -1);
    MUST(cuEventSynchronize(done));
    EXPECT(*host.data == 5);
    float pageable = -1;
    MUST(cuMemcpyDtoHAsync_v2(&pageable, row.get(), 4, stream.get()));
    EXPECT(pageable == 5);
    MUST(cuEventDestroy_v2(done));
}

// An event lets run what is before it and nothing behind it.
void test_events_part_the_work(CUmodule module) {
    Adder adder(module);
    Stream stream;
    DeviceRow x(8, 0.0f), y(8, 1.0f);
    CUevent middle = nullptr;
    MUST(cuEventCreate(&middle, CU_EVENT_DISABLE_TIMING));
    adder.add(x, y, stream.get());
    MUST(cuEventRecord(middle, stream.get()));
    adder.add(x, y, stream.get());
    EXPECT(x.all(0.0f));
    MUST(cuEventSynchronize(middle));
    EXPECT(x.all(1.0f));
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(x.all(2.0f));
    MUST(cuEventDestroy_v2(middle));
}

void test_queries_in_vain(CUmodule module) {
    Adder adder(module);
    Stream stream;
    DeviceRow x(8, 0.0f), y(8, 1.0f);
    CUevent end = nullptr;
    MUST(cuEventCreate(&end, CU_EVENT_DISABLE_TIMING));
    adder.add(x, y, stream.get());
    MUST(cuEventRecord(end, stream.get()));
    for (int i = 0; i < 3; i++) {
        EXPECT_CODE(cuEventQuery(end), CUDA_ERROR_NOT_READY);
    }
    EXPECT(x.all(0.0f));
    MUST(cuEventQuery(end));
    EXPECT(x.all(1.0f));
    adder.add(x, y, stream.get());
    for (int i = 0; i < 3; i++) {
        EXPECT_CODE(cuStreamQuery(stream.get()), CUDA_ERROR_NOT_READY);
    }
    MUST(cuStreamQuery(stream.get()));
    EXPECT(x.all(2.0f));
    MUST(cuEventDestroy_v2(end));
}

// One stream waits for another's event, or forgets to.
void test_streams(CUmodule module) {
    for (bool waits : {false, true}) {
        Adder adder(module);
        Stream first, second;
        DeviceRow x(8, 1.0f), y(8, 0.0f);
        CUevent made = nullptr;
        MUST(cuEventCreate(&made, CU_EVENT_DISABLE_TIMING));
        adder.add(x, x, first.get());
        MUST(cuEventRecord(made, first.get()));
        if (waits) {
            MUST(cuStreamWaitEvent(second.get(), made, 0));
        }
        adder.add(y, x, second.get());
        MUST(cuStreamSynchronize(second.get()));
        EXPECT(y.all(waits ? 2.0f : 1.0f));
        MUST(cuEventDestroy_v2(made));
    }
}

// Blocking streams and the default stream wait for each other.
void test_default_stream(CUmodule module) {
    Adder adder(module);
    Stream blocking(CU_STREAM_DEFAULT);
    DeviceRow x(8, 1.0f), y(8, 1.0f);
    adder.add(x, y, blocking.get());
    EXPECT(x.all(2.0f));  // its copy runs on the default stream
    MUST(cuMemsetD32_v2(x.get(), 0x40400000, 8));  // 3.0f, not waited for
    adder.add(x, y, blocking.get());
    MUST(cuStreamSynchronize(blocking.get()));
    EXPECT(x.all(4.0f));
}

// What a kernel reads before its wait is from before the kernels ahead of it.
void test_early_reads(CUmodule module) {
    Adder adder(module), early(module, "self_test_too_early");
    Stream stream;
    DeviceRow x(8, 0.0f), y(8, 1.0f);
    adder.add(x, y, stream.get());
    early.add(x, y, stream.get());
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(x.all(1.0f));  // 2 if it had waited
}

// Freeing waits for all.
void test_free(CUmodule module) {
    Adder adder(module);
    Stream stream;
    DeviceRow x(8, 0.0f), y(8, 1.0f);
    adder.add(x, y, stream.get());
    CUdeviceptr other = 0;
    MUST(cuMemAlloc_v2(&other, 4));
    EXPECT(x.all(0.0f));
    MUST(cuMemFree_v2(other));
    EXPECT(x.all(1.0f));
}

}  // namespace

int main() {
    MUST(cuInit(0));
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUmodule module = nullptr;
    MUST(cuModuleLoadData(&module, kImage));
    test_upload_reads_late();
    test_readback_lands_late();
    test_events_part_the_work(module);
    test_queries_in_vain(module);
    test_streams(module);
    test_default_stream(module);
    test_early_reads(module);
    test_free(module);
    return report();
}
