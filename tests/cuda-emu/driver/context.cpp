// Start, device, contexts, errors. See device.h.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"

using namespace driver;

namespace driver {
thread_local CUcontext current_context;
}

namespace {

CUctx_st primary;
thread_local std::vector<CUcontext> stack_below;

constexpr char kBusId[] = "0000:0A:00.0";
constexpr unsigned char kUuid[16] = {0x6d, 0x69, 0x72, 0x61, 0x69, 0x2d, 0x65, 0x6d,
                                     0x75, 0x6c, 0x61, 0x74, 0x65, 0x64, 0x00, 0x01};

// Numbers of CUdevice_attribute that a compute program asks for, as an H200 answers.
int attribute_of(int attribute) {
    static const std::map<int, int> values = {
        {1, kMaxThreads},              // threads of a block
        {2, 1024}, {3, 1024}, {4, 64}, // block
        {5, 2147483647}, {6, 65535}, {7, 65535},  // grid
        {8, kSharedDefault},           // shared memory of a block
        {9, 65536},                    // constant memory
        {10, 32},                      // warp
        {11, 2147483647},              // pitch
        {12, 65536},                   // registers of a block
        {13, 1980000},                 // clock, kHz
        {14, 512},                     // texture alignment
        {15, 1},                       // overlap
        {16, kMultiprocessors},
        {19, 1},                       // mapped host memory
        {31, 1},                       // concurrent kernels
        {32, 1},                       // ECC
        {33, 10}, {34, 0}, {50, 0},    // PCI bus, device, domain
        {36, 3201000},                 // memory clock, kHz
        {37, 6144},                    // memory bus, bits
        {38, kL2Bytes},
        {39, 2048},                    // threads of a multiprocessor
        {40, 3},                       // copy engines
        {41, 1},                       // unified addressing
        {75, 9}, {76, 0},              // compute capability
        {78, 1},                       // priorities
        {79, 1}, {80, 1},              // first-level cache
        {81, 228 * 1024},              // shared memory of a multiprocessor
        {82, 65536},                   // registers of a multiprocessor
        {83, 1},                       // managed memory
        {90, 1},                       // preemption
        {91, 1},                       // registered host pointers
        {95, 1},                       // cooperative launch
        {97, kSharedOptIn},
        {99, 1},                       // registering host memory
        {102, 1},                      // virtual addresses
        {106, 32},                     // blocks of a multiprocessor
        {108, 32 << 20},               // persisting second-level cache
        {109, 134213632},              // access policy window
        {111, 1024},                   // shared memory that the system keeps
        {115, 1},                      // memory pools
    };
    const auto found = values.find(attribute);
    return found == values.end() ? 0 : found->second;
}

// None on a machine with a driver but no GPU, which MIRAI_EMU_DEVICES=0 asks for.
int device_count() {
    const char* wanted = getenv("MIRAI_EMU_DEVICES");
    return wanted && !strcmp(wanted, "0") ? 0 : 1;
}

void read_settings(Device& d) {
    const char* lazy = getenv("MIRAI_EMU_LAZY");
    d.lazy = lazy && strcmp(lazy, "0");
    d.overlap = d.lazy;
    if (const char* memory = getenv("MIRAI_EMU_MEMORY")) {
        d.memory_total = strtoull(memory, nullptr, 10);
    }
    const char* order = getenv("MIRAI_EMU_ORDER");
    if (!order) {
        return;
    }
    d.overlap = true;
    if (!strcmp(order, "reverse")) {
        emu::set_order(emu::Order::Reverse, 0);
    } else if (!strncmp(order, "random", 6)) {
        emu::set_order(emu::Order::Random, order[6] ? strtoull(order + 7, nullptr, 10) : 1);
    } else if (strcmp(order, "forward")) {
        fprintf(stderr, "MIRAI_EMU_ORDER=%s: forward, reverse or random:SEED\n", order);
        abort();
    }
}

struct ErrorName {
    CUresult code;
    const char *name, *text;
};
#define ERROR(code, text) {code, #code, text}
constexpr ErrorName kErrors[] = {
    ERROR(CUDA_SUCCESS, "no error"),
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument"),
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory"),
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error"),
    ERROR(CUDA_ERROR_DEINITIALIZED, "driver shutting down"),
    ERROR(CUDA_ERROR_NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal"),
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context"),
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(CUDA_ERROR_ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    ERROR(CUDA_ERROR_FILE_NOT_FOUND, "file not found"),
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle"),
    ERROR(CUDA_ERROR_ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found"),
    ERROR(CUDA_ERROR_NOT_READY, "device not ready"),
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(CUDA_ERROR_LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    ERROR(CUDA_ERROR_ASSERT, "device-side assert triggered"),
    ERROR(CUDA_ERROR_HARDWARE_STACK_ERROR, "hardware stack error"),
    ERROR(CUDA_ERROR_ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    ERROR(CUDA_ERROR_MISALIGNED_ADDRESS, "misaligned address"),
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(CUDA_ERROR_NOT_PERMITTED, "operation not permitted"),
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported"),
    ERROR(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, "system has unsupported display driver / cuda driver combination"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing stream"),
    ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture from another thread"),
    ERROR(CUDA_ERROR_UNKNOWN, "unknown error"),
};

const ErrorName* find_error(CUresult code) {
    for (const ErrorName& error : kErrors) {
        if (error.code == code) {
            return &error;
        }
    }
    return nullptr;
}

template <class Body>
CUresult about_device(const char* function, CUdevice ordinal, Body body) {
    return enter(function, Needs::Start,
                 [&](Device& d) { return ordinal != 0 ? CUDA_ERROR_INVALID_DEVICE : body(d); });
}

CUresult copy_text(char* to, int length, const char* text) {
    if (!to || length <= 0) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    snprintf(to, static_cast<size_t>(length), "%s", text);
    return CUDA_SUCCESS;
}

}  // namespace

extern "C" {

CUresult cuInit(unsigned flags) {
    return enter(__func__, Needs::Nothing, [&](Device& d) {
        if (flags) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        if (!device_count()) {
            return CUDA_ERROR_NO_DEVICE;
        }
        if (!d.started) {
            d.started = true;
            read_settings(d);
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuDriverGetVersion(int* version) {
    if (!version) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    // A driver that is too old, for tests of what a program says about it.
    const char* wanted = getenv("MIRAI_EMU_DRIVER_VERSION");
    *version = wanted ? atoi(wanted) : kDriverVersion;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult code, const char** name) {
    const ErrorName* error = find_error(code);
    *name = error ? error->name : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult code, const char** text) {
    const ErrorName* error = find_error(code);
    *text = error ? error->text : nullptr;
    return error ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, unsigned* status) {
    if (!symbol || !function) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    Dl_info here;
    void* library =
        dladdr(reinterpret_cast<void*>(&cuInit), &here) ? dlopen(here.dli_fname, RTLD_NOLOAD | RTLD_LAZY) : nullptr;
    *function = nullptr;
    for (const char* ending : {"_v2", ""}) {
        if (library && !*function) {
            *function = dlsym(library, (std::string(symbol) + ending).c_str());
        }
    }
    if (status) {
        *status = *function ? 0 : 1;
    }
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuDeviceGetCount(int* count) {
    return enter(__func__, Needs::Start, [&](Device&) {
        if (!count) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *count = device_count();
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGet(CUdevice* found, int ordinal) {
    return about_device(__func__, ordinal, [&](Device&) {
        *found = ordinal;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetName(char* name, int length, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device&) { return copy_text(name, length, "Emulated H200"); });
}

CUresult cuDeviceGetUuid_v2(CUuuid* uuid, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device&) {
        memcpy(uuid->bytes, kUuid, sizeof kUuid);
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device&) { return copy_text(id, length, kBusId); });
}

CUresult cuDeviceGetByPCIBusId(CUdevice* found, const char* id) {
    return enter(__func__, Needs::Start, [&](Device&) {
        if (!id || strcasecmp(id, kBusId)) {
            return CUDA_ERROR_INVALID_DEVICE;
        }
        *found = 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device& d) {
        *bytes = d.memory_total;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device&) {
        if (!value || attribute < 1) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *value = attribute_of(attribute);
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device& d) {
        d.context_users++;
        *context = &primary;
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice ordinal) {
    return about_device(__func__, ordinal, [&](Device& d) {
        if (!d.context_users) {
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        d.context_users--;
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxSetFlags_v2(CUdevice ordinal, unsigned) {
    return about_device(__func__, ordinal, [](Device&) { return CUDA_SUCCESS; });
}

CUresult cuDevicePrimaryCtxGetState(CUdevice ordinal, unsigned* flags, int* active) {
    return about_device(__func__, ordinal, [&](Device& d) {
        *flags = 0;
        *active = d.context_users > 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSetCurrent(CUcontext context) {
    return enter(__func__, Needs::Start, [&](Device&) {
        if (context && context != &primary) {
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        current_context = context;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    return enter(__func__, Needs::Start, [&](Device&) {
        *context = current_context;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    return enter(__func__, Needs::Start, [&](Device&) {
        if (context != &primary) {
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        stack_below.push_back(current_context);
        current_context = context;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxPopCurrent_v2(CUcontext* context) {
    return enter(__func__, Needs::Start, [&](Device&) {
        if (!current_context) {
            return CUDA_ERROR_INVALID_CONTEXT;
        }
        if (context) {
            *context = current_context;
        }
        current_context = stack_below.empty() ? nullptr : stack_below.back();
        if (!stack_below.empty()) {
            stack_below.pop_back();
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetDevice(CUdevice* ordinal) {
    return enter(__func__, Needs::Context, [&](Device&) {
        *ordinal = 0;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetApiVersion(CUcontext, unsigned* version) {
    return enter(__func__, Needs::Start, [&](Device&) {
        *version = 3020;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    return enter(__func__, Needs::Context, [&](Device&) {
        *least = 0;
        *greatest = -5;
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSynchronize() {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
            return refused;
        }
        d.counts.add("synchronizations");
        drain_all();
        return CUDA_SUCCESS;
    });
}
}
