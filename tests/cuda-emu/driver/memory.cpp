// Memory: allocations of device and host, copies, fills. See device.h.
#include <string.h>

#include "device.h"
#include "pages.h"

using namespace driver;

namespace driver {

std::map<uintptr_t, Allocation>::iterator holder(std::map<uintptr_t, Allocation>& memory, uintptr_t address,
                                                 size_t bytes) {
    auto next = memory.upper_bound(address);
    if (next == memory.begin()) {
        return memory.end();
    }
    --next;
    const size_t offset = address - next->first;
    return offset < next->second.bytes && bytes <= next->second.bytes - offset ? next : memory.end();
}

bool on_device(CUdeviceptr address, size_t bytes) {
    return holder(device().device_memory, address, bytes) != device().device_memory.end();
}

bool is_pinned(const void* address, size_t bytes) {
    auto& memory = device().host_memory;
    return holder(memory, reinterpret_cast<uintptr_t>(address), bytes) != memory.end();
}

}  // namespace driver

namespace {

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(static_cast<uintptr_t>(address)); }

CUresult allocate(std::map<uintptr_t, Allocation>& memory, size_t bytes, uintptr_t& address) {
    if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
        return refused;
    }
    if (!bytes) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Pages pages = map_pages(bytes);
    if (!pages.memory) {
        return CUDA_ERROR_OUT_OF_MEMORY;
    }
    address = reinterpret_cast<uintptr_t>(pages.memory);
    memory.emplace(address, Allocation{bytes, std::move(pages.release)});
    return CUDA_SUCCESS;
}

// Waits for the device first, as the real functions do.
CUresult release(std::map<uintptr_t, Allocation>& memory, uintptr_t address, size_t& bytes) {
    if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
        return refused;
    }
    const auto found = memory.find(address);
    if (found == memory.end()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    drain_all();
    bytes = found->second.bytes;
    found->second.release();
    memory.erase(found);
    return CUDA_SUCCESS;
}

void count_allocation(Device& d, const char* what, size_t bytes) {
    d.counts.add(what);
    d.counts.add(std::string(what) + "_bytes", bytes);
    if (d.graphs_launched) {
        d.counts.add("allocations_after_graphs");
    }
}

enum class Direction { Upload, Readback, Inside };

// What both kinds of copy check: ranges, and that a synchronous one is not made while something captures.
CUresult check_ranges(CUdeviceptr on, size_t bytes, const void* host) {
    if (bytes && (!on_device(on, bytes) || !host)) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

std::string name_of(Direction direction) {
    switch (direction) {
        case Direction::Upload:
            return "uploads";
        case Direction::Readback:
            return "readbacks";
        default:
            return "device_copies";
    }
}

// Queues a copy. Memory of the host that is not pinned is read at once, and written before this returns.
CUresult copy_async(void* to, const void* from, size_t bytes, CUstream handle, Direction direction) {
    CUstream stream = resolve(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!bytes) {
        return CUDA_SUCCESS;
    }
    const bool pinned = direction == Direction::Inside ||
                        is_pinned(direction == Direction::Upload ? from : to, bytes);
    if (!pinned && stream->capture) {
        return refuse_if_capturing(stream);
    }
    Work work;
    if (!pinned && direction == Direction::Upload) {
        auto staged = std::make_shared<std::vector<char>>(static_cast<const char*>(from),
                                                          static_cast<const char*>(from) + bytes);
        work.action = [=] { memcpy(to, staged->data(), bytes); };
    } else {
        work.action = [=] { memmove(to, from, bytes); };
    }
    const CUresult result = submit(stream, std::move(work), name_of(direction));
    if (result != CUDA_SUCCESS) {
        return result;
    }
    if (!stream->capture) {
        device().counts.add(name_of(direction) + "_bytes", bytes);
    }
    if (!pinned && direction == Direction::Readback) {
        drain(stream);
    }
    return CUDA_SUCCESS;
}

// A copy on the default stream that has ended when this returns.
CUresult copy_now(void* to, const void* from, size_t bytes, Direction direction) {
    if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
        return refused;
    }
    const CUresult result = copy_async(to, from, bytes, nullptr, direction);
    if (result == CUDA_SUCCESS && direction != Direction::Inside) {
        drain(resolve(nullptr));
    }
    return result;
}

template <class T>
CUresult fill(CUdeviceptr to, T value, size_t count, CUstream handle) {
    CUstream stream = resolve(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (to % sizeof(T) || count > SIZE_MAX / sizeof(T) || (count && !on_device(to, count * sizeof(T)))) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Work work;
    work.action = [=] {
        if (sizeof(T) == 1) {
            memset(pointer(to), static_cast<int>(value), count);
        } else {
            std::fill_n(static_cast<T*>(pointer(to)), count, value);
        }
    };
    return count ? submit(stream, std::move(work), "fills") : CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuMemGetInfo_v2(size_t* free, size_t* total) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!free || !total) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *total = d.memory_total;
        *free = d.memory_total - d.memory_used;
        return CUDA_SUCCESS;
    });
}

void mirai_emu_memory(size_t* used, size_t* total) {
    Device& d = device();
    std::lock_guard<std::mutex> lock(d.mutex);
    *used = d.memory_used;
    *total = d.memory_total;
}

CUresult cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!address) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (bytes > d.memory_total - d.memory_used) {
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        uintptr_t made = 0;
        const CUresult result = allocate(d.device_memory, bytes, made);
        if (result == CUDA_SUCCESS) {
            *address = made;
            d.memory_used += bytes;
            count_allocation(d, "allocations", bytes);
        }
        return result;
    });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!address) {
            return CUDA_SUCCESS;
        }
        size_t bytes = 0;
        const CUresult result = release(d.device_memory, address, bytes);
        if (result == CUDA_SUCCESS) {
            d.memory_used -= bytes;
            d.counts.add("frees");
        }
        return result;
    });
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr* base, size_t* bytes, CUdeviceptr address) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        const auto found = holder(d.device_memory, address, 1);
        if (found == d.device_memory.end()) {
            return CUDA_ERROR_NOT_FOUND;
        }
        if (base) {
            *base = found->first;
        }
        if (bytes) {
            *bytes = found->second.bytes;
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuMemHostAlloc(void** made, size_t bytes, unsigned) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!made) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        uintptr_t address = 0;
        const CUresult result = allocate(d.host_memory, bytes, address);
        if (result == CUDA_SUCCESS) {
            *made = reinterpret_cast<void*>(address);
            count_allocation(d, "host_allocations", bytes);
        }
        return result;
    });
}

CUresult cuMemAllocHost_v2(void** made, size_t bytes) { return cuMemHostAlloc(made, bytes, 0); }

CUresult cuMemFreeHost(void* memory) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        size_t bytes = 0;
        const CUresult result = release(d.host_memory, reinterpret_cast<uintptr_t>(memory), bytes);
        if (result == CUDA_SUCCESS) {
            d.counts.add("host_frees");
        }
        return result;
    });
}

CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr* address, void* memory, unsigned flags) {
    return enter(__func__, Needs::Context, [&](Device&) {
        if (!address || flags || !is_pinned(memory, 1)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *address = reinterpret_cast<uintptr_t>(memory);
        return CUDA_SUCCESS;
    });
}

CUresult cuMemHostGetFlags(unsigned* flags, void* memory) {
    return enter(__func__, Needs::Context, [&](Device&) {
        if (!flags || !is_pinned(memory, 1)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *flags = 2;  // mapped, as everything is under unified addressing
        return CUDA_SUCCESS;
    });
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t bytes) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(to, bytes, from);
        return checked != CUDA_SUCCESS ? checked : copy_now(pointer(to), from, bytes, Direction::Upload);
    });
}

CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t bytes) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(from, bytes, to);
        return checked != CUDA_SUCCESS ? checked : copy_now(to, pointer(from), bytes, Direction::Readback);
    });
}

CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(from, bytes, on_device(to, bytes) ? pointer(to) : nullptr);
        return checked != CUDA_SUCCESS ? checked : copy_now(pointer(to), pointer(from), bytes, Direction::Inside);
    });
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t bytes, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(to, bytes, from);
        return checked != CUDA_SUCCESS ? checked : copy_async(pointer(to), from, bytes, stream, Direction::Upload);
    });
}

CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(from, bytes, to);
        return checked != CUDA_SUCCESS ? checked : copy_async(to, pointer(from), bytes, stream, Direction::Readback);
    });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device&) {
        const CUresult checked = check_ranges(from, bytes, on_device(to, bytes) ? pointer(to) : nullptr);
        return checked != CUDA_SUCCESS ? checked
                                       : copy_async(pointer(to), pointer(from), bytes, stream, Direction::Inside);
    });
}

CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, size_t count) {
    return enter(__func__, Needs::Context, [&](Device&) { return fill(to, value, count, nullptr); });
}
CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, size_t count) {
    return enter(__func__, Needs::Context, [&](Device&) { return fill(to, value, count, nullptr); });
}
CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device&) { return fill(to, value, count, stream); });
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
    return enter(__func__, Needs::Context, [&](Device&) { return fill(to, value, count, stream); });
}
}
