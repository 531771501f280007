// What the device itself allows: read-only bandwidth, copy bandwidth, and the cost of a launch with and without programmatic
// dependent launch, in a stream and in a graph. Prints one JSON object.
//
// The buffer is many times the second-level cache and holds random numbers. Every reading kernel's sum is compared with that
// of a plain one: a loop that the compiler removed would be fast.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a ceilings.cu -o ceilings && ./ceilings [GIBIBYTES]
#include <cuda_runtime.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <vector>

namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
        exit(1);
    }
}

__device__ uint32_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return static_cast<uint32_t>(x ^ x >> 31);
}

__global__ void fill(uint4* data, uint64_t count) {
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
        data[i] = make_uint4(mix(4 * i), mix(4 * i + 1), mix(4 * i + 2), mix(4 * i + 3));
    }
}

__device__ uint4 read_once(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// One word a thread, xor-ed into one word of memory: integers, so the order does not matter.
__device__ void add_up(uint32_t sum, uint32_t* out) {
    for (int lane = 16; lane; lane /= 2) {
        sum ^= __shfl_xor_sync(~0u, sum, lane);
    }
    if (threadIdx.x % 32 == 0) {
        atomicXor(out, sum);
    }
}

__global__ void read_plainly(const uint4* data, uint64_t count, uint32_t* out) {
    uint32_t sum = 0;
    for (uint64_t i = blockIdx.x * uint64_t{blockDim.x} + threadIdx.x; i < count; i += uint64_t{gridDim.x} * blockDim.x) {
        const uint4 v = data[i];
        sum ^= v.x ^ v.y ^ v.z ^ v.w;
    }
    add_up(sum, out);
}

// Each block walks pieces of kAhead * blockDim.x vectors; all loads of a piece are in flight before the first is used.
template <int kAhead>
__global__ void read_ahead(const uint4* data, uint64_t count, uint32_t* out) {
    uint32_t sum = 0;
    const uint64_t piece = uint64_t{kAhead} * blockDim.x;
    for (uint64_t base = blockIdx.x * piece; base < count; base += gridDim.x * piece) {
        uint4 v[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            const uint64_t i = base + uint64_t(k) * blockDim.x + threadIdx.x;
            v[k] = i < count ? read_once(data + i) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int k = 0; k < kAhead; k++) {
            sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
        }
    }
    add_up(sum, out);
}

// What a kernel of a decode step is besides its work: a wait for the one before, and a write.
__global__ void step(uint32_t* counter) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    if (threadIdx.x == 0 && blockIdx.x == 0) {
        *counter += 1;
    }
}

struct Timer {
    cudaEvent_t start, end;
    Timer() {
        check(cudaEventCreate(&start), "event");
        check(cudaEventCreate(&end), "event");
    }
    template <class F>
    double seconds(cudaStream_t stream, F&& work) {
        check(cudaEventRecord(start, stream), "event");
        work();
        check(cudaEventRecord(end, stream), "event");
        check(cudaEventSynchronize(end), "work");
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, start, end), "event");
        return milliseconds / 1e3;
    }
    template <class F>
    double median(cudaStream_t stream, int times, F&& work) {
        work();
        std::vector<double> all;
        for (int i = 0; i < times; i++) {
            all.push_back(seconds(stream, work));
        }
        std::sort(all.begin(), all.end());
        return all[all.size() / 2];
    }
};

void launch_step(cudaStream_t stream, unsigned blocks, bool early, uint32_t* counter) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(128);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = early ? 1 : 0;
    check(cudaLaunchKernelEx(&config, step, counter), "launch");
}

// Seconds from one kernel to the next in a chain.
double launch_cost(Timer& timer, cudaStream_t stream, unsigned blocks, bool early, bool graph, uint32_t* counter) {
    constexpr int kChain = 1000;
    const auto chain = [&] {
        for (int i = 0; i < kChain; i++) {
            launch_step(stream, blocks, early, counter);
        }
    };
    check(cudaMemset(counter, 0, 4), "counter");
    double seconds = 0;
    constexpr int kTimes = 9;
    if (graph) {
        cudaGraph_t recorded;
        cudaGraphExec_t ready;
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
        chain();
        check(cudaStreamEndCapture(stream, &recorded), "capture");
        check(cudaGraphInstantiate(&ready, recorded, 0), "graph");
        seconds = timer.median(stream, kTimes, [&] { check(cudaGraphLaunch(ready, stream), "graph launch"); });
        check(cudaGraphExecDestroy(ready), "graph");
        check(cudaGraphDestroy(recorded), "graph");
    } else {
        seconds = timer.median(stream, kTimes, chain);
    }
    uint32_t count = 0;
    check(cudaMemcpy(&count, counter, 4, cudaMemcpyDeviceToHost), "counter");
    if (count != kChain * (kTimes + 1)) {
        fprintf(stderr, "%u kernels counted, not %u: they did not wait for each other\n", count, kChain * (kTimes + 1));
        exit(1);
    }
    return seconds / kChain;
}

struct Reader {
    const char* name;
    void (*kernel)(const uint4*, uint64_t, uint32_t*);
};

}  // namespace

int main(int argc, char** argv) {
    const uint64_t bytes = (argc > 1 ? strtoull(argv[1], nullptr, 10) : 8) << 30;
    const uint64_t count = bytes / sizeof(uint4);
    cudaDeviceProp device{};
    check(cudaGetDeviceProperties(&device, 0), "device");
    const unsigned multiprocessors = static_cast<unsigned>(device.multiProcessorCount);
    cudaStream_t stream;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    uint4 *data = nullptr, *copy = nullptr;
    uint32_t* word = nullptr;
    check(cudaMalloc(&data, bytes), "memory");
    check(cudaMalloc(&copy, bytes), "memory");
    check(cudaMalloc(&word, 4), "memory");
    fill<<<multiprocessors * 8, 512, 0, stream>>>(data, count);
    check(cudaGetLastError(), "fill");
    check(cudaStreamSynchronize(stream), "fill");
    Timer timer;

    const auto sum = [&](const Reader& reader, unsigned blocks, unsigned threads) {
        uint32_t got = 0;
        check(cudaMemsetAsync(word, 0, 4, stream), "sum");
        reader.kernel<<<blocks, threads, 0, stream>>>(data, count, word);
        check(cudaGetLastError(), reader.name);
        check(cudaMemcpyAsync(&got, word, 4, cudaMemcpyDeviceToHost, stream), "sum");
        check(cudaStreamSynchronize(stream), reader.name);
        return got;
    };
    const uint32_t expected = sum({"plain", read_plainly}, multiprocessors * 4, 256);
    const Reader readers[] = {{"4 ahead", read_ahead<4>}, {"8 ahead", read_ahead<8>}, {"16 ahead", read_ahead<16>}};
    double best = 0;
    bool right = true, first = true;
    printf("{\"device\": \"%s\", \"multiprocessors\": %u, \"buffer_bytes\": %llu, \"reads\": [", device.name,
           multiprocessors, static_cast<unsigned long long>(bytes));
    for (const Reader& reader : readers) {
        for (unsigned blocks : {1u, 2u, 4u, 8u}) {
            for (unsigned threads : {256u, 512u}) {
                const bool same = sum(reader, multiprocessors * blocks, threads) == expected;
                right = right && same;
                const double seconds = timer.median(stream, 15, [&] {
                    reader.kernel<<<multiprocessors * blocks, threads, 0, stream>>>(data, count, word);
                });
                const double rate = static_cast<double>(bytes) / seconds;
                best = std::max(best, rate);
                printf("%s{\"kernel\": \"%s\", \"blocks\": %u, \"threads\": %u, \"bytes_per_s\": %.6g, \"right\": %s}",
                       first ? "" : ", ", reader.name, multiprocessors * blocks, threads, rate, same ? "true" : "false");
                first = false;
            }
        }
    }
    const double copied = timer.median(stream, 9, [&] {
        check(cudaMemcpyAsync(copy, data, bytes, cudaMemcpyDeviceToDevice, stream), "copy");
    });
    printf("], \"read_bytes_per_s\": %.6g, \"copy_bytes_per_s\": %.6g, \"right\": %s, \"launches\": [", best,
           2 * static_cast<double>(bytes) / copied, right ? "true" : "false");
    first = true;
    for (unsigned blocks : {1u, multiprocessors}) {
        for (bool graph : {false, true}) {
            for (bool early : {false, true}) {
                const double seconds = launch_cost(timer, stream, blocks, early, graph, word);
                printf("%s{\"blocks\": %u, \"graph\": %s, \"dependent_launch\": %s, \"us\": %.4g}", first ? "" : ", ",
                       blocks, graph ? "true" : "false", early ? "true" : "false", seconds * 1e6);
                first = false;
            }
        }
    }
    printf("]}\n");
    return right ? 0 : 1;
}
