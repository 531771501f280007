// Memory accesses of asynchronous copies, compiled with the sanitizers so that they see them as the thread's own.
#include "scheduler.h"

namespace emu {

void instrumented_copy(void* to, const void* from, unsigned bytes, unsigned capacity) {
    // One access where it can be one.
    if (bytes == 16 && capacity == 16) {
        struct alignas(16) Piece {
            uint64_t words[2];
        };
        *static_cast<Piece*>(to) = *static_cast<const Piece*>(from);
        return;
    }
    auto* out = static_cast<volatile uint8_t*>(to);
    auto* in = static_cast<const volatile uint8_t*>(from);
    for (unsigned i = 0; i < capacity; i++) {
        out[i] = i < bytes ? in[i] : uint8_t{0};
    }
}

}  // namespace emu
