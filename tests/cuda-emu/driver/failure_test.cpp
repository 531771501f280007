// Failures on request, a device that is lost by one, and the counts that a process leaves behind.
// RUN: MIRAI_EMU_FAIL=cuLaunchKernelEx:3:700
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

namespace {

CUmodule start() {
    MUST(cuInit(0));
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUmodule module = nullptr;
    MUST(cuModuleLoadData(&module, kImage));
    return module;
}

// The third launch fails, and nothing works from there on, as after an illegal address.
void test_lost_device() {
    const CUmodule module = start();
    CUfunction function = nullptr;
    MUST(cuModuleGetFunction(&function, module, "self_test_add"));
    CUdeviceptr row = 0;
    MUST(cuMemAlloc_v2(&row, 32));
    int n = 8, shared = 0;
    void* parameters[] = {&row, &row, &n, &shared};
    const CUlaunchConfig config{1, 1, 1, 32, 1, 1, 0, nullptr, nullptr, 0};
    MUST(cuLaunchKernelEx(&config, function, parameters, nullptr));
    MUST(cuLaunchKernelEx(&config, function, parameters, nullptr));
    EXPECT_CODE(cuLaunchKernelEx(&config, function, parameters, nullptr), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_CODE(cuLaunchKernelEx(&config, function, parameters, nullptr), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_CODE(cuCtxSynchronize(), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_CODE(cuMemFree_v2(row), CUDA_ERROR_ILLEGAL_ADDRESS);
    int count = 0;
    MUST(cuDeviceGetCount(&count));
}

// What a child with these variables answers; `body` runs in it.
template <class Body>
int child(const char* name, const char* value, Body body) {
    fflush(nullptr);
    const pid_t pid = fork();
    if (pid == 0) {
        setenv(name, value, 1);
        exit(body());
    }
    int status = 0;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void test_absent_and_old() {
    EXPECT(child("MIRAI_EMU_DEVICES", "0", [] { return static_cast<int>(cuInit(0)); }) == CUDA_ERROR_NO_DEVICE);
    EXPECT(child("MIRAI_EMU_DRIVER_VERSION", "42", [] {
               int version = 0;
               return cuDriverGetVersion(&version) == CUDA_SUCCESS ? version : 0;
           }) == 42);
}

void test_report() {
    char path[] = "/tmp/counts-XXXXXX";
    const int file = mkstemp(path);
    EXPECT(file >= 0);
    EXPECT(child("MIRAI_EMU_COUNTS", path, [] {
               start();
               CUdeviceptr memory = 0;
               MUST(cuMemAlloc_v2(&memory, 12));
               MUST(cuMemsetD8_v2(memory, 1, 12));
               return wrong.load();
           }) == 0);
    char text[1024] = "";
    const ssize_t got = read(file, text, sizeof text - 1);
    EXPECT(got > 0 && text[got - 1] == '\n');
    EXPECT(strstr(text, "\"allocations\":1,") && strstr(text, "\"allocations_bytes\":12,") &&
           strstr(text, "\"fills\":1,"));
    close(file);
    unlink(path);
}

}  // namespace

int main() {
    test_absent_and_old();
    test_report();
    test_lost_device();
    return report();
}
