// What a kernel test needs: buffers, launches, random numbers, references in double precision, comparisons.
//
// Owns the choice of machine: under nvcc a test runs on the GPU, elsewhere on the emulation, from the same source. A
// test includes this, then the kernel's file, and has a `main` that calls cases and returns `harness::report()`.
// Environment: TEST_SMALL=1 asks for shapes of few blocks (ThreadSanitizer); TEST_SEED, a number.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include "tile.cuh"

namespace harness {

// ---- random numbers ----

inline uint64_t seed() {
    static const uint64_t value = getenv("TEST_SEED") ? strtoull(getenv("TEST_SEED"), nullptr, 10) : 1;
    return value;
}

struct Random {
    uint64_t state;
    explicit Random(uint64_t stream) : state(seed() * 0x9e3779b97f4a7c15ull + stream) {}
    uint64_t next() {
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        return z ^ z >> 31;
    }
    double unit() { return static_cast<double>(next() >> 11) / 9007199254740992.0; }
    int below(int n) { return static_cast<int>(next() % static_cast<uint64_t>(n)); }
    float normal() {
        double sum = 0;
        for (int i = 0; i < 12; i++) {
            sum += unit();
        }
        return static_cast<float>(sum - 6.0);
    }
};

inline bool small() { return getenv("TEST_SMALL") != nullptr; }

// ---- numbers, written apart from the kernels' own ----

inline double value(float x) { return x; }
inline double value(double x) { return x; }
inline double value(bf16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline double value(e4m3 x) {
    const int exponent = x.bits >> 3 & 15, mantissa = x.bits & 7;
    if ((x.bits & 0x7f) == 0x7f) {
        return NAN;
    }
    const double magnitude = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    return x.bits & 0x80 ? -magnitude : magnitude;
}

inline bf16 round_bf16(double x) {
    const float f = static_cast<float>(x);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (isnan(f)) {
        return bf16{0x7fc0};
    }
    const uint32_t rest = bits & 0xffff;
    bits >>= 16;
    bits += rest > 0x8000 || (rest == 0x8000 && (bits & 1));
    return bf16{static_cast<uint16_t>(bits)};
}

// Nearest of the 255 values, by search: slow, and right by construction. Ties go to the even code.
inline e4m3 round_e4m3(double x) {
    int best = 0;
    double distance = INFINITY;
    for (int code = 0; code < 0x7f; code++) {
        const double d = fabs(value(e4m3{static_cast<uint8_t>(code)}) - fabs(x));
        if (d < distance || (d == distance && code % 2 == 0)) {
            best = code;
            distance = d;
        }
    }
    return e4m3{static_cast<uint8_t>(best | (signbit(x) ? 0x80 : 0))};
}

inline std::vector<bf16> random_bf16(Random& random, size_t n, float spread = 1.0f) {
    std::vector<bf16> v(n);
    for (bf16& x : v) {
        x = round_bf16(random.normal() * spread);
    }
    return v;
}

// ---- memory ----

#ifdef __CUDACC__
inline void check_cuda(cudaError_t status, const char* what) {
    if (status == cudaSuccess) {
        return;
    }
    fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
    exit(71);
}
#endif

void synchronize();

// Memory of the device, exact in size, every byte 0xff (NaN, -1) until written.
template <class T>
class Buffer {
  public:
    explicit Buffer(size_t n) : size_(n) {
        const size_t bytes = std::max<size_t>(n, 1) * sizeof(T);
#ifdef __CUDACC__
        check_cuda(cudaMalloc(&data_, bytes), "cudaMalloc");
        check_cuda(cudaMemset(data_, 0xff, bytes), "cudaMemset");
#else
        void* memory = nullptr;
        if (posix_memalign(&memory, 256, bytes)) {
            abort();
        }
        data_ = static_cast<T*>(memory);
        memset(static_cast<void*>(data_), 0xff, bytes);
#endif
    }
    explicit Buffer(const std::vector<T>& values) : Buffer(values.size()) { upload(values); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        synchronize();
#ifdef __CUDACC__
        cudaFree(data_);
#else
        free(data_);
#endif
    }
    void upload(const std::vector<T>& values) {
        synchronize();
#ifdef __CUDACC__
        check_cuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "upload");
#else
        if (!values.empty()) {
            memcpy(static_cast<void*>(data_), values.data(), values.size() * sizeof(T));
        }
#endif
    }
    std::vector<T> download() const {
        synchronize();
        std::vector<T> out(size_);
#ifdef __CUDACC__
        check_cuda(cudaMemcpy(out.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "download");
#else
        if (size_) {
            memcpy(static_cast<void*>(out.data()), data_, size_ * sizeof(T));
        }
#endif
        return out;
    }
    T* get() const { return data_; }
    size_t size() const { return size_; }

  private:
    T* data_ = nullptr;
    size_t size_;
};

// ---- launches ----

inline void synchronize() {
#ifdef __CUDACC__
    check_cuda(cudaDeviceSynchronize(), "kernel");
#else
    emu::synchronize();
#endif
}

// Launches with programmatic dependent launch. Arguments are converted to the kernel's parameter types.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared, A... arguments) {
    static_assert(sizeof...(P) == sizeof...(A), "one argument for each parameter");
    std::tuple<P...> values{static_cast<P>(arguments)...};
#ifdef __CUDACC__
    (void)name;
    if (shared > 48 * 1024) {
        check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
                   "shared memory");
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &early;
    config.numAttrs = 1;
    std::apply([&](auto... v) { check_cuda(cudaLaunchKernelEx(&config, kernel, v...), name); }, values);
#else
    emu::Launch request;
    request.grid = grid;
    request.block = dim3(threads);
    request.shared_bytes = shared;
    request.name = name;
    emu::launch(request, [kernel, values] { std::apply(kernel, values); });
#endif
}

#define LAUNCH(kernel, grid, threads, shared, ...) harness::launch(#kernel, kernel, grid, threads, shared, __VA_ARGS__)

// ---- comparisons ----

struct Totals {
    long values = 0, wrong = 0, cases = 0;
    double worst = 0;
};
inline Totals& totals() {
    static Totals t;
    return t;
}

inline void mismatch(const std::string& what, size_t at, double got, double want) {
    if (totals().wrong++ < 5) {
        fprintf(stderr, "MISMATCH %s[%zu]: got %.8g, want %.8g (TEST_SEED=%llu)\n", what.c_str(), at, got, want,
                static_cast<unsigned long long>(seed()));
    }
}

// Element by element: |got - want| <= tolerance * (|want| + rms(want)). NaN is never right.
template <class T>
void expect_close(const std::string& what, const std::vector<T>& got, const std::vector<double>& want,
                  double tolerance = 1e-2) {
    totals().cases++;
    if (got.size() != want.size()) {
        return mismatch(what + " (length)", 0, got.size(), want.size());
    }
    double squares = 0;
    for (double w : want) {
        squares += w * w;
    }
    const double rms = want.empty() ? 0 : sqrt(squares / want.size());
    for (size_t i = 0; i < got.size(); i++) {
        const double g = value(got[i]);
        const double error = fabs(g - want[i]) / (fabs(want[i]) + rms + 1e-30);
        totals().values++;
        if (!(error <= tolerance)) {
            mismatch(what, i, g, want[i]);
        } else {
            totals().worst = std::max(totals().worst, error);
        }
    }
}

template <class T>
void expect_equal(const std::string& what, const std::vector<T>& got, const std::vector<T>& want) {
    totals().cases++;
    if (got.size() != want.size()) {
        return mismatch(what + " (length)", 0, got.size(), want.size());
    }
    for (size_t i = 0; i < got.size(); i++) {
        totals().values++;
        if (memcmp(&got[i], &want[i], sizeof(T))) {
            mismatch(what, i, static_cast<double>(got[i]), static_cast<double>(want[i]));
        }
    }
}

inline void expect(const std::string& what, bool right) {
    totals().cases++;
    totals().values++;
    if (!right) {
        mismatch(what, 0, 0, 1);
    }
}

inline int report() {
    synchronize();
    const Totals& t = totals();
    printf("%ld comparisons, %ld values, worst %.2g, wrong %ld\n", t.cases, t.values, t.worst, t.wrong);
    return t.wrong || !t.values;
}

}  // namespace harness
