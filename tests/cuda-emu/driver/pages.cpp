#include "pages.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define REDZONE(from, bytes) ASAN_POISON_MEMORY_REGION(from, bytes)
#define NO_REDZONE(from, bytes) ASAN_UNPOISON_MEMORY_REGION(from, bytes)
#else
#define REDZONE(from, bytes) ((void)(from), (void)(bytes))
#define NO_REDZONE(from, bytes) ((void)(from), (void)(bytes))
#endif

namespace driver {

namespace {

constexpr size_t kAlignment = 512;
constexpr size_t kLarge = 1 << 20;      // from here on mapped
constexpr size_t kPattern = 16 << 20;   // bytes of the file of 0xff
constexpr size_t kGuard = 64 << 10;     // before and behind, never accessible
constexpr size_t kPage = 4096;

int pattern_file() {
    static const int file = [] {
        const int made = memfd_create("device-memory", MFD_CLOEXEC);
        if (made < 0 || ftruncate(made, kPattern)) {
            return -1;
        }
        void* memory = mmap(nullptr, kPattern, PROT_WRITE, MAP_SHARED, made, 0);
        if (memory == MAP_FAILED) {
            return -1;
        }
        memset(memory, 0xff, kPattern);
        munmap(memory, kPattern);
        return made;
    }();
    return file;
}

Pages map_large(size_t bytes) {
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage, all = rounded + 2 * kGuard;
    void* reserved = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) {
        return {nullptr, {}};
    }
    char* base = static_cast<char*>(reserved) + kGuard;
    for (size_t at = 0; at < rounded; at += kPattern) {
        const size_t part = std::min(kPattern, rounded - at);
        if (mmap(base + at, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, pattern_file(),
                 0) == MAP_FAILED) {
            munmap(reserved, all);
            return {nullptr, {}};
        }
    }
    REDZONE(base + bytes, rounded - bytes);
    return {base, [=] {
                NO_REDZONE(base, rounded);
                munmap(reserved, all);
            }};
}

}  // namespace

#if defined(__SANITIZE_ADDRESS__)
// A part of an allocation that nobody may touch. Its presence says that somebody watches. Memory that is freed forgets it.
extern "C" void mirai_emu_redzone(unsigned long long address, size_t bytes) {
    REDZONE(reinterpret_cast<void*>(static_cast<uintptr_t>(address)), bytes);
}
#endif

Pages map_pages(size_t bytes) {
    if (bytes >= kLarge && pattern_file() >= 0) {
        return map_large(bytes);
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes)) {
        return {nullptr, {}};
    }
    memset(memory, 0xff, bytes);
    return {memory, [memory] { free(memory); }};
}

}  // namespace driver
