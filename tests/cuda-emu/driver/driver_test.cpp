// Device, memory, streams, events and launches: what the emulated driver answers to right and to wrong calls.
// RUN: MIRAI_EMU_MEMORY=16777216
// RUN: MIRAI_EMU_MEMORY=16777216 MIRAI_EMU_ORDER=reverse
// RUN: MIRAI_EMU_MEMORY=16777216 MIRAI_EMU_ORDER=random:7
// RUN: MIRAI_EMU_MEMORY=16777216 MIRAI_EMU_LAZY=1
#include "test.h"

namespace {

void test_start() {
    int count = 0;
    EXPECT_CODE(cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
    EXPECT_CODE(cuInit(1), CUDA_ERROR_INVALID_VALUE);
    MUST(cuInit(0));
    MUST(cuInit(0));
    MUST(cuDeviceGetCount(&count));
    EXPECT(count == 1);
    CUdevice device = -1;
    MUST(cuDeviceGet(&device, 0));
    EXPECT_CODE(cuDeviceGet(&device, 1), CUDA_ERROR_INVALID_DEVICE);
    size_t bytes = 0;
    EXPECT_CODE(cuMemGetInfo_v2(&bytes, &bytes), CUDA_ERROR_INVALID_CONTEXT);
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    const std::pair<int, int> wanted[] = {{16, 132}, {75, 9}, {76, 0}, {97, 227 * 1024}, {38, 50 << 20}, {10, 32}};
    for (const auto& [attribute, value] : wanted) {
        int got = -1;
        MUST(cuDeviceGetAttribute(&got, attribute, 0));
        EXPECT(got == value);
    }
    const char* name = nullptr;
    MUST(cuGetErrorName(CUDA_ERROR_ILLEGAL_ADDRESS, &name));
    EXPECT(!strcmp(name, "CUDA_ERROR_ILLEGAL_ADDRESS"));
    EXPECT_CODE(cuGetErrorName(static_cast<CUresult>(12345), &name), CUDA_ERROR_INVALID_VALUE);
    void* function = nullptr;
    MUST(cuGetProcAddress_v2("cuMemAlloc", &function, 13000, 0, nullptr));
    EXPECT(function == reinterpret_cast<void*>(&cuMemAlloc_v2));
    EXPECT_CODE(cuGetProcAddress_v2("cuNothing", &function, 13000, 0, nullptr), CUDA_ERROR_NOT_FOUND);
}

void test_memory() {
    size_t before = 0, total = 0, after = 0;
    MUST(cuMemGetInfo_v2(&before, &total));
    EXPECT(total == 16777216 && before == total);
    CUdeviceptr small = 0, large = 0, none = 0;
    MUST(cuMemAlloc_v2(&small, 100));
    MUST(cuMemAlloc_v2(&large, (2 << 20) + 12));
    EXPECT(small % 256 == 0 && large % 256 == 0);
    MUST(cuMemGetInfo_v2(&after, &total));
    EXPECT(after == before - 100 - (2 << 20) - 12);
    EXPECT_CODE(cuMemAlloc_v2(&none, total), CUDA_ERROR_OUT_OF_MEMORY);
    EXPECT_CODE(cuMemAlloc_v2(&none, 0), CUDA_ERROR_INVALID_VALUE);

    std::vector<unsigned char> got((2 << 20) + 12, 0);
    MUST(cuMemcpyDtoH_v2(got.data(), large, got.size()));
    EXPECT(std::all_of(got.begin(), got.end(), [](unsigned char c) { return c == 0xff; }));
    EXPECT_CODE(cuMemcpyDtoH_v2(got.data(), small, 101), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(cuMemcpyHtoD_v2(large + 1, got.data(), got.size()), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(cuMemsetD32Async(small + 2, 0, 1, nullptr), CUDA_ERROR_INVALID_VALUE);
    MUST(cuMemsetD8_v2(small, 7, 50));
    MUST(cuMemsetD32_v2(small + 52, 0x01020304, 2));
    MUST(cuMemcpyDtoD_v2(large + 3, small, 100));
    MUST(cuMemcpyDtoH_v2(got.data(), large + 3, 100));
    EXPECT(got[0] == 7 && got[49] == 7 && got[50] == 0xff && got[52] == 4 && got[59] == 1 && got[60] == 0xff);
    MUST(cuMemFree_v2(small));
    EXPECT_CODE(cuMemFree_v2(small), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(cuMemcpyDtoH_v2(got.data(), small, 1), CUDA_ERROR_INVALID_VALUE);
    MUST(cuMemFree_v2(large));
    MUST(cuMemGetInfo_v2(&after, &total));
    EXPECT(after == before);
}

void test_functions(CUmodule module) {
    CUfunction function = nullptr;
    EXPECT_CODE(cuModuleGetFunction(&function, module, "no_such_kernel"), CUDA_ERROR_NOT_FOUND);
    MUST(cuModuleGetFunction(&function, module, "self_test_add"));
    int value = -1;
    MUST(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function));
    EXPECT(value == 256);
    size_t offset = 0, bytes = 0;
    MUST(cuFuncGetParamInfo(function, 2, &offset, &bytes));
    EXPECT(offset == 16 && bytes == 4);
    EXPECT_CODE(cuFuncGetParamInfo(function, 4, &offset, &bytes), CUDA_ERROR_INVALID_VALUE);
    const char* name = nullptr;
    MUST(cuFuncGetName(&name, function));
    EXPECT(!strcmp(name, "self_test_add"));
    EXPECT_CODE(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 228 * 1024),
                CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 64), CUDA_ERROR_INVALID_VALUE);
    int n = 8, shared = 0;
    DeviceRow row(8, 1.0f);
    CUdeviceptr memory = row.get();
    void* parameters[] = {&memory, &memory, &n, &shared};
    const auto launch = [&](unsigned grid, unsigned threads) {
        return cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, 0, nullptr, parameters, nullptr);
    };
    EXPECT_CODE(launch(0, 32), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(launch(1, 0), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(launch(1, 257), CUDA_ERROR_INVALID_VALUE);
    EXPECT_CODE(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, reinterpret_cast<CUstream>(0x1234), parameters, nullptr),
                CUDA_ERROR_INVALID_HANDLE);
    MUST(launch(1, 32));
    MUST(cuCtxSynchronize());
    EXPECT(row.all(2.0f));

    Adder adder(module);
    EXPECT_CODE(adder.try_add(row, row, nullptr, 48 * 1024 + 1), CUDA_ERROR_INVALID_VALUE);
    MUST(adder.try_add(row, row, nullptr, 48 * 1024));
    MUST(cuFuncSetAttribute(adder.get(), CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 227 * 1024));
    MUST(adder.try_add(row, row, nullptr, 227 * 1024));
    EXPECT_CODE(adder.try_add(row, row, nullptr, 227 * 1024 + 1), CUDA_ERROR_INVALID_VALUE);
    MUST(cuCtxSynchronize());
    EXPECT(row.all(8.0f));
}

void test_libraries() {
    CUmodule module = nullptr;
    CUfunction function = nullptr;
    int value = 0;
    CUlibrary library = nullptr;
    CUkernel kernel = nullptr;
    MUST(cuLibraryLoadData(&library, kImage, nullptr, nullptr, 0, nullptr, nullptr, 0));
    MUST(cuLibraryGetKernel(&kernel, library, "self_test_add"));
    MUST(cuKernelGetFunction(&function, kernel));
    MUST(cuFuncGetAttribute(&value, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, function));
    EXPECT(value == 48 * 1024);
    MUST(cuLibraryUnload(library));
    EXPECT_CODE(cuLibraryGetKernel(&kernel, library, "self_test_add"), CUDA_ERROR_INVALID_HANDLE);
    EXPECT_CODE(cuModuleLoadData(&module, "no image"), CUDA_ERROR_INVALID_IMAGE);
}

// x += y, twice through the stream, parameters on a stack that is gone by then.
void test_launches(CUmodule module) {
    Adder adder(module);
    Stream stream;
    DeviceRow x(64, 1.0f), y(64, 2.0f);
    count("kernels", true);
    adder.add(x, y, stream.get());
    adder.add(x, y, stream.get());
    MUST(cuStreamSynchronize(stream.get()));
    EXPECT(x.all(5.0f));
    EXPECT(count("kernels_by_name.self_test_add") == 2 && count("kernels") == 2);
}

void test_events(CUmodule module) {
    Adder adder(module);
    Stream one, two;
    DeviceRow x(64, 1.0f), y(64, 1.0f);
    CUevent start = nullptr, end = nullptr, silent = nullptr;
    MUST(cuEventCreate(&start, CU_EVENT_DEFAULT));
    MUST(cuEventCreate(&end, CU_EVENT_DEFAULT));
    MUST(cuEventCreate(&silent, CU_EVENT_DISABLE_TIMING));
    MUST(cuEventQuery(start));
    MUST(cuEventRecord(start, one.get()));
    adder.add(x, y, one.get());
    MUST(cuEventRecord(end, one.get()));
    MUST(cuEventRecord(silent, one.get()));
    MUST(cuStreamWaitEvent(two.get(), end, 0));
    adder.add(x, x, two.get());
    MUST(cuStreamSynchronize(two.get()));
    MUST(cuEventQuery(end));
    float milliseconds = -1;
    MUST(cuEventElapsedTime(&milliseconds, start, end));
    EXPECT(milliseconds >= 0);
    MUST(cuEventSynchronize(silent));
    EXPECT_CODE(cuEventElapsedTime(&milliseconds, start, silent), CUDA_ERROR_INVALID_HANDLE);
    EXPECT(x.all(4.0f));
    MUST(cuEventDestroy_v2(start));
    EXPECT_CODE(cuEventRecord(start, one.get()), CUDA_ERROR_INVALID_HANDLE);
    MUST(cuEventDestroy_v2(end));
    MUST(cuEventDestroy_v2(silent));
    unsigned flags = 0;
    int priority = 9;
    MUST(cuStreamGetFlags(one.get(), &flags));
    MUST(cuStreamGetPriority(one.get(), &priority));
    EXPECT(flags == CU_STREAM_NON_BLOCKING && priority == -1);
}

// Two threads of the host, each with its stream: the device is one, and must not mix them up.
void test_threads(CUmodule module) {
    CUcontext context = nullptr;
    MUST(cuCtxGetCurrent(&context));
    const auto work = [&] {
        size_t bytes = 0;
        EXPECT_CODE(cuMemGetInfo_v2(&bytes, &bytes), CUDA_ERROR_INVALID_CONTEXT);
        MUST(cuCtxSetCurrent(context));
        Adder adder(module);
        Stream stream;
        DeviceRow x(64, 0.0f), y(64, 1.0f);
        for (int i = 0; i < 50; i++) {
            adder.add(x, y, stream.get());
        }
        MUST(cuStreamSynchronize(stream.get()));
        EXPECT(x.all(50.0f));
    };
    std::thread first(work), second(work);
    first.join();
    second.join();
}

}  // namespace

int main() {
    test_start();
    test_memory();
    CUmodule module = nullptr;
    MUST(cuModuleLoadData(&module, kImage));
    test_functions(module);
    test_libraries();
    test_launches(module);
    test_events(module);
    test_threads(module);
    MUST(cuModuleUnload(module));
    return report();
}
