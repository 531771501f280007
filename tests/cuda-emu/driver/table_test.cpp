// The kernels compiled into the emulated driver against those that nvcc made: names, sizes of parameters, bounds.
// RUN: MIRAI_EMU_ORDER=forward
#include <fstream>

#include "test.h"

namespace {

struct Compiled {
    std::string name;
    std::vector<size_t> parameters;
};

// What `cargo xtask kernels` keeps of each kernel.
std::vector<Compiled> compiled() {
    std::vector<Compiled> all;
    std::ifstream file(std::string(getenv("KERNELS")) + "/resources.toml");
    for (std::string line; std::getline(file, line);) {
        if (line[0] == '[') {
            all.push_back({line.substr(1, line.find(']') - 1), {}});
        } else if (line.rfind("parameters = [", 0) == 0) {
            const char* at = line.c_str() + line.find('[') + 1;
            for (char* end = nullptr;; at = end + 1) {
                const size_t bytes = strtoul(at, &end, 10);
                if (end == at) {
                    break;
                }
                all.back().parameters.push_back(bytes);
            }
        }
    }
    return all;
}

}  // namespace

int main() {
    MUST(cuInit(0));
    CUcontext context = nullptr;
    MUST(cuDevicePrimaryCtxRetain(&context, 0));
    MUST(cuCtxSetCurrent(context));
    CUmodule module = nullptr;
    MUST(cuModuleLoadData(&module, kImage));
    const std::vector<Compiled> kernels = compiled();
    EXPECT(kernels.size() > 20);
    for (const Compiled& kernel : kernels) {
        CUfunction function = nullptr;
        const CUresult found = cuModuleGetFunction(&function, module, kernel.name.c_str());
        expect(found == CUDA_SUCCESS, kernel.name.c_str(), __LINE__, "is not emulated");
        size_t offset = 0, end = 0, bytes = 0;
        for (size_t i = 0; function && i < kernel.parameters.size(); i++) {
            expect(cuFuncGetParamInfo(function, i, &offset, &bytes) == CUDA_SUCCESS && bytes == kernel.parameters[i] &&
                       offset >= end,
                   kernel.name.c_str(), __LINE__, "has other parameters");
            end = offset + bytes;
        }
        EXPECT(!function || cuFuncGetParamInfo(function, kernel.parameters.size(), &offset, &bytes) != CUDA_SUCCESS);
        int threads = 0;
        EXPECT(!function || (cuFuncGetAttribute(&threads, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function) ==
                                 CUDA_SUCCESS &&
                             threads >= 32 && threads <= 1024));
    }
    return report();
}
