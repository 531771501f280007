// Modules, kernels and their launches. See device.h.
#include <string.h>

#include <algorithm>

#include "device.h"

using namespace driver;

namespace {

constexpr uint32_t kFatbinMagic = 0xba55ed50, kWrapperMagic = 0x466243b1;

// Whether it starts like code for a GPU: a fatbin, what nvcc wraps one in, a cubin. What is in it is not looked at: the
// kernels are compiled in.
bool is_image(const void* image) {
    uint32_t magic = 0;
    if (image) {
        memcpy(&magic, image, 4);
    }
    return magic == kFatbinMagic || magic == kWrapperMagic || (image && !memcmp(image, "\177ELF", 4));
}

CUresult load(Device& d, CUmodule* module, const void* image) {
    if (!module) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    if (const CUresult refused = refuse_in_capture(); refused != CUDA_SUCCESS) {
        return refused;
    }
    if (!is_image(image)) {
        return CUDA_ERROR_INVALID_IMAGE;
    }
    *module = new CUmod_st;
    d.modules.insert(*module);
    return CUDA_SUCCESS;
}

CUresult unload(Device& d, CUmodule module) {
    if (!d.modules.erase(module)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    drain_all();
    for (const auto& [name, function] : module->functions) {
        d.functions.erase(function.get());
    }
    delete module;
    return CUDA_SUCCESS;
}

CUresult find(Device& d, CUfunction* function, CUmodule module, const char* name) {
    if (!d.modules.count(module)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!function || !name || !*name) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const Kernel* kernel = find_kernel(name);
    if (!kernel) {
        return CUDA_ERROR_NOT_FOUND;
    }
    std::unique_ptr<CUfunc_st>& entry = module->functions[name];
    if (!entry) {
        entry = std::make_unique<CUfunc_st>();
        entry->kernel = kernel;
        entry->dynamic_shared = kSharedDefault - static_cast<int>(kernel->static_shared);
        d.functions.insert(entry.get());
    }
    *function = entry.get();
    return CUDA_SUCCESS;
}

CUresult set_attribute(Device& d, CUfunction function, CUfunction_attribute attribute, int value) {
    if (!d.functions.count(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
        if (value < 0 || value > kSharedOptIn - static_cast<int>(function->kernel->static_shared)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        function->dynamic_shared = value;
        return CUDA_SUCCESS;
    }
    if (attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT) {
        if (value < -1 || value > 100) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        function->carveout = value;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult get_attribute(Device& d, int* value, CUfunction_attribute attribute, CUfunction function) {
    if (!d.functions.count(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
            *value = static_cast<int>(function->kernel->most_threads);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
            *value = static_cast<int>(function->kernel->static_shared);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_NUM_REGS:
            *value = static_cast<int>(function->kernel->registers);
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
        case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
            *value = 0;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PTX_VERSION:
        case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
            *value = 90;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
            *value = function->dynamic_shared;
            return CUDA_SUCCESS;
        case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
            *value = function->carveout;
            return CUDA_SUCCESS;
    }
    return CUDA_ERROR_INVALID_VALUE;
}

CUresult parameter_info(Device& d, CUfunction function, size_t index, size_t* offset, size_t* bytes) {
    if (!d.functions.count(function) || !offset) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    const auto& parameters = function->kernel->parameters;
    if (index >= parameters.size()) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    *offset = parameters[index].offset;
    if (bytes) {
        *bytes = parameters[index].bytes;
    }
    return CUDA_SUCCESS;
}

bool fits(const Kernel& kernel, const CUlaunchConfig& c, int dynamic_limit) {
    const size_t threads = size_t{c.blockDimX} * c.blockDimY * c.blockDimZ;
    return threads && threads <= kMaxThreads && threads <= kernel.most_threads && c.blockDimZ <= 64 && c.gridDimX &&
           c.gridDimY && c.gridDimZ && c.gridDimX <= 2147483647u && c.gridDimY <= 65535 && c.gridDimZ <= 65535 &&
           c.sharedMemBytes <= static_cast<unsigned>(dynamic_limit);
}

// Whether it may start before the kernel before it has ended. False also for an attribute that is not emulated.
bool read_attributes(const CUlaunchConfig& config, bool& early) {
    early = false;
    for (unsigned i = 0; i < config.numAttrs; i++) {
        const CUlaunchAttribute& attribute = config.attrs[i];
        if (attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
            early = attribute.value.programmaticStreamSerializationAllowed != 0;
        } else if (attribute.id != CU_LAUNCH_ATTRIBUTE_IGNORE && attribute.id != CU_LAUNCH_ATTRIBUTE_PRIORITY) {
            return false;
        }
    }
    return true;
}

CUresult launch(Device& d, const CUlaunchConfig& config, CUfunction function, void** parameters, void** extra) {
    if (!d.functions.count(function)) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    CUstream stream = resolve(config.hStream);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    const Kernel& kernel = *function->kernel;
    if (!fits(kernel, config, function->dynamic_shared) || (!parameters && !kernel.parameters.empty())) {
        return CUDA_ERROR_INVALID_VALUE;
    }
    auto call = std::make_shared<KernelCall>();
    if (extra || !read_attributes(config, call->launch.early)) {
        return CUDA_ERROR_NOT_SUPPORTED;
    }
    call->kernel = &kernel;
    call->launch.grid = emu::Extent3(config.gridDimX, config.gridDimY, config.gridDimZ);
    call->launch.block = emu::Extent3(config.blockDimX, config.blockDimY, config.blockDimZ);
    call->launch.shared_bytes = config.sharedMemBytes;
    call->launch.name = kernel.name;
    call->values.resize(kernel.parameter_bytes);
    for (size_t i = 0; i < kernel.parameters.size(); i++) {
        if (!parameters[i]) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        memcpy(call->values.data() + kernel.parameters[i].offset, parameters[i], kernel.parameters[i].bytes);
    }
    Work work;
    work.kernel = std::move(call);
    return submit(stream, std::move(work), std::string("kernel:") + kernel.name);
}

}  // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    return enter(__func__, Needs::Context, [&](Device& d) { return load(d, module, image); });
}
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, const int*, void**) {
    return enter(__func__, Needs::Context, [&](Device& d) { return load(d, module, image); });
}
CUresult cuModuleLoadFatBinary(CUmodule* module, const void* image) {
    return enter(__func__, Needs::Context, [&](Device& d) { return load(d, module, image); });
}
CUresult cuModuleUnload(CUmodule module) {
    return enter(__func__, Needs::Context, [&](Device& d) { return unload(d, module); });
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    return enter(__func__, Needs::Context, [&](Device& d) { return find(d, function, module, name); });
}
CUresult cuModuleGetFunctionCount(unsigned* count, CUmodule module) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        *count = static_cast<unsigned>(kernel_count());
        return d.modules.count(module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}

// A library is a module that needs no context of its own.
CUresult cuLibraryLoadData(CUlibrary* library, const void* image, const int*, void**, unsigned, const int*, void**,
                           unsigned) {
    return enter(__func__, Needs::Start,
                 [&](Device& d) { return load(d, reinterpret_cast<CUmodule*>(library), image); });
}
CUresult cuLibraryUnload(CUlibrary library) {
    return enter(__func__, Needs::Start, [&](Device& d) { return unload(d, reinterpret_cast<CUmodule>(library)); });
}
CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    return enter(__func__, Needs::Start,
                 [&](Device& d) { return find(d, kernel, reinterpret_cast<CUmodule>(library), name); });
}
CUresult cuLibraryGetKernelCount(unsigned* count, CUlibrary library) {
    return enter(__func__, Needs::Start, [&](Device& d) {
        *count = static_cast<unsigned>(kernel_count());
        return d.modules.count(reinterpret_cast<CUmodule>(library)) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}
CUresult cuLibraryGetModule(CUmodule* module, CUlibrary library) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        *module = reinterpret_cast<CUmodule>(library);
        return d.modules.count(*module) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}
CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        *function = kernel;
        return d.functions.count(kernel) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}
CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
    return enter(__func__, Needs::Start, [&](Device& d) { return set_attribute(d, kernel, attribute, value); });
}
CUresult cuKernelGetAttribute(int* value, CUfunction_attribute attribute, CUkernel kernel, CUdevice) {
    return enter(__func__, Needs::Start, [&](Device& d) { return get_attribute(d, value, attribute, kernel); });
}
CUresult cuKernelGetName(const char** name, CUkernel kernel) { return cuFuncGetName(name, kernel); }
CUresult cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t* offset, size_t* bytes) {
    return enter(__func__, Needs::Start, [&](Device& d) { return parameter_info(d, kernel, index, offset, bytes); });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return enter(__func__, Needs::Context, [&](Device& d) { return set_attribute(d, function, attribute, value); });
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
    return enter(__func__, Needs::Context, [&](Device& d) { return get_attribute(d, value, attribute, function); });
}
CUresult cuFuncSetCacheConfig(CUfunction function, int) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        return d.functions.count(function) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    });
}
CUresult cuFuncLoad(CUfunction function) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        // Loading may allocate on the device.
        const CUresult refused = refuse_in_capture();
        return !d.functions.count(function) ? CUDA_ERROR_INVALID_HANDLE : refused;
    });
}
CUresult cuFuncGetName(const char** name, CUfunction function) {
    return enter(__func__, Needs::Start, [&](Device& d) {
        if (!name || !d.functions.count(function)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        *name = function->kernel->name;
        return CUDA_SUCCESS;
    });
}
CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t* offset, size_t* bytes) {
    return enter(__func__, Needs::Context,
                 [&](Device& d) { return parameter_info(d, function, index, offset, bytes); });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t shared) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!blocks || threads <= 0 || !d.functions.count(function)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        constexpr size_t kOfMultiprocessor = 228 * 1024, kOfSystem = 1024;
        const Kernel& kernel = *function->kernel;
        const size_t registers = size_t{(kernel.registers + 7) / 8 * 8} * ((threads + 31) / 32 * 32);
        const size_t by_shared = kOfMultiprocessor / (shared + kernel.static_shared + kOfSystem);
        *blocks = static_cast<int>(std::min({by_shared, 65536 / registers, size_t{2048} / threads, size_t{32}}));
        return CUDA_SUCCESS;
    });
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void** parameters,
                        void** extra) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        const CUlaunchConfig config{grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, nullptr, 0};
        return launch(d, config, function, parameters, extra);
    });
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters, void** extra) {
    return enter(__func__, Needs::Context, [&](Device& d) {
        if (!config || (config->numAttrs && !config->attrs)) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        return launch(d, *config, function, parameters, extra);
    });
}

CUresult mirai_emu_submit(CUstream handle, const char* name, void (*run)(const void* arguments), const void* arguments,
                          size_t bytes) {
    return enter(__func__, Needs::Context, [&](Device&) {
        CUstream stream = resolve(handle);
        if (!stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        auto copy = std::make_shared<std::vector<char>>(static_cast<const char*>(arguments),
                                                        static_cast<const char*>(arguments) + bytes);
        Work work;
        work.action = [=] { run(copy->data()); };
        return submit(stream, std::move(work), std::string("kernel:") + name);
    });
}
}
