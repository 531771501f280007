// The kernels compiled into the emulated driver, found by name.
//
// Owns what a real driver reads from a fatbin: names, sizes of parameters, launch bounds, static shared memory. One
// source a kernel file is generated (`table.py`), and each kernel in it registers itself when the library is loaded.
#pragma once
#include <stddef.h>

#include <string>
#include <utility>
#include <vector>

namespace driver {

struct Parameter {
    size_t offset, bytes;
};

struct Kernel {
    const char* name;
    unsigned most_threads;  // of a block, from its launch bounds
    unsigned static_shared, registers;
    std::vector<Parameter> parameters;
    size_t parameter_bytes;
    // Runs one thread. `values`: all parameters, each at its offset.
    void (*run)(const char* values);
};

// Null if there is none of that name.
const Kernel* find_kernel(const char* name);
size_t kernel_count();
// Called before main, by generated code.
void register_kernel(Kernel kernel);

// The first argument of a `__launch_bounds__`; 1,024 where a kernel has none.
constexpr unsigned most_threads() { return 1024; }
template <class... Rest>
constexpr unsigned most_threads(int threads, Rest...) {
    return static_cast<unsigned>(threads);
}

template <class... P>
std::vector<Parameter> layout_of(void (*)(P...), size_t& total) {
    std::vector<Parameter> parameters;
    total = 0;
    auto add = [&](size_t bytes, size_t alignment) {
        const size_t offset = (total + alignment - 1) / alignment * alignment;
        parameters.push_back({offset, bytes});
        total = offset + bytes;
    };
    (add(sizeof(P), alignof(P)), ...);
    return parameters;
}

// The offsets of a kernel's parameters, known to the compiler.
template <class... P>
struct Offsets {
    size_t at[sizeof...(P) + 1] = {};
    constexpr Offsets() {
        size_t total = 0, i = 0;
        ((total = (total + alignof(P) - 1) / alignof(P) * alignof(P), at[i++] = total, total += sizeof(P)), ...);
    }
};

template <class... P, size_t... I>
void call_kernel(void (*kernel)(P...), const char* values, std::index_sequence<I...>) {
    static constexpr Offsets<P...> offsets;
    kernel(*reinterpret_cast<const P*>(values + offsets.at[I])...);
}

template <class... P>
void call_kernel(void (*kernel)(P...), const char* values) {
    call_kernel(kernel, values, std::index_sequence_for<P...>{});
}

// In a generated source: a variable whose making registers the kernel.
#define EMU_REGISTER(kernel, shared, registers_used, ...)                                                        \
    static const bool registered_##kernel = [] {                                                                 \
        driver::Kernel entry{#kernel, driver::most_threads(__VA_ARGS__), shared, registers_used, {}, 0, nullptr}; \
        entry.parameters = driver::layout_of(&kernel, entry.parameter_bytes);                                    \
        entry.run = [](const char* values) { driver::call_kernel(&kernel, values); };                            \
        driver::register_kernel(entry);                                                                          \
        return true;                                                                                             \
    }();

}  // namespace driver
