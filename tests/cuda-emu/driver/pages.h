// Memory of the emulated device: every byte 0xff until written, with nothing readable next to it.
//
// Owns how that is had without touching it: large allocations map one small file of 0xff over and over, copied by the
// kernel where it is written. Knows nothing of contexts or limits.
#pragma once
#include <stddef.h>

#include <functional>

namespace driver {

struct Pages {
    void* memory;  // null if there is none; aligned to 512 bytes
    std::function<void()> release;
};

Pages map_pages(size_t bytes);

}  // namespace driver
