// Pages of the KV cache, whole: copies (copy on write, snapshots) and zeroing.
//
//   copy_pages:  page to[i] = page from[i]        zero_pages:  page to[i] = 0
//
// `bytes` of a page is a multiple of 16. Grid: (pages, parts of a page), any number of threads. Sources and targets of
// one launch are disjoint. Bytes: 2 (1) pages; the floor is that over the bandwidth.

#include "tile.cuh"

extern "C" __global__ void __launch_bounds__(256)
    copy_pages(unsigned char* pool, const uint32_t* from, const uint32_t* to, unsigned long long bytes) {
    let_dependents_start();
    dependency_wait();
    const unsigned char* source = pool + from[blockIdx.x] * bytes;
    unsigned char* target = pool + to[blockIdx.x] * bytes;
    const unsigned long long step = 16ull * blockDim.x * gridDim.y;
    for (unsigned long long i = 16ull * (blockIdx.y * blockDim.x + threadIdx.x); i < bytes; i += step) {
        store16(target + i, load_stream(source + i));
    }
}

extern "C" __global__ void __launch_bounds__(256)
    zero_pages(unsigned char* pool, const uint32_t* to, unsigned long long bytes) {
    let_dependents_start();
    dependency_wait();
    unsigned char* target = pool + to[blockIdx.x] * bytes;
    const unsigned long long step = 16ull * blockDim.x * gridDim.y;
    for (unsigned long long i = 16ull * (blockIdx.y * blockDim.x + threadIdx.x); i < bytes; i += step) {
        store16(target + i, uint4{0, 0, 0, 0});
    }
}
