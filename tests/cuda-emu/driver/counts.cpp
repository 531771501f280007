// What was done, counted: for tests that hold a step to so many launches and copies. Also makes functions fail on
// request. See device.h.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

namespace driver {

namespace {

std::string as_json(const Counts& counts) {
    std::string text = "{";
    for (const auto& [name, n] : counts.values) {
        text += "\"" + name + "\":" + std::to_string(n) + ",";
    }
    text += "\"kernels_by_name\":{";
    const char* comma = "";
    for (const auto& [name, n] : counts.kernels) {
        text += comma + ("\"" + name + "\":" + std::to_string(n));
        comma = ",";
    }
    return text + "}}";
}

struct Failure {
    std::string function;
    long call = 0;
    int code = 0;
};

Failure wanted_failure() {
    Failure failure;
    const char* text = getenv("MIRAI_EMU_FAIL");
    char name[128];
    if (text && sscanf(text, "%127[^:]:%ld:%d", name, &failure.call, &failure.code) == 3) {
        failure.function = name;
    }
    return failure;
}

// When the process ends: one line more in the file.
struct Report {
    ~Report() {
        const char* path = getenv("MIRAI_EMU_COUNTS");
        FILE* file = path ? fopen(path, "a") : nullptr;
        if (!file) {
            return;
        }
        std::lock_guard<std::mutex> lock(device().mutex);
        fprintf(file, "%s\n", as_json(device().counts).c_str());
        fclose(file);
    }
};

}  // namespace

void count_work(const std::string& what) {
    Counts& counts = device().counts;
    constexpr char kPrefix[] = "kernel:";
    if (what.compare(0, sizeof kPrefix - 1, kPrefix) == 0) {
        counts.add("kernels");
        counts.kernels[what.substr(sizeof kPrefix - 1)]++;
    } else {
        counts.add(what);
    }
}

CUresult injected_failure(const char* function) {
    static Failure failure = wanted_failure();
    if (failure.function != function || --failure.call != 0) {
        return CUDA_SUCCESS;
    }
    const auto code = static_cast<CUresult>(failure.code);
    // From here on these are errors of the context, not of the call.
    if ((code >= CUDA_ERROR_ILLEGAL_ADDRESS && code < CUDA_ERROR_NOT_PERMITTED) ||
        code == CUDA_ERROR_ECC_UNCORRECTABLE) {
        device().broken = code;
    }
    return code;
}

Device& device() {
    static Device* the_device = new Device;  // outlives every thread that may still call
    static Report report;
    return *the_device;
}

}  // namespace driver

extern "C" size_t mirai_emu_counts(char* json, size_t capacity, int reset) {
    driver::Device& d = driver::device();
    std::lock_guard<std::mutex> lock(d.mutex);
    const std::string text = driver::as_json(d.counts);
    if (json && capacity) {
        const size_t copied = text.size() < capacity ? text.size() : capacity - 1;
        memcpy(json, text.data(), copied);
        json[copied] = 0;
    }
    if (reset) {
        d.counts = {};
    }
    return text.size();
}
