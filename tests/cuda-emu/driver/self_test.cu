// Kernels for the emulated driver's own tests, which must not change when the project's kernels do.

#include "tile.cuh"

// x += y, one block of any number of threads; `shared` bytes of dynamic shared memory are written where there are any.
extern "C" __global__ void __launch_bounds__(256) self_test_add(float* x, const float* y, int n, int shared) {
    if (shared) {
        PORT_DYNAMIC_SHARED(memory);
        memory[shared - 1] = 1;
    }
    let_dependents_start();
    dependency_wait();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
        x[i] += y[i];
    }
}

// A fault: reads what the kernel before writes without having waited for it.
extern "C" __global__ void self_test_too_early(float* x, const float* y, int n, int) {
    const int i = static_cast<int>(threadIdx.x);
    const float early = i < n ? x[i] : 0.0f;
    dependency_wait();
    if (i < n) {
        x[i] = early + y[i];
    }
}

// A fault: writes one element behind the row.
extern "C" __global__ void self_test_beyond(float* x, const float*, int n, int) {
    dependency_wait();
    if (threadIdx.x == 0) {
        x[n] = 1.0f;
    }
}
