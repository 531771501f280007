// What the tests of the emulated libraries share: checks, and small owners of device objects.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cuda_api.h"

// Starts like a fatbin.
inline const unsigned kImage[4] = {0xba55ed50, 0, 0, 0};

inline std::atomic<int> checks{0}, wrong{0};

inline void expect(bool right, const char* what, int line, const char* more = "") {
    checks++;
    if (!right) {
        wrong++;
        fprintf(stderr, "line %d: %s %s\n", line, what, more);
    }
}

inline const char* name_of(CUresult code) {
    const char* name = nullptr;
    return cuGetErrorName(code, &name) == CUDA_SUCCESS ? name : "an unknown error";
}

#define EXPECT(condition) expect(condition, #condition, __LINE__)
#define EXPECT_CODE(call, code)                                                         \
    do {                                                                                \
        const CUresult code_ = call;                                                    \
        expect(code_ == (code), #call " must give " #code ", gave", __LINE__, name_of(code_)); \
    } while (0)
#define MUST(call) EXPECT_CODE(call, CUDA_SUCCESS)

inline int report() {
    printf("%d checks, %d wrong\n", checks.load(), wrong.load());
    return wrong || !checks;
}

// A number of the counts, by its name; one of `kernels_by_name` by `kernels_by_name.NAME`. 0 if there is none.
inline long count(const std::string& name, bool reset = false) {
    std::string text(1 << 16, 0);
    text.resize(mirai_emu_counts(text.data(), text.size(), reset));
    const std::string key = "\"" + name.substr(name.find('.') + 1) + "\":";
    const size_t inside = text.find("\"kernels_by_name\"");
    const size_t at = text.find(key, name.find('.') == std::string::npos ? 0 : inside);
    return at == std::string::npos ? 0 : atol(text.c_str() + at + key.size());
}

class Stream {
  public:
    explicit Stream(unsigned flags = CU_STREAM_NON_BLOCKING) {
        MUST(cuStreamCreateWithPriority(&stream_, flags, -1));
    }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    ~Stream() { MUST(cuStreamDestroy_v2(stream_)); }
    CUstream get() const { return stream_; }

  private:
    CUstream stream_ = nullptr;
};

// Equal numbers in device memory.
class DeviceRow {
  public:
    DeviceRow(size_t n, float value) : n_(n) {
        const std::vector<float> values(n, value);
        MUST(cuMemAlloc_v2(&data_, n * sizeof(float)));
        MUST(cuMemcpyHtoD_v2(data_, values.data(), n * sizeof(float)));
    }
    DeviceRow(const DeviceRow&) = delete;
    DeviceRow& operator=(const DeviceRow&) = delete;
    ~DeviceRow() { MUST(cuMemFree_v2(data_)); }
    // The memory as it is now, whatever is still queued.
    bool all(float value) const {
        std::vector<float> got(n_);
        MUST(cuMemcpyDtoH_v2(got.data(), data_, n_ * sizeof(float)));
        return std::all_of(got.begin(), got.end(), [&](float x) { return x == value; });
    }
    CUdeviceptr get() const { return data_; }
    size_t size() const { return n_; }

  private:
    CUdeviceptr data_ = 0;
    size_t n_;
};

// Launches a kernel that adds two rows, with programmatic dependent launch.
class Adder {
  public:
    explicit Adder(CUmodule module, const char* name = "self_test_add") {
        MUST(cuModuleGetFunction(&function_, module, name));
    }
    void add(const DeviceRow& x, const DeviceRow& y, CUstream stream) const { MUST(try_add(x, y, stream)); }
    CUresult try_add(const DeviceRow& x, const DeviceRow& y, CUstream stream, int shared = 0) const {
        CUdeviceptr a = x.get(), b = y.get();
        int n = static_cast<int>(x.size()), asked = shared;
        void* parameters[] = {&a, &b, &n, &asked};
        CUlaunchAttribute early{};
        early.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        early.value.programmaticStreamSerializationAllowed = 1;
        const CUlaunchConfig config{1, 1, 1, 64, 1, 1, static_cast<unsigned>(shared), stream, &early, 1};
        const CUresult result = cuLaunchKernelEx(&config, function_, parameters, nullptr);
        a = b = 0;  // the driver has copied them, or is wrong
        n = -1;
        return result;
    }
    CUfunction get() const { return function_; }

  private:
    CUfunction function_ = nullptr;
};
