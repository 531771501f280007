// A kernel that writes behind an allocation ends the process: small ones under AddressSanitizer, large ones always.
// RUN: MIRAI_EMU_ORDER=forward
#include <sys/wait.h>
#include <unistd.h>

#include "test.h"

namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kWatched = true;
#else
constexpr bool kWatched = false;
#endif

// Whether a child that lets the kernel run on a row of n elements lives to its end.
bool survives(size_t n, const char* kernel) {
    fflush(nullptr);
    const pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr)) {
            _exit(99);
        }
        MUST(cuInit(0));
        CUcontext context = nullptr;
        MUST(cuDevicePrimaryCtxRetain(&context, 0));
        MUST(cuCtxSetCurrent(context));
        CUmodule module = nullptr;
        MUST(cuModuleLoadData(&module, kImage));
        DeviceRow row(n, 1.0f);
        Adder(module, kernel).add(row, row, nullptr);
        MUST(cuCtxSynchronize());
        _exit(wrong ? 98 : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT(!WIFEXITED(status) || WEXITSTATUS(status) < 98);
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

}  // namespace

int main() {
    constexpr size_t kSmall = 1000, kPages = 1 << 18, kNoPages = (1 << 18) + 3;
    for (size_t n : {kSmall, kPages, kNoPages}) {
        EXPECT(survives(n, "self_test_add"));
    }
    EXPECT(!survives(kPages, "self_test_beyond"));
    EXPECT(survives(kSmall, "self_test_beyond") == !kWatched);
    EXPECT(survives(kNoPages, "self_test_beyond") == !kWatched);
    return report();
}
