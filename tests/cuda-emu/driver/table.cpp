#include "table.h"

#include <map>

namespace driver {

namespace {
// Made at the first registration, which comes before this file's own variables.
std::map<std::string, Kernel>& table() {
    static std::map<std::string, Kernel> kernels;
    return kernels;
}
}  // namespace

const Kernel* find_kernel(const char* name) {
    const auto found = table().find(name);
    return found == table().end() ? nullptr : &found->second;
}

size_t kernel_count() { return table().size(); }

void register_kernel(Kernel kernel) {
    const std::string name = kernel.name;
    table().emplace(name, std::move(kernel));
}

}  // namespace driver
